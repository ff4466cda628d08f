//! What is watched: kinds that every cluster has, and those whose definition is there.

use std::collections::BTreeSet;

use culvert_k8s_api::{Kind, labels, network_policy};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, ListParams};
use kube::core::discovery::v2::{APIGroupDiscoveryList, APIResourceDiscovery, APIVersionDiscovery};
use kube::core::{ApiResource, GroupVersionKind};

/// A kind to watch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Watched {
    /// API group; empty for the core.
    pub group: String,
    /// Version in which it is read.
    pub version: String,
    /// Such as `Pod`.
    pub kind: String,
    /// Such as `pods`.
    pub plural: String,
    /// What the world has it as.
    pub is: Kind,
    /// A cluster may be without it, and serving does not depend on it.
    pub optional: bool,
}

/// A kind of the mesh, if it is defined.
struct Mesh {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    /// That are read, the one to prefer first.
    versions: &'static [&'static str],
    is: Kind,
}

/// All of them.
const MESH: [Mesh; 11] = [
    Mesh {
        group: "security.istio.io",
        kind: "AuthorizationPolicy",
        plural: "authorizationpolicies",
        versions: &["v1", "v1beta1"],
        is: Kind::AuthorizationPolicy,
    },
    Mesh {
        group: "security.istio.io",
        kind: "PeerAuthentication",
        plural: "peerauthentications",
        versions: &["v1", "v1beta1"],
        is: Kind::PeerAuthentication,
    },
    Mesh {
        group: "networking.istio.io",
        kind: "ServiceEntry",
        plural: "serviceentries",
        versions: &["v1", "v1beta1", "v1alpha3"],
        is: Kind::ServiceEntry,
    },
    Mesh {
        group: "networking.istio.io",
        kind: "WorkloadEntry",
        plural: "workloadentries",
        versions: &["v1", "v1beta1", "v1alpha3"],
        is: Kind::WorkloadEntry,
    },
    Mesh {
        group: "gateway.networking.k8s.io",
        kind: "Gateway",
        plural: "gateways",
        versions: &["v1", "v1beta1"],
        is: Kind::Gateway,
    },
    Mesh {
        group: "gateway.networking.k8s.io",
        kind: "GatewayClass",
        plural: "gatewayclasses",
        versions: &["v1", "v1beta1"],
        is: Kind::GatewayClass,
    },
    Mesh {
        group: "gateway.networking.k8s.io",
        kind: "HTTPRoute",
        plural: "httproutes",
        versions: &["v1", "v1beta1"],
        is: Kind::HTTPRoute,
    },
    Mesh {
        group: "gateway.networking.k8s.io",
        kind: "GRPCRoute",
        plural: "grpcroutes",
        versions: &["v1", "v1alpha2"],
        is: Kind::GRPCRoute,
    },
    Mesh {
        group: "gateway.networking.k8s.io",
        kind: "TCPRoute",
        plural: "tcproutes",
        versions: &["v1", "v1alpha2"],
        is: Kind::TCPRoute,
    },
    Mesh {
        group: "gateway.networking.k8s.io",
        kind: "TLSRoute",
        plural: "tlsroutes",
        versions: &["v1", "v1alpha3", "v1alpha2"],
        is: Kind::TLSRoute,
    },
    Mesh {
        group: "gateway.networking.k8s.io",
        kind: "ReferenceGrant",
        plural: "referencegrants",
        versions: &["v1", "v1beta1"],
        is: Kind::ReferenceGrant,
    },
];

impl Watched {
    /// `group/version`, or the version alone.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// What is asked of the API server, if not all of it. Of a Service with a selector Kubernetes writes slices of the pods that are
    /// read anyway: in most clusters all slices but a few, and more of them than Services.
    pub fn labels(&self) -> Option<String> {
        let slices =
            format!("{},{}!={}", labels::SERVICE_NAME, labels::SLICE_MANAGED_BY, labels::SLICE_OF_SELECTOR);
        (self.is == Kind::EndpointSlice).then_some(slices)
    }

    /// The name that its definition has, if it has one.
    pub fn definition(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }

    /// For the client.
    pub fn resource(&self) -> ApiResource {
        let kind = GroupVersionKind::gvk(&self.group, &self.version, &self.kind);
        ApiResource::from_gvk_with_plural(&kind, &self.plural)
    }
}

/// What every cluster has.
pub fn builtin() -> Vec<Watched> {
    let kind = |group: &str, kind: &str, plural: &str, is| Watched {
        group: group.to_owned(),
        version: "v1".to_owned(),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
        is,
        optional: false,
    };
    vec![
        kind("", "Namespace", "namespaces", Kind::Namespace),
        kind("", "Node", "nodes", Kind::Node),
        kind("", "Pod", "pods", Kind::Pod),
        kind("", "Service", "services", Kind::Service),
        kind("discovery.k8s.io", "EndpointSlice", "endpointslices", Kind::EndpointSlice),
        kind("networking.k8s.io", "NetworkPolicy", "networkpolicies", Kind::NetworkPolicy),
    ]
}

/// What one look at the API server's list of what it serves tells.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Defined {
    /// What is to be watched besides [`builtin`].
    pub kinds: Vec<Watched>,
    /// Groups of which the API server does not know now what they hold: what was watched of them is watched still.
    pub unknown: BTreeSet<String>,
    /// Names of all definitions (CustomResourceDefinitions), whether their kinds are served now or not.
    pub definitions: BTreeSet<String>,
}

/// Why nothing is known.
#[derive(Debug, thiserror::Error)]
pub enum DefinedError {
    /// The API server did not answer.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// It answers in the form of old: then nothing is taken to be gone.
    #[error("the API server does not list all kinds at once, as Kubernetes does from 1.27 on")]
    Old,
}

/// What is defined besides.
///
/// An API server that starts lists the kinds of its definitions last, seconds after it is ready: what it does not list yet is
/// there all the same. So a kind is gone only with its definition, and one of the mesh that is defined and not listed is watched
/// already: it counts as not listed until the API server serves it.
///
/// # Errors
/// If the API server does not answer, or not with what it serves: then nothing is known to have gone either.
pub async fn defined(client: &Client) -> Result<Defined, DefinedError> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definitions = api.list_metadata(&ListParams::default()).await?;
    let list = client.list_api_groups_aggregated().await?;
    // No API server is without groups of its own.
    if list.items.is_empty() {
        return Err(DefinedError::Old);
    }
    let mut found = of(&list);
    found.definitions = definitions.items.into_iter().filter_map(|it| it.metadata.name).collect();
    for mesh in &MESH {
        let name = format!("{}.{}", mesh.plural, mesh.group);
        let listed = found.kinds.iter().any(|it| it.group == mesh.group && it.kind == mesh.kind);
        if !listed && found.definitions.contains(&name) {
            let definition = api.get_opt(&name).await?;
            found.kinds.extend(definition.and_then(|definition| mesh.served_by(&definition)));
        }
    }
    Ok(found)
}

impl Mesh {
    /// As what a definition says it is served, once the API server has accepted it.
    fn served_by(&self, definition: &CustomResourceDefinition) -> Option<Watched> {
        let mut conditions = definition.status.iter().flat_map(|it| it.conditions.iter().flatten());
        let established = conditions.any(|it| it.type_ == "Established" && it.status == "True");
        if !established || definition.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let served = |name: &&&str| definition.spec.versions.iter().any(|it| it.served && it.name == **name);
        let version = self.versions.iter().find(served)?;
        Some(Watched {
            group: self.group.to_owned(),
            version: (*version).to_owned(),
            kind: self.kind.to_owned(),
            plural: self.plural.to_owned(),
            is: self.is,
            optional: false,
        })
    }
}

fn of(list: &APIGroupDiscoveryList) -> Defined {
    let mut found = Defined::default();
    for group in &list.items {
        let Some(name) = group.metadata.as_ref().and_then(|it| it.name.as_deref()) else { continue };
        let mesh: Vec<_> = MESH.iter().filter(|it| it.group == name).collect();
        // The API server's own groups hold none; `policy.networking.k8s.io` is a definition.
        let own = !name.contains('.') || (name.ends_with(".k8s.io") && name != "policy.networking.k8s.io");
        if mesh.is_empty() && own {
            continue;
        }
        if group.versions.iter().any(|it| it.freshness.as_deref() == Some("Stale")) {
            found.unknown.insert(name.to_owned());
        }
        let versions: Vec<&APIVersionDiscovery> = if mesh.is_empty() {
            // The first is the one that the API server prefers.
            group.versions.iter().take(1).collect()
        } else {
            let read = ["v1", "v1beta1", "v1alpha3", "v1alpha2"];
            let version = |name| group.versions.iter().find(|it| it.version.as_deref() == Some(name));
            read.into_iter().filter_map(version).collect()
        };
        for version in versions {
            for kind in version.resources.iter().filter_map(|it| watched(name, version, it, &mesh)) {
                if !found.kinds.iter().any(|it| it.group == kind.group && it.kind == kind.kind) {
                    found.kinds.push(kind);
                }
            }
        }
    }
    found
}

fn watched(
    group: &str,
    version: &APIVersionDiscovery,
    resource: &APIResourceDiscovery,
    mesh: &[&Mesh],
) -> Option<Watched> {
    let version = version.version.as_deref()?;
    let kind = resource.response_kind.as_ref()?.kind.as_deref()?;
    let of_mesh = mesh.iter().find(|it| it.kind == kind && it.versions.contains(&version));
    let is = match of_mesh {
        Some(mesh) => mesh.is,
        None if mesh.is_empty() && network_policy::restricts(kind) => Kind::OtherNetworkPolicy,
        None => return None,
    };
    Some(Watched {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: kind.to_owned(),
        plural: resource.resource.clone()?,
        is,
        optional: is == Kind::OtherNetworkPolicy,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A version: its name, its freshness, and its kinds by plural.
    type Version<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

    fn group(name: &str, versions: &[Version<'_>]) -> Value {
        let versions = versions.iter().map(|(version, freshness, kinds)| {
            let resources = kinds.iter().map(|(plural, kind)| {
                json!({"resource": plural, "responseKind": {"group": name, "version": version, "kind": kind},
                    "subresources": [{"subresource": "status", "responseKind": {"kind": kind}}]})
            });
            json!({"version": version, "freshness": freshness, "resources": resources.collect::<Vec<_>>()})
        });
        json!({"metadata": {"name": name}, "versions": versions.collect::<Vec<_>>()})
    }

    fn found(groups: &[Value]) -> (Vec<String>, Vec<String>) {
        let list: APIGroupDiscoveryList = serde_json::from_value(json!({"items": groups})).unwrap();
        let found = of(&list);
        let kinds =
            found.kinds.iter().map(|it| format!("{} {} {}", it.api_version(), it.plural, it.optional));
        (kinds.collect(), found.unknown.into_iter().collect())
    }

    #[test]
    fn kinds_of_the_mesh_in_the_best_version_and_whatever_restricts_networks() {
        let policies = ("authorizationpolicies", "AuthorizationPolicy");
        let entries = ("serviceentries", "ServiceEntry");
        let (kinds, unknown) = found(&[
            group("apps", &[("v1", "Current", &[("deployments", "Deployment")])]),
            group("networking.k8s.io", &[("v1", "Current", &[("networkpolicies", "NetworkPolicy")])]),
            group(
                "security.istio.io",
                &[("v1beta1", "Current", &[policies]), ("v1", "Current", &[policies])],
            ),
            group("networking.istio.io", &[("v1alpha3", "Current", &[entries, ("gateways", "Gateway")])]),
            group(
                "cilium.io",
                &[
                    (
                        "v2",
                        "Current",
                        &[("ciliumnetworkpolicies", "CiliumNetworkPolicy"), ("ciliumnodes", "CiliumNode")],
                    ),
                    ("v2alpha1", "Current", &[("oldnetworkpolicies", "OldNetworkPolicy")]),
                ],
            ),
            group(
                "policy.networking.k8s.io",
                &[("v1alpha1", "Current", &[("adminnetworkpolicies", "AdminNetworkPolicy")])],
            ),
        ]);
        assert_eq!(
            kinds,
            [
                "security.istio.io/v1 authorizationpolicies false",
                "networking.istio.io/v1alpha3 serviceentries false",
                "cilium.io/v2 ciliumnetworkpolicies true",
                "policy.networking.k8s.io/v1alpha1 adminnetworkpolicies true",
            ]
        );
        assert!(unknown.is_empty());
    }

    /// An API server that starts has definitions before it serves their kinds.
    #[test]
    fn a_definition_says_what_will_be_served() {
        let policies = &MESH[0];
        let served = |versions: &[(&str, bool)], established: &str, deleted: Option<&str>| {
            let versions = versions
                .iter()
                .map(|(name, served)| json!({"name": name, "served": served, "storage": false}));
            let definition = serde_json::from_value(json!({
                "metadata": {"name": "authorizationpolicies.security.istio.io", "deletionTimestamp": deleted},
                "spec": {"group": "security.istio.io", "scope": "Namespaced",
                    "names": {"kind": "AuthorizationPolicy", "plural": "authorizationpolicies"},
                    "versions": versions.collect::<Vec<_>>()},
                "status": {"conditions": [{"type": "Established", "status": established}]},
            }));
            policies
                .served_by(&definition.unwrap())
                .map(|it| format!("{} {}", it.api_version(), it.definition()))
        };
        let name = "authorizationpolicies.security.istio.io";
        let both = [("v1beta1", true), ("v1", true)];
        assert_eq!(served(&both, "True", None).unwrap(), format!("security.istio.io/v1 {name}"));
        let old = [("v1beta1", true), ("v1", false)];
        assert_eq!(served(&old, "True", None).unwrap(), format!("security.istio.io/v1beta1 {name}"));
        assert_eq!(served(&[("v2", true)], "True", None), None);
        assert_eq!(served(&both, "False", None), None, "its names are taken by another");
        assert_eq!(served(&both, "True", Some("2026-01-01T00:00:00Z")), None);
    }

    /// A server behind the API server that is away takes none of its kinds with it.
    #[test]
    fn what_a_group_holds_may_be_unknown() {
        let (kinds, unknown) = found(&[
            group("projectcalico.org", &[("v3", "Stale", &[])]),
            group("metrics.k8s.io", &[("v1beta1", "Stale", &[])]),
        ]);
        assert_eq!((kinds.len(), unknown), (0, vec!["projectcalico.org".to_owned()]));
    }
}
