//! `networking.istio.io` v1, v1beta1 and v1alpha3: ServiceEntry and WorkloadEntry. Unknown fields are refused.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::meta::{ObjectMeta, StringMap};
use crate::object::Checks;
use crate::values::{IpBlock, Port, is_dns_subdomain, is_service_host};

/// A name and endpoints outside the cluster's own services.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ServiceEntry {
    /// Name and namespace.
    pub metadata: ObjectMeta,
    /// What it stands for.
    pub spec: ServiceEntrySpec,
}

/// `spec` of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceEntrySpec {
    /// DNS names, each its own service; `*.` in front takes all below.
    pub hosts: Vec<String>,
    /// Virtual addresses; without any, one is allocated for each host.
    #[serde(default)]
    pub addresses: Vec<IpBlock>,
    /// Ports.
    #[serde(default)]
    pub ports: Vec<ServiceEntryPort>,
    /// Inside or outside the mesh.
    #[serde(default)]
    pub location: Location,
    /// How endpoints are found.
    #[serde(default)]
    pub resolution: Resolution,
    /// Given ones.
    #[serde(default)]
    pub endpoints: Vec<WorkloadEntrySpec>,
    /// Pods and WorkloadEntries by label.
    #[serde(default)]
    pub workload_selector: Option<WorkloadSelector>,
    /// Not honoured by ambient (D27).
    #[serde(default)]
    pub export_to: Vec<String>,
    /// Identities to expect.
    #[serde(default)]
    pub subject_alt_names: Vec<String>,
}

/// A port of a ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceEntryPort {
    /// The port clients use.
    pub number: Port,
    /// HTTP, HTTPS, GRPC, HTTP2, TCP, TLS, MONGO...
    #[serde(default)]
    pub protocol: String,
    /// Refers endpoints' own port.
    pub name: String,
    /// The endpoint's port; the same if absent.
    #[serde(default)]
    pub target_port: Option<Port>,
}

/// Inside or outside the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Location {
    #[default]
    MeshExternal,
    MeshInternal,
}

/// How endpoints are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// Connections go where they were meant to go (Z36).
    #[default]
    None,
    /// The endpoints' addresses.
    Static,
    /// Names are resolved by the proxy (Z42).
    Dns,
    /// The same here.
    DnsRoundRobin,
}

/// Workloads by label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadSelector {
    /// All must be there.
    pub labels: StringMap,
}

/// A workload that is no pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkloadEntry {
    /// Name, namespace; its labels join those of the spec.
    pub metadata: ObjectMeta,
    /// What it is.
    pub spec: WorkloadEntrySpec,
}

/// `spec` of a WorkloadEntry, and an endpoint of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WorkloadEntrySpec {
    /// IP address or DNS name.
    pub address: String,
    /// Its own port by the service port's name.
    pub ports: BTreeMap<String, Port>,
    /// For selectors and canonical names.
    pub labels: StringMap,
    /// Network it is on; empty is the mesh's own.
    pub network: String,
    /// `region/zone/subzone`.
    pub locality: String,
    /// Share of the load; 1 if absent (D29).
    pub weight: Option<u32>,
    /// Its identity.
    pub service_account: String,
}

impl WorkloadEntrySpec {
    /// Its address, unless it is a name.
    pub fn ip(&self) -> Option<IpAddr> {
        self.address.parse().ok()
    }

    pub(crate) fn check(&self, path: &str, checks: &mut Checks) {
        let at = || format!("{path}.address");
        if self.address.is_empty() {
            // An endpoint on another network may have none: it is reached by that network's gateway.
            if self.network.is_empty() {
                checks.fail(at(), "", "is required", "an IP address or a DNS name");
            }
        } else if self.ip().is_none() && !is_dns_subdomain(&self.address) {
            let expected = "an IP address or a DNS name (unix sockets are not supported)";
            checks.fail(at(), &self.address, "invalid value", expected);
        }
        if !self.service_account.is_empty() && !is_dns_subdomain(&self.service_account) {
            let expected = "the name of a service account";
            checks.fail(format!("{path}.serviceAccount"), &self.service_account, "invalid value", expected);
        }
        if self.locality.split('/').count() > 3 {
            checks.fail(format!("{path}.locality"), &self.locality, "invalid value", "region/zone/subzone");
        }
    }
}

impl ServiceEntrySpec {
    pub(crate) fn check(&self, checks: &mut Checks) {
        if self.hosts.is_empty() {
            checks.fail("spec.hosts", "", "is empty", "at least one host");
        }
        for (index, host) in self.hosts.iter().enumerate() {
            if !is_service_host(host) {
                checks.fail(
                    format!("spec.hosts[{index}]"),
                    host,
                    "invalid value",
                    "a DNS name, or *. and a DNS name",
                );
            }
        }
        if self.workload_selector.is_some() && !self.endpoints.is_empty() {
            checks.fail("spec.workloadSelector", "", "cannot stand beside endpoints", "one of them");
        }
        if self.resolution == Resolution::None && !self.endpoints.is_empty() {
            checks.fail(
                "spec.endpoints",
                "",
                "cannot be given with resolution NONE",
                "resolution STATIC or DNS",
            );
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let path = format!("spec.endpoints[{index}]");
            endpoint.check(&path, checks);
            if self.resolution == Resolution::Static
                && !endpoint.address.is_empty()
                && endpoint.ip().is_none()
            {
                let reason = "is a name, with resolution STATIC";
                checks.fail(format!("{path}.address"), &endpoint.address, reason, "an IP address");
            }
            for name in endpoint.ports.keys() {
                if !self.ports.iter().any(|port| &port.name == name) {
                    checks.fail(
                        format!("{path}.ports.{name}"),
                        name,
                        "no port of that name",
                        "a name of spec.ports",
                    );
                }
            }
        }
        for (index, port) in self.ports.iter().enumerate() {
            if self.ports[..index].iter().any(|other| other.number == port.number) {
                checks.fail(format!("spec.ports[{index}].number"), port.number, "is there twice", "");
            }
            if self.ports[..index].iter().any(|other| other.name == port.name) {
                checks.fail(format!("spec.ports[{index}].name"), &port.name, "is there twice", "");
            }
        }
    }
}
