//! What the facts of a cluster mean for the mesh: pure functions.

use super::Check;
use super::facts::Facts;
use crate::cluster::seen::{Node, Seen, age};

/// The oldest Kubernetes whose API the programs are built against.
const KUBERNETES: (u32, u32) = (1, 33);
/// The newest that they were tried with.
const TRIED: (u32, u32) = (1, 36);
/// Address translation in nf_tables' family inet.
const KERNEL: (u32, u32) = (5, 2);
/// What waits at a listener that closes can go to another (`tcp_migrate_req`).
const KERNEL_MIGRATES: (u32, u32) = (5, 14);
/// Processors that the programs are built for.
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];
/// The oldest Gateway API whose kinds are read.
const GATEWAY_API: (u32, u32) = (1, 1);
/// Names in one line.
const NAMES: usize = 5;
/// Seconds that a clock may be off.
const SKEW: i64 = 5;

pub(super) fn api_server(seen: &Seen) -> Check {
    let Some(version) = &seen.kubernetes else {
        let why = seen.away.as_deref().unwrap_or("no answer");
        return Check::error(
            "kubernetes",
            format!("{} does not answer: {why}", seen.name),
            "see whether the kubeconfig is right and the API server runs",
        );
    };
    match number(version) {
        Some(found) if found < KUBERNETES => Check::error(
            "kubernetes",
            format!("{version} is too old"),
            format!("1.{} or newer is needed", KUBERNETES.1),
        ),
        Some(found) if found > TRIED => Check::warning(
            "kubernetes",
            format!("{version} is newer than what culvert was tried with"),
            format!("the newest that was tried is 1.{}", TRIED.1),
        ),
        Some(_) => Check::ok("kubernetes", version),
        None => Check::warning("kubernetes", format!("{version:?} is no version that can be compared"), ""),
    }
}

pub(super) fn cluster(seen: &Seen, facts: &Facts) -> Vec<Check> {
    vec![
        match seen.unread.iter().find(|(what, _)| what == "nodes") {
            Some((_, why)) => Check::warning("nodes", format!("they were not read: {why}"), ""),
            None => nodes(&seen.nodes),
        },
        kinds(facts),
        gateway_api(facts),
        others(facts),
        cni(facts),
        pod_security(seen, facts),
        clock(seen),
    ]
}

fn nodes(all: &[Node]) -> Check {
    let linux: Vec<&Node> = all.iter().filter(|node| node.linux).collect();
    if linux.is_empty() {
        return Check::error("nodes", "no Linux node was seen", "the mesh's programs run on Linux alone");
    }
    let of = |wanted: &dyn Fn(&Node) -> bool| -> Vec<String> {
        let found = linux.iter().filter(|node| wanted(node));
        found.map(|node| format!("{} ({}, {})", node.name, node.kernel, node.architecture)).collect()
    };
    let kernel = |node: &Node| number(&node.kernel);
    let old = of(&|node| kernel(node).is_some_and(|found| found < KERNEL));
    if !old.is_empty() {
        return Check::error(
            "nodes",
            format!("too old a kernel: {}", few(&old)),
            "Linux 5.2 or newer is needed",
        );
    }
    let strange =
        of(&|node| !node.architecture.is_empty() && !ARCHITECTURES.contains(&node.architecture.as_str()));
    if !strange.is_empty() {
        let message = format!("no program is built for {}", few(&strange));
        return Check::error(
            "nodes",
            message,
            "keep these nodes out with a taint, or build the programs for them",
        );
    }
    let resets = of(&|node| kernel(node).is_some_and(|found| found < KERNEL_MIGRATES));
    if !resets.is_empty() {
        return Check::warning(
            "nodes",
            format!("before Linux 5.14: {}", few(&resets)),
            "connections that wait to be accepted are reset when a proxy is replaced",
        );
    }
    let kernels: std::collections::BTreeSet<&str> = linux.iter().map(|node| node.kernel.as_str()).collect();
    let kernels: Vec<String> = kernels.into_iter().map(str::to_owned).collect();
    Check::ok("nodes", format!("{} with Linux {}", linux.len(), few(&kernels)))
}

/// `crds.install` makes the kinds, and helm refuses to touch another release's.
fn kinds(facts: &Facts) -> Check {
    let kinds = match &facts.kinds {
        Ok(kinds) => kinds,
        Err(why) => return Check::warning("kinds", format!("definitions of kinds were not read: {why}"), ""),
    };
    if kinds.is_empty() {
        return Check::ok("kinds", "those of security.istio.io and networking.istio.io are not there yet");
    }
    let foreign: Vec<String> = kinds
        .iter()
        .filter(|(_, owner)| *owner != "culvert")
        .map(|(name, owner)| if owner.is_empty() { name.clone() } else { format!("{name} (of {owner})") })
        .collect();
    if foreign.is_empty() {
        return Check::ok("kinds", format!("{} of the mesh's own", kinds.len()));
    }
    Check::warning(
        "kinds",
        format!("another mesh's: {}", few(&foreign)),
        "install with --set crds.install=false",
    )
}

fn gateway_api(facts: &Facts) -> Check {
    let Some((version, channel)) = &facts.gateway_api else {
        return Check::warning(
            "gateway-api",
            "it is not installed, so there can be no waypoints",
            "install the standard channel of gateway-api, then culvert install again for its GatewayClass",
        );
    };
    match number(version) {
        Some(found) if found < GATEWAY_API => Check::warning(
            "gateway-api",
            format!("{version} is old"),
            "v1.1 or newer is needed for waypoints and GRPCRoute",
        ),
        _ => Check::ok("gateway-api", format!("{version}, {channel} channel")),
    }
}

fn others(facts: &Facts) -> Check {
    let others = match &facts.others {
        Ok(others) if others.is_empty() => {
            return Check::ok("other-meshes", "no other mesh takes pods' traffic");
        }
        Ok(others) => others,
        Err(why) => {
            return Check::warning(
                "other-meshes",
                format!("DaemonSets or Deployments were not read: {why}"),
                "",
            );
        }
    };
    Check::error(
        "other-meshes",
        format!("{} would take the same pods by the same labels", few(others)),
        "one ambient mesh a cluster: remove the other first",
    )
}

/// Of what the API shows: a network plugin's own settings. Configuration files of nodes are the agents' to check.
fn cni(facts: &Facts) -> Check {
    let Some(cilium) = &facts.cilium else {
        return Check::ok("cni", "nothing is known that would get in the way");
    };
    let is = |key: &str, value: &str| cilium.get(key).is_some_and(|found| found == value);
    if is("cni-exclusive", "true") {
        return Check::error(
            "cni",
            "Cilium removes other plugins' configuration (cni-exclusive)",
            "set cni.exclusive=false in Cilium's values",
        );
    }
    if is("bpf-lb-sock", "true") && !is("bpf-lb-sock-hostns-only", "true") {
        return Check::error(
            "cni",
            "Cilium replaces services' addresses inside pods, before the mesh sees them (bpf-lb-sock)",
            "set socketLB.hostNamespaceOnly=true in Cilium's values",
        );
    }
    if is("enable-bpf-masquerade", "true") {
        return Check::warning(
            "cni",
            "Cilium's bpf masquerading hides the kubelet's address from pods",
            "if probes fail, set bpf.masquerade=false in Cilium's values",
        );
    }
    Check::ok("cni", "Cilium, with settings that leave the mesh room")
}

fn pod_security(seen: &Seen, facts: &Facts) -> Check {
    match facts.pod_security.as_deref() {
        None | Some("privileged") => {
            Check::ok("pod-security", format!("{} takes the agent and the proxy", seen.system))
        }
        Some(level) => Check::error(
            "pod-security",
            format!("namespace {} enforces {level:?}, which refuses the agent and the proxy", seen.system),
            format!(
                "kubectl label namespace {} pod-security.kubernetes.io/enforce=privileged --overwrite",
                seen.system
            ),
        ),
    }
}

fn clock(seen: &Seen) -> Check {
    match seen.skew {
        skew if skew.abs() <= SKEW => Check::ok("clock", "this machine's and the API server's agree"),
        skew => Check::warning(
            "clock",
            format!("this machine's is {} off the API server's", age(skew.abs())),
            "set it: nodes' clocks must agree too, certificates are valid from and until a time",
        ),
    }
}

/// The first two numbers of a version such as `v1.36.3`, `6.1.0-18-amd64` or `1.33+`.
fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn few(names: &[String]) -> String {
    let more = if names.len() > NAMES { format!(" and {} more", names.len() - NAMES) } else { String::new() };
    format!("{}{more}", names.iter().take(NAMES).cloned().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::Verdict;
    use super::*;

    fn nothing() -> Facts {
        Facts {
            kinds: Ok(BTreeMap::new()),
            gateway_api: None,
            others: Ok(Vec::new()),
            cilium: None,
            pod_security: None,
        }
    }

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(number("v1.36.3"), Some((1, 36)));
        assert_eq!(number("v1.33+"), Some((1, 33)));
        assert_eq!(number("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(number("v"), None);
        let verdict = |version: &str| {
            api_server(&Seen { kubernetes: Some(version.to_owned()), ..Seen::default() }).result
        };
        assert_eq!(
            [verdict("v1.9.0"), verdict("v1.32.9"), verdict("v1.33.0"), verdict("v1.99.0"), verdict("x")],
            [Verdict::Error, Verdict::Error, Verdict::Ok, Verdict::Warning, Verdict::Warning]
        );
        let away = Seen { away: Some("refused".to_owned()), ..Seen::default() };
        assert!(api_server(&away).message.contains("refused"));
    }

    #[test]
    fn every_node_must_be_able_to_run_it() {
        let node = |kernel: &str, architecture: &str| Node {
            name: "a".to_owned(),
            linux: true,
            kernel: kernel.to_owned(),
            architecture: architecture.to_owned(),
            ..Node::default()
        };
        let verdict = |all: &[Node]| nodes(all).result;
        assert_eq!(verdict(&[node("6.1.0", "amd64"), node("5.15.2", "arm64")]), Verdict::Ok);
        assert_eq!(verdict(&[node("6.1.0", "amd64"), node("5.10.0", "amd64")]), Verdict::Warning);
        assert_eq!(verdict(&[node("4.18.0", "amd64")]), Verdict::Error);
        assert_eq!(verdict(&[node("6.1.0", "s390x")]), Verdict::Error);
        let windows = Node { linux: false, ..node("10.0", "amd64") };
        assert_eq!(verdict(&[windows]), Verdict::Error);
    }

    #[test]
    fn kinds_of_another_mesh_are_left_to_it() {
        let of = |owner: &str| {
            let kinds =
                BTreeMap::from([("authorizationpolicies.security.istio.io".to_owned(), owner.to_owned())]);
            super::kinds(&Facts { kinds: Ok(kinds), ..nothing() })
        };
        assert_eq!(of("culvert").result, Verdict::Ok);
        let theirs = of("istio-base");
        assert!(
            theirs.result == Verdict::Warning && theirs.action.contains("crds.install=false"),
            "{theirs:?}"
        );
        assert_eq!(kinds(&nothing()).result, Verdict::Ok);
    }

    #[test]
    fn what_takes_the_same_traffic_is_named() {
        let facts = Facts { others: Ok(vec!["istio-system/ztunnel".to_owned()]), ..nothing() };
        assert!(
            others(&facts).result == Verdict::Error
                && others(&facts).message.contains("istio-system/ztunnel")
        );
        assert_eq!(others(&nothing()).result, Verdict::Ok);
        let cilium = |key: &str| {
            cni(&Facts { cilium: Some(BTreeMap::from([(key.to_owned(), "true".to_owned())])), ..nothing() })
                .result
        };
        assert_eq!(cilium("cni-exclusive"), Verdict::Error);
        assert_eq!(cilium("bpf-lb-sock"), Verdict::Error);
        assert_eq!(cilium("x"), Verdict::Ok);
        let strict = Facts { pod_security: Some("baseline".to_owned()), ..nothing() };
        assert_eq!(pod_security(&Seen::default(), &strict).result, Verdict::Error);
    }
}
