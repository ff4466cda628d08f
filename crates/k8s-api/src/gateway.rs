//! `gateway.networking.k8s.io` v1 and v1beta1: Gateway and GatewayClass, as far as a waypoint needs them.
//!
//! Their own definitions say what is valid, and later versions add fields that older readers may pass over, so unknown fields
//! are ignored as in core kinds. A field that is read is read strictly.

use serde::{Deserialize, Serialize};

use crate::meta::{ObjectMeta, StringMap};
use crate::network_policy::LabelSelector;
use crate::object::Checks;
use crate::values::{Port, is_dns_label, is_dns_subdomain};

/// The protocol of the listener that takes tunnels.
pub const HBONE: &str = "HBONE";

/// Where traffic enters: here, a waypoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Gateway {
    /// Name, namespace, labels, annotations.
    pub metadata: ObjectMeta,
    /// What is wanted.
    pub spec: GatewaySpec,
    /// What its controller says of it.
    pub status: GatewayStatus,
}

/// `spec` of a Gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewaySpec {
    /// Whose it is.
    pub gateway_class_name: String,
    /// Where it listens; at least one.
    pub listeners: Vec<Listener>,
    /// Addresses that it is to have. With any, nothing is made for it: whoever wrote them runs it (D61).
    pub addresses: Vec<GatewayAddress>,
    /// What is to be on everything that is made for it.
    pub infrastructure: Option<Infrastructure>,
}

/// One listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Listener {
    /// Unique in the Gateway.
    pub name: String,
    /// Where.
    pub port: Port,
    /// [`HBONE`], HTTP, TLS, ...
    pub protocol: String,
    /// What may attach to it.
    #[serde(default)]
    pub allowed_routes: Option<AllowedRoutes>,
}

/// What may attach to a listener; of a waypoint's listener also who may be bound to it (W03).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AllowedRoutes {
    /// From where; the Gateway's own namespace if absent.
    pub namespaces: Option<RouteNamespaces>,
    /// Kinds of routes; those of the protocol if empty.
    pub kinds: Vec<RouteKind>,
}

/// Namespaces of an [`AllowedRoutes`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteNamespaces {
    /// Which.
    pub from: FromNamespaces,
    /// By their labels, with [`FromNamespaces::Selector`].
    pub selector: Option<LabelSelector>,
}

/// Which namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum FromNamespaces {
    All,
    Selector,
    #[default]
    Same,
    None,
}

/// A kind of route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteKind {
    /// `gateway.networking.k8s.io` if absent.
    pub group: Option<String>,
    /// Such as `HTTPRoute`.
    pub kind: String,
}

/// An address of a Gateway, wanted or had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GatewayAddress {
    /// `IPAddress` if absent, `Hostname`, or a kind of somebody's own.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// In text; empty asks for any.
    pub value: String,
}

/// What is to be on everything that is made for a Gateway (D60).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Infrastructure {
    /// Labels.
    pub labels: StringMap,
    /// Annotations.
    pub annotations: StringMap,
    /// What else.
    pub parameters_ref: Option<ParametersRef>,
}

/// An object of the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct ParametersRef {
    /// Empty for the core.
    pub group: String,
    /// Such as `ConfigMap`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// `status` of a Gateway, as far as it is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GatewayStatus {
    /// Where it is reached.
    pub addresses: Vec<GatewayAddress>,
    /// Condition `Programmed` is true: there is somebody at these addresses.
    pub programmed: bool,
}

/// Who looks after Gateways of this class.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GatewayClass {
    /// Its name, labels.
    pub metadata: ObjectMeta,
    /// What it says.
    pub spec: GatewayClassSpec,
}

/// `spec` of a GatewayClass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayClassSpec {
    /// The controller, as a domain and a path.
    pub controller_name: String,
    /// Parameters of the class; none are taken here.
    pub parameters_ref: Option<ParametersRef>,
}

/// The status as it is written; what is not like that is passed over, since nobody can mend it by hand.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct WrittenStatus {
    addresses: Vec<GatewayAddress>,
    conditions: Vec<WrittenCondition>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WrittenCondition {
    #[serde(rename = "type")]
    type_: String,
    status: String,
}

impl From<WrittenStatus> for GatewayStatus {
    fn from(written: WrittenStatus) -> Self {
        let programmed = |it: &WrittenCondition| it.type_ == "Programmed" && it.status == "True";
        Self { addresses: written.addresses, programmed: written.conditions.iter().any(programmed) }
    }
}

impl Gateway {
    /// The listener that takes tunnels: the first of protocol HBONE.
    pub fn hbone(&self) -> Option<&Listener> {
        self.spec.listeners.iter().find(|it| it.protocol == HBONE)
    }
}

impl Listener {
    /// Whether what is in `namespace`, a namespace with `labels`, may attach, if the listener's Gateway is in `home` (W03).
    /// A namespace of which nothing is known matches no selector.
    pub fn admits(&self, home: &str, namespace: &str, labels: Option<&StringMap>) -> bool {
        let Some(namespaces) = self.allowed_routes.as_ref().and_then(|it| it.namespaces.as_ref()) else {
            return namespace == home;
        };
        match namespaces.from {
            FromNamespaces::All => true,
            FromNamespaces::Same => namespace == home,
            FromNamespaces::None => false,
            FromNamespaces::Selector => {
                let (Some(selector), Some(labels)) = (&namespaces.selector, labels) else { return false };
                // An operator that is not known holds for whoever asks whom a policy may restrict; here it would let in.
                let known = |operator: &str| ["In", "NotIn", "Exists", "DoesNotExist"].contains(&operator);
                selector.match_expressions.iter().all(|it| known(&it.operator)) && selector.matches(labels)
            }
        }
    }
}

impl GatewayAddress {
    /// Whether it is an IP address.
    pub fn is_ip(&self) -> bool {
        self.type_.as_deref().is_none_or(|it| it == "IPAddress")
    }

    /// Whether it is a DNS name.
    pub fn is_hostname(&self) -> bool {
        self.type_.as_deref() == Some("Hostname")
    }
}

impl GatewaySpec {
    pub(crate) fn check(&self, checks: &mut Checks) {
        if !is_dns_subdomain(&self.gateway_class_name) {
            let expected = "the name of a GatewayClass";
            checks.fail("spec.gatewayClassName", &self.gateway_class_name, "invalid name", expected);
        }
        for (index, listener) in self.listeners.iter().enumerate() {
            if !is_dns_subdomain(&listener.name) {
                let path = format!("spec.listeners[{index}].name");
                checks.fail(path, &listener.name, "invalid name", "lower case letters, digits, - and .");
            }
            if self.listeners[..index].iter().any(|other| other.name == listener.name) {
                checks.fail(format!("spec.listeners[{index}].name"), &listener.name, "is there twice", "");
            }
        }
        if let Some(parameters) = self.infrastructure.as_ref().and_then(|it| it.parameters_ref.as_ref())
            && !is_dns_subdomain(&parameters.name)
        {
            let path = "spec.infrastructure.parametersRef.name";
            checks.fail(path, &parameters.name, "invalid name", "the name of an object of this namespace");
        }
    }
}

impl GatewayClassSpec {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let shape = self.controller_name.split_once('/').is_some_and(|(domain, path)| {
            is_dns_subdomain(domain) && !path.is_empty() && domain.split('.').all(is_dns_label)
        });
        if !shape {
            let expected = "a domain and a path, such as culvert.dev/waypoint-controller";
            checks.fail("spec.controllerName", &self.controller_name, "invalid value", expected);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::parse_file;
    use crate::object::Object;

    fn gateway(spec: &str) -> Gateway {
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w, namespace: shop}}\nspec: {spec}\n"
        );
        let parsed = parse_file("g.yaml", &text);
        assert_eq!(parsed.errors, [], "{text}");
        match &parsed.objects[0].object {
            Object::Gateway(it) => (**it).clone(),
            other => panic!("{other:?}"),
        }
    }

    fn error(kind: &str, spec: &str) -> String {
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: w, namespace: shop}}\nspec: {spec}\n"
        );
        let parsed = parse_file("g.yaml", &text);
        parsed.errors.first().map(ToString::to_string).unwrap_or_default()
    }

    #[test]
    fn what_is_not_read_is_passed_over_and_what_is_read_must_fit() {
        let it = gateway(
            "{gatewayClassName: culvert-waypoint, defaultScope: All, tls: {frontend: {default: {}}}, listeners: [{name: mesh, port: 15008, protocol: HBONE, hostname: x.example, tls: {mode: Terminate}}]}",
        );
        assert_eq!(it.hbone().map(|it| it.port.get()), Some(15008));
        let found =
            error("Gateway", "{gatewayClassName: c, listeners: [{name: m, port: many, protocol: HBONE}]}");
        assert!(found.contains("spec.listeners[0].port") && found.contains("many"), "{found}");
        let found = error("Gateway", "{gatewayClassName: Upper, listeners: []}");
        assert!(found.contains("spec.gatewayClassName"), "{found}");
        let found = error("GatewayClass", "{controllerName: nobody}");
        assert!(found.contains("spec.controllerName") && found.contains("nobody"), "{found}");
        let twice = "{gatewayClassName: c, listeners: [{name: m, port: 1, protocol: HBONE}, {name: m, port: 2, protocol: TCP}]}";
        assert!(error("Gateway", twice).contains("is there twice"));
    }

    /// W03.
    #[test]
    fn a_listener_admits_the_namespaces_that_it_names() {
        let labels = |pairs: &[(&str, &str)]| -> StringMap {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let team = labels(&[("team", "a")]);
        let cases = [
            ("{}", true, false),
            ("{allowedRoutes: {}}", true, false),
            ("{allowedRoutes: {namespaces: {}}}", true, false),
            ("{allowedRoutes: {namespaces: {from: Same}}}", true, false),
            ("{allowedRoutes: {namespaces: {from: All}}}", true, true),
            ("{allowedRoutes: {namespaces: {from: None}}}", false, false),
            ("{allowedRoutes: {namespaces: {from: Selector}}}", false, false),
            (
                "{allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: a}}}}}",
                true,
                true,
            ),
            (
                "{allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: b}}}}}",
                false,
                false,
            ),
            (
                "{allowedRoutes: {namespaces: {from: Selector, selector: {matchExpressions: [{key: team, operator: Perhaps}]}}}}",
                false,
                false,
            ),
        ];
        for (listener, own, other) in cases {
            let rest = listener.trim_start_matches('{').trim_end_matches('}');
            let closing = "}".repeat(rest.matches('{').count() - rest.matches('}').count());
            let comma = if rest.is_empty() { "" } else { ", " };
            let it = gateway(&format!(
                "{{gatewayClassName: c, listeners: [{{name: m, port: 15008, protocol: HBONE{comma}{rest}{closing}}}]}}"
            ));
            let listener = it.hbone().unwrap();
            assert_eq!(listener.admits("shop", "shop", Some(&team)), own, "{rest}");
            assert_eq!(listener.admits("shop", "other", Some(&team)), other, "{rest}");
            assert!(!listener.admits("shop", "unknown", None) || rest.contains("All"), "{rest}");
        }
    }

    #[test]
    fn the_status_says_where_it_is() {
        let text = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w}\nspec: {gatewayClassName: c, listeners: []}\nstatus: {addresses: [{type: IPAddress, value: 10.0.0.1}, {type: Hostname, value: w.example}], conditions: [{type: Programmed, status: \"True\", reason: x}]}\n";
        let parsed = parse_file("g.yaml", text);
        let Object::Gateway(it) = &parsed.objects[0].object else { panic!("{parsed:?}") };
        assert!(
            it.status.programmed && it.status.addresses[0].is_ip() && it.status.addresses[1].is_hostname()
        );
        // A status that nobody here wrote is no reason to lose the object.
        let odd =
            text.replace("[{type: IPAddress, value: 10.0.0.1}, {type: Hostname, value: w.example}]", "7");
        let parsed = parse_file("g.yaml", &odd);
        let Object::Gateway(it) = &parsed.objects[0].object else { panic!("{parsed:?}") };
        assert_eq!(it.status, GatewayStatus::default());
    }
}
