//! What became of routes at each of their parents: `status.parents`, as the Gateway API has it.

use std::sync::Arc;

use culvert_k8s_api::ObjectKey;
use culvert_k8s_api::object::Kind;
use culvert_k8s_api::routes::{ParentRef, RouteType};
use culvert_runtime::drain::DrainWatcher;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::keep::keep;
use super::{Condition, Contribution, Desired, Publisher, StatusKind, Target, Wanted, kinds};
use crate::gateways::CONTROLLER;
use crate::index::Snapshot;
use crate::translate::routes::{ParentStatus, Routed, Verdict};

/// The field manager. It must stay what it is.
const MANAGER: &str = "culvert-routes";
const KINDS: &[StatusKind] = &[kinds::HTTP_ROUTE, kinds::GRPC_ROUTE, kinds::TCP_ROUTE, kinds::TLS_ROUTE];

/// The contributor, for [`run`] and for the writer.
pub fn contribution() -> (Publisher, Contribution) {
    super::contribution(MANAGER, Some(CONTROLLER), KINDS)
}

/// Publishes what is true, whenever that changes while this replica leads, until `drain` starts.
pub async fn run(
    publisher: Publisher,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    leading: watch::Receiver<bool>,
    drain: DrainWatcher,
) {
    let mut last: Option<Arc<Routed>> = None;
    keep(publisher, snapshots, leading, drain, move |snapshot| {
        let routed = &snapshot.translation.routed;
        // Most changes are of pods, and translate no route.
        if last.as_ref().is_some_and(|last| Arc::ptr_eq(last, routed)) {
            return None;
        }
        last = Some(Arc::clone(routed));
        Some(desired(snapshot))
    })
    .await;
}

/// What should stand in the status of every route with a parent that is ours to judge.
pub fn desired(snapshot: &Snapshot) -> Desired {
    let mut desired = Desired::new();
    for ((of, namespace, name), parents) in &snapshot.translation.routed.status {
        let (kind, object) = kinds_of(*of);
        let key = ObjectKey { kind: object, namespace: namespace.clone(), name: name.clone() };
        let Some(manifest) = snapshot.world.objects.get(&key) else { continue };
        let meta = manifest.object.metadata();
        let entries: Vec<Value> = parents.iter().map(entry).collect();
        let wanted = Wanted::of(meta.uid.as_str(), meta.generation).field("parents", entries.into());
        desired.insert(Target::new(kind, namespace.as_str(), name.as_str()), wanted);
    }
    desired
}

fn kinds_of(of: RouteType) -> (StatusKind, Kind) {
    match of {
        RouteType::Http => (kinds::HTTP_ROUTE, Kind::HTTPRoute),
        RouteType::Grpc => (kinds::GRPC_ROUTE, Kind::GRPCRoute),
        RouteType::Tcp => (kinds::TCP_ROUTE, Kind::TCPRoute),
        RouteType::Tls => (kinds::TLS_ROUTE, Kind::TLSRoute),
    }
}

fn entry(it: &ParentStatus) -> Value {
    let mut conditions = vec![condition("Accepted", &it.accepted), condition("ResolvedRefs", &it.resolved)];
    if let Some(message) = &it.partly {
        conditions
            .push(Condition::new("PartiallyInvalid", true, "UnsupportedValue", message.as_str()).to_json());
    }
    json!({ "parentRef": reference(&it.parent), "controllerName": CONTROLLER, "conditions": conditions })
}

fn condition(of: &'static str, verdict: &Verdict) -> Value {
    Condition::new(of, verdict.is, verdict.reason, verdict.message.as_str()).to_json()
}

/// As the route has it: by that the entry is found.
fn reference(parent: &ParentRef) -> Value {
    let mut it = json!({ "group": parent.group, "kind": parent.kind, "name": parent.name });
    if let Some(namespace) = &parent.namespace {
        it["namespace"] = namespace.as_str().into();
    }
    if let Some(section) = &parent.section_name {
        it["sectionName"] = section.as_str().into();
    }
    if let Some(port) = parent.port {
        it["port"] = port.get().into();
    }
    it
}
