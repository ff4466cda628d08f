//! Crates depend on each other in one direction only, read from `cargo metadata`.
//!
//! Dependencies of tests are exempt: a test may use whatever makes it short. Those of build scripts are not.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde::Deserialize;

/// What each crate may name, without the prefix `culvert-`. A crate that is missing here is a problem too: it needs a layer.
const ALLOWED: [(&str, &[&str]); 17] = [
    ("proto", &[]),
    ("runtime", &[]),
    ("net", &[]),
    ("k8s-api", &[]),
    ("model", &["proto"]),
    ("identity", &["model", "runtime", "proto"]),
    ("hbone", &["model", "runtime"]),
    ("xds", &["proto", "runtime"]),
    ("sandbox", &["runtime", "net", "k8s-api"]),
    ("ztunnel", PRODUCT),
    ("waypoint", PRODUCT),
    ("controller", PRODUCT),
    ("cli", AROUND),
    ("bench", BENCH),
    ("e2e", AROUND),
    ("cluster", &["sandbox"]),
    ("xtask", &[]),
];

/// What runs in a cluster: every library but the sandbox, which has no business there.
const PRODUCT: &[&str] = &["proto", "model", "runtime", "net", "identity", "hbone", "xds", "k8s-api"];
/// What runs around it.
const AROUND: &[&str] =
    &["proto", "model", "runtime", "net", "identity", "hbone", "xds", "k8s-api", "sandbox"];
/// What measures a mesh starts it as the end-to-end tests do, and plays a control plane of any size.
const BENCH: &[&str] = &["e2e", "proto", "runtime", "net", "identity", "xds", "k8s-api"];

/// Decisions are pure: the crate that makes them reaches none of these, over no number of steps.
const PURE: &str = "model";
const IMPURE: [&str; 9] =
    ["tokio", "hyper", "kube", "tonic", "mio", "async-std", "socket2", "rustls", "k8s-openapi"];

/// The part of `cargo metadata` that matters here.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Option<Resolve>,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Debug, Deserialize)]
struct Kind {
    kind: Option<String>,
}

/// Asks cargo for the graph of what Linux builds.
///
/// # Errors
/// If cargo cannot be run, or says no.
pub fn metadata(root: &Path) -> anyhow::Result<Metadata> {
    // The cargo that runs this, if one does.
    let output = Command::new(option_env!("CARGO").unwrap_or("cargo"))
        .args(["metadata", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root)
        .output()
        .context("running cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("reading the answer of cargo metadata")
}

/// Each dependency that points the wrong way.
pub fn check(metadata: &Metadata) -> Vec<String> {
    let names: HashMap<&str, &str> =
        metadata.packages.iter().map(|it| (it.id.as_str(), it.name.as_str())).collect();
    let members: BTreeSet<&str> =
        metadata.workspace_members.iter().filter_map(|id| names.get(id.as_str()).copied()).collect();
    let graph = graph(metadata, &names);
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    let mut problems = Vec::new();
    for member in &members {
        let short = member.trim_start_matches("culvert-");
        let Some(allowed) = allowed.get(short) else {
            problems.push(format!("{member} has no layer: give it one in xtask/src/layers.rs"));
            continue;
        };
        for dependency in graph.get(member).into_iter().flatten().filter(|it| members.contains(*it)) {
            if !allowed.contains(&dependency.trim_start_matches("culvert-")) {
                problems.push(format!("{member} must not depend on {dependency}"));
            }
        }
    }
    problems.extend(impure(&graph));
    problems
}

/// Who depends on whom by name, tests left out.
fn graph<'a>(
    metadata: &'a Metadata,
    names: &HashMap<&'a str, &'a str>,
) -> BTreeMap<&'a str, BTreeSet<&'a str>> {
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for node in metadata.resolve.iter().flat_map(|it| &it.nodes) {
        let Some(name) = names.get(node.id.as_str()) else { continue };
        let edges = graph.entry(name).or_default();
        for dependency in &node.deps {
            let only_tests = dependency.dep_kinds.iter().all(|it| it.kind.as_deref() == Some("dev"));
            if let (false, Some(to)) = (only_tests, names.get(dependency.pkg.as_str())) {
                edges.insert(to);
            }
        }
    }
    graph
}

/// The ways by which the pure crate reaches an impure one, the shortest for each.
fn impure(graph: &BTreeMap<&str, BTreeSet<&str>>) -> Vec<String> {
    let start = format!("culvert-{PURE}");
    let mut ways: BTreeMap<&str, String> = BTreeMap::new();
    let mut todo = std::collections::VecDeque::new();
    if let Some((name, _)) = graph.get_key_value(start.as_str()) {
        ways.insert(name, (*name).to_owned());
        todo.push_back(*name);
    }
    while let Some(name) = todo.pop_front() {
        for next in graph.get(name).into_iter().flatten() {
            if !ways.contains_key(next) {
                ways.insert(next, format!("{} -> {next}", ways[name]));
                todo.push_back(next);
            }
        }
    }
    IMPURE
        .iter()
        .filter_map(|name| ways.get(name))
        .map(|way| format!("decisions are not pure: {way}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A graph from `(from, to, kind)`; every name that starts with `culvert-` is a member.
    fn world(edges: &[(&str, &str, Option<&str>)]) -> Metadata {
        let names: BTreeSet<&str> = edges.iter().flat_map(|(from, to, _)| [*from, *to]).collect();
        let nodes: Vec<_> = names
            .iter()
            .map(|name| {
                let deps: Vec<_> = edges
                    .iter()
                    .filter(|(from, ..)| from == name)
                    .map(|(_, to, kind)| json!({"pkg": to, "dep_kinds": [{"kind": kind}]}))
                    .collect();
                json!({"id": name, "deps": deps})
            })
            .collect();
        let packages: Vec<_> = names.iter().map(|name| json!({"id": name, "name": name})).collect();
        let members: Vec<_> = names.iter().filter(|name| name.starts_with("culvert-")).collect();
        let all = json!({"packages": packages, "workspace_members": members, "resolve": {"nodes": nodes}});
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn the_right_direction_passes() {
        let right = world(&[
            ("culvert-model", "culvert-proto", None),
            ("culvert-ztunnel", "culvert-model", None),
            ("culvert-proto", "prost", None),
        ]);
        assert_eq!(check(&right), Vec::<String>::new());
    }

    #[test]
    fn the_wrong_direction_is_named() {
        let wrong = world(&[("culvert-net", "culvert-runtime", None)]);
        assert_eq!(check(&wrong), ["culvert-net must not depend on culvert-runtime"]);
        let programs = world(&[("culvert-cli", "culvert-ztunnel", None)]);
        assert_eq!(check(&programs), ["culvert-cli must not depend on culvert-ztunnel"]);
    }

    #[test]
    fn tests_may_use_anything_and_build_scripts_may_not() {
        let test = world(&[("culvert-net", "culvert-runtime", Some("dev"))]);
        assert_eq!(check(&test), Vec::<String>::new());
        let script = world(&[("culvert-net", "culvert-runtime", Some("build"))]);
        assert_eq!(check(&script).len(), 1);
    }

    #[test]
    fn a_crate_without_a_layer_is_a_problem() {
        let new = world(&[("culvert-new", "prost", None)]);
        assert_eq!(check(&new), ["culvert-new has no layer: give it one in xtask/src/layers.rs"]);
    }

    #[test]
    fn decisions_reach_no_runtime_over_any_number_of_steps() {
        let far = world(&[
            ("culvert-model", "culvert-proto", None),
            ("culvert-proto", "innocent", None),
            ("innocent", "tokio", None),
        ]);
        assert_eq!(
            check(&far),
            ["decisions are not pure: culvert-model -> culvert-proto -> innocent -> tokio"]
        );
    }

    #[test]
    fn this_workspace_keeps_its_layers() {
        assert_eq!(check(&metadata(&crate::root()).unwrap()), Vec::<String>::new());
    }
}
