//! `culvert explain`: where a pod's connection would go and whether it would be let in, from the proxy that would decide it.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use culvert_net::netns::NetNs;
use culvert_sandbox::daemon::Role;
use culvert_sandbox::state::StateDir;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use serde_json::Value;

use crate::args::{ClusterArgs, ExplainArgs, Mesh};
use crate::cluster::reach::{Place, Unreached};
use crate::cluster::{Cluster, block_on};
use crate::get::source::proxy_of;
use crate::pod;
use crate::table::render;

/// The proxy's admin page, on loopback of its own namespace.
const ADMIN: u16 = 15000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// More than the endpoints of any service that a person would want to read; 150 bytes each are 100,000 of them.
const MAX_ANSWER: usize = 16 << 20;

pub(crate) fn explain(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let answer = match args.mesh.choose()? {
        Mesh::Local(state) => local(&state, args)?,
        Mesh::Cluster(cluster) => block_on(of_cluster(&cluster, args))?,
    };
    match args.output.data(&answer)? {
        Some(data) => print!("{data}"),
        None => print!("{}", shown(&answer)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the proxy of the pod's node, by way of the API server.
async fn of_cluster(cluster: &ClusterArgs, args: &ExplainArgs) -> anyhow::Result<Value> {
    let cluster = Cluster::open(cluster).await?;
    let pods: Api<Pod> =
        Api::namespaced(cluster.client.clone(), args.namespace.as_ref().unwrap_or(&cluster.namespace));
    let namespace = pods.namespace().unwrap_or_default().to_owned();
    let name = args.source.strip_prefix("pod/").or(args.source.strip_prefix("pods/")).unwrap_or(&args.source);
    let pod = cluster.ask(pods.get(name)).await.with_context(|| format!("pod {namespace}/{name}"))?;
    let node = pod.spec.and_then(|spec| spec.node_name);
    let node = node.with_context(|| format!("pod {namespace}/{name} is on no node yet"))?;
    let proxy = proxy_of(&cluster, &node).await?;
    let place = Place { namespace: &proxy.namespace, pod: &proxy.name, port: ADMIN };
    let page = cluster
        .forwarded(place, &question(&format!("{namespace}/{name}"), &args.destination), MAX_ANSWER)
        .await;
    match page {
        Ok(page) => Ok(page.json()?),
        Err(Unreached::NoPage { status: 400, words }) => bail!("{words}"),
        Err(why) => Err(why).with_context(|| format!("the proxy on {node}, {}", proxy.name)),
    }
}

fn local(state: &StateDir, args: &ExplainArgs) -> anyhow::Result<Value> {
    let report = pod::report(state)?;
    let source = pod::find(&report, &args.source())?;
    let proxy = report
        .system
        .iter()
        .find(|daemon| daemon.role == Role::Proxy && daemon.node.as_ref() == Some(&source.node));
    let netns = proxy.and_then(|proxy| proxy.state.netns.as_ref());
    let netns =
        netns.with_context(|| format!("no proxy runs on {}, the node of {}", source.node, source.key))?;
    get(&NetNs::open(netns)?, ADMIN, &question(&source.key.to_string(), &args.destination))
        .context("the proxy's admin page")
}

/// The page that answers it.
fn question(source: &str, destination: &str) -> String {
    format!("/debug/explain?source={}&destination={}", escaped(source), escaped(destination))
}

/// A page that is served on a namespace's loopback.
pub(crate) fn get(netns: &NetNs, port: u16, page: &str) -> anyhow::Result<Value> {
    let place = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = netns.run(|| TcpStream::connect_timeout(&place, CONNECT_TIMEOUT))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    write!(stream, "GET {page} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.take(MAX_ANSWER as u64).read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
    match head.split_whitespace().nth(1) {
        Some("200") => Ok(serde_json::from_str(body)?),
        Some("400") => bail!("{}", body.trim()),
        status => bail!("answered {}", status.unwrap_or("nothing")),
    }
}

/// For a query: what is neither a letter, a digit nor plain punctuation as percent signs.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// For people: what was asked, what was there to choose from, what is done, and whether it is let in.
fn shown(answer: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut page = format!("{} connects to {}\n", text(&answer["source"]["uid"]), text(&answer["asked"]));
    page += &match &answer["addressed"] {
        Value::Object(one) => one
            .iter()
            .map(|(kind, name)| format!("  that is the {kind} {}\n", text(name)))
            .collect::<String>(),
        _ => "  that is nobody whom the mesh knows\n".to_owned(),
    };
    for waypoint in answer["waypoints"].as_array().into_iter().flatten() {
        let _ = writeln!(page, "  it is reached through the waypoint {}", text(&waypoint["name"]));
    }
    page += &endpoints(answer);
    page += &decision(&answer["decision"]);
    page + &authorization(&answer["authorization"])
}

fn endpoints(answer: &Value) -> String {
    let rows: Vec<Vec<String>> = answer["endpoints"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|one| {
            let plain = |key: &str| match &one[key] {
                Value::Null => "-".to_owned(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let failed =
                if one["cooling"] == true { "failed a moment ago".to_owned() } else { "-".to_owned() };
            let why_not = if one["why_not"].is_null() { failed } else { plain("why_not") };
            vec![plain("uid"), plain("target_port"), plain("capacity"), plain("rank"), plain("load"), why_not]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "\n{}",
        render(&["ENDPOINT", "PORT", "WEIGHT", "SHARED SCOPES", "CONNECTIONS", "NOT CHOSEN"], &rows)
    )
}

fn decision(decision: &Value) -> String {
    let text = |key: &str| decision[key].as_str().unwrap_or_default();
    let what = match text("way") {
        "refused" => format!("refused: {}: {}", text("reason"), text("detail")),
        "passthrough" => format!("passed through to {} as it is, without encryption", text("destination")),
        "plain" => format!("plain TCP to {} at {}", text("workload"), text("destination")),
        "lookup" => format!("to {}, whose name {} is looked up", text("workload"), text("hostname")),
        _ => format!(
            "a tunnel to the {}, {} at {}, asked for {}",
            text("to"),
            text("workload"),
            text("peer"),
            text("authority")
        ),
    };
    format!("\nDecision: {what}\n")
}

fn authorization(verdict: &Value) -> String {
    let text = |key: &str| verdict[key].as_str().unwrap_or_default();
    match verdict["allowed"].as_bool() {
        None => String::new(),
        Some(true) if verdict["policy"].is_null() => {
            "Let in: yes, no ALLOW policy applies and no DENY policy matches\n".to_owned()
        }
        Some(true) => format!("Let in: yes, by policy {}\n", text("policy")),
        Some(false) => format!("Let in: no, {}: {}\n", text("reason"), text("detail")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_query_is_escaped() {
        assert_eq!(escaped("[fd00::1]:80"), "%5Bfd00::1%5D:80");
        assert_eq!(escaped("a&b=c d"), "a%26b%3Dc%20d");
    }

    #[test]
    fn a_page_says_what_and_why() {
        let answer = json!({
            "source": {"uid": "Kubernetes//Pod/shop/client"},
            "asked": "10.96.0.1:80",
            "addressed": {"service": "shop/web"},
            "waypoints": [],
            "endpoints": [
                {"uid": "a", "target_port": 8080, "capacity": 1, "rank": 0, "load": 3, "cooling": true, "why_not": null},
                {"uid": "b", "target_port": null, "capacity": 1, "rank": 0, "load": 0, "cooling": false, "why_not": "not ready"},
            ],
            "decision": {"way": "tunnel", "to": "destination", "workload": "a", "peer": "1:15008", "authority": "1:8080"},
            "authorization": {"allowed": false, "reason": "authorization_policy", "detail": "denied by policy shop/p"},
        });
        let page = shown(&answer);
        for part in [
            "that is the service shop/web",
            "failed a moment ago",
            "not ready",
            "Decision: a tunnel to the destination, a at 1:15008, asked for 1:8080",
            "Let in: no, authorization_policy: denied by policy shop/p",
        ] {
            assert!(page.contains(part), "{part} in {page}");
        }
        let refused = json!({"addressed": "unknown", "decision": {"way": "refused", "reason": "self_call", "detail": "x"}});
        assert!(shown(&refused).contains("Decision: refused: self_call: x"));
    }
}
