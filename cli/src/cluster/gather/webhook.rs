//! Whether the admission webhook answers: only the API server can say, when it calls it. So it is asked to create a policy without
//! doing it.

use kube::Api;
use kube::api::{DynamicObject, PostParams};
use serde_json::json;

use super::{SECURITY, resource};
use crate::cluster::connect::{Cluster, NoAnswer};

/// A namespace that is always there and that the webhook is asked about.
const NAMESPACE: &str = "default";

/// `None` if whoever asks may not create policies: then the webhook was not called.
pub(super) async fn try_it(cluster: &Cluster) -> Option<Result<(), String>> {
    let kind = resource(SECURITY, "PeerAuthentication", "peerauthentications");
    let api: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), NAMESPACE, &kind);
    let object = json!({
        "apiVersion": kind.api_version, "kind": kind.kind,
        "metadata": {"generateName": "culvert-status-", "namespace": NAMESPACE},
        "spec": {},
    });
    let object: DynamicObject = serde_json::from_value(object).ok()?;
    let dry = PostParams { dry_run: true, field_manager: None };
    verdict(cluster.ask(api.create(&dry, &object)).await.map(|_| ()))
}

/// What an answer to the attempt says of the webhook.
fn verdict(outcome: Result<(), NoAnswer>) -> Option<Result<(), String>> {
    match outcome {
        Ok(()) => Some(Ok(())),
        // The API server says so when it cannot call one.
        Err(NoAnswer::Refused { message, .. }) if message.contains("failed calling webhook") => {
            Some(Err(message))
        }
        // Refused by a webhook: it answers.
        Err(NoAnswer::Refused { message, .. }) if message.contains("denied the request") => Some(Ok(())),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_call_that_failed_counts_against_it() {
        let refused = |code, message: &str| Err(NoAnswer::Refused { code, message: message.to_owned() });
        assert_eq!(verdict(Ok(())), Some(Ok(())));
        let failed =
            "Internal error occurred: failed calling webhook \"validation.culvert.dev\": connection refused";
        assert_eq!(verdict(refused(500, failed)), Some(Err(failed.to_owned())));
        let denied = "admission webhook \"validation.culvert.dev\" denied the request: spec.mode";
        assert_eq!(verdict(refused(403, denied)), Some(Ok(())));
        assert_eq!(verdict(refused(403, "peerauthentications is forbidden")), None);
        assert_eq!(verdict(refused(404, "not found")), None);
    }
}
