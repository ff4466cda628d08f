//! What the proxy tells people: admin page, metrics, readiness (Z01, Z112, Z113).

use std::sync::Arc;

use culvert_runtime::admin::{AdminServer, json, text};
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::metrics::{CONTENT_TYPE, Metrics as Registry};
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;
use http::StatusCode;
use http::header::{CONTENT_TYPE as CONTENT_TYPE_HEADER, HeaderValue};
use serde_json::{Value, json as value};
use tokio::sync::Notify;

use crate::app::bind;
use crate::explain::{Knowledge, explain};
use crate::observe::measure;
use crate::pods::{Pods, Shared};
use crate::profile;

/// Opens the three ports.
///
/// # Errors
/// One cannot be bound.
pub fn serve(
    tasks: &Tasks,
    shared: &Arc<Shared>,
    pods: &Arc<Pods>,
    registry: &Registry,
    filter: FilterHandle,
    quit: &Arc<Notify>,
    drain: &DrainWatcher,
) -> anyhow::Result<()> {
    let config = &shared.config;
    let ports = [
        ("admin", config.admin_listen, admin(shared, pods, &filter, quit)),
        ("metrics", config.metrics_listen, metrics(shared, pods, registry)),
        ("readiness", config.readiness_listen, AdminServer::new().readiness(shared.readiness.clone())),
    ];
    for (name, address, server) in ports {
        let listener = bind(name, address)?;
        let drain = drain.clone();
        tasks.spawn(name, async move {
            if let Err(error) = server.serve(listener, drain).await {
                tracing::error!(port = name, %error, "no longer served");
            }
        });
    }
    Ok(())
}

fn admin(shared: &Arc<Shared>, pods: &Arc<Pods>, filter: &FilterHandle, quit: &Arc<Notify>) -> AdminServer {
    let dump = (shared.clone(), pods.clone());
    let connections = shared.clone();
    let certificates = shared.clone();
    let listed = pods.clone();
    let asked = shared.clone();
    let config = shared.clone();
    let server = AdminServer::new().logging(filter).quit(quit.clone());
    profile::routes(server)
        .route("GET", "/config", "settings in force and where each was written, JSON", move |_| {
            std::future::ready(json(&config.config.effective.to_json()))
        })
        .route("GET", "/config_dump", "everything the proxy knows, JSON", move |_| {
            std::future::ready(json(&config_dump(&dump.0, &dump.1)))
        })
        .route("GET", "/connections", "open connections, JSON", move |_| {
            std::future::ready(json(&connections.observer.connections.list()))
        })
        .route("GET", "/certificates", "certificates of this node's pods, JSON", move |_| {
            std::future::ready(json(&certificates.certificates.list()))
        })
        .route(
            "GET",
            "/debug/explain",
            "what ?source=NAMESPACE/POD&destination=HOST:PORT would get, and why, JSON",
            move |request| {
                let known = Knowledge {
                    snapshot: &asked.state.load_full(),
                    seen: &asked.endpoints,
                    cluster: &asked.config.cluster_id,
                    domain: &asked.config.cluster_domain,
                };
                let answer = explain(&known, request.query("source"), request.query("destination"));
                std::future::ready(match answer {
                    Ok(answer) => json(&answer),
                    Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
                })
            },
        )
        .route("GET", "/pods", "pods of this node, JSON", move |_| std::future::ready(json(&listed.list())))
}

/// Bytes of connections that are still open are counted at each scrape, so that a long transfer shows while it runs.
fn metrics(shared: &Arc<Shared>, pods: &Arc<Pods>, registry: &Registry) -> AdminServer {
    let mut server = AdminServer::new();
    for path in ["/metrics", "/stats/prometheus"] {
        let (shared, pods, registry) = (shared.clone(), pods.clone(), registry.clone());
        server = server.route("GET", path, "metrics, OpenMetrics text", move |_| {
            measure(&shared, &pods);
            let mut response = text(StatusCode::OK, registry.encode());
            response.headers_mut().insert(CONTENT_TYPE_HEADER, HeaderValue::from_static(CONTENT_TYPE));
            std::future::ready(response)
        });
    }
    server
}

/// Everything the proxy knows (Z112).
pub(crate) fn config_dump(shared: &Shared, pods: &Pods) -> Value {
    let snapshot = shared.state.load_full();
    value!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": shared.config.node,
        "config": shared.config.effective.to_json(),
        "generation": snapshot.generation(),
        "workloads": snapshot.workloads().collect::<Vec<_>>(),
        "services": snapshot.services().collect::<Vec<_>>(),
        "policies": snapshot.policies().collect::<Vec<_>>(),
        "certificates": shared.certificates.list(),
        "pods": pods.list(),
        "connections": shared.observer.connections.list(),
    })
}
