//! Listing waypoints, and waiting for them.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use kube::api::{DynamicObject, ListParams};
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::apply::gateways;
use crate::args::{ListArgs, WaypointStatusArgs};
use crate::cluster::Cluster;
use crate::cluster::gather::{self, objects};
use crate::cluster::seen::Waypoint;
use crate::output::{List, Table};

/// Between two looks.
const POLL: Duration = Duration::from_millis(500);

/// A condition of a waypoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    namespace: String,
    name: String,
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
}

pub(super) async fn waypoints(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Vec<Waypoint>> {
    Ok(objects(cluster, namespace).await?.iter().filter_map(objects::waypoint).collect())
}

async fn objects(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Vec<DynamicObject>> {
    let all = gather::list(cluster, &gateways(cluster, namespace), &ListParams::default()).await;
    let all = all.map_err(|error| match error {
        error if error.is_missing() => {
            anyhow::anyhow!("the Gateway API is not installed in {} ({error})", cluster.name())
        }
        error => error.into(),
    })?;
    Ok(all.into_iter().filter(|it| objects::waypoint(it).is_some()).collect())
}

/// Where to look: everywhere, in the namespace that was named, or in that of the context.
fn scope<'a>(cluster: &'a Cluster, namespace: Option<&'a str>, all: bool) -> Option<&'a str> {
    (!all).then(|| namespace.unwrap_or(&cluster.namespace))
}

/// K13.
pub(super) async fn list(
    cluster: &Cluster,
    namespace: Option<&str>,
    args: &ListArgs,
) -> anyhow::Result<ExitCode> {
    let scope = scope(cluster, namespace, args.all_namespaces);
    let all = waypoints(cluster, scope).await?;
    let mut table =
        Table::new(&["NAMESPACE", "NAME", "TRAFFIC TYPE", "PROGRAMMED", "+CLASS", "+ADDRESS", "+REASON"]);
    for it in &all {
        table.row([
            it.namespace.clone(),
            it.name.clone(),
            it.traffic.clone(),
            programmed(it).to_owned(),
            it.class.clone(),
            it.addresses.join(","),
            it.reason.clone(),
        ]);
    }
    match args.output.data(&List::new("WaypointList", all))? {
        Some(data) => print!("{data}"),
        None if table.is_empty() => none(scope),
        None => print!("{}", table.render(args.output.is_wide())),
    }
    Ok(ExitCode::SUCCESS)
}

/// K14: a line for each condition; exit code 1 if a waypoint is not programmed.
pub(super) async fn status(
    cluster: &Cluster,
    namespace: Option<&str>,
    args: &WaypointStatusArgs,
) -> anyhow::Result<ExitCode> {
    let scope = scope(cluster, namespace, args.all_namespaces);
    if args.wait {
        wait(cluster, scope, args.name.as_deref(), Duration::from_secs(args.waypoint_timeout)).await?;
    }
    let mut all = objects(cluster, scope).await?;
    if let Some(name) = &args.name {
        all.retain(|it| it.metadata.name.as_ref() == Some(name));
        if all.is_empty() {
            bail!("no waypoint {name}{}", scope.map(|it| format!(" in namespace {it}")).unwrap_or_default());
        }
    }
    let well = all.iter().filter_map(objects::waypoint).all(|it| it.programmed == Some(true));
    let conditions: Vec<Condition> = all.iter().flat_map(conditions).collect();
    let mut table = Table::new(&["NAMESPACE", "NAME", "STATUS", "TYPE", "REASON", "MESSAGE"]);
    for it in &conditions {
        table.row([&it.namespace, &it.name, &it.status, &it.kind, &it.reason, &it.message].map(Clone::clone));
    }
    match args.output.data(&List::new("WaypointConditionList", conditions))? {
        Some(data) => print!("{data}"),
        None if table.is_empty() => none(scope),
        None => print!("{}", table.render(true)),
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns once every waypoint that is meant is programmed.
///
/// # Errors
/// The time is over, or there is none.
pub(super) async fn wait(
    cluster: &Cluster,
    namespace: Option<&str>,
    name: Option<&str>,
    patience: Duration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let mut all = waypoints(cluster, namespace).await?;
        all.retain(|it| name.is_none_or(|name| it.name == name));
        let left = unprogrammed(&all);
        if left.is_empty() && !all.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let what = if all.is_empty() { "there is no waypoint".to_owned() } else { left.join("; ") };
            return Err(anyhow::anyhow!(what))
                .with_context(|| format!("not programmed after {} s", patience.as_secs()));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn unprogrammed(all: &[Waypoint]) -> Vec<String> {
    let left = all.iter().filter(|it| it.programmed != Some(true));
    left.map(|it| match it.programmed {
        Some(_) => format!("{}/{}: {}: {}", it.namespace, it.name, it.reason, it.message),
        None => format!("{}/{}: nobody has taken it up", it.namespace, it.name),
    })
    .collect()
}

fn conditions(of: &DynamicObject) -> Vec<Condition> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    objects::conditions(&of.data["status"])
        .map(|it| Condition {
            namespace: of.metadata.namespace.clone().unwrap_or_default(),
            name: of.metadata.name.clone().unwrap_or_default(),
            kind: text(&it["type"]),
            status: text(&it["status"]),
            reason: text(&it["reason"]),
            message: text(&it["message"]),
        })
        .collect()
}

fn programmed(of: &Waypoint) -> &'static str {
    match of.programmed {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    }
}

fn none(scope: Option<&str>) {
    match scope {
        Some(namespace) => eprintln!("No waypoints found in namespace {namespace} (-A shows all)."),
        None => eprintln!("No waypoints found."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_says_why_it_is_not_there() {
        let waypoint = |programmed| Waypoint {
            namespace: "shop".into(),
            name: "w".into(),
            programmed,
            reason: "R".into(),
            message: "m".into(),
            ..Waypoint::default()
        };
        assert_eq!(unprogrammed(&[waypoint(Some(true))]), Vec::<String>::new());
        assert_eq!(unprogrammed(&[waypoint(Some(false))]), ["shop/w: R: m"]);
        assert_eq!(unprogrammed(&[waypoint(None)]), ["shop/w: nobody has taken it up"]);
    }
}
