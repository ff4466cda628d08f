//! Which pods are instances of a Gateway's waypoint: whom xDS streams with routes and policies of requests are for.

use culvert_k8s_api::gateway::Gateway;
use culvert_k8s_api::object::{Kind, ObjectKey};
use culvert_k8s_api::status::Phase;
use culvert_k8s_api::{Object, labels};

use crate::auth::{Caller, Grant};
use crate::gateways::{self, Owner};
use crate::index;

/// What is, as far as this is about it.
pub(super) struct World<'a> {
    pub objects: &'a index::World,
    /// Istio's class of waypoints is ours too.
    pub compat: bool,
}

impl World<'_> {
    /// Whether a caller may have a stream. `said` is the Gateway that its node names, if it named one; `None` before it has named
    /// its node.
    ///
    /// # Errors
    /// Why not, for the log.
    pub fn admits(&self, caller: &Caller, said: Option<Option<&str>>) -> Result<(), String> {
        let node = caller.node.as_str();
        match (&caller.grant, said) {
            // The proxy of a node, as whatever it says it is on a later look.
            (Grant::Node, None | Some(None)) => Ok(()),
            (Grant::Node, Some(Some(gateway))) => {
                let (namespace, name) = self.waypoint(gateway)?;
                let mut pods = self.pods_of(namespace);
                if pods.any(|pod| self.is_instance(node, namespace, pod, name)) {
                    Ok(())
                } else {
                    Err(format!("no instance of Gateway {gateway} is on its node"))
                }
            }
            (Grant::Own { namespace, pod, .. }, None) => {
                let of = self.label(namespace, pod).ok_or("the pod is no trusted proxy and no waypoint")?;
                self.instance(node, namespace, pod, &format!("{namespace}/{of}"))
            }
            (Grant::Own { namespace, pod, .. }, Some(Some(gateway))) => {
                self.instance(node, namespace, pod, gateway)
            }
            (Grant::Own { .. }, Some(None)) => {
                Err("the pod is no trusted proxy and names no Gateway".to_owned())
            }
        }
    }

    fn instance(&self, node: &str, namespace: &str, pod: &str, gateway: &str) -> Result<(), String> {
        let (home, name) = self.waypoint(gateway)?;
        if home == namespace && self.is_instance(node, namespace, pod, name) {
            Ok(())
        } else {
            Err(format!("the pod is no instance of Gateway {gateway} on its node"))
        }
    }

    /// Namespace and name of a Gateway that is a waypoint of this mesh.
    fn waypoint<'g>(&self, gateway: &'g str) -> Result<(&'g str, &'g str), String> {
        let no = || format!("there is no waypoint {gateway:?} of this mesh");
        let (namespace, name) = gateway.split_once('/').ok_or_else(no)?;
        let Some(Object::Gateway(it)) = self.object(Kind::Gateway, namespace, name) else { return Err(no()) };
        if it.hbone().is_some() && self.owner(it) == Owner::Us { Ok((namespace, name)) } else { Err(no()) }
    }

    fn owner(&self, gateway: &Gateway) -> Owner {
        let name = gateway.spec.gateway_class_name.as_str();
        let class = match self.object(Kind::GatewayClass, "", name) {
            Some(Object::GatewayClass(class)) => Some(&**class),
            _ => None,
        };
        gateways::owner(name, class, self.compat)
    }

    /// A pod that has not ended, on this node, with the label of this Gateway.
    fn is_instance(&self, node: &str, namespace: &str, pod: &str, gateway: &str) -> bool {
        let placed = self.objects.pods.get(&(namespace.to_owned(), pod.to_owned())).is_some_and(|status| {
            status.node_name == node && matches!(status.phase, Phase::Pending | Phase::Running)
        });
        placed && self.label(namespace, pod) == Some(gateway)
    }

    fn label(&self, namespace: &str, pod: &str) -> Option<&str> {
        let labels = &self.object(Kind::Pod, namespace, pod)?.metadata().labels;
        labels.get(labels::GATEWAY_NAME).map(String::as_str)
    }

    fn pods_of<'s>(&'s self, namespace: &'s str) -> impl Iterator<Item = &'s str> {
        let first = ObjectKey { kind: Kind::Pod, namespace: namespace.to_owned(), name: String::new() };
        let pods = self.objects.objects.range(first..);
        pods.take_while(move |(key, _)| key.kind == Kind::Pod && key.namespace == namespace)
            .map(|(key, _)| key.name.as_str())
    }

    fn object(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Object> {
        let key = ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() };
        self.objects.objects.get(&key).map(|it| &it.object)
    }
}

#[cfg(test)]
#[path = "instances_tests.rs"]
mod tests;
