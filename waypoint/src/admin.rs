//! What the waypoint tells people: admin page, metrics, readiness (W74).

use std::sync::Arc;

use culvert_model::route::Route;
use culvert_runtime::admin::{AdminServer, json};
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::metrics::Metrics as Registry;
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;
use serde_json::{Value, json as value};
use tokio::sync::Notify;

use crate::app::bind;
use crate::shared::Shared;

/// Opens the three ports.
///
/// # Errors
/// One cannot be bound.
pub fn serve(
    tasks: &Tasks,
    shared: &Arc<Shared>,
    registry: &Registry,
    filter: FilterHandle,
    quit: &Arc<Notify>,
    drain: &DrainWatcher,
) -> anyhow::Result<()> {
    let config = &shared.config;
    let ports = [
        ("admin", config.admin_listen, admin(shared, &filter, quit)),
        ("metrics", config.metrics_listen, AdminServer::new().metrics(registry)),
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

fn admin(shared: &Arc<Shared>, filter: &FilterHandle, quit: &Arc<Notify>) -> AdminServer {
    let (dumped, config, certificates) = (shared.clone(), shared.clone(), shared.clone());
    AdminServer::new()
        .logging(filter)
        .quit(quit.clone())
        .route("GET", "/config", "settings in force and where each was written, JSON", move |_| {
            std::future::ready(json(&config.config.effective.to_json()))
        })
        .route("GET", "/config_dump", "everything the waypoint knows, JSON", move |_| {
            std::future::ready(json(&config_dump(&dumped)))
        })
        .route("GET", "/certificates", "the waypoint's certificate, JSON", move |_| {
            std::future::ready(json(&certificates.certificates.list()))
        })
}

/// Everything the waypoint knows.
fn config_dump(shared: &Shared) -> Value {
    let world = shared.state.load_full();
    value!({
        "version": env!("CARGO_PKG_VERSION"),
        "gateway": shared.own.to_string(),
        "config": shared.config.effective.to_json(),
        "generation": world.snapshot.generation(),
        "workloads": world.snapshot.workloads().collect::<Vec<_>>(),
        "services": world.snapshot.services().collect::<Vec<_>>(),
        "routes": world.routes.iter().map(|it| route(it)).collect::<Vec<_>>(),
        "policies": world.policies.iter().map(|it| value!({ "name": it.key.to_string(), "action": it.action.as_str(), "dry_run": it.dry_run, "undecodable": it.undecodable })).collect::<Vec<_>>(),
        "certificates": shared.certificates.list(),
    })
}

fn route(route: &Route) -> Value {
    let rules: Vec<Value> = route
        .http
        .iter()
        .map(|rule| {
            value!({
                "name": *rule.name.0,
                "matches": rule.matches.len(),
                "filters": rule.filters.len(),
                "backends": rule.backends.iter().map(|it| {
                    value!({ "service": it.service.to_string(), "port": it.port, "weight": it.weight, "broken": it.broken })
                }).collect::<Vec<_>>(),
                "broken": rule.broken,
            })
        })
        .collect();
    value!({
        "resource": *route.resource,
        "parent": route.parent.to_string(),
        "port": route.port,
        "consumer": route.consumer,
        "hostnames": route.hostnames,
        "rules": rules,
        "streams": route.streams.iter().map(|rule| value!({ "backends": rule.backends.len(), "broken": rule.broken })).collect::<Vec<_>>(),
    })
}
