//! Pages of proxies and controllers as rows.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::source::Answer;
use super::{Filter, Listing};
use crate::args::What;
use crate::output::Table;

pub(super) fn listing(what: What, answers: &[Answer], filter: &Filter) -> Listing {
    let pages = || answers.iter().filter_map(|it| Some((it, it.outcome.as_ref().ok()?)));
    match what {
        What::Services => services(pages().next().map(|it| it.1), filter),
        What::Policies => policies(pages().next().map(|it| it.1), filter),
        What::Certificates => {
            certificates(pages().map(|(answer, page)| (answer.node.as_str(), page)), filter)
        }
        What::Connections => connections(pages().map(|(answer, page)| (answer.node.as_str(), page)), filter),
        What::Proxies => proxies(pages().map(|(answer, page)| (answer.from.as_str(), page)), filter),
        What::Workloads | What::All => workloads(pages().next().map(|it| it.1), filter),
    }
}

/// K01.
fn workloads(dump: Option<&Value>, filter: &Filter) -> Listing {
    let mut table = Table::new(&[
        "NAMESPACE",
        "NAME",
        "ADDRESS",
        "NODE",
        "WAYPOINT",
        "PROTOCOL",
        "+IDENTITY",
        "+HEALTH",
        "+POLICIES",
        "+UID",
    ]);
    let mut items = Vec::new();
    for workload in sorted(dump, "workloads") {
        let (namespace, name) = (text(&workload["namespace"]), text(&workload["name"]));
        let addresses = texts(&workload["addresses"]);
        let asked = filter.address.is_none_or(|asked| addresses.contains(&asked.to_string()));
        if !asked || !filter.takes(&namespace, &name) {
            continue;
        }
        let shown = if addresses.is_empty() { text(&workload["hostname"]) } else { addresses.join(",") };
        table.row([
            namespace,
            name,
            shown,
            text(&workload["node"]),
            waypoint(&workload["waypoint"]),
            protocol(&workload["tunnel_protocol"]).to_owned(),
            text(&workload["identity"]),
            text(&workload["health"]),
            texts(&workload["authorization_policies"]).join(","),
            text(&workload["uid"]),
        ]);
        items.push(workload.clone());
    }
    Listing { kind: "WorkloadList", items, table }
}

/// K02. Endpoints are those that take traffic of all that there are.
fn services(dump: Option<&Value>, filter: &Filter) -> Listing {
    let mut endpoints: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for workload in array(dump, "workloads") {
        let healthy = usize::from(workload["health"] == "Healthy");
        for service in workload["services"].as_object().into_iter().flat_map(serde_json::Map::keys) {
            let count = endpoints.entry(service).or_default();
            *count = (count.0 + healthy, count.1 + 1);
        }
    }
    let mut table = Table::new(&[
        "NAMESPACE",
        "NAME",
        "ADDRESS",
        "WAYPOINT",
        "ENDPOINTS",
        "+PORTS",
        "+BALANCING",
        "+HOSTNAME",
    ]);
    let mut items = Vec::new();
    for service in sorted(dump, "services") {
        let key = text(&service["key"]);
        let (namespace, hostname) = key.split_once('/').unwrap_or(("", &key));
        let name = text(&service["name"]);
        if !filter.takes(namespace, &name) {
            continue;
        }
        let (healthy, all) = endpoints.get(key.as_str()).copied().unwrap_or_default();
        let addresses: Vec<String> =
            array(Some(service), "addresses").iter().map(|it| prefix(&it["prefix"])).collect();
        let ports =
            array(Some(service), "ports").iter().map(|port| text(&port["service_port"])).collect::<Vec<_>>();
        table.row([
            namespace.to_owned(),
            name,
            addresses.join(","),
            waypoint(&service["waypoint"]),
            format!("{healthy}/{all}"),
            ports.join(","),
            text(&service["load_balancing"]["mode"]),
            hostname.to_owned(),
        ]);
        let mut item = service.clone();
        item["endpoints"] = json!({"healthy": healthy, "total": all});
        items.push(item);
    }
    Listing { kind: "ServiceList", items, table }
}

/// K03.
fn policies(dump: Option<&Value>, filter: &Filter) -> Listing {
    let mut table =
        Table::new(&["NAMESPACE", "NAME", "ACTION", "SCOPE", "+GROUPS", "+DRY-RUN", "+UNDECODABLE"]);
    let mut items = Vec::new();
    for policy in sorted(dump, "policies") {
        let key = text(&policy["key"]);
        let (namespace, name) = key.split_once('/').unwrap_or(("", &key));
        if !filter.takes(namespace, name) {
            continue;
        }
        table.row([
            namespace.to_owned(),
            name.to_owned(),
            text(&policy["action"]),
            text(&policy["scope"]),
            array(Some(policy), "groups").len().to_string(),
            text(&policy["dry_run"]),
            text(&policy["undecodable"]),
        ]);
        items.push(policy.clone());
    }
    Listing { kind: "PolicyList", items, table }
}

/// K04. Of all nodes; the namespace is that of the identity.
fn certificates<'a>(pages: impl Iterator<Item = (&'a str, &'a Value)>, filter: &Filter) -> Listing {
    let mut table = Table::new(&[
        "NODE",
        "IDENTITY",
        "STATUS",
        "VALID",
        "NOT AFTER",
        "+NOT BEFORE",
        "+SERIAL",
        "+FAILURES",
    ]);
    let mut items = Vec::new();
    for (node, page) in pages {
        for certificate in page.as_array().into_iter().flatten() {
            let identity = text(&certificate["identity"]);
            // spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT
            let mut parts = identity.split('/').skip(4).step_by(2);
            let (namespace, account) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            if !filter.takes(namespace, account) {
                continue;
            }
            let valid = certificate["state"] == "Available";
            let why = text(&certificate["lastError"]);
            let failures = text(&certificate["failures"]);
            table.row([
                node.to_owned(),
                identity.clone(),
                text(&certificate["state"]),
                valid.to_string(),
                text(&certificate["notAfter"]),
                text(&certificate["notBefore"]),
                text(&certificate["serial"]),
                if why.is_empty() { failures } else { format!("{failures}: {why}") },
            ]);
            items.push(on(node, certificate));
        }
    }
    Listing { kind: "CertificateList", items, table }
}

/// K05. Of all nodes; the namespace is that of the node's own pod.
fn connections<'a>(pages: impl Iterator<Item = (&'a str, &'a Value)>, filter: &Filter) -> Listing {
    let mut table = Table::new(&[
        "NODE",
        "WORKLOAD",
        "DIRECTION",
        "LOCAL",
        "REMOTE",
        "TARGET",
        "PROTOCOL",
        "+PEER",
        "+SENT",
        "+RECEIVED",
        "+AGE",
    ]);
    let mut items = Vec::new();
    for (node, page) in pages {
        for connection in page.as_array().into_iter().flatten() {
            let uid = text(&connection["workload"]);
            let (namespace, name) = of_uid(&uid);
            let direction = text(&connection["direction"]);
            let wanted = filter.direction.is_none_or(|wanted| direction == wanted);
            if !wanted || !filter.takes(namespace, name) {
                continue;
            }
            let [source, destination, hbone] =
                ["source", "destination", "hbone"].map(|key| text(&connection[key]));
            let protocol = if hbone.is_empty() { "TCP" } else { "HBONE" };
            // Towards the tunnel's other end, if there is one.
            let (local, remote, target) = if direction == "outbound" {
                let remote = if hbone.is_empty() { destination.clone() } else { hbone };
                (source, remote, destination)
            } else {
                (destination.clone(), source, destination)
            };
            table.row([
                node.to_owned(),
                if name.is_empty() { uid.clone() } else { format!("{namespace}/{name}") },
                direction,
                local,
                remote,
                target,
                protocol.to_owned(),
                text(&connection["source_identity"]),
                text(&connection["sent"]),
                text(&connection["received"]),
                crate::cluster::seen::age(connection["open_for_ms"].as_i64().unwrap_or(0) / 1_000),
            ]);
            items.push(on(node, connection));
        }
    }
    Listing { kind: "ConnectionList", items, table }
}

/// K15. `BEHIND` is by type: `-` has the newest generation.
fn proxies<'a>(pages: impl Iterator<Item = (&'a str, &'a Value)>, filter: &Filter) -> Listing {
    let mut table = Table::new(&[
        "NODE",
        "POD",
        "CONTROLLER",
        "VERSION",
        "CONNECTED",
        "WORKLOADS",
        "POLICIES",
        "+GENERATION",
        "+SENT",
        "+REFUSED",
    ]);
    let mut items = Vec::new();
    for (controller, page) in pages {
        for proxy in sorted(Some(page), "proxies") {
            let (namespace, pod) = (text(&proxy["namespace"]), text(&proxy["pod"]));
            // Proxies are the mesh's own: a namespace does not limit them, a name does.
            if filter.name.as_ref().is_some_and(|name| *name != pod && proxy["node"] != name.as_str()) {
                continue;
            }
            let progress = |kind: &str| state(&proxy["types"][kind]);
            let types = proxy["types"].as_object();
            let sum = |key: &str| -> u64 {
                types.into_iter().flatten().filter_map(|(_, it)| it[key].as_u64()).sum()
            };
            let acked =
                types.into_iter().flatten().map(|(_, it)| it["ackedGeneration"].as_u64()).min().flatten();
            let why = types.into_iter().flatten().find_map(|(_, it)| it["lastNack"].as_str());
            table.row([
                text(&proxy["node"]),
                pod,
                controller.to_owned(),
                text(&proxy["version"]),
                text(&proxy["connected"])
                    .split('.')
                    .next()
                    .unwrap_or_default()
                    .trim_end_matches('Z')
                    .to_owned(),
                progress("Address"),
                progress("Authorization"),
                acked.map(|it| it.to_string()).unwrap_or_default(),
                sum("sent").to_string(),
                why.map_or_else(|| sum("nacked").to_string(), |why| format!("{}: {why}", sum("nacked"))),
            ]);
            let mut item = proxy.clone();
            item["controller"] = json!(controller);
            item["namespace"] = json!(namespace);
            items.push(item);
        }
    }
    Listing { kind: "ProxyList", items, table }
}

/// In the words that Istio's tools use.
fn state(progress: &Value) -> String {
    match progress {
        Value::Null => "NOT ASKED",
        it if it["sent"] == 0 && it["ackedGeneration"].is_null() => "NOT SENT",
        it if it["lastNack"].is_string() => "ERROR",
        it if it["behindSince"].is_string() => "STALE",
        _ => "SYNCED",
    }
    .to_owned()
}

impl Filter {
    fn takes(&self, namespace: &str, name: &str) -> bool {
        self.namespace.as_ref().is_none_or(|wanted| wanted == namespace)
            && self.name.as_ref().is_none_or(|wanted| wanted == name)
    }
}

/// A value and where it was found.
fn on(node: &str, value: &Value) -> Value {
    let mut value = value.clone();
    if value.is_object() {
        value["node"] = json!(node);
    }
    value
}

fn array<'a>(of: Option<&'a Value>, key: &str) -> &'a [Value] {
    of.and_then(|of| of[key].as_array()).map_or(&[], Vec::as_slice)
}

/// By what is shown first: pages have no order.
fn sorted<'a>(of: Option<&'a Value>, key: &str) -> Vec<&'a Value> {
    let mut all: Vec<&Value> = array(of, key).iter().collect();
    all.sort_by_key(|it| {
        [text(&it["namespace"]), text(&it["key"]), text(&it["name"]), text(&it["node"]), text(&it["uid"])]
    });
    all
}

/// A scalar as text; null is empty.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

/// `10.0.0.1/32` is one address.
fn prefix(value: &Value) -> String {
    let text = text(value);
    let single = text.strip_suffix("/32").or_else(|| text.strip_suffix("/128"));
    single.unwrap_or(&text).to_owned()
}

fn protocol(value: &Value) -> &'static str {
    match value.as_str() {
        Some("Hbone") => "HBONE",
        Some("LegacyIstioMtls") => "MTLS",
        _ => "TCP",
    }
}

fn waypoint(value: &Value) -> String {
    let to = &value["destination"];
    let name = text(&to["Hostname"]);
    if name.is_empty() { text(&to["Address"]["address"]) } else { name }
}

/// Namespace and name in `CLUSTER/GROUP/KIND/NAMESPACE/NAME`; empty if there are none.
fn of_uid(uid: &str) -> (&str, &str) {
    let mut parts = uid.splitn(5, '/').skip(3);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Value {
        json!({
            "workloads": [
                {"uid": "Kubernetes//Pod/shop/web-2", "name": "web-2", "namespace": "shop", "addresses": ["100.64.1.3"],
                 "node": "b", "tunnel_protocol": "Hbone", "health": "Unhealthy", "waypoint": null,
                 "services": {"shop/web.shop.svc.cluster.local": []}},
                {"uid": "Kubernetes//Pod/shop/web-1", "name": "web-1", "namespace": "shop", "addresses": ["100.64.1.2", "fd00::2"],
                 "node": "a", "tunnel_protocol": "None", "health": "Healthy",
                 "waypoint": {"destination": {"Hostname": "shop/w.shop.svc.cluster.local"}, "hbone_port": 15008},
                 "services": {"shop/web.shop.svc.cluster.local": []}},
                {"uid": "u", "name": "x", "namespace": "other", "addresses": [], "hostname": "db.example", "node": ""},
            ],
            "services": [{"key": "shop/web.shop.svc.cluster.local", "name": "web", "ports": [{"service_port": 80}],
                "addresses": [{"network": "", "prefix": "198.18.1.1/32"}], "load_balancing": {"mode": "Any"}, "waypoint": null}],
            "policies": [{"key": "shop/p", "action": "Deny", "scope": "Namespace", "groups": [{}], "dry_run": false}],
        })
    }

    fn answer(page: Value) -> Vec<Answer> {
        vec![Answer { from: "proxy/a".into(), node: "a".into(), outcome: Ok(page) }]
    }

    fn shop() -> Filter {
        Filter { namespace: Some("shop".into()), ..Filter::default() }
    }

    fn lines(what: What, page: Value, filter: &Filter) -> Vec<Vec<String>> {
        let text = listing(what, &answer(page), filter).table.render(false);
        let cells = |line: &str| {
            line.split("   ").map(|it| it.trim().to_owned()).filter(|it| !it.is_empty()).collect()
        };
        text.lines().map(cells).collect()
    }

    /// K01.
    #[test]
    fn workloads_have_the_columns_of_istios_tool_and_its_filters() {
        let all = lines(What::Workloads, dump(), &shop());
        assert_eq!(all[0], ["NAMESPACE", "NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"]);
        assert_eq!(
            all[1],
            ["shop", "web-1", "100.64.1.2,fd00::2", "a", "shop/w.shop.svc.cluster.local", "TCP"]
        );
        assert_eq!(all[2], ["shop", "web-2", "100.64.1.3", "b", "-", "HBONE"]);
        assert_eq!(all.len(), 3);
        let by_address = Filter { address: Some("fd00::2".parse().unwrap()), ..Filter::default() };
        assert_eq!(lines(What::Workloads, dump(), &by_address).len(), 2);
        let by_name = Filter { name: Some("web-2".into()), ..shop() };
        assert_eq!(lines(What::Workloads, dump(), &by_name)[1][1], "web-2");
        assert_eq!(lines(What::Workloads, dump(), &Filter::default()).len(), 4);
    }

    /// K02.
    #[test]
    fn services_count_their_healthy_endpoints() {
        let all = lines(What::Services, dump(), &shop());
        assert_eq!(all[1], ["shop", "web", "198.18.1.1", "-", "1/2"]);
        let items = listing(What::Services, &answer(dump()), &shop()).items;
        assert_eq!(items[0]["endpoints"], json!({"healthy": 1, "total": 2}));
    }

    /// K03.
    #[test]
    fn policies_say_what_they_do_and_for_whom() {
        assert_eq!(lines(What::Policies, dump(), &shop())[1], ["shop", "p", "Deny", "Namespace"]);
        assert!(
            listing(
                What::Policies,
                &answer(dump()),
                &Filter { namespace: Some("x".into()), ..Filter::default() }
            )
            .table
            .is_empty()
        );
    }

    /// K04.
    #[test]
    fn certificates_are_those_of_the_namespaces_identities() {
        let page = json!([
            {"identity": "spiffe://cluster.local/ns/shop/sa/web", "state": "Available", "serial": "ab", "notAfter": "2026-12-01T00:00:00Z",
             "notBefore": "2026-11-30T00:00:00Z", "failures": 0},
            {"identity": "spiffe://cluster.local/ns/x/sa/y", "state": "Unavailable", "failures": 2, "lastError": "refused"}]);
        let all = lines(What::Certificates, page.clone(), &shop());
        assert_eq!(all.len(), 2);
        assert_eq!(
            all[1],
            ["a", "spiffe://cluster.local/ns/shop/sa/web", "Available", "true", "2026-12-01T00:00:00Z"]
        );
        let items = listing(What::Certificates, &answer(page), &Filter::default()).items;
        assert_eq!((items.len(), &items[0]["node"]), (2, &json!("a")));
    }

    /// K05.
    #[test]
    fn connections_say_both_ends_and_the_target() {
        let page = json!([
            {"id": 1, "direction": "outbound", "workload": "Kubernetes//Pod/shop/web-1", "source": "100.64.1.2:4000",
             "destination": "100.64.2.2:80", "hbone": "100.64.2.2:15008", "sent": 1, "received": 2, "open_for_ms": 3000},
            {"id": 2, "direction": "inbound", "workload": "Kubernetes//Pod/shop/web-1", "source": "100.64.3.1:5000",
             "destination": "100.64.1.2:80", "hbone": null}]);
        let all = lines(What::Connections, page.clone(), &shop());
        assert_eq!(
            all[1],
            ["a", "shop/web-1", "outbound", "100.64.1.2:4000", "100.64.2.2:15008", "100.64.2.2:80", "HBONE"]
        );
        assert_eq!(
            all[2],
            ["a", "shop/web-1", "inbound", "100.64.1.2:80", "100.64.3.1:5000", "100.64.1.2:80", "TCP"]
        );
        let inbound = Filter { direction: Some("inbound"), ..Filter::default() };
        assert_eq!(lines(What::Connections, page, &inbound).len(), 2);
    }

    /// K15.
    #[test]
    fn proxies_say_how_far_they_are_by_type() {
        let types = json!({
            "Address": {"ackedGeneration": 7, "behindSince": "2026-11-30T00:00:00Z", "sent": 2, "nacked": 0, "lastNack": null},
            "Authorization": {"ackedGeneration": 8, "behindSince": null, "sent": 2, "nacked": 0, "lastNack": null}});
        let page = json!({"proxies": [{"node": "b", "pod": "zt-b", "namespace": "s", "version": "0.1.0",
            "connected": "2026-11-30T04:00:00.5Z", "types": types}]});
        let all = lines(What::Proxies, page, &shop());
        assert_eq!(all[1], ["b", "zt-b", "proxy/a", "0.1.0", "2026-11-30T04:00:00", "STALE", "SYNCED"]);
        assert_eq!(state(&Value::Null), "NOT ASKED");
        assert_eq!(state(&json!({"sent": 0, "ackedGeneration": null})), "NOT SENT");
        assert_eq!(state(&json!({"sent": 1, "ackedGeneration": 1, "lastNack": "no"})), "ERROR");
    }
}
