//! What there is from a file instead of a control plane (Z100).
//!
//! The file is YAML: `workloads`, `services`, `routes` and `policies`, each a list of messages in their JSON form (`istio.workload.Workload`,
//! `istio.workload.Service`, `culvert.waypoint.v1.Route`, `culvert.waypoint.v1.Policy`), with addresses as text. It is decoded by the code that decodes a control
//! plane's resources, and strictly: what is unknown in it refuses the file. A refused file changes nothing: the last good one stays
//! in force, and the log says so.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use culvert_model::Str;
use culvert_model::wire;
use culvert_runtime::config::parse_yaml_within;
use notify::{RecursiveMode, Watcher};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::{Map, Value};
use tokio::sync::mpsc;

use super::Follower;
use super::staging::Part;
use crate::shared::Shared;

/// Longest file: at about 500 bytes a workload, the 100,000 that a control plane may push.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Nodes in its text: a workload has about 40.
const MAX_NODES: usize = 8 << 20;
/// Notifications can be lost (network file systems); the file is compared at least this often.
const RECHECK: Duration = Duration::from_secs(30);
/// A file that is being written changes several times: one reading serves what arrives so close together.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Follows the file until the process ends.
pub async fn run(shared: Arc<Shared>, path: PathBuf) {
    let mut follower = Follower::new(shared);
    let mut file = LocalFile::new(&path);
    let (mut changes, _watcher) = watch(&path);
    loop {
        match file.read() {
            Ok(Some(part)) => {
                let changed = follower.staging.apply(part);
                follower.commit(&changed);
                tracing::info!(path = %path.display(), "local configuration is in force");
            }
            Ok(None) => {}
            Err(error) => {
                let kept = match file.good {
                    Some(_) => "the last good one stays in force",
                    None => "there is none before it",
                };
                tracing::error!(path = %path.display(), error = format!("{error:#}"), kept, "local configuration is refused");
            }
        }
        tokio::select! {
            // Without a watcher there is no sender.
            Some(()) = changes.recv() => tokio::time::sleep(DEBOUNCE).await,
            () = tokio::time::sleep(RECHECK) => {}
        }
        // Read what there is now once, however many notices there were.
        while changes.try_recv().is_ok() {}
    }
}

/// Watches the directory: a file that is replaced by a rename, or behind a changed link, is another file.
fn watch(path: &Path) -> (mpsc::Receiver<()>, Option<notify::RecommendedWatcher>) {
    let (notify, changes) = mpsc::channel(1);
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading a file is an event too, and would wake us for our own reads.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = notify.try_send(());
        }
    })
    .and_then(|mut watcher| watcher.watch(directory, RecursiveMode::NonRecursive).map(|()| watcher));
    match watcher {
        Ok(watcher) => (changes, Some(watcher)),
        Err(error) => {
            tracing::warn!(%error, every = ?RECHECK, "the directory cannot be watched; the file is compared instead");
            (changes, None)
        }
    }
}

/// The file, and what of it is in force.
struct LocalFile<'a> {
    path: &'a Path,
    /// Bytes last looked at, good or bad: the same again is not news.
    seen: Option<Vec<u8>>,
    good: Option<Names>,
    generation: u64,
}

/// Names of resources, to tell what a new file no longer has.
#[derive(Debug, Default)]
struct Names {
    addresses: BTreeSet<Str>,
    routes: BTreeSet<Str>,
    policies: BTreeSet<Str>,
}

impl<'a> LocalFile<'a> {
    fn new(path: &'a Path) -> Self {
        Self { path, seen: None, good: None, generation: 0 }
    }

    /// What leads from the last good content to this one; none if nothing changed since the last look.
    fn read(&mut self) -> anyhow::Result<Option<Part>> {
        let mut bytes = Vec::new();
        let opened = std::fs::File::open(self.path).context("cannot be opened")?;
        opened.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).context("cannot be read")?;
        if self.seen.as_ref() == Some(&bytes) {
            return Ok(None);
        }
        let parsed = std::str::from_utf8(&bytes).context("is not text").and_then(|text| {
            ensure!(bytes.len() as u64 <= MAX_FILE_BYTES, "longer than {MAX_FILE_BYTES} bytes");
            parse(text)
        });
        self.seen = Some(bytes);
        let (mut part, names) = parsed?;
        let before = self.good.take().unwrap_or_default();
        part.update.removed_addresses = before.addresses.difference(&names.addresses).cloned().collect();
        part.removed_routes = before.routes.difference(&names.routes).cloned().collect();
        part.removed_policies = before.policies.difference(&names.policies).cloned().collect();
        self.generation += 1;
        part.update.generation = self.generation;
        self.good = Some(names);
        Ok(Some(part))
    }
}

fn parse(text: &str) -> anyhow::Result<(Part, Names)> {
    let mut content = parse_yaml_within(text, "local configuration", MAX_NODES)?;
    let pool = DescriptorPool::decode(culvert_proto::DESCRIPTORS).expect("the build wrote a valid set");
    let (mut part, mut names) = (Part::default(), Names::default());
    for (list, field) in [("workloads", "workload"), ("services", "service")] {
        for (place, value) in entries(&mut content, list)? {
            let name = match list {
                "workloads" => text_at(&value, "uid"),
                _ => format!("{}/{}", text_at(&value, "namespace"), text_at(&value, "hostname")),
            };
            let value = Map::from_iter([(field.to_owned(), value)]).into();
            let body = encode(&pool, "istio.workload.Address", value);
            let body = body.with_context(|| format!("{place} {name:?}"))?;
            part.update.addresses.push(wire::address(&name, &body).with_context(|| place.clone())?);
            ensure!(names.addresses.insert(name.as_str().into()), "{place}: {name:?} stands there twice");
        }
    }
    for (place, value) in entries(&mut content, "routes")? {
        let name = route_name(&value);
        let body = encode(&pool, "culvert.waypoint.v1.Route", value);
        let body = body.with_context(|| format!("{place} {name:?}"))?;
        let decoded = wire::route(&name, &body);
        if let Some(error) = decoded.error {
            return Err(error).with_context(|| place);
        }
        part.routes.extend(decoded.route);
        ensure!(names.routes.insert(name.as_str().into()), "{place}: {name:?} stands there twice");
    }
    for (place, value) in entries(&mut content, "policies")? {
        let name = format!("{}/{}", text_at(&value, "namespace"), text_at(&value, "name"));
        let body = encode(&pool, "culvert.waypoint.v1.Policy", value);
        let body = body.with_context(|| format!("{place} {name:?}"))?;
        let decoded = wire::request::decode(&name, &body);
        if let Some(error) = decoded.error {
            return Err(error).with_context(|| place);
        }
        ensure!(names.policies.insert(name.as_str().into()), "{place}: {name:?} stands there twice");
        part.policies.push((name.into(), decoded.policy));
    }
    match content.keys().next() {
        Some(key) => bail!("unknown key {key:?}; want workloads, services, routes and policies"),
        None => Ok((part, names)),
    }
}

/// A route's name on the wire, by its fields.
fn route_name(value: &Value) -> String {
    let either = |snake: &str, camel: &str| match text_at(value, snake) {
        text if text.is_empty() => text_at(value, camel),
        text => text,
    };
    let port = value.get("port").and_then(Value::as_u64).unwrap_or(0);
    format!(
        "{}/{}/{}/{}/{}/{port}",
        text_at(value, "kind"),
        text_at(value, "namespace"),
        text_at(value, "name"),
        either("service_namespace", "serviceNamespace"),
        either("service_hostname", "serviceHostname"),
    )
}

/// The items of a list with their places, `workloads[3]`; the list is taken out of the content.
fn entries(content: &mut Map<String, Value>, list: &'static str) -> anyhow::Result<Vec<(String, Value)>> {
    match content.remove(list) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => {
            let placed = items.into_iter().enumerate();
            Ok(placed.map(|(index, item)| (format!("{list}[{index}]"), item)).collect())
        }
        Some(_) => bail!("{list}: want a list"),
    }
}

fn text_at(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn encode(pool: &DescriptorPool, message: &str, mut value: Value) -> anyhow::Result<Vec<u8>> {
    let descriptor = pool.get_message_by_name(message).expect("the set has all messages of the wire");
    bytes_of_addresses(&mut value);
    Ok(DynamicMessage::deserialize(descriptor, value)?.encode_to_vec())
}

/// The API has addresses as bytes, which JSON writes in base 64; people write them as text.
fn bytes_of_addresses(value: &mut Value) {
    let encode = |item: &mut Value| match item.as_str().and_then(|text| text.parse::<IpAddr>().ok()) {
        Some(IpAddr::V4(ip)) => *item = BASE64.encode(ip.octets()).into(),
        Some(IpAddr::V6(ip)) => *item = BASE64.encode(ip.octets()).into(),
        None => bytes_of_addresses(item),
    };
    match value {
        Value::Object(map) => map.iter_mut().for_each(|(key, item)| match (key.as_str(), item) {
            ("addresses", Value::Array(items)) => items.iter_mut().for_each(encode),
            ("address", item) => encode(item),
            (_, item) => bytes_of_addresses(item),
        }),
        Value::Array(items) => items.iter_mut().for_each(bytes_of_addresses),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
services:
- name: web
  namespace: shop
  hostname: web.shop
  addresses: [{address: 198.18.0.1}]
routes:
- {kind: HTTPRoute, namespace: shop, name: r, serviceNamespace: shop, serviceHostname: web.shop, port: 80}
policies:
- {namespace: shop, name: p, action: DENY}
"#;

    #[test]
    fn a_file_says_it_all() {
        let (part, _) = parse(FILE).unwrap();
        assert_eq!((part.update.addresses.len(), part.routes.len(), part.policies.len()), (1, 1, 1));
        assert_eq!(*part.routes[0].resource, *"HTTPRoute/shop/r/shop/web.shop/80");
        assert_eq!(*part.policies[0].0, *"shop/p");
    }

    #[test]
    fn what_is_wrong_refuses_the_file() {
        for (from, to) in [
            ("name: r,", "name: r, made_up: 1,"),
            ("action: DENY", "action: MAYBE"),
            ("kind: HTTPRoute", "kind: Ingress"),
            ("policies:", "polices:"),
            ("198.18.0.1", "198.18.0"),
        ] {
            assert!(parse(&FILE.replace(from, to)).is_err(), "{to}");
        }
    }

    #[test]
    fn what_is_no_longer_there_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("local.yaml");
        std::fs::write(&path, FILE).unwrap();
        let mut file = LocalFile::new(&path);
        assert!(file.read().unwrap().is_some());
        assert!(file.read().unwrap().is_none(), "nothing new");
        std::fs::write(&path, "services: []").unwrap();
        let part = file.read().unwrap().unwrap();
        let removed = (part.update.removed_addresses, part.removed_routes, part.removed_policies);
        assert_eq!((removed.0.len(), removed.1.len(), removed.2.len()), (1, 1, 1));
        std::fs::write(&path, "rubbish").unwrap();
        assert!(file.read().is_err());
        assert!(file.read().unwrap().is_none(), "said once");
    }
}
