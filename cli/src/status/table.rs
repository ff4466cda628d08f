//! The status of a cluster for people. Of a mesh of two nodes that is well it fits a screen of 80 columns and 24 lines.

use std::fmt::Write as _;

use super::cluster::{NodeView, Status};
use crate::cluster::problems::Reason;
use crate::cluster::seen::{Enrolment, age, seconds};
use crate::output::Table;

/// Problems shown; the others are counted, and `-o json` has them.
const SHOWN: usize = 15;
/// Names shown in a line.
const NAMES: usize = 4;
/// Nodes shown as rows unless the screen is wide.
const NODES: usize = 10;

pub(super) fn page(status: &Status, wide: bool) -> String {
    let mut page = String::new();
    let problems = &status.problems;
    if !problems.is_empty() {
        let _ = writeln!(page, "PROBLEMS");
        for problem in problems.iter().take(SHOWN) {
            let _ = writeln!(page, "  {}", problem.line(status.cluster.seen));
        }
        if problems.len() > SHOWN {
            let _ = writeln!(page, "  and {} more: -o json shows them all", problems.len() - SHOWN);
        }
        page += "\n";
    }
    if status.cluster.kubernetes.is_none() {
        return page;
    }
    let installed = !problems.iter().any(|problem| problem.reason == Reason::NotInstalled);
    for (section, lists, text) in sections(status).into_iter().take(if installed { usize::MAX } else { 1 }) {
        let known = lists.iter().all(|list| !status.unread.iter().any(|unread| unread == list));
        let _ = writeln!(
            page,
            "{section:<14}{}",
            if known { text } else { format!("not read: {}", lists.join(", ")) }
        );
    }
    page += &nodes(status, wide);
    if problems.is_empty() {
        page += "\nAll is well.\n";
    }
    page
}

/// Each with the lists that it is made of.
fn sections(status: &Status) -> [(&'static str, &'static [&'static str], String); 8] {
    let cluster = format!("{}, {}", status.cluster.name, status.cluster.kubernetes.as_deref().unwrap_or("-"));
    [
        ("CLUSTER", &[], cluster),
        ("CONTROLLER", &["deployments", "leases", "pods of the mesh"], controller(status)),
        ("PROXIES", &["nodes", "pods of the mesh"], proxies(status)),
        ("CERTIFICATES", &["pods of the mesh"], certificates(status)),
        ("NAMESPACES", &["namespaces"], namespaces(status)),
        ("PODS", &["namespaces", "pods"], pods(status)),
        ("WAYPOINTS", &["gateways"], waypoints(status)),
        ("POLICIES", &["authorizationpolicies", "peerauthentications"], policies(status)),
    ]
}

fn controller(status: &Status) -> String {
    let plane = &status.control_plane;
    let ready = plane.replicas.iter().filter(|replica| replica.ready).count();
    let version = plane.version.as_deref().unwrap_or("-");
    let leader = plane.leader.as_deref().unwrap_or("nobody");
    format!("{version}, {ready} of {} ready, {leader} leads", plane.desired)
}

fn proxies(status: &Status) -> String {
    let connected: Vec<_> = status.nodes.iter().filter_map(|node| node.configuration.as_ref()).collect();
    let current = connected.iter().filter(|it| it.behind_seconds == 0).count();
    let generation = status.control_plane.generation.map_or("-".to_owned(), |it| it.to_string());
    format!("{current} of {} have the newest configuration, generation {generation}", status.nodes.len())
}

fn certificates(status: &Status) -> String {
    let asked: Vec<_> = status.nodes.iter().filter_map(|node| node.certificates.as_ref()).collect();
    let (valid, total) = asked.iter().fold((0, 0), |sum, it| (sum.0 + it.valid, sum.1 + it.total));
    let left = |end| age(seconds(status.cluster.seen, end));
    let next = asked.iter().filter_map(|it| it.next_not_after).min();
    let next = next.map(|end| format!(", the next ends in {}", left(end))).unwrap_or_default();
    let root = status.control_plane.root_not_after;
    let root = root.map(|end| format!(", the root in {}", left(end))).unwrap_or_default();
    format!("{valid} of {total} valid{next}{root}")
}

fn namespaces(status: &Status) -> String {
    let labelled = status.namespaces.iter().filter(|it| it.labelled).map(|it| it.name.clone());
    listed(labelled.collect(), "in the mesh")
}

fn pods(status: &Status) -> String {
    let of = |wanted: &[Enrolment]| status.pods.iter().filter(|pod| wanted.contains(&pod.mesh)).count();
    let should = of(&[Enrolment::Enabled, Enrolment::Pending, Enrolment::Missing]);
    let stray = of(&[Enrolment::Stray]);
    let but = if stray > 0 { format!(", and {stray} that should not be") } else { String::new() };
    format!("{} of {should} in the mesh{but}", of(&[Enrolment::Enabled]))
}

fn waypoints(status: &Status) -> String {
    let Some(all) = &status.waypoints else { return "none: the Gateway API is not installed".to_owned() };
    if all.is_empty() {
        return "none".to_owned();
    }
    let done = all.iter().filter(|it| it.programmed == Some(true)).count();
    format!("{done} of {} programmed", all.len())
}

fn policies(status: &Status) -> String {
    let all = status.policies.len();
    let refused = status.problems.iter().filter(|problem| {
        let it = &problem.object;
        let namespace = it.namespace.as_deref().unwrap_or_default();
        status.policies.iter().any(|of| of.kind == it.kind && of.namespace == namespace && of.name == it.name)
    });
    match (all, refused.count()) {
        (0, _) => "none".to_owned(),
        (all, 0) => format!("{all} in force as written"),
        (all, refused) => format!("{} of {all} in force as written", all.saturating_sub(refused)),
    }
}

/// `none`, or how many and the first names.
fn listed(names: Vec<String>, what: &str) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    let more = if names.len() > NAMES { format!(" and {} more", names.len() - NAMES) } else { String::new() };
    let first: Vec<_> = names.iter().take(NAMES).map(String::as_str).collect();
    format!("{} {what}: {}{more}", names.len(), first.join(", "))
}

fn nodes(status: &Status, wide: bool) -> String {
    let mut table = Table::new(&[
        "NODE",
        "READY",
        "AGENT",
        "PROXY",
        "VERSION",
        "BEHIND",
        "CERTS",
        "PODS",
        "+GENERATION",
        "+RESTARTS",
        "+CONTROLLER",
        "+KUBELET",
        "+KERNEL",
    ]);
    let shown = if wide { status.nodes.len() } else { NODES };
    for node in status.nodes.iter().take(shown) {
        table.row(row(node));
    }
    if table.is_empty() {
        return String::new();
    }
    let hidden = status.nodes.len().saturating_sub(shown);
    let more =
        if hidden > 0 { format!("and {hidden} more nodes: -o wide shows them all\n") } else { String::new() };
    format!("\n{}{more}", table.render(wide))
}

fn row(node: &NodeView) -> Vec<String> {
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let program =
        |it: &Option<super::cluster::ProgramView>| it.as_ref().map_or("none".to_owned(), |it| yes(it.ready));
    let configuration = node.configuration.as_ref();
    let behind = configuration.filter(|it| it.behind_seconds > 0).map(|it| age(it.behind_seconds));
    let restarts = |it: &Option<super::cluster::ProgramView>| it.as_ref().map_or(0, |it| it.restarts);
    vec![
        node.name.clone(),
        yes(node.ready),
        program(&node.agent),
        program(&node.proxy),
        configuration.map(|it| it.version.clone()).unwrap_or_default(),
        behind.unwrap_or_default(),
        node.certificates.as_ref().map(|it| format!("{}/{}", it.valid, it.total)).unwrap_or_default(),
        node.enrolled.to_string(),
        configuration.and_then(|it| it.generation).map(|it| it.to_string()).unwrap_or_default(),
        format!("{}/{}", restarts(&node.agent), restarts(&node.proxy)),
        configuration.map(|it| it.controller.clone()).unwrap_or_default(),
        node.kubelet.clone(),
        node.kernel.clone(),
    ]
}
