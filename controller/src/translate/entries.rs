//! ServiceEntry and WorkloadEntry (D20, D26, D27, D29).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use culvert_k8s_api::meta::{ObjectMeta, StringMap};
use culvert_k8s_api::networking::{Resolution, ServiceEntry, WorkloadEntrySpec};
use culvert_proto::workload as proto;
use culvert_proto::workload::load_balancing::Mode;

use super::endpoints::{Endpoint, Targets, entry_ports, entry_protocol, tcp_ports};
use super::pods::{canonical_name, canonical_revision, speaks_hbone, tunnel};
use super::services::{ip_bytes, network_address};
use super::view::View;
use super::waypoints::{Asks, Traffic};
use super::{Names, Translation, vip};

/// The hosts of all ServiceEntries that are sent.
pub(super) struct Hosts<'a> {
    /// By resource name; the entry that has it.
    owners: BTreeMap<String, (&'a ServiceEntry, &'a str)>,
    /// Resource names of hosts that no other service answers to with more right (D26).
    canonical: BTreeSet<String>,
    vips: BTreeMap<String, Ipv4Addr>,
}

impl Hosts<'_> {
    /// Resource names of the hosts of an entry.
    pub fn keys_of(&self, entry: &ServiceEntry) -> Vec<String> {
        let own = entry.spec.hosts.iter().map(|host| key(entry, host));
        own.filter(|key| {
            self.owners.get(key).is_some_and(|(owner, _)| owner.metadata.name == entry.metadata.name)
        })
        .collect()
    }
}

fn key(entry: &ServiceEntry, host: &str) -> String {
    format!("{}/{host}", entry.metadata.namespace)
}

/// Decides whose each host is, and allocates addresses.
pub(super) fn hosts<'a>(
    view: &View<'a>,
    previous: &BTreeMap<String, Ipv4Addr>,
    out: &mut Translation,
) -> Hosts<'a> {
    let cluster: BTreeSet<String> =
        view.services.keys().map(|(namespace, name)| view.service_host(namespace, name)).collect();
    let in_cluster = |namespace: &str, host: &str| {
        let rest = host.strip_suffix(view.settings.cluster_domain.as_str());
        let rest = rest.and_then(|rest| rest.strip_suffix(".svc."));
        let name = rest.and_then(|rest| rest.strip_suffix(namespace)?.strip_suffix('.'));
        name.is_some_and(|name| view.services.contains_key(&(namespace, name)))
    };
    let mut entries: Vec<&ServiceEntry> = view.service_entries.values().copied().collect();
    entries.sort_by_key(|entry| entry.metadata.age());
    let mut hosts = Hosts { owners: BTreeMap::new(), canonical: BTreeSet::new(), vips: BTreeMap::new() };
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    for entry in entries {
        let meta = &entry.metadata;
        for host in &entry.spec.hosts {
            let key = key(entry, host);
            if hosts.owners.contains_key(&key) || in_cluster(&meta.namespace, host) {
                out.notes.push(format!(
                    "ServiceEntry {}/{}: {host} is already a service of this namespace",
                    meta.namespace, meta.name
                ));
                continue;
            }
            if seen.insert(host) && !cluster.contains(host) {
                hosts.canonical.insert(key.clone());
            }
            hosts.owners.insert(key, (entry, host));
        }
    }
    hosts.vips = allocate(&hosts, view, previous);
    out.vips.clone_from(&hosts.vips);
    hosts
}

/// Names without an address get one, unless connections must go where they were meant to go, or the name stands for many.
fn allocate(
    hosts: &Hosts<'_>,
    view: &View<'_>,
    previous: &BTreeMap<String, Ipv4Addr>,
) -> BTreeMap<String, Ipv4Addr> {
    let wants = |(entry, host): &(&ServiceEntry, &str)| {
        entry.spec.addresses.is_empty() && entry.spec.resolution != Resolution::None && !host.starts_with('*')
    };
    let names: BTreeSet<String> =
        hosts.owners.iter().filter(|(_, owner)| wants(owner)).map(|(key, _)| key.clone()).collect();
    let written = view.service_entries.values().flat_map(|entry| &entry.spec.addresses);
    let taken = written.filter_map(|block| match block.0.addr() {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    });
    vip::allocate(&names, previous, &taken.collect())
}

/// Converts every ServiceEntry, its endpoints, and every WorkloadEntry.
pub(super) fn convert_all(
    view: &View<'_>,
    hosts: &Hosts<'_>,
    targets: &Targets<'_>,
    names: &Names,
    out: &mut Translation,
) {
    for (key, (entry, host)) in &hosts.owners {
        let message = service(view, hosts, key, entry, host);
        out.insert(key.clone(), proto::address::Type::Service(message));
    }
    for entry in view.service_entries.values() {
        endpoints(view, hosts, entry, names, out);
    }
    for ((namespace, name), entry) in &view.workload_entries {
        let (meta, spec) = (&entry.metadata, &entry.spec);
        // Its own labels are those of the spec; the object's fill in.
        let mut labels = meta.labels.clone();
        labels.extend(spec.labels.clone());
        let uid = super::entry_uid(view.settings, namespace, name);
        let mut message = workload(view, meta, spec, &labels, uid);
        message.services = targets.of(namespace, &labels, Endpoint::Entry(spec));
        message.authorization_policies = names.of(namespace, &labels);
        out.insert(message.uid.clone(), proto::address::Type::Workload(message));
    }
}

fn service(
    view: &View<'_>,
    hosts: &Hosts<'_>,
    key: &str,
    entry: &ServiceEntry,
    host: &str,
) -> proto::Service {
    let (meta, spec, network) = (&entry.metadata, &entry.spec, &view.settings.network);
    let written = spec.addresses.iter().map(|block| {
        let whole = block.0.prefix_len() == block.0.max_prefix_len();
        let mut address = network_address(network, block.0.addr());
        address.length = (!whole).then(|| block.0.prefix_len().into());
        address
    });
    let allocated = hosts.vips.get(key).map(|ip| network_address(network, IpAddr::V4(*ip)));
    let ports = tcp_ports(entry).map(|port| proto::Port {
        service_port: port.number.get().into(),
        target_port: port.target_port.unwrap_or(port.number).get().into(),
        app_protocol: entry_protocol(&port.protocol).into(),
    });
    let (waypoint, weighted_waypoints) = view.waypoint(Asks { meta, traffic: Traffic::Service });
    let passthrough = spec.resolution == Resolution::None;
    proto::Service {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        hostname: host.to_owned(),
        addresses: written.chain(allocated).collect(),
        ports: ports.collect(),
        subject_alt_names: spec.subject_alt_names.clone(),
        waypoint,
        weighted_waypoints,
        load_balancing: passthrough.then(|| proto::LoadBalancing {
            mode: Mode::Passthrough.into(),
            ..proto::LoadBalancing::default()
        }),
        canonical: hosts.canonical.contains(key),
        ..proto::Service::default()
    }
}

fn endpoints(view: &View<'_>, hosts: &Hosts<'_>, entry: &ServiceEntry, names: &Names, out: &mut Translation) {
    let keys = hosts.keys_of(entry);
    if keys.is_empty() {
        return;
    }
    for (index, endpoint) in entry.spec.endpoints.iter().enumerate() {
        let before = &entry.spec.endpoints[..index];
        let twin = before.iter().any(|other| other.address == endpoint.address);
        let section = match (endpoint.address.is_empty(), twin) {
            (false, false) => endpoint.address.clone(),
            _ => format!("{}-{index}", endpoint.address),
        };
        add(view, entry, endpoint, &section, &keys, names, out);
    }
    let by_name = matches!(entry.spec.resolution, Resolution::Dns | Resolution::DnsRoundRobin);
    if by_name && entry.spec.endpoints.is_empty() && entry.spec.workload_selector.is_none() {
        // No endpoint is given, so each host is its own.
        for host in entry.spec.hosts.iter().filter(|host| !host.starts_with('*')) {
            let key = key(entry, host);
            if keys.contains(&key) {
                let spec = WorkloadEntrySpec { address: host.clone(), ..WorkloadEntrySpec::default() };
                add(view, entry, &spec, host, &[key], names, out);
            }
        }
    }
}

fn add(
    view: &View<'_>,
    entry: &ServiceEntry,
    endpoint: &WorkloadEntrySpec,
    section: &str,
    keys: &[String],
    names: &Names,
    out: &mut Translation,
) {
    let meta = &entry.metadata;
    let group = "networking.istio.io/ServiceEntry";
    let uid = format!("{}/{group}/{}/{}/{section}", view.settings.cluster_id, meta.namespace, meta.name);
    let mut message = workload(view, meta, endpoint, &endpoint.labels, uid);
    let list = proto::PortList { ports: entry_ports(entry, Endpoint::Entry(endpoint)) };
    message.services = keys.iter().map(|key| (key.clone(), list.clone())).collect::<HashMap<_, _>>();
    message.authorization_policies = names.of(&meta.namespace, &endpoint.labels);
    out.insert(message.uid.clone(), proto::address::Type::Workload(message));
}

fn workload(
    view: &View<'_>,
    meta: &ObjectMeta,
    spec: &WorkloadEntrySpec,
    labels: &StringMap,
    uid: String,
) -> proto::Workload {
    let settings = view.settings;
    let native = speaks_hbone(labels);
    let network = if spec.network.is_empty() { &settings.network } else { &spec.network };
    let mut locality = spec.locality.split('/').map(str::to_owned);
    let mut part = || locality.next().unwrap_or_default();
    let locality = proto::Locality { region: part(), zone: part(), subzone: part() };
    proto::Workload {
        uid,
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        addresses: spec.ip().map(ip_bytes).into_iter().collect(),
        hostname: if spec.ip().is_none() { spec.address.clone() } else { String::new() },
        network: network.clone(),
        tunnel_protocol: tunnel(native).into(),
        trust_domain: settings.trust_domain.clone(),
        service_account: if spec.service_account.is_empty() { "default" } else { &spec.service_account }
            .to_owned(),
        waypoint: view.waypoint(Asks { meta, traffic: Traffic::Workload }).0,
        canonical_name: canonical_name(labels, &meta.name),
        canonical_revision: canonical_revision(labels),
        workload_type: proto::WorkloadType::Pod.into(),
        workload_name: meta.name.clone(),
        native_tunnel: native,
        status: proto::WorkloadStatus::Healthy.into(),
        cluster_id: settings.cluster_id.clone(),
        locality: (locality != proto::Locality::default()).then_some(locality),
        capacity: spec.weight,
        ..proto::Workload::default()
    }
}
