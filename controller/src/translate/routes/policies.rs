//! AuthorizationPolicy with targets to `culvert.waypoint.v1.Policy`, for the waypoints that serve the targets (W27, W58).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use culvert_k8s_api::gateway::Gateway;
use culvert_k8s_api::meta::ObjectMeta;
use culvert_k8s_api::routes::GROUP;
use culvert_k8s_api::security::{AuthorizationPolicy, TargetRef};
use culvert_proto::waypoint as proto;
use prost::Message;

use super::rules;
use crate::gateways::{self, Owner};
use crate::translate::PolicyStatus;
use crate::translate::view::View;

/// What is said of several targets, up to here.
const MAX_SAID: usize = 5;

/// Gateway (`namespace/name`) to policies by resource name.
pub type Targeted = BTreeMap<String, BTreeMap<String, Arc<proto::Policy>>>;

/// Why a target leads to no waypoint: a reason of condition `WaypointAccepted`, and the rest.
type Problem = (&'static str, String);

/// What a target is about at one Gateway: everything, or these services.
#[derive(Clone, Debug, Default)]
struct Scope {
    everything: bool,
    services: BTreeSet<(String, String)>,
}

/// Converts every policy with targets, and says what became of it.
pub(super) fn convert_all(view: &View<'_>, status: &mut [PolicyStatus]) -> Targeted {
    let mut targeted = Targeted::new();
    let with_targets = status.iter_mut().filter(|it| it.targeted);
    let mut said: BTreeMap<(String, String), &mut PolicyStatus> =
        with_targets.map(|it| ((it.namespace.clone(), it.name.clone()), it)).collect();
    for policy in view.policies.values() {
        let spec = &policy.spec;
        if spec.target_ref.is_none() && spec.target_refs.is_empty() {
            continue;
        }
        let mut scopes: BTreeMap<String, Scope> = BTreeMap::new();
        let mut problems = Vec::new();
        for target in spec.target_ref.iter().chain(&spec.target_refs) {
            if let Err(problem) = scope(view, &policy.metadata, target, &mut scopes) {
                problems.push(problem);
            }
        }
        let meta = &policy.metadata;
        for (gateway, scope) in &scopes {
            let name = format!("{}/{}", meta.namespace, meta.name);
            let message = Arc::new(message(policy, scope));
            // The code that reads it at the waypoint judges it here: what it cannot read it denies.
            let read = culvert_model::wire::request::decode(&name, &message.encode_to_vec());
            if let Some(error) = read.error {
                problems.push((
                    "UnsupportedValue",
                    format!("waypoint {gateway} denies everything that it is for: {error}"),
                ));
            }
            targeted.entry(gateway.clone()).or_default().insert(name, message);
        }
        if let Some(status) = said.get_mut(&(meta.namespace.clone(), meta.name.clone())) {
            say(status, scopes.into_keys().collect(), &problems);
        }
    }
    targeted
}

fn say(status: &mut PolicyStatus, waypoints: Vec<String>, problems: &[Problem]) {
    let is = |reason: &&str| problems.iter().any(|(of, _)| of == reason);
    let words: BTreeSet<&str> = problems.iter().map(|(_, why)| why.as_str()).collect();
    status.message = words.into_iter().take(MAX_SAID).collect::<Vec<_>>().join("; ");
    status.accepted = !waypoints.is_empty();
    status.reason = if problems.is_empty() {
        "Accepted"
    } else {
        ["UnsupportedValue", "Invalid", "TargetNotFound"].into_iter().find(is).unwrap_or("AncestorNotBound")
    };
    if status.accepted {
        status.resource = Some(format!("{}/{}", status.namespace, status.name));
    }
    status.waypoints = waypoints;
}

fn message(policy: &AuthorizationPolicy, scope: &Scope) -> proto::Policy {
    let targets = scope.services.iter().filter(|_| !scope.everything);
    let target = |(namespace, hostname): &(String, String)| proto::Target {
        service_namespace: namespace.clone(),
        service_hostname: hostname.clone(),
    };
    proto::Policy { targets: targets.map(target).collect(), ..rules::policy(policy) }
}

/// Adds what a target is about to the Gateways whose waypoints serve it.
fn scope(
    view: &View<'_>,
    meta: &ObjectMeta,
    target: &TargetRef,
    scopes: &mut BTreeMap<String, Scope>,
) -> Result<(), Problem> {
    let own = meta.namespace.as_str();
    let namespace = target.namespace.as_deref().unwrap_or(own);
    let what = format!("{} {namespace}/{}", target.kind, target.name);
    if namespace != own {
        return Err(("Invalid", format!("{what}: a target is in the policy's own namespace")));
    }
    let key = (own, target.name.as_str());
    let missing = || ("TargetNotFound", format!("{what} does not exist"));
    match (target.group.as_str(), target.kind.as_str()) {
        ("" | "core", "Service") => {
            let service = view.services.get(&key).ok_or_else(missing)?;
            let hosts = [view.service_host(own, &target.name)];
            services(view, &service.metadata, &what, &hosts, scopes)
        }
        ("networking.istio.io", "ServiceEntry") => {
            let entry = view.service_entries.get(&key).ok_or_else(missing)?;
            services(view, &entry.metadata, &what, &entry.spec.hosts, scopes)
        }
        (GROUP, "Gateway") => {
            let gateway = view.gateways.gateways.get(&key).ok_or_else(missing)?;
            if !is_waypoint(view, gateway) {
                return Err(("AncestorNotBound", format!("{what} is no waypoint of this mesh")));
            }
            scopes.entry(name_of(gateway)).or_default().everything = true;
            Ok(())
        }
        (GROUP, "GatewayClass") => of_class(view, own, target, scopes),
        (group, kind) => {
            let expected = "Service, ServiceEntry, Gateway or GatewayClass";
            Err(("Invalid", format!("{what}: a target is a {expected}, not a {kind} of {group:?}")))
        }
    }
}

fn services(
    view: &View<'_>,
    meta: &ObjectMeta,
    what: &str,
    hosts: &[String],
    scopes: &mut BTreeMap<String, Scope>,
) -> Result<(), Problem> {
    let serving = view.serving(meta);
    if serving.is_empty() {
        let why = match view.wanted(meta) {
            Some((home, name)) => {
                format!("is bound to {home}/{name}, which is no waypoint of this mesh that serves it")
            }
            None => "is not bound to a waypoint".to_owned(),
        };
        return Err(("AncestorNotBound", format!("{what} {why}")));
    }
    for gateway in serving {
        let scope = scopes.entry(gateway).or_default();
        scope.services.extend(hosts.iter().map(|host| (meta.namespace.clone(), host.clone())));
    }
    Ok(())
}

/// Of the root namespace only, since it is about every namespace.
fn of_class(
    view: &View<'_>,
    own: &str,
    target: &TargetRef,
    scopes: &mut BTreeMap<String, Scope>,
) -> Result<(), Problem> {
    let what = format!("GatewayClass {}", target.name);
    let root = view.settings.root_namespace.as_str();
    if own != root {
        return Err(("Invalid", format!("{what}: only a policy of namespace {root} can be for a class")));
    }
    let class = view.gateways.classes.get(target.name.as_str()).copied();
    match gateways::owner(&target.name, class, view.settings.compat) {
        Owner::Us => {}
        Owner::Unknown => return Err(("TargetNotFound", format!("{what} does not exist"))),
        Owner::Other => return Err(("AncestorNotBound", format!("{what} is another controller's"))),
    }
    let all = view.gateways.gateways.values().filter(|it| it.spec.gateway_class_name == target.name);
    let mut found = false;
    for gateway in all.filter(|it| is_waypoint(view, it)) {
        scopes.entry(name_of(gateway)).or_default().everything = true;
        found = true;
    }
    if found { Ok(()) } else { Err(("AncestorNotBound", format!("{what}: there is no waypoint of it"))) }
}

fn is_waypoint(view: &View<'_>, gateway: &Gateway) -> bool {
    gateway.hbone().is_some() && view.owner(gateway) == Owner::Us
}

fn name_of(gateway: &Gateway) -> String {
    format!("{}/{}", gateway.metadata.namespace, gateway.metadata.name)
}
