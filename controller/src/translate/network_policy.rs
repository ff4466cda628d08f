//! Whom NetworkPolicies select (docs/decisions/0008-same-node.md). The network enforces them; the node tunnels must not go past it.

use std::collections::BTreeMap;

use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::network_policy::NetworkPolicy;
use culvert_proto::culvert::{Pod, pod};
use culvert_proto::workload::Extension;
use culvert_proto::{Any, POD_EXTENSION, POD_TYPE_URL};
use prost::Message;

use super::Translation;
use super::view::View;

/// What is known of the policies that the network enforces.
pub(super) struct NetworkPolicies<'a> {
    /// By namespace: a policy selects in its own only.
    policies: BTreeMap<&'a str, Vec<&'a NetworkPolicy>>,
    /// These are all.
    whole: bool,
}

impl<'a> NetworkPolicies<'a> {
    /// Sorts what there is. One policy of a kind that cannot be read may select anything, so that nothing is known of any pod.
    pub fn new(view: &View<'a>, out: &mut Translation) -> Self {
        let mut policies: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for policy in &view.network_policies {
            policies.entry(policy.metadata.namespace.as_str()).or_default().push(*policy);
        }
        for other in &view.other_network_policies {
            let (kind, name) = (&other.kind, &other.metadata.name);
            out.notes.push(format!(
                "{kind} {name}: whom it selects cannot be read, so that no connection is handed over on a node"
            ));
        }
        let whole = view.settings.network_policies && view.other_network_policies.is_empty();
        Self { policies, whole }
    }

    /// What the proxies are told of a pod.
    pub fn extension(&self, namespace: &str, labels: &StringMap, uid: &str) -> Extension {
        let mut of = self.policies.get(namespace).into_iter().flatten();
        let known = if of.any(|policy| policy.selects(namespace, labels)) {
            pod::NetworkPolicies::Selected
        } else if self.whole {
            pod::NetworkPolicies::None
        } else {
            pod::NetworkPolicies::Unknown
        };
        let message = Pod { uid: uid.to_owned(), network_policies: known.into() };
        let config = Any { type_url: POD_TYPE_URL.to_owned(), value: message.encode_to_vec().into() };
        Extension { name: POD_EXTENSION.to_owned(), config: Some(config) }
    }
}
