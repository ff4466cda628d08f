//! What a service is made of at one moment: addresses, ports and the endpoints behind them. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use culvert_k8s_api::core::{IpFamily, IpFamilyPolicy, Pod, Protocol, Service, ServicePort, ServiceType};
use culvert_k8s_api::meta::selects;
use culvert_k8s_api::values::IntOrString;
use serde::{Deserialize, Serialize};

use crate::dns;
use crate::plan::{self, Family, Pool};

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// The namespace.
    pub namespace: String,
    /// The name in it.
    pub name: String,
}

/// A pod as services see it.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// Its manifest.
    pub pod: &'a Pod,
    /// Its addresses.
    pub addresses: &'a [IpAddr],
    /// It takes traffic now.
    pub ready: bool,
}

/// A service with its endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    /// Which service.
    #[serde(flatten)]
    pub key: Key,
    /// Its own addresses; none if headless or ExternalName.
    #[serde(rename = "clusterIPs")]
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<PortView>,
    /// Addresses of the ready pods behind it.
    pub pods: Vec<IpAddr>,
    /// Names of the ready pods that have one below the service (`hostname` and `subdomain`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hosts: BTreeMap<String, Vec<IpAddr>>,
    /// The other name of an ExternalName service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
}

/// A port of a service with its endpoints, sorted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortView {
    /// Its name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The port clients use.
    pub port: u16,
    /// Its transport.
    pub protocol: Protocol,
    /// Where connections go.
    pub endpoints: Vec<SocketAddr>,
}

/// Addresses handed out to services.
#[derive(Debug)]
pub struct ServiceAddresses {
    pool: Pool,
    family: Family,
    held: BTreeMap<Key, Vec<IpAddr>>,
}

impl Key {
    /// As in status files: `namespace.name`.
    pub fn dotted(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl ServiceAddresses {
    /// Nothing handed out yet.
    pub fn new(family: Family) -> Self {
        ServiceAddresses { pool: Pool::new(plan::SERVICE_HOSTS), family, held: BTreeMap::new() }
    }

    /// The addresses of all `services`: those written in a manifest, those held already, or new ones. Addresses of services
    /// that are gone become free. Also returns what could not be satisfied.
    pub fn assign<'a>(
        &mut self,
        services: impl Iterator<Item = &'a Service>,
    ) -> (&BTreeMap<Key, Vec<IpAddr>>, Vec<String>) {
        let mut problems = Vec::new();
        let known: BTreeMap<Key, &Service> = services.map(|service| (key_of(service), service)).collect();
        self.held.retain(|key, _| known.contains_key(key));
        for key in self.pool.owners() {
            if !known.keys().any(|known| known.to_string() == key) {
                self.pool.release(&key);
            }
        }
        // Written addresses first, so that none of them is handed out to another.
        let (written, free): (Vec<_>, Vec<_>) =
            known.iter().partition(|(_, service)| !service.written_ips().is_empty());
        for (key, service) in written.into_iter().chain(free) {
            match self.addresses(key, service) {
                Ok(addresses) => {
                    self.held.insert(key.clone(), addresses);
                }
                Err(problem) => {
                    self.held.remove(key);
                    problems.push(format!("service {key}: {problem}"));
                }
            }
        }
        (&self.held, problems)
    }

    fn addresses(&mut self, key: &Key, service: &Service) -> Result<Vec<IpAddr>, String> {
        if service.is_headless() || service.spec.type_ == ServiceType::ExternalName {
            return Ok(Vec::new());
        }
        let owner = key.to_string();
        let written = service.written_ips();
        if !written.is_empty() {
            for address in &written {
                match plan::service_host(*address) {
                    Some(host) if self.pool.claim(host, &owner) => {}
                    Some(_) => return Err(format!("{address} belongs to another service")),
                    None => {
                        let [v4, v6] = plan::service_networks();
                        return Err(format!("{address} is outside {v4} and {v6}"));
                    }
                }
            }
            return Ok(written);
        }
        if let Some(held) = self.held.get(key).filter(|held| !held.is_empty()) {
            return Ok(self.families(service, held.clone()));
        }
        let host = self.pool.take(&owner).ok_or("no address is left")?;
        Ok(self.families(service, plan::service_addresses(host).to_vec()))
    }

    /// One family only where the manifest asks for it. A manifest that says nothing gets all families of the sandbox.
    fn families(&self, service: &Service, addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        let mut kept = self.family.keep(addresses);
        let wanted = &service.spec.ip_families;
        let family = |address: &IpAddr| if address.is_ipv4() { IpFamily::IPv4 } else { IpFamily::IPv6 };
        if !wanted.is_empty() {
            kept.retain(|address| wanted.contains(&family(address)));
            kept.sort_by_key(|address| wanted.iter().position(|wanted| *wanted == family(address)));
        }
        if service.spec.ip_family_policy == Some(IpFamilyPolicy::SingleStack) {
            kept.truncate(1);
        }
        kept
    }
}

impl ServiceView {
    /// Puts a service together from its addresses and the pods of the sandbox.
    pub fn new(service: &Service, addresses: &[IpAddr], pods: &[Candidate<'_>]) -> ServiceView {
        let spec = &service.spec;
        let chosen: Vec<_> = pods
            .iter()
            .filter(|candidate| candidate.ready || spec.publish_not_ready_addresses)
            .filter(|candidate| candidate.pod.metadata.namespace == service.metadata.namespace)
            .filter(|candidate| selects(&spec.selector, &candidate.pod.metadata.labels))
            .collect();
        let ports = spec.ports.iter().map(|port| PortView::new(port, &chosen)).collect();
        let mut hosts: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for candidate in &chosen {
            let pod = &candidate.pod.spec;
            if let (Some(host), Some(subdomain)) = (&pod.hostname, &pod.subdomain)
                && *subdomain == service.metadata.name
            {
                hosts.entry(host.clone()).or_default().extend(candidate.addresses);
            }
        }
        let alias = spec.external_name.clone().filter(|_| spec.type_ == ServiceType::ExternalName);
        let mut pods: Vec<IpAddr> =
            chosen.iter().flat_map(|candidate| candidate.addresses.iter().copied()).collect();
        pods.sort_unstable();
        ServiceView { key: key_of(service), addresses: addresses.to_vec(), ports, pods, hosts, alias }
    }

    /// Its names in the cluster's DNS, without the domain.
    pub fn names(&self) -> Vec<(String, dns::Entry)> {
        let name = format!("{}.{}.svc", self.key.name, self.key.namespace);
        let own = match &self.alias {
            Some(alias) => dns::Entry::Alias(alias.clone()),
            None if self.addresses.is_empty() => dns::Entry::Addresses(self.pods.clone()),
            None => dns::Entry::Addresses(self.addresses.clone()),
        };
        let hosts = self
            .hosts
            .iter()
            .map(|(host, addresses)| (format!("{host}.{name}"), dns::Entry::Addresses(addresses.clone())));
        hosts.chain([(name.clone(), own)]).collect()
    }
}

impl PortView {
    fn new(port: &ServicePort, chosen: &[&Candidate<'_>]) -> PortView {
        let mut endpoints: Vec<_> = chosen
            .iter()
            .filter_map(|candidate| Some((candidate, target_port(port, candidate.pod)?)))
            .flat_map(|(candidate, target)| {
                candidate.addresses.iter().map(move |address| SocketAddr::new(*address, target))
            })
            .collect();
        endpoints.sort_unstable();
        PortView { name: port.name.clone(), port: port.port.get(), protocol: port.protocol, endpoints }
    }
}

/// Namespace and name of a service.
pub fn key_of(service: &Service) -> Key {
    Key { namespace: service.metadata.namespace.clone(), name: service.metadata.name.clone() }
}

/// The pod's port behind a service's port; `None` if the pod has no port of that name.
fn target_port(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target_port {
        None => Some(port.port.get()),
        Some(target) => number_of(target, pod, port.protocol),
    }
}

/// A port that may be given by the name of a container's port.
pub fn number_of(port: &IntOrString, pod: &Pod, protocol: Protocol) -> Option<u16> {
    match port {
        IntOrString::Int(number) => Some(number.get()),
        IntOrString::Name(name) => pod
            .spec
            .containers
            .iter()
            .flat_map(|container| &container.ports)
            .find(|declared| declared.protocol == protocol && declared.name.as_ref() == Some(name))
            .map(|declared| declared.container_port.get()),
    }
}
