//! The world, sorted for translation: objects by kind and namespace, in the order of their names.

use std::collections::BTreeMap;

use culvert_k8s_api::core::{Node, Pod, Service};
use culvert_k8s_api::discovery::EndpointSlice;
use culvert_k8s_api::meta::{ObjectMeta, StringMap};
use culvert_k8s_api::network_policy::{NetworkPolicy, OtherNetworkPolicy};
use culvert_k8s_api::networking::{ServiceEntry, WorkloadEntry};
use culvert_k8s_api::routes::{ReferenceGrant, Route};
use culvert_k8s_api::security::{AuthorizationPolicy, PeerAuthentication};
use culvert_k8s_api::{Kind, Object, ObjectKey};

use super::MeshSettings;
use super::waypoints::Gateways;
use crate::index::World;

/// Name within a namespace: `(namespace, name)`.
pub(super) type Key<'a> = (&'a str, &'a str);

pub(super) struct View<'a> {
    pub world: &'a World,
    pub settings: &'a MeshSettings,
    pub namespaces: BTreeMap<&'a str, &'a ObjectMeta>,
    pub nodes: BTreeMap<&'a str, &'a Node>,
    pub pods: BTreeMap<Key<'a>, &'a Pod>,
    pub services: BTreeMap<Key<'a>, &'a Service>,
    pub slices: BTreeMap<Key<'a>, &'a EndpointSlice>,
    pub policies: BTreeMap<Key<'a>, &'a AuthorizationPolicy>,
    pub peers: BTreeMap<Key<'a>, &'a PeerAuthentication>,
    pub service_entries: BTreeMap<Key<'a>, &'a ServiceEntry>,
    pub workload_entries: BTreeMap<Key<'a>, &'a WorkloadEntry>,
    pub network_policies: Vec<&'a NetworkPolicy>,
    pub other_network_policies: Vec<&'a OtherNetworkPolicy>,
    pub gateways: Gateways<'a>,
    /// By kind, then by name.
    pub routes: Vec<&'a Route>,
    /// By the namespace that they are for.
    pub grants: BTreeMap<&'a str, Vec<&'a ReferenceGrant>>,
}

impl<'a> View<'a> {
    pub fn new(world: &'a World, settings: &'a MeshSettings) -> Self {
        let mut view = Self::empty(world, settings);
        for manifest in world.objects.values() {
            view.add(&manifest.object);
        }
        view
    }

    /// Of these kinds alone.
    pub fn of(world: &'a World, settings: &'a MeshSettings, kinds: &[Kind]) -> Self {
        let mut view = Self::empty(world, settings);
        for kind in kinds {
            let first = ObjectKey { kind: *kind, namespace: String::new(), name: String::new() };
            let all = world.objects.range(first..).take_while(|(key, _)| key.kind == *kind);
            all.for_each(|(_, manifest)| view.add(&manifest.object));
        }
        view
    }

    fn empty(world: &'a World, settings: &'a MeshSettings) -> Self {
        Self {
            world,
            settings,
            namespaces: BTreeMap::new(),
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            policies: BTreeMap::new(),
            peers: BTreeMap::new(),
            service_entries: BTreeMap::new(),
            workload_entries: BTreeMap::new(),
            network_policies: Vec::new(),
            other_network_policies: Vec::new(),
            gateways: Gateways::default(),
            routes: Vec::new(),
            grants: BTreeMap::new(),
        }
    }

    fn add(&mut self, object: &'a Object) {
        let meta = object.metadata();
        let key = (meta.namespace.as_str(), meta.name.as_str());
        match object {
            Object::Namespace(_) => {
                self.namespaces.insert(&meta.name, meta);
            }
            Object::Node(it) => {
                self.nodes.insert(&meta.name, it);
            }
            Object::Pod(it) => {
                self.pods.insert(key, it);
            }
            Object::Service(it) => {
                self.services.insert(key, it);
            }
            Object::EndpointSlice(it) => {
                self.slices.insert(key, it);
            }
            Object::AuthorizationPolicy(it) => {
                self.policies.insert(key, it);
            }
            Object::PeerAuthentication(it) => {
                self.peers.insert(key, it);
            }
            Object::ServiceEntry(it) => {
                self.service_entries.insert(key, it);
            }
            Object::WorkloadEntry(it) => {
                self.workload_entries.insert(key, it);
            }
            Object::NetworkPolicy(it) => self.network_policies.push(it),
            Object::OtherNetworkPolicy(it) => self.other_network_policies.push(it),
            Object::Gateway(it) => {
                self.gateways.gateways.insert(key, it);
            }
            Object::GatewayClass(it) => {
                self.gateways.classes.insert(&meta.name, it);
            }
            Object::HTTPRoute(it) | Object::GRPCRoute(it) | Object::TCPRoute(it) | Object::TLSRoute(it) => {
                self.routes.push(it);
            }
            Object::ReferenceGrant(it) => self.grants.entry(&meta.namespace).or_default().push(it),
            Object::ServiceAccount(_) => {}
        }
    }

    /// The labels of a namespace, if there is such an object.
    pub fn namespace_labels(&self, namespace: &str) -> Option<&'a StringMap> {
        self.namespaces.get(namespace).map(|meta| &meta.labels)
    }

    /// The DNS name of a service of the cluster.
    pub fn service_host(&self, namespace: &str, name: &str) -> String {
        format!("{name}.{namespace}.svc.{}", self.settings.cluster_domain)
    }
}
