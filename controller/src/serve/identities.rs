//! Who runs where, for the certificate authority.

use std::sync::Arc;

use culvert_k8s_api::Object;
use culvert_k8s_api::object::{Kind, ObjectKey};
use culvert_k8s_api::status::Phase;
use culvert_model::identity::Identity;
use tokio::sync::watch;

use crate::auth::NodeName;
use crate::ca::NodeIdentities;
use crate::index::{Snapshot, World};

/// Answers from the newest snapshot.
#[derive(Clone, Debug)]
pub struct Running(pub watch::Receiver<Arc<Snapshot>>);

impl NodeIdentities for Running {
    fn runs_on(&self, node: &NodeName, identity: &Identity) -> bool {
        let snapshot = Arc::clone(&self.0.borrow());
        runs_on(&snapshot.world, node.as_str(), identity.namespace(), identity.service_account())
    }
}

/// A pod that is pending runs too: its certificate is fetched before its first connection. One that has ended does not.
fn runs_on(world: &World, node: &str, namespace: &str, account: &str) -> bool {
    let here = |key: &(String, String)| {
        world.pods.get(key).is_some_and(|status| {
            status.node_name == node && matches!(status.phase, Phase::Pending | Phase::Running)
        })
    };
    let first = ObjectKey { kind: Kind::Pod, namespace: namespace.to_owned(), name: String::new() };
    let pods = world
        .objects
        .range(first..)
        .take_while(|(key, _)| key.kind == Kind::Pod && key.namespace == namespace);
    pods.into_iter().any(|(key, manifest)| match &manifest.object {
        Object::Pod(pod) => {
            pod.service_account() == account && here(&(key.namespace.clone(), key.name.clone()))
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use culvert_k8s_api::manifest::parse_file;
    use culvert_k8s_api::status::PodStatus;

    use super::*;
    use crate::index::by_key;

    /// D50.
    #[test]
    fn only_a_pod_that_has_not_ended_on_that_node_counts() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: n}\nspec: {serviceAccountName: a, containers: [{name: c}]}\n";
        let mut world = World { objects: by_key(parse_file("f", text).objects), ..World::default() };
        assert!(!runs_on(&world, "node", "n", "a"), "a manifest alone is no pod");
        let status = |phase| PodStatus {
            uid: "u".into(),
            namespace: "n".into(),
            name: "p".into(),
            node_name: "node".into(),
            pod_ips: Vec::new(),
            phase,
            ready: false,
            netns: None,
            deleted: true,
        };
        for (phase, expected) in [
            (Phase::Pending, true),
            (Phase::Running, true),
            (Phase::Failed, false),
            (Phase::Succeeded, false),
        ] {
            world.pods.insert(("n".into(), "p".into()), status(phase));
            assert_eq!(runs_on(&world, "node", "n", "a"), expected, "{phase:?}");
        }
        world.pods.insert(("n".into(), "p".into()), status(Phase::Running));
        for (node, namespace, account) in [("other", "n", "a"), ("node", "m", "a"), ("node", "n", "default")]
        {
            assert!(!runs_on(&world, node, namespace, account));
        }
        world.objects.clear();
        assert!(!runs_on(&world, "node", "n", "a"), "a status alone is no pod");
    }
}
