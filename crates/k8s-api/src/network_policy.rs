//! `networking.k8s.io/v1` NetworkPolicy, and the kinds like it that other networks bring.
//!
//! The network enforces them, not the mesh. What the mesh has to know is whom they select: a connection that is handed over inside
//! a node's tunnel never crosses the interface where they are enforced (docs/decisions/0008-same-node.md). So everything that is
//! not understood here selects, and nothing is an error.

use serde::{Deserialize, Serialize};

use crate::meta::{ObjectMeta, StringMap};

/// networking.k8s.io/v1 NetworkPolicy: whom it selects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetworkPolicy {
    /// Name and namespace: it selects pods of its own namespace only.
    pub metadata: ObjectMeta,
    /// `spec.podSelector`; `None` where it cannot be read, which selects every pod of the namespace.
    pub pod_selector: Option<LabelSelector>,
}

/// A policy of a kind whose selection the mesh cannot read: `CiliumNetworkPolicy`, `AdminNetworkPolicy` and the like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OtherNetworkPolicy {
    /// Name and namespace, unchecked.
    pub metadata: ObjectMeta,
    /// Its API version and kind, as they are written.
    pub kind: String,
}

/// metav1.LabelSelector. Empty, it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// All must be there.
    pub match_labels: StringMap,
    /// All must hold.
    pub match_expressions: Vec<Requirement>,
}

/// One expression of a [`LabelSelector`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    pub operator: String,
    /// For the first two.
    pub values: Vec<String>,
}

/// `spec` of a NetworkPolicy, as far as it is read.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Spec {
    pub pod_selector: LabelSelector,
}

impl NetworkPolicy {
    /// Whether it selects a pod.
    pub fn selects(&self, namespace: &str, labels: &StringMap) -> bool {
        self.metadata.namespace == namespace
            && self.pod_selector.as_ref().is_none_or(|selector| selector.matches(labels))
    }
}

impl LabelSelector {
    /// Whether labels match, as the API server has it. An operator that is not known holds.
    pub fn matches(&self, labels: &StringMap) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|it| it.holds(labels))
    }
}

impl Requirement {
    fn holds(&self, labels: &StringMap) -> bool {
        let value = labels.get(&self.key);
        match self.operator.as_str() {
            "In" => value.is_some_and(|value| self.values.contains(value)),
            // A label that is not there is not in any set.
            "NotIn" => value.is_none_or(|value| !self.values.contains(value)),
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            _ => true,
        }
    }
}

/// Whether a kind that is none of ours restricts what pods may send to each other. By name, since no list of them is ever whole.
pub fn restricts(kind: &str) -> bool {
    kind.ends_with("NetworkPolicy") || kind == "EgressFirewall"
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::manifest::{Manifest, parse_file};
    use crate::object::Object;

    fn objects(text: &str) -> Vec<Arc<Manifest>> {
        let parsed = parse_file("p.yaml", text);
        assert_eq!(parsed.errors, [], "{text}");
        parsed.objects
    }

    fn policy(spec: &str) -> NetworkPolicy {
        let text = format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: shop}}\n{spec}\n"
        );
        match &objects(&text)[0].object {
            Object::NetworkPolicy(it) => (**it).clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn whom_a_policy_selects() {
        let labels = |text: &str| -> StringMap {
            let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
        };
        for (selector, of_pod, selected) in [
            ("{}", "", true),
            ("{matchLabels: {app: web}}", "app=web,v=1", true),
            ("{matchLabels: {app: web}}", "app=db", false),
            ("{matchLabels: {app: web, v: '2'}}", "app=web,v=1", false),
            ("{matchExpressions: [{key: app, operator: In, values: [a, web]}]}", "app=web", true),
            ("{matchExpressions: [{key: app, operator: In, values: [a]}]}", "app=web", false),
            ("{matchExpressions: [{key: app, operator: In, values: [a]}]}", "", false),
            ("{matchExpressions: [{key: app, operator: NotIn, values: [web]}]}", "app=web", false),
            ("{matchExpressions: [{key: app, operator: NotIn, values: [web]}]}", "", true),
            ("{matchExpressions: [{key: app, operator: Exists}]}", "app=web", true),
            ("{matchExpressions: [{key: app, operator: Exists}]}", "v=1", false),
            ("{matchExpressions: [{key: app, operator: DoesNotExist}]}", "app=web", false),
            ("{matchExpressions: [{key: app, operator: DoesNotExist}]}", "v=1", true),
            ("{matchLabels: {app: web}, matchExpressions: [{key: v, operator: Exists}]}", "app=web", false),
        ] {
            let policy = policy(&format!("spec: {{podSelector: {selector}, policyTypes: [Egress]}}"));
            assert_eq!(policy.selects("shop", &labels(of_pod)), selected, "{selector} {of_pod}");
            assert!(!policy.selects("bank", &labels(of_pod)), "another namespace's pods are not its own");
        }
    }

    /// What cannot be read selects: the network may understand it.
    #[test]
    fn what_is_not_understood_selects() {
        let nobody = StringMap::new();
        for spec in [
            "",
            "spec: {}",
            "spec: {podSelector: [1]}",
            "spec: {podSelector: {matchLabels: [a]}}",
            "spec: {podSelector: {matchExpressions: [{key: a, operator: Near}]}}",
            "spec: {podSelector: {matchExpressions: [{key: a, operator: NotIn}]}, newField: {x: 1}}",
        ] {
            assert!(policy(spec).selects("shop", &nobody), "{spec}");
        }
    }

    #[test]
    fn policies_of_other_kinds_are_noticed() {
        for (api, kind, noticed) in [
            ("cilium.io/v2", "CiliumNetworkPolicy", true),
            ("cilium.io/v2", "CiliumClusterwideNetworkPolicy", true),
            ("projectcalico.org/v3", "GlobalNetworkPolicy", true),
            ("projectcalico.org/v3", "NetworkPolicy", true),
            ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy", true),
            ("networking.k8s.io/v2", "NetworkPolicy", true),
            ("k8s.ovn.org/v1", "EgressFirewall", true),
            ("v1", "ConfigMap", false),
        ] {
            let text = format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: Any.Name}}\n");
            let found = objects(&text);
            let other = found.iter().any(|it| matches!(&it.object, Object::OtherNetworkPolicy(_)));
            assert_eq!(other, noticed, "{api} {kind}");
        }
    }
}
