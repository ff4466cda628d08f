//! What is answered to a review. Pure.

use culvert_k8s_api::manifest::{FileError, judge_value};
use culvert_k8s_api::{Object, ObjectKey};
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation};
use serde_json::Value;

use crate::index::{World, by_key};
use crate::translate::{MeshSettings, translate};

/// What is wrong is said up to here; who mends that is told the rest.
const MAX_ERRORS: usize = 10;
/// A warning; kubectl shows each on a line.
const MAX_WARNING: usize = 250;
const GROUPS: [&str; 2] = ["security.istio.io", "networking.istio.io"];

/// A verdict in one word, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was to be judged: it is deleted, or what is judged did not change.
    Passed,
    /// It is as it should be.
    Good,
    /// It is stored, and does less or something else than who wrote it may think.
    Warned,
    /// It is refused.
    Refused,
}

/// Answers a review. `None` if it asks nothing.
pub fn answer(review: AdmissionReview<DynamicObject>) -> Option<(AdmissionReview<DynamicObject>, Verdict)> {
    let request: AdmissionRequest<DynamicObject> = review.try_into().ok()?;
    let mut response = AdmissionResponse::from(&request);
    let verdict = match judge(&request) {
        None => Verdict::Passed,
        Some(Ok(warnings)) if warnings.is_empty() => Verdict::Good,
        Some(Ok(warnings)) => {
            response.warnings = Some(warnings);
            Verdict::Warned
        }
        Some(Err(message)) => {
            response = response.deny(message);
            response.result.code = 422;
            response.result.reason = "Invalid".to_owned();
            Verdict::Refused
        }
    };
    Some((response.into_review(), verdict))
}

/// `None` if there is nothing to judge, else warnings, or why it is refused.
fn judge(request: &AdmissionRequest<DynamicObject>) -> Option<Result<Vec<String>, String>> {
    // Its status is written by controllers, and what is deleted harms nobody.
    if request.sub_resource.as_deref().is_some_and(|it| !it.is_empty())
        || !matches!(request.operation, Operation::Create | Operation::Update)
        || !GROUPS.contains(&request.kind.group.as_str())
    {
        return None;
    }
    let object = request.object.as_ref()?;
    // A finalizer or a label must be changed also of an object that was stored before it would have been refused.
    let old = request.old_object.as_ref().filter(|_| request.operation == Operation::Update);
    if old.is_some_and(|old| old.data.get("spec") == object.data.get("spec"))
        || object.metadata.deletion_timestamp.is_some()
    {
        return None;
    }
    let mut document = match serde_json::to_value(object) {
        Ok(document) => document,
        Err(error) => return Some(Err(format!("it cannot be read: {error}"))),
    };
    if document["metadata"]["name"].as_str().is_none_or(str::is_empty)
        && let Some(prefix) = document["metadata"]["generateName"].as_str()
    {
        document["metadata"]["name"] = format!("{prefix}x").into();
    }
    Some(judge_document(&document))
}

fn judge_document(document: &Value) -> Result<Vec<String>, String> {
    let parsed = judge_value("", document);
    if !parsed.errors.is_empty() {
        return Err(listed(&parsed.errors));
    }
    let mut warnings: Vec<String> = parsed.notes.into_iter().map(|note| note.text).collect();
    let exports = |object: &Object| match object {
        Object::ServiceEntry(it) => it.spec.export_to.iter().any(|to| to != "*"),
        _ => false,
    };
    if parsed.objects.iter().any(|it| exports(&it.object)) {
        warnings.push("spec.exportTo is not honoured: its hosts are known in every namespace".to_owned());
    }
    // The same function that decides what is sent to the proxies says what of it is not as written.
    let keys: Vec<ObjectKey> = parsed.objects.iter().map(|it| it.object.key()).collect();
    let world = World { objects: by_key(parsed.objects), ..World::default() };
    let made = translate(&world, &std::collections::BTreeMap::new(), &MeshSettings::default());
    // Selectors in the root namespace are judged by the status: which namespace that is is no business of this function.
    let said = made
        .policy_status
        .into_iter()
        .filter(|it| it.reason != "Shadowed" && !it.targeted && !it.message.is_empty());
    warnings.extend(said.map(|it| it.message));
    debug_assert!(keys.len() <= 1, "one object is asked about: {keys:?}");
    Ok(warnings.into_iter().map(|it| it.chars().take(MAX_WARNING).collect()).collect())
}

fn listed(errors: &[FileError]) -> String {
    let mut said: Vec<String> = errors.iter().take(MAX_ERRORS).map(FileError::detail).collect();
    if errors.len() > MAX_ERRORS {
        said.push(format!("and {} more", errors.len() - MAX_ERRORS));
    }
    said.join("; ")
}
