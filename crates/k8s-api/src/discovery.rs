//! `discovery.k8s.io/v1` EndpointSlice, as far as it is read: where a Service without a selector leads.
//!
//! Where a Service has a selector, Kubernetes writes its slices from the pods that the mesh reads itself, so those say nothing new.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::core::{Protocol, Service};
use crate::labels;
use crate::meta::ObjectMeta;
use crate::object::Checks;
use crate::values::{Port, is_dns_subdomain};

/// discovery.k8s.io/v1 EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Name, namespace, and the label that names its Service.
    pub metadata: ObjectMeta,
    /// What its addresses are.
    pub address_type: AddressType,
    /// At most 1,000, says the API server.
    pub endpoints: Vec<Endpoint>,
    /// Those of each endpoint.
    pub ports: Vec<EndpointPort>,
}

/// The fields of an EndpointSlice besides its metadata: it has no `spec`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Fields {
    pub address_type: AddressType,
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    #[serde(default)]
    pub ports: Vec<EndpointPort>,
}

/// What the addresses of a slice are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum AddressType {
    IPv4,
    IPv6,
    /// Nobody resolves these, not even Kubernetes.
    #[serde(rename = "FQDN")]
    Fqdn,
}

/// One endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Only the first is meant, as kube-proxy has it.
    pub addresses: Vec<String>,
    /// Whether it may receive traffic.
    #[serde(default)]
    pub conditions: Conditions,
    /// What is there; nothing is known of it if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_ref: Option<TargetRef>,
    /// Where it is; gives locality (D23).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
}

/// `conditions` of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Conditions {
    /// Not known counts as true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
}

/// What is at an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// Such as `Pod`.
    pub kind: String,
    /// The slice's own if empty.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A port of every endpoint of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    /// The name of the Service's port that leads here; empty if that has none.
    pub name: String,
    /// The port. Without it the endpoint takes the Service's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// TCP if not given.
    pub protocol: Protocol,
}

impl EndpointSlice {
    /// The name of the Service that it is of; it is of none without that label.
    pub fn service(&self) -> Option<&str> {
        self.metadata.labels.get(labels::SERVICE_NAME).map(String::as_str).filter(|name| !name.is_empty())
    }

    pub(crate) fn check(&self, checks: &mut Checks) {
        if let Some(name) = self.service().filter(|name| !is_dns_subdomain(name)) {
            let field = format!("metadata.labels[\"{}\"]", labels::SERVICE_NAME);
            checks.fail(field, name, "invalid name", "the name of a Service");
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let path = format!("endpoints[{index}].addresses");
            let Some(address) = endpoint.addresses.first() else {
                checks.fail(path, "", "is empty", "an address");
                continue;
            };
            let fits = match self.address_type {
                AddressType::IPv4 => address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4()),
                AddressType::IPv6 => address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()),
                AddressType::Fqdn => true,
            };
            if !fits {
                let expected = format!("an {:?} address, as addressType says", self.address_type);
                checks.fail(format!("{path}[0]"), address, "invalid value", expected);
            }
        }
    }
}

impl Endpoint {
    /// Where it is, if that is an IP address.
    pub fn ip(&self) -> Option<IpAddr> {
        self.addresses.first()?.parse().ok()
    }

    /// Whether it may receive traffic.
    pub fn ready(&self) -> bool {
        self.conditions.ready != Some(false)
    }

    /// Whether it says that a pod is there.
    pub fn is_pod(&self) -> bool {
        self.target_ref.as_ref().is_some_and(|target| target.kind == "Pod")
    }
}

impl Service {
    /// Whether EndpointSlices say where it leads.
    pub fn by_slices(&self) -> bool {
        self.spec.selector.is_empty() && self.spec.type_ != crate::core::ServiceType::ExternalName
    }
}

#[cfg(test)]
mod tests {
    use crate::manifest::parse_file;
    use crate::object::Object;

    const GOOD: &str = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}\naddressType: IPv4\nports: [{name: sql, port: 5432, protocol: TCP}, {name: all, port: null}, {port: 53, protocol: UDP}]\nendpoints:\n- addresses: [192.0.2.7]\n  conditions: {ready: true, serving: true, terminating: false}\n  hints: {forZones: [{name: a}]}\n  zone: a\n- addresses: [192.0.2.8]\n  conditions: {ready: false}\n  targetRef: {kind: Pod, namespace: shop, name: db-0, uid: u}\n  nodeName: node-a\n";

    #[test]
    fn a_slice_as_the_api_server_has_it() {
        let parsed = parse_file("s.yaml", GOOD);
        assert_eq!(parsed.errors, []);
        let Object::EndpointSlice(slice) = &parsed.objects[0].object else { panic!("{parsed:?}") };
        assert_eq!(slice.service(), Some("db"));
        assert_eq!(slice.ports[0].port.map(crate::values::Port::get), Some(5432));
        assert_eq!((slice.ports[1].port, slice.ports[2].name.as_str()), (None, ""));
        let ready: Vec<_> = slice.endpoints.iter().map(|it| (it.ready(), it.is_pod(), it.ip())).collect();
        let ip = |text: &str| Some(text.parse().unwrap());
        assert_eq!(ready, [(true, false, ip("192.0.2.7")), (false, true, ip("192.0.2.8"))]);
    }

    /// What is wrong is said with field, value and what would be right.
    #[test]
    fn a_slice_that_is_wrong() {
        for (from, to, error) in [
            (
                "192.0.2.7",
                "\"2001:db8::1\"",
                "endpoints[0].addresses[0]: invalid value (got \"2001:db8::1\", expected an IPv4 address, as addressType says)",
            ),
            ("[192.0.2.8]", "[]", "endpoints[1].addresses: is empty"),
            ("IPv4", "IPv5", "addressType: "),
            ("addressType: IPv4\n", "", "addressType"),
            ("port: 5432", "port: 0", "ports[0].port: "),
        ] {
            let parsed = parse_file("s.yaml", &GOOD.replacen(from, to, 1));
            let said: Vec<String> = parsed.errors.iter().map(ToString::to_string).collect();
            assert!(said.len() == 1 && said[0].contains(error), "{error}: {said:?}");
        }
    }
}
