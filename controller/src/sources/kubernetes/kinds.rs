//! What is watched: kinds that every cluster has, and those whose definition is there.

use culvert_k8s_api::{Kind, network_policy};
use kube::Client;
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

/// Kinds of the mesh, if they are defined: group, kind, versions that are read with the one to prefer first.
const MESH: [(&str, &str, &[&str], Kind); 6] = [
    ("security.istio.io", "AuthorizationPolicy", &["v1", "v1beta1"], Kind::AuthorizationPolicy),
    ("security.istio.io", "PeerAuthentication", &["v1", "v1beta1"], Kind::PeerAuthentication),
    ("networking.istio.io", "ServiceEntry", &["v1", "v1beta1", "v1alpha3"], Kind::ServiceEntry),
    ("networking.istio.io", "WorkloadEntry", &["v1", "v1beta1", "v1alpha3"], Kind::WorkloadEntry),
    ("gateway.networking.k8s.io", "Gateway", &["v1", "v1beta1"], Kind::Gateway),
    ("gateway.networking.k8s.io", "GatewayClass", &["v1", "v1beta1"], Kind::GatewayClass),
];

impl Watched {
    /// `group/version`, or the version alone.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
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
        kind("networking.k8s.io", "NetworkPolicy", "networkpolicies", Kind::NetworkPolicy),
    ]
}

/// What is defined besides. One request for the groups and one for each group that may hold something.
///
/// # Errors
/// If the API server does not answer: then nothing is known to have gone either.
pub async fn defined(client: &Client) -> Result<Vec<Watched>, kube::Error> {
    let mut found = Vec::new();
    for group in client.list_api_groups().await?.groups {
        let served: Vec<&str> = group.versions.iter().map(|it| it.version.as_str()).collect();
        let wanted: Vec<_> = MESH.iter().filter(|(of, ..)| *of == group.name).collect();
        // The API server's own groups hold none; `policy.networking.k8s.io` is a definition.
        let own = !group.name.contains('.')
            || (group.name.ends_with(".k8s.io") && group.name != "policy.networking.k8s.io");
        let versions: Vec<String> = if !wanted.is_empty() {
            let read = ["v1", "v1beta1", "v1alpha3"];
            read.into_iter().filter(|it| served.contains(it)).map(str::to_owned).collect()
        } else if own {
            Vec::new()
        } else {
            group.preferred_version.iter().map(|it| it.version.clone()).collect()
        };
        for version in versions {
            let resources =
                client.list_api_group_resources(&format!("{}/{version}", group.name)).await?.resources;
            for resource in resources.iter().filter(|it| !it.name.contains('/')) {
                let mesh = wanted
                    .iter()
                    .find(|(_, kind, read, _)| *kind == resource.kind && read.contains(&version.as_str()));
                let is = match mesh {
                    Some((.., is)) => *is,
                    None if wanted.is_empty() && network_policy::restricts(&resource.kind) => {
                        Kind::OtherNetworkPolicy
                    }
                    None => continue,
                };
                let known = |it: &Watched| it.group == group.name && it.kind == resource.kind;
                if !found.iter().any(known) {
                    found.push(Watched {
                        group: group.name.clone(),
                        version: version.clone(),
                        kind: resource.kind.clone(),
                        plural: resource.name.clone(),
                        is,
                        optional: is == Kind::OtherNetworkPolicy,
                    });
                }
            }
        }
    }
    Ok(found)
}
