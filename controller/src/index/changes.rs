//! What one change of the world makes necessary, so that a pod among 100,000 costs what one pod is worth.
//!
//! Workloads are what there are many of, and no workload says anything about another: a pod or WorkloadEntry is translated
//! from itself, its status, and what is in force in its namespace, the root namespace and its node. So when only pods change,
//! only those are translated again, beside the rest of their namespace. When something else changes, everything that is no
//! workload is translated again, and the workloads of its namespace; when it is for the whole mesh, everything is. Of a waypoint's
//! Gateway: the workloads that it may be bound to, or that are its own. A route or a grant changes what waypoints are told, and nothing
//! else.
//!
//! EndpointSlices are the exception: by an address they make a pod of any namespace an endpoint, and whether an address is a pod's
//! makes a workload of its own of it or not. There are few, so all of them are looked at each time.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use culvert_k8s_api::discovery::Endpoint;
use culvert_k8s_api::labels;
use culvert_k8s_api::manifest::Manifest;
use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::object::{Kind, Object, ObjectKey};
use culvert_k8s_api::status::PodStatus;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::World;
use crate::translate::MeshSettings;
use crate::translate::waypoints::asked;

/// Kinds that others are translated by: everything but what becomes a workload.
const CONTEXT: [Kind; 16] = [
    Kind::Namespace,
    Kind::Node,
    Kind::Service,
    Kind::EndpointSlice,
    Kind::AuthorizationPolicy,
    Kind::PeerAuthentication,
    Kind::ServiceEntry,
    Kind::NetworkPolicy,
    Kind::OtherNetworkPolicy,
    Kind::Gateway,
    Kind::GatewayClass,
    Kind::HTTPRoute,
    Kind::GRPCRoute,
    Kind::TCPRoute,
    Kind::TLSRoute,
    Kind::ReferenceGrant,
];

/// Of these, what is the same for workloads of every namespace. There are few.
const EVERYWHERE: [Kind; 3] = [Kind::OtherNetworkPolicy, Kind::Gateway, Kind::GatewayClass];

/// `(namespace, name)`.
type Name = (String, String);

/// What is to be translated again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Everything.
    pub all: bool,
    /// Everything that is neither a pod nor a WorkloadEntry.
    pub context: bool,
    /// What waypoints are told.
    pub routes: bool,
    pub pods: BTreeSet<Name>,
    pub entries: BTreeSet<Name>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Nothing but what waypoints are told.
    pub fn only_routes(&self) -> bool {
        *self == Self { routes: true, ..Self::default() }
    }

    /// Compares two worlds, skipping what they share.
    pub fn between(before: &World, after: &World, settings: &MeshSettings) -> Self {
        let mut changes = Self::default();
        let mut namespaces = BTreeSet::new();
        let mut nodes = BTreeSet::new();
        let (mut gateways, mut classes) = (BTreeSet::new(), BTreeSet::new());
        let mut object = |key: &ObjectKey| match key.kind {
            Kind::Pod => drop(changes.pods.insert((key.namespace.clone(), key.name.clone()))),
            Kind::WorkloadEntry => drop(changes.entries.insert((key.namespace.clone(), key.name.clone()))),
            Kind::ServiceAccount => {}
            Kind::Node => {
                changes.context = true;
                nodes.insert(key.name.clone());
            }
            Kind::Namespace => {
                changes.context = true;
                namespaces.insert(key.name.clone());
            }
            Kind::AuthorizationPolicy | Kind::PeerAuthentication
                if key.namespace == settings.root_namespace =>
            {
                changes.all = true;
            }
            Kind::Gateway => {
                changes.context = true;
                gateways.insert((key.namespace.clone(), key.name.clone()));
            }
            Kind::GatewayClass => {
                changes.context = true;
                classes.insert(key.name.clone());
            }
            // No workload, no service and no policy is translated by them.
            Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute | Kind::TLSRoute | Kind::ReferenceGrant => {
                changes.routes = true;
            }
            // It may select anything.
            Kind::OtherNetworkPolicy => changes.all = true,
            Kind::AuthorizationPolicy
            | Kind::PeerAuthentication
            | Kind::Service
            | Kind::EndpointSlice
            | Kind::ServiceEntry
            | Kind::NetworkPolicy => {
                changes.context = true;
                namespaces.insert(key.namespace.clone());
            }
        };
        for difference in before.objects.diff(&after.objects) {
            match difference {
                DiffItem::Add(key, _) | DiffItem::Remove(key, _) => object(key),
                // A line that moved changes nothing.
                DiffItem::Update { old, new } if old.1.object == new.1.object => {}
                DiffItem::Update { new, .. } => object(new.0),
            }
        }
        changes.pods.extend(keys(before.pods.diff(&after.pods)));
        changes.context |= before.services.diff(&after.services).next().is_some();
        let redirected: BTreeSet<Name> = keys(before.redirection.diff(&after.redirection)).collect();
        if !redirected.is_empty() || !nodes.is_empty() {
            changes.touched(after, &nodes, &redirected);
        }
        changes.by_address(before, after);
        for namespace in &namespaces {
            changes.pods.extend(named(&after.objects, Kind::Pod, namespace));
            changes.entries.extend(named(&after.objects, Kind::WorkloadEntry, namespace));
        }
        gateways.extend(of_classes(&classes, after));
        changes.bound_to(&gateways, after);
        if changes.routes && !changes.only_routes() && !changes.context {
            // Beside workloads a route is translated with everything that is none.
            changes.context = true;
            changes.by_address(before, after);
        }
        changes
    }

    /// The workloads whose labels, or whose namespace's, name one of these Gateways.
    fn bound_to(&mut self, gateways: &BTreeSet<Name>, world: &World) {
        if gateways.is_empty() {
            return;
        }
        let is = |namespace: &str, name: &str| gateways.contains(&(namespace.to_owned(), name.to_owned()));
        for (kind, out) in [(Kind::Pod, &mut self.pods), (Kind::WorkloadEntry, &mut self.entries)] {
            let mut last: Option<(&str, Option<&StringMap>)> = None;
            for (key, manifest) in of(&world.objects, kind, None) {
                let namespace = key.namespace.as_str();
                let inherited = match last {
                    Some((of, inherited)) if of == namespace => inherited,
                    _ => labels_of(world, namespace),
                };
                last = Some((namespace, inherited));
                let own = &manifest.object.metadata().labels;
                let bound = asked(own, inherited, namespace).is_some_and(|(home, name, _)| is(home, name));
                if bound || own.get(labels::GATEWAY_NAME).is_some_and(|name| is(namespace, name)) {
                    out.insert((key.namespace.clone(), key.name.clone()));
                }
            }
        }
    }

    /// Pods of nodes that changed, and those whose redirection did.
    fn touched(&mut self, after: &World, nodes: &BTreeSet<String>, redirected: &BTreeSet<Name>) {
        let touched = after.pods.iter().filter(|(_, status)| {
            nodes.contains(&status.node_name)
                || redirected.contains(&(status.node_name.clone(), status.uid.clone()))
        });
        self.pods.extend(touched.map(|(name, _)| name.clone()));
    }

    /// What slices lead to: a pod that comes to an address of one or leaves it changes what is beside the pods; and what is beside
    /// them can be told only with every pod at such an address.
    fn by_address(&mut self, before: &World, after: &World) {
        let mut sliced: HashSet<IpAddr> = addresses(&before.objects).collect();
        sliced.extend(addresses(&after.objects));
        if sliced.is_empty() {
            return;
        }
        let at = |status: &PodStatus| status.pod_ips.iter().any(|ip| sliced.contains(ip));
        self.context |= self
            .pods
            .iter()
            .any(|name| before.pods.get(name).is_some_and(at) || after.pods.get(name).is_some_and(at));
        if self.context {
            self.pods
                .extend(after.pods.iter().filter(|(_, status)| at(status)).map(|(name, _)| name.clone()));
        }
    }

    /// The part of the world that is to be translated again, with all that it is translated by.
    pub fn part(&self, world: &World, settings: &MeshSettings) -> World {
        let mut part = World::default();
        let mut take = |key: ObjectKey| {
            if let Some(manifest) = world.objects.get(&key) {
                part.objects.insert(key, Arc::clone(manifest));
            }
        };
        for (kind, names) in [(Kind::Pod, &self.pods), (Kind::WorkloadEntry, &self.entries)] {
            for (namespace, name) in names {
                take(ObjectKey { kind, namespace: namespace.clone(), name: name.clone() });
            }
        }
        for name in &self.pods {
            let Some(status) = world.pods.get(name) else { continue };
            take(ObjectKey { kind: Kind::Node, namespace: String::new(), name: status.node_name.clone() });
        }
        let mut namespaces: BTreeSet<&str> =
            self.pods.iter().chain(&self.entries).map(|(namespace, _)| namespace.as_str()).collect();
        namespaces.insert(&settings.root_namespace);
        for namespace in &namespaces {
            take(ObjectKey {
                kind: Kind::Namespace,
                namespace: String::new(),
                name: (*namespace).to_owned(),
            });
        }
        for kind in CONTEXT {
            if self.context || kind == Kind::EndpointSlice || EVERYWHERE.contains(&kind) {
                let all = of(&world.objects, kind, None);
                part.objects.extend(all.map(|(key, manifest)| (key.clone(), Arc::clone(manifest))));
            } else {
                let near = namespaces.iter().flat_map(|namespace| of(&world.objects, kind, Some(namespace)));
                part.objects.extend(near.map(|(key, manifest)| (key.clone(), Arc::clone(manifest))));
            }
        }
        for manifest in part.objects.clone().values() {
            if let Object::EndpointSlice(slice) = &manifest.object
                && let Some(service) = slice.service()
            {
                let (namespace, name) = (slice.metadata.namespace.clone(), service.to_owned());
                let key = ObjectKey { kind: Kind::Service, namespace, name };
                if let Some(manifest) = world.objects.get(&key) {
                    part.objects.insert(key, Arc::clone(manifest));
                }
            }
        }
        if self.context {
            part.services.clone_from(&world.services);
        }
        for name in &self.pods {
            let Some(status) = world.pods.get(name) else { continue };
            let key = (status.node_name.clone(), status.uid.clone());
            if let Some(redirection) = world.redirection.get(&key) {
                part.redirection.insert(key, redirection.clone());
            }
            part.pods.insert(name.clone(), status.clone());
        }
        part
    }
}

/// The Gateways of these classes.
fn of_classes(classes: &BTreeSet<String>, world: &World) -> Vec<Name> {
    let all = of(&world.objects, Kind::Gateway, None);
    let is = |manifest: &Manifest| match &manifest.object {
        Object::Gateway(gateway) => classes.contains(&gateway.spec.gateway_class_name),
        _ => false,
    };
    all.filter(|(_, manifest)| is(manifest))
        .map(|(key, _)| (key.namespace.clone(), key.name.clone()))
        .collect()
}

fn keys<'a, 'b, V: 'a + 'b>(
    differences: impl Iterator<Item = DiffItem<'a, 'b, Name, V>>,
) -> impl Iterator<Item = Name> {
    differences.map(|difference| match difference {
        DiffItem::Add(key, _) | DiffItem::Remove(key, _) | DiffItem::Update { new: (key, _), .. } => {
            key.clone()
        }
    })
}

fn labels_of<'a>(world: &'a World, namespace: &str) -> Option<&'a StringMap> {
    let key = ObjectKey { kind: Kind::Namespace, namespace: String::new(), name: namespace.to_owned() };
    world.objects.get(&key).map(|it| &it.object.metadata().labels)
}

/// Where the slices in force lead.
fn addresses(objects: &OrdMap<ObjectKey, Arc<Manifest>>) -> impl Iterator<Item = IpAddr> {
    of(objects, Kind::EndpointSlice, None).flat_map(|(_, manifest)| {
        let endpoints = match &manifest.object {
            Object::EndpointSlice(slice) => slice.endpoints.as_slice(),
            _ => &[],
        };
        endpoints.iter().filter_map(Endpoint::ip)
    })
}

fn named(objects: &OrdMap<ObjectKey, Arc<Manifest>>, kind: Kind, namespace: &str) -> Vec<Name> {
    of(objects, kind, Some(namespace)).map(|(key, _)| (key.namespace.clone(), key.name.clone())).collect()
}

/// The objects of a kind, or those of it in a namespace.
fn of<'a>(
    objects: &'a OrdMap<ObjectKey, Arc<Manifest>>,
    kind: Kind,
    namespace: Option<&str>,
) -> impl Iterator<Item = (&'a ObjectKey, &'a Arc<Manifest>)> {
    let first = ObjectKey { kind, namespace: namespace.unwrap_or_default().to_owned(), name: String::new() };
    let namespace = namespace.map(str::to_owned);
    objects.range((Bound::Included(first), Bound::Unbounded)).take_while(move |(key, _)| {
        key.kind == kind && namespace.as_ref().is_none_or(|namespace| key.namespace == *namespace)
    })
}
