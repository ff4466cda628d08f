//! Looks at a cluster: lists of the API server and pages of the mesh's pods, at the same time, each bounded. What cannot be had is
//! noted and does not keep the rest back.

use std::fmt::Debug;
use std::time::Instant;

use anyhow::Result;
use futures_util::StreamExt;
use http::Request;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease as ApiLease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node as ApiNode, Pod, Service};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::client::Body;
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use super::connect::{Cluster, NoAnswer};
use super::reach::{self, Place, SMALL_PAGE, http_date};
use super::seen::{OwnPod, Role, Said, Seen, SeenPod};

pub(crate) mod objects;
mod webhook;

/// Objects in one answer of the API server; a list goes on in the next.
const PAGE: u32 = 500;
/// Objects of one list in all: more than a cluster is made for.
const MOST: usize = 200_000;
/// Selects the mesh's own pods.
const OWN: &str = "app in (culvert-controller, culvert-agent, ztunnel)";
/// Group and version of policies.
const SECURITY: (&str, &str) = ("security.istio.io", "v1");
/// Group and version of entries.
const NETWORKING: (&str, &str) = ("networking.istio.io", "v1");
/// Group and version of Gateways.
pub(crate) const GATEWAY: (&str, &str) = ("gateway.networking.k8s.io", "v1");

/// Which kinds of mesh resources have a status worth reading.
const RESOURCES: [((&str, &str), &str, &str); 6] = [
    (SECURITY, "AuthorizationPolicy", "authorizationpolicies"),
    (SECURITY, "PeerAuthentication", "peerauthentications"),
    (SECURITY, "RequestAuthentication", "requestauthentications"),
    (NETWORKING, "ServiceEntry", "serviceentries"),
    (NETWORKING, "WorkloadEntry", "workloadentries"),
    (NETWORKING, "DestinationRule", "destinationrules"),
];

/// How much to look at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scope {
    /// Only pods, policies and waypoints of this namespace.
    pub namespace: Option<String>,
    /// Only this node, its agent, its proxy and its pods.
    pub node: Option<String>,
}

/// Everything that [`Seen`] is made of.
pub(crate) async fn gather(cluster: &Cluster, scope: &Scope) -> Seen {
    let mut seen = Seen {
        now: Timestamp::now(),
        name: cluster.name(),
        system: cluster.system.clone(),
        excluded: vec!["kube-system".to_owned(), cluster.system.clone()],
        ..Seen::default()
    };
    let asked = version(cluster).await;
    let started = Instant::now();
    match asked {
        Ok((version, date)) => {
            seen.skew = seen.now.as_second() - date.unwrap_or(seen.now).as_second();
            seen.now = date.unwrap_or(seen.now);
            seen.kubernetes = Some(version);
        }
        Err(error) => {
            seen.away = Some(error.to_string());
            return seen;
        }
    }
    let mut look = Look { cluster, scope, seen, started };
    // Many lists at once make large futures.
    Box::pin(look.installation()).await;
    Box::pin(look.world()).await;
    look.resources().await;
    look.ask().await;
    look.seen
}

/// Version of Kubernetes, and the API server's clock.
pub(crate) async fn version(cluster: &Cluster) -> Result<(String, Option<Timestamp>), NoAnswer> {
    let asked = async {
        let request = Request::get("/version").body(Body::empty()).map_err(kube::Error::HttpError)?;
        cluster.client.send(request).await
    };
    let response = cluster.ask(asked).await?;
    let date = response.headers().get(http::header::DATE).and_then(|it| it.to_str().ok()).and_then(http_date);
    let status = response.status();
    let page =
        http_body_util::BodyExt::collect(http_body_util::Limited::new(response.into_body(), SMALL_PAGE));
    let page =
        tokio::time::timeout(cluster.patience, page).await.map_err(|_| NoAnswer::Late(cluster.patience))?;
    let body = page.map_err(|error| NoAnswer::Away(error.to_string()))?.to_bytes();
    let answer: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    match answer["gitVersion"].as_str() {
        Some(version) => Ok((version.to_owned(), date)),
        None => {
            let said = answer["message"].as_str().unwrap_or("what answers there is no API server").to_owned();
            Err(NoAnswer::Refused { code: status.as_u16(), message: said })
        }
    }
}

/// A whole list, page by page.
pub(crate) async fn list<K>(
    cluster: &Cluster,
    api: &Api<K>,
    selector: &ListParams,
) -> Result<Vec<K>, NoAnswer>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut all = Vec::new();
    let mut params = selector.clone().limit(PAGE);
    loop {
        let page = cluster.ask(api.list(&params)).await?;
        let next = page.metadata.continue_.clone().filter(|token| !token.is_empty());
        all.extend(page.items);
        match next {
            Some(token) if all.len() < MOST => params.continue_token = Some(token),
            _ => return Ok(all),
        }
    }
}

/// A kind that is known by name only.
pub(crate) fn resource((group, version): (&str, &str), kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: format!("{group}/{version}"),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    }
}

struct Look<'a> {
    cluster: &'a Cluster,
    scope: &'a Scope,
    seen: Seen,
    /// When the API server's clock was read.
    started: Instant,
}

impl Look<'_> {
    /// Takes what was had, or notes why it was not. What does not exist is nothing.
    fn note<T>(&mut self, what: &str, outcome: Result<T, NoAnswer>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) if error.is_missing() => None,
            Err(error) => {
                // Of what may not be read the API server says the kind each time: it is the same reason for all.
                let why = match error {
                    NoAnswer::Refused { code: 403, .. } => "you may not (403)".to_owned(),
                    other => other.to_string(),
                };
                self.seen.unread.push((what.to_owned(), why));
                None
            }
        }
    }

    fn in_system<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.cluster.client.clone(), &self.cluster.system)
    }

    async fn installation(&mut self) {
        let cluster = self.cluster;
        let (deployments, sets, own) =
            (self.in_system::<Deployment>(), self.in_system::<DaemonSet>(), self.in_system());
        let (leases, maps) = (self.in_system::<ApiLease>(), self.in_system::<ConfigMap>());
        let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(cluster.client.clone());
        let selected = ListParams::default().labels(OWN);
        let (controller, agent, proxy, lease, root, webhook, pods) = tokio::join!(
            cluster.ask(deployments.get("culvert-controller")),
            cluster.ask(sets.get("culvert-agent")),
            cluster.ask(sets.get("ztunnel")),
            cluster.ask(leases.get("culvert-leader")),
            cluster.ask(maps.get("istio-ca-root-cert")),
            cluster.ask(webhooks.get("culvert-validator")),
            list::<Pod>(cluster, &own, &selected),
        );
        self.seen.controller = self.note("deployments", controller).map(|it| objects::deployment(&it));
        if let Some(agent) = self.note("daemonsets", agent) {
            self.seen.excluded = objects::excluded(&agent).unwrap_or_else(|| self.seen.excluded.clone());
            self.seen.agent = Some(objects::daemon_set(&agent));
            match objects::enablement(&agent) {
                Ok(selectors) => self.seen.enablement = selectors,
                Err(error) => self.seen.unread.push(("the agents' selectors of who joins".to_owned(), error)),
            }
        }
        self.seen.proxy = self.note("daemonsets", proxy).map(|it| objects::daemon_set(&it));
        self.seen.lease = self.note("leases", lease).map(objects::lease);
        self.seen.root = self.note("configmaps", root).and_then(|it| objects::root_end(&it));
        self.seen.webhook =
            self.note("validatingwebhookconfigurations", webhook).map(|it| objects::webhook(&it));
        let pods = self.note("pods of the mesh", pods).unwrap_or_default();
        self.seen.own =
            pods.iter().filter_map(own_pod).filter(|own| self.is_meant(&own.pod, own.role)).collect();
        if self.seen.webhook.as_ref().is_some_and(|webhook| webhook.bundle) {
            let answered = webhook::try_it(cluster).await;
            self.seen.webhook.iter_mut().for_each(|webhook| webhook.answered.clone_from(&answered));
        }
    }

    /// Controllers are everybody's.
    fn is_meant(&self, pod: &SeenPod, role: Role) -> bool {
        role == Role::Controller || self.scope.node.as_ref().is_none_or(|node| *node == pod.node)
    }

    async fn world(&mut self) {
        let cluster = self.cluster;
        let client = || cluster.client.clone();
        let nodes: Api<ApiNode> = Api::all(client());
        let leases: Api<ApiLease> = Api::namespaced(client(), "kube-node-lease");
        let namespaces: Api<Namespace> = Api::all(client());
        let pods: Api<Pod> = scoped(cluster, self.scope);
        let services: Api<Service> = scoped(cluster, self.scope);
        let all = ListParams::default();
        let bound = ListParams::default().labels("istio.io/use-waypoint");
        let on_node = match &self.scope.node {
            Some(node) => ListParams::default().fields(&format!("spec.nodeName={node}")),
            None => ListParams::default(),
        };
        let (nodes, leases, namespaces, pods, services) = tokio::join!(
            list(cluster, &nodes, &all),
            list(cluster, &leases, &all),
            list(cluster, &namespaces, &all),
            list(cluster, &pods, &on_node),
            list(cluster, &services, &bound),
        );
        let leases = self.note("leases of nodes", leases).unwrap_or_default();
        let nodes = self.note("nodes", nodes).unwrap_or_default();
        let nodes = nodes.iter().map(|node| objects::node(node, &leases));
        self.seen.nodes =
            nodes.filter(|it| self.scope.node.as_ref().is_none_or(|node| *node == it.name)).collect();
        let namespaces = self.note("namespaces", namespaces).unwrap_or_default();
        self.seen.namespaces = objects::labels_by_name(&namespaces);
        let services = self.note("services", services).unwrap_or_default();
        let pods = self.note("pods", pods).unwrap_or_default();
        self.seen.bound = objects::bound(&namespaces, &services, &pods);
        let system = self.cluster.system.clone();
        let others = pods.iter().map(objects::pod).filter(|pod| pod.namespace != system);
        self.seen.pods = others.collect();
    }

    async fn resources(&mut self) {
        let cluster = self.cluster;
        let api = |group, kind: &str, plural: &str| -> Api<DynamicObject> {
            let resource = resource(group, kind, plural);
            match &self.scope.namespace {
                Some(namespace) => Api::namespaced_with(cluster.client.clone(), namespace, &resource),
                None => Api::all_with(cluster.client.clone(), &resource),
            }
        };
        let all = ListParams::default();
        let kinds: Vec<_> = RESOURCES
            .iter()
            .map(|(group, kind, plural)| (*kind, *plural, api(*group, kind, plural)))
            .collect();
        let gateways = api(GATEWAY, "Gateway", "gateways");
        let lists = reach::each(kinds, |(kind, plural, api)| {
            let all = &all;
            async move { (kind, plural, list(cluster, &api, all).await) }
        });
        let (lists, gateways) = tokio::join!(lists.collect::<Vec<_>>(), list(cluster, &gateways, &all));
        for (kind, plural, outcome) in lists {
            let objects = self.note(plural, outcome).unwrap_or_default();
            self.seen.policies.extend(objects.iter().map(|it| objects::policy(kind, it)));
        }
        self.seen
            .policies
            .sort_by(|a, b| (&a.namespace, &a.kind, &a.name).cmp(&(&b.namespace, &b.kind, &b.name)));
        let waypoints = self.note("gateways", gateways);
        self.seen.waypoints = waypoints.map(|all| all.iter().filter_map(objects::waypoint).collect());
    }

    /// Asks the mesh's own pods that may answer.
    async fn ask(&mut self) {
        let cluster = self.cluster;
        let clock = (self.seen.now, self.started);
        let own = std::mem::take(&mut self.seen.own);
        let asked = reach::each(own, |own| async move {
            let may_answer = own.pod.phase == "Running" && !own.pod.deleted;
            let said = if may_answer { Some(said(cluster, &own, clock).await) } else { None };
            OwnPod { said, ..own }
        });
        let mut own: Vec<OwnPod> = asked.collect().await;
        own.sort_by(|a, b| (a.role, &a.pod.node, &a.pod.name).cmp(&(b.role, &b.pod.node, &b.pod.name)));
        let forbidden = own.iter().find_map(|own| match &own.said {
            Some(Err(why @ reach::Unreached::Forbidden(_))) => Some(why.to_string()),
            _ => None,
        });
        self.seen.unread.extend(forbidden.map(|why| ("pages of the mesh's pods".to_owned(), why)));
        self.seen.own = own;
    }
}

fn scoped<K>(cluster: &Cluster, scope: &Scope) -> Api<K>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope>,
    K::DynamicType: Default,
{
    match &scope.namespace {
        Some(namespace) => Api::namespaced(cluster.client.clone(), namespace),
        None => Api::all(cluster.client.clone()),
    }
}

fn own_pod(pod: &Pod) -> Option<OwnPod> {
    let role = match pod.metadata.labels.as_ref()?.get("app")?.as_str() {
        "culvert-controller" => Role::Controller,
        "culvert-agent" => Role::Agent,
        "ztunnel" => Role::Proxy,
        _ => return None,
    };
    Some(OwnPod { role, pod: objects::pod(pod), said: None })
}

/// What a program of the mesh says of itself. `clock` is the API server's, and when it was read.
async fn said(
    cluster: &Cluster,
    own: &OwnPod,
    clock: (Timestamp, Instant),
) -> Result<Said, reach::Unreached> {
    let at = |port| Place { namespace: &own.pod.namespace, pod: &own.pod.name, port };
    match own.role {
        Role::Controller => {
            let page = cluster.served(at(15014), "/debug/proxies").await?.json()?;
            let policies: objects::Policies = cluster.served(at(15014), "/debug/policies").await?.json()?;
            Ok(Said::Controller(page, policies.policies))
        }
        Role::Agent => {
            let page = cluster.served(at(8000), "/healthz").await?;
            // The API server's clock as it is now, to a second.
            let now = clock.0.as_second() + i64::try_from(clock.1.elapsed().as_secs()).unwrap_or(0);
            Ok(Said::Agent(page.date.map(|date| date.as_second() - now)))
        }
        Role::Proxy => {
            Ok(Said::Proxy(cluster.forwarded(at(15000), "/certificates", SMALL_PAGE).await?.json()?))
        }
    }
}
