//! Metrics, readiness and what a person asks when something is not as expected.

use std::sync::{Arc, OnceLock};

use culvert_runtime::admin::{AdminServer, json};
use culvert_runtime::metrics::Metrics;
use culvert_runtime::readiness::Readiness;
use culvert_runtime::telemetry::FilterHandle;
use culvert_xds::server::DeltaServer;
use serde_json::{Map, Value, json as value};
use tokio::sync::watch;

use super::views::Views;
use crate::index::Snapshot;
use crate::translate::render;
use crate::translate::routes::Told;

/// The xDS server as it is used here.
pub type Xds = DeltaServer<Views>;

/// The pages of the metrics port. They are served before there is anything to show: `xds` is set when that begins.
pub fn pages(
    readiness: Readiness,
    metrics: &Metrics,
    filter: Option<&FilterHandle>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    xds: Arc<OnceLock<Xds>>,
) -> AdminServer {
    let errors = snapshots.clone();
    let mut server = AdminServer::new()
        .readiness(readiness)
        .metrics(metrics)
        .route("GET", "/debug/index", "what is sent, and what became of each policy", move |_| {
            let snapshot = Arc::clone(&snapshots.borrow());
            std::future::ready(json(&index(&snapshot)))
        })
        .route("GET", "/debug/errors", "what could not be read, and what was left alone", move |_| {
            let snapshot = Arc::clone(&errors.borrow());
            std::future::ready(json(&value!({
                "errors": snapshot.world.errors.iter().map(described).collect::<Vec<_>>(),
                "ignored": snapshot.world.notes,
            })))
        })
        .route("GET", "/debug/clients", "connected proxies and what each has acknowledged", move |_| {
            let clients = xds.get().map(Xds::clients).unwrap_or_default();
            std::future::ready(json(&value!({ "clients": clients })))
        });
    if let Some(filter) = filter {
        server = server.logging(filter);
    }
    server
}

fn index(snapshot: &Snapshot) -> Value {
    let addresses: Map<String, Value> = snapshot
        .addresses
        .iter()
        .map(|(name, it)| (name.clone(), versioned(&it.version, render::address(&it.message))))
        .collect();
    let policies: Map<String, Value> = snapshot
        .policies
        .iter()
        .map(|(name, it)| (name.clone(), versioned(&it.version, render::policy(&it.message))))
        .collect();
    value!({
        "generation": snapshot.generation,
        "addresses": addresses,
        "policies": policies,
        "waypoints": snapshot.translation.told().into_iter().map(told).collect::<Map<_, _>>(),
        "policyStatus": snapshot.translation.policy_status,
        "notes": snapshot.translation.notes,
        "redirection": snapshot.world.redirection.iter().map(|((node, uid), status)| {
            value!({ "node": node, "uid": uid, "status": status })
        }).collect::<Vec<_>>(),
    })
}

/// By name: what each says is in the log and the pages of the waypoint.
fn told((gateway, told): (String, Told)) -> (String, Value) {
    let names = value!({
        "routes": told.routes.keys().collect::<Vec<_>>(),
        "policies": told.policies.keys().collect::<Vec<_>>(),
    });
    (gateway, names)
}

fn versioned(version: &str, message: Value) -> Value {
    value!({ "version": version, "resource": message })
}

fn described(error: &culvert_k8s_api::manifest::FileError) -> Value {
    let mut described = serde_json::to_value(error).unwrap_or_default();
    if let Value::Object(fields) = &mut described {
        fields.insert("text".to_owned(), Value::String(error.to_string()));
    }
    described
}
