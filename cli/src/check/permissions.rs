//! What whoever asks may do, as the API server says of them.

use futures_util::StreamExt;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Api;
use kube::api::PostParams;

use super::Check;
use crate::cluster::Cluster;
use crate::cluster::reach::each;

/// Verb, group, resource, subresource, and whether in the installation's namespace only.
type Need = (&'static str, &'static str, &'static str, &'static str, bool);

/// What the chart makes.
const INSTALL: [Need; 12] = [
    ("create", "", "namespaces", "", false),
    ("create", "apiextensions.k8s.io", "customresourcedefinitions", "", false),
    ("create", "rbac.authorization.k8s.io", "clusterroles", "", false),
    ("create", "rbac.authorization.k8s.io", "clusterrolebindings", "", false),
    ("create", "rbac.authorization.k8s.io", "roles", "", true),
    ("create", "rbac.authorization.k8s.io", "rolebindings", "", true),
    ("create", "", "serviceaccounts", "", true),
    ("create", "", "services", "", true),
    ("create", "", "secrets", "", true),
    ("create", "apps", "deployments", "", true),
    ("create", "apps", "daemonsets", "", true),
    ("create", "policy", "poddisruptionbudgets", "", true),
];

/// What `culvert status` reads.
const LOOK: [Need; 12] = [
    ("list", "", "nodes", "", false),
    ("list", "", "namespaces", "", false),
    ("list", "", "pods", "", false),
    ("list", "", "services", "", false),
    ("list", "security.istio.io", "authorizationpolicies", "", false),
    ("list", "networking.istio.io", "serviceentries", "", false),
    ("list", "gateway.networking.k8s.io", "gateways", "", false),
    ("get", "apps", "deployments", "", true),
    ("get", "apps", "daemonsets", "", true),
    ("get", "coordination.k8s.io", "leases", "", true),
    ("get", "", "pods", "proxy", true),
    ("create", "", "pods", "portforward", true),
];

pub(super) async fn install(cluster: &Cluster) -> Check {
    let denied = denied(cluster, &INSTALL).await;
    verdict("may-install", "you may install it", "you may not install it", denied)
}

pub(super) async fn look(cluster: &Cluster) -> Check {
    let denied = denied(cluster, &LOOK).await;
    let check =
        verdict("may-look", "you may read all of the status", "you may not read all of the status", denied);
    // The rest of the status is shown all the same.
    match check.result {
        super::Verdict::Error => Check { result: super::Verdict::Warning, ..check },
        _ => check,
    }
}

fn verdict(name: &'static str, well: &str, not: &str, denied: Result<Vec<String>, String>) -> Check {
    match denied {
        Ok(denied) if denied.is_empty() => Check::ok(name, well),
        Ok(denied) => {
            Check::error(name, format!("{not}: {}", denied.join(", ")), "ask the cluster's administrator")
        }
        Err(why) => Check::warning(name, format!("the API server does not say: {why}"), ""),
    }
}

/// What may not be done, in words.
async fn denied(cluster: &Cluster, needs: &[Need]) -> Result<Vec<String>, String> {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let asked = each(needs.iter().copied(), |need| {
        let reviews = &reviews;
        async move {
            let review = review(need, &cluster.system);
            let answer = cluster.ask(reviews.create(&PostParams::default(), &review)).await;
            answer.map(|it| {
                (!it.status.is_some_and(|status| status.allowed)).then(|| words(need, &cluster.system))
            })
        }
    });
    let mut denied = Vec::new();
    for answer in asked.collect::<Vec<_>>().await {
        denied.extend(answer.map_err(|error| error.to_string())?);
    }
    denied.sort();
    Ok(denied)
}

fn review((verb, group, resource, subresource, in_system): Need, system: &str) -> SelfSubjectAccessReview {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let attributes = ResourceAttributes {
        verb: some(verb),
        group: Some(group.to_owned()),
        resource: some(resource),
        subresource: some(subresource),
        namespace: in_system.then(|| system.to_owned()),
        ..ResourceAttributes::default()
    };
    let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
    SelfSubjectAccessReview { spec, ..Default::default() }
}

fn words((verb, group, resource, subresource, in_system): Need, system: &str) -> String {
    let group = if group.is_empty() { String::new() } else { format!(".{group}") };
    let below = if subresource.is_empty() { String::new() } else { format!("/{subresource}") };
    let place = if in_system { format!(" in {system}") } else { String::new() };
    format!("{verb} {resource}{group}{below}{place}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_is_asked_for_and_named() {
        let need = ("create", "", "pods", "portforward", true);
        let asked = review(need, "s").spec.resource_attributes.unwrap();
        assert_eq!(
            (asked.namespace.as_deref(), asked.subresource.as_deref()),
            (Some("s"), Some("portforward"))
        );
        assert_eq!(words(need, "s"), "create pods/portforward in s");
        let everywhere = ("list", "apps", "daemonsets", "", false);
        assert_eq!(review(everywhere, "s").spec.resource_attributes.unwrap().namespace, None);
        assert_eq!(words(everywhere, "s"), "list daemonsets.apps");
    }

    #[test]
    fn what_may_not_be_done_fails_the_check() {
        assert_eq!(verdict("n", "may", "may not", Ok(vec![])), Check::ok("n", "may"));
        let denied = verdict("n", "may", "may not", Ok(vec!["list nodes".to_owned()]));
        assert_eq!(
            (denied.result, denied.message.as_str()),
            (super::super::Verdict::Error, "may not: list nodes")
        );
    }
}
