//! Making waypoints and removing them.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use culvert_k8s_api::labels;
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use serde_json::json;

use super::{list, manifest};
use crate::args::{ApplyArgs, DeleteArgs};
use crate::cluster::Cluster;
use crate::cluster::gather::{GATEWAY, resource};

/// Owner of the fields that this command sets.
const MANAGER: &str = "culvert";

/// What is done about a namespace's label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Enrol {
    /// It is to be set.
    Set,
    /// It says so already.
    Done,
    /// It names another waypoint.
    Conflict(String),
}

pub(super) fn gateways(cluster: &Cluster, namespace: Option<&str>) -> Api<DynamicObject> {
    let kind = resource(GATEWAY, "Gateway", "gateways");
    match namespace {
        Some(namespace) => Api::namespaced_with(cluster.client.clone(), namespace, &kind),
        None => Api::all_with(cluster.client.clone(), &kind),
    }
}

pub(super) async fn apply(
    cluster: &Cluster,
    namespace: Option<&str>,
    args: &ApplyArgs,
) -> anyhow::Result<ExitCode> {
    let namespace = namespace.unwrap_or(&cluster.namespace);
    let name = &args.shape.name;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let known =
        cluster.ask(namespaces.get(namespace)).await.with_context(|| format!("namespace {namespace}"))?;
    let of_namespace = known.metadata.labels.unwrap_or_default();
    let label = of_namespace.get(labels::USE_WAYPOINT).map(String::as_str);
    let enrol = enrolment(label, name);
    // Before anything is made.
    if let (true, false, Enrol::Conflict(other)) = (args.enroll_namespace, args.overwrite, &enrol) {
        bail!("namespace {namespace} uses waypoint {other:?}: --overwrite makes it use {name:?}");
    }
    let patch = Patch::Apply(manifest::gateway(&args.shape, Some(namespace)));
    let params = PatchParams::apply(MANAGER).force();
    let made = cluster.ask(gateways(cluster, Some(namespace)).patch(name, &params, &patch)).await;
    made.map_err(|error| match error {
        error if error.is_missing() => {
            anyhow::anyhow!("the Gateway API is not installed in {} ({error})", cluster.name())
        }
        error => error.into(),
    })
    .with_context(|| format!("waypoint {namespace}/{name}"))?;
    println!("waypoint {namespace}/{name} applied");
    if of_namespace.get(labels::DATAPLANE_MODE).map(String::as_str) != Some(labels::MODE_AMBIENT) {
        eprintln!(
            "warning: namespace {namespace} is not in the mesh, so nothing goes through its waypoint: kubectl label namespace \
{namespace} {}={}",
            labels::DATAPLANE_MODE,
            labels::MODE_AMBIENT
        );
    }
    if args.enroll_namespace && enrol != Enrol::Done {
        let patch = json!({"metadata": {"labels": {labels::USE_WAYPOINT: name}}});
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        let patched = namespaces.patch(namespace, &params, &patch);
        cluster.ask(patched).await.with_context(|| format!("namespace {namespace}"))?;
        println!("namespace {namespace} labeled with {}={name}", labels::USE_WAYPOINT);
    }
    if args.wait {
        let patience = Duration::from_secs(args.waypoint_timeout);
        list::wait(cluster, Some(namespace), Some(name), patience).await?;
        println!("waypoint {namespace}/{name} is programmed");
    }
    Ok(ExitCode::SUCCESS)
}

fn enrolment(label: Option<&str>, name: &str) -> Enrol {
    match label {
        Some(label) if label == name => Enrol::Done,
        Some(label) => Enrol::Conflict(label.to_owned()),
        None => Enrol::Set,
    }
}

pub(super) async fn delete(
    cluster: &Cluster,
    namespace: Option<&str>,
    args: &DeleteArgs,
) -> anyhow::Result<ExitCode> {
    let namespace = namespace.unwrap_or(&cluster.namespace);
    let waypoints = list::waypoints(cluster, Some(namespace)).await?;
    let names: Vec<String> =
        if args.all { waypoints.iter().map(|it| it.name.clone()).collect() } else { args.names.clone() };
    if names.is_empty() {
        println!("no waypoints in namespace {namespace}");
        return Ok(ExitCode::SUCCESS);
    }
    let mut failed = false;
    for name in names {
        // A Gateway of another class is somebody else's, whatever its name.
        if !waypoints.iter().any(|it| it.name == name) {
            eprintln!("error: no waypoint {name} in namespace {namespace}");
            failed = true;
            continue;
        }
        match cluster.ask(gateways(cluster, Some(namespace)).delete(&name, &DeleteParams::default())).await {
            Ok(_) => println!("waypoint {namespace}/{name} deleted"),
            Err(error) => {
                eprintln!("error: waypoint {namespace}/{name}: {error}");
                failed = true;
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// K11.
    #[test]
    fn a_namespace_that_uses_another_waypoint_is_left_to_it() {
        assert_eq!(enrolment(None, "w"), Enrol::Set);
        assert_eq!(enrolment(Some("w"), "w"), Enrol::Done);
        assert_eq!(enrolment(Some("x"), "w"), Enrol::Conflict("x".to_owned()));
    }
}
