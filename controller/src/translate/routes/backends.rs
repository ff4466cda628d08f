//! Where a route sends requests: references that lead somewhere, or why they do not.

use culvert_k8s_api::core::ServiceType;
use culvert_k8s_api::routes::{BackendRef, ObjectRef, Route};
use culvert_proto::waypoint as proto;

use super::super::view::View;

const ENTRIES: &str = "networking.istio.io";

/// A route at one of its parents, as far as references depend on it.
pub(super) struct From<'r, 'a> {
    pub view: &'r View<'a>,
    pub route: &'r Route,
    /// The service that it is for: what a client reaches anyway needs no leave to be referred to.
    pub parent: (&'r str, &'r str, &'r str),
}

/// Why a reference leads nowhere: a reason of condition `ResolvedRefs`, and the rest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Unresolved {
    pub reason: &'static str,
    pub message: String,
}

/// Of several reasons the first is said.
pub(super) const REASONS: [&str; 3] = ["RefNotPermitted", "InvalidKind", "BackendNotFound"];

impl From<'_, '_> {
    /// A backend without its filters. One that leads nowhere says why, and its share of the requests fails.
    pub fn backend(&self, backend: &BackendRef, unresolved: &mut Vec<Unresolved>) -> proto::Backend {
        let mut made = proto::Backend { weight: backend.weight, ..proto::Backend::default() };
        match self.resolve(&backend.target) {
            Ok((namespace, hostname, port)) => {
                (made.service_namespace, made.service_hostname, made.port) = (namespace, hostname, port);
            }
            Err(why) => {
                made.broken = why.message.clone();
                unresolved.push(why);
            }
        }
        made
    }

    /// Namespace, host name and port of what is referred to.
    pub fn resolve(&self, target: &ObjectRef) -> Result<(String, String, u32), Unresolved> {
        let own = self.route.metadata.namespace.as_str();
        let namespace = target.namespace.as_deref().unwrap_or(own);
        let what = format!("{} {namespace}/{}", target.kind, target.name);
        let key = (namespace, target.name.as_str());
        let not_found = |message: String| Err(Unresolved { reason: "BackendNotFound", message });
        let hostname;
        let ports: Vec<u32>;
        match (target.group.as_str(), target.kind.as_str()) {
            ("", "Service") => {
                self.permitted(target, namespace, &what)?;
                let Some(service) = self.view.services.get(&key) else {
                    return not_found(format!("{what} does not exist"));
                };
                if service.spec.type_ == ServiceType::ExternalName {
                    let message = format!("{what} is of type ExternalName, which is left to DNS");
                    return Err(Unresolved { reason: "InvalidKind", message });
                }
                hostname = self.view.service_host(namespace, &target.name);
                ports = service.spec.ports.iter().map(|it| it.port.get().into()).collect();
            }
            (ENTRIES, "ServiceEntry") => {
                self.permitted(target, namespace, &what)?;
                let entry = self.view.service_entries.get(&key);
                let Some((entry, host)) = entry.and_then(|it| Some((it, it.spec.hosts.first()?))) else {
                    return not_found(format!("{what} does not exist"));
                };
                hostname = host.clone();
                ports = entry.spec.ports.iter().map(|it| it.number.get().into()).collect();
            }
            (group, kind) => {
                let message =
                    format!("{kind} {:?} of {group:?} is no kind that requests can be sent to", target.name);
                return Err(Unresolved { reason: "InvalidKind", message });
            }
        }
        match target.port.map(|port| u32::from(port.get())) {
            Some(port) if ports.contains(&port) => Ok((namespace.to_owned(), hostname, port)),
            Some(port) => not_found(format!("{what} has no port {port}")),
            None => not_found(format!("{what}: no port is given")),
        }
    }

    /// Into another namespace a reference needs its leave, unless it is to the service that the route is for anyway: a waypoint has an
    /// identity of its own, and reaches what the route's author may not.
    fn permitted(&self, target: &ObjectRef, namespace: &str, what: &str) -> Result<(), Unresolved> {
        let own = self.route.metadata.namespace.as_str();
        let (kind, of, name) = self.parent;
        if namespace == own || (kind, of, name) == (target.kind.as_str(), namespace, target.name.as_str()) {
            return Ok(());
        }
        let to = (target.group.as_str(), target.kind.as_str(), target.name.as_str());
        let mut grants = self.view.grants.get(namespace).into_iter().flatten();
        if grants.any(|grant| grant.permits(self.route.of.kind(), own, to)) {
            return Ok(());
        }
        let message = format!(
            "{what} is of another namespace, and no ReferenceGrant there lets {}s of {own} refer to it",
            self.route.of.kind()
        );
        Err(Unresolved { reason: "RefNotPermitted", message })
    }
}
