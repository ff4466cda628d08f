//! What a pod's name query means (Z76-Z83). Pure: who asks upstream and how messages look is the proxy's business.

use std::net::IpAddr;
use std::sync::Arc;

use crate::balance::usable;
use crate::service::{IpFamilies, Service};
use crate::snapshot::{Snapshot, best};
use crate::workload::Workload;

/// The most addresses that an answer carries. A headless service may have thousands; a stream's message of 64 KiB holds about
/// 2,000 AAAA records of 28 bytes, and no client tries more than a handful.
const MAX_ADDRESSES: usize = 256;

/// The kind of address asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueryFamily {
    /// A.
    V4,
    /// AAAA.
    V6,
}

/// What to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DnsDecision {
    /// These.
    Answer {
        /// At least one, shuffled.
        addresses: Vec<IpAddr>,
        /// The name without the client's search domain, if one was cut off: the answer is then a CNAME to it (Z78).
        canonical: Option<String>,
    },
    /// The name is ours and has no address of this family (Z82).
    NoData,
    /// The name is not ours (Z82, Z83).
    Forward,
}

/// Decides a query for `name` (any case, with or without the root's dot) from `client`.
///
/// The name is tried as it is and then without each search domain that Kubernetes gives the client's namespace, each of them
/// first whole and then with its leading labels replaced by `*` (Z78, Z79). A service that is hidden from the client is
/// not found (Z75), and neither is one outside the cluster without an address of its own (Z83).
pub fn lookup(
    snapshot: &Snapshot,
    client: &Workload,
    cluster_domain: &str,
    name: &str,
    family: QueryFamily,
    random: &mut dyn FnMut(u64) -> u64,
) -> DnsDecision {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let Some((service, alias)) = find(snapshot, client, cluster_domain, &name) else {
        return DnsDecision::Forward;
    };
    let mut addresses = addresses(snapshot, client, service, family);
    if addresses.is_empty() {
        return DnsDecision::NoData;
    }
    shuffle(&mut addresses, random);
    addresses.truncate(MAX_ADDRESSES);
    let canonical = (alias.len() < name.len()).then(|| alias.to_owned());
    DnsDecision::Answer { addresses, canonical }
}

/// The service meant, and the form of the name that found it.
fn find<'a, 'n>(
    snapshot: &'a Snapshot,
    client: &Workload,
    cluster_domain: &str,
    name: &'n str,
) -> Option<(&'a Arc<Service>, &'n str)> {
    let own = format!("{}.svc.{cluster_domain}", client.namespace);
    let services = format!("svc.{cluster_domain}");
    let aliases = [Some(name), cut(name, &own), cut(name, &services), cut(name, cluster_domain)];
    aliases.into_iter().flatten().find_map(|alias| {
        let service = candidates(snapshot, client, cluster_domain, alias)?;
        Some((service, alias))
    })
}

/// `name` without a search domain.
fn cut<'n>(name: &'n str, domain: &str) -> Option<&'n str> {
    name.strip_suffix(domain)?.strip_suffix('.').filter(|left| !left.is_empty())
}

/// The service whose host name is this one, or the closest wildcard above it.
fn candidates<'a>(
    snapshot: &'a Snapshot,
    client: &Workload,
    cluster_domain: &str,
    alias: &str,
) -> Option<&'a Arc<Service>> {
    let of = |hostname: &str| {
        let answerable = |s: &&Arc<Service>| s.addresses.iter().any(single) || in_cluster(s, cluster_domain);
        let all = snapshot.services_named(hostname);
        if all.iter().all(|s| answerable(&s)) {
            return best(all, &client.namespace);
        }
        let fit: Vec<_> = all.iter().filter(answerable).cloned().collect();
        let key = &best(&fit, &client.namespace)?.key;
        snapshot.service_by_key(key)
    };
    if let Some(service) = of(alias) {
        return Some(service);
    }
    let mut rest = alias;
    // One buffer for all wildcards: a name has at most 127 labels.
    let mut wildcard = String::with_capacity(alias.len() + 1);
    while let Some((_, parent)) = rest.split_once('.') {
        wildcard.clear();
        wildcard.push_str("*.");
        wildcard.push_str(parent);
        if let Some(service) = of(&wildcard) {
            return Some(service);
        }
        rest = parent;
    }
    None
}

/// Kubernetes' own services are told from external ones by their name; only they may be headless.
fn in_cluster(service: &Service, cluster_domain: &str) -> bool {
    cut(&service.key.hostname, cluster_domain).is_some_and(|left| left.ends_with(".svc"))
}

/// A block is no address to answer with.
fn single(prefix: &crate::address::NetworkPrefix) -> bool {
    prefix.prefix.prefix_len() == prefix.prefix.max_prefix_len()
}

fn addresses(snapshot: &Snapshot, client: &Workload, service: &Service, family: QueryFamily) -> Vec<IpAddr> {
    let fits = |address: &IpAddr| address.is_ipv4() == (family == QueryFamily::V4);
    if service.addresses.iter().any(single) {
        let near = service.addresses.iter().filter(|p| single(p) && p.network == client.network);
        return near.map(|p| p.prefix.addr()).filter(fits).collect();
    }
    let offered = match (service.ip_families, family) {
        (IpFamilies::Automatic | IpFamilies::Dual, _) => true,
        (IpFamilies::V4, family) => family == QueryFamily::V4,
        (IpFamilies::V6, family) => family == QueryFamily::V6,
    };
    if !offered {
        return Vec::new();
    }
    // Host-network endpoints answer at their node's address, which is theirs for this purpose.
    let ready = snapshot.endpoints(&service.key).filter(|w| usable(w, &service.load_balancing));
    let near = ready.filter(|w| w.network == client.network);
    let mut all: Vec<IpAddr> = near.flat_map(|w| w.addresses.iter().copied()).filter(fits).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Fisher and Yates.
fn shuffle(addresses: &mut [IpAddr], random: &mut dyn FnMut(u64) -> u64) {
    for last in (1..addresses.len()).rev() {
        let other = usize::try_from(random(last as u64 + 1)).unwrap_or(0).min(last);
        addresses.swap(last, other);
    }
}
