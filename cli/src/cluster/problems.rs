//! What is wrong with a mesh: a pure function of what was seen. Each problem is one line that says what, where, since when and what
//! to do; what follows from another problem is left out.

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::seen::{Seen, age, seconds};

mod control_plane;
mod nodes;
#[cfg(test)]
mod tests;
mod workloads;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    /// Something does not work.
    Error,
    /// It works, and something is not as it should be or will not stay so.
    Warning,
}

/// What kind of problem. The names are part of what `-o json` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) enum Reason {
    ApiServerUnreachable,
    NotInstalled,
    CannotRead,
    ControllerNotReady,
    ControllerUnreachable,
    NoLeader,
    LeaseStale,
    RootExpired,
    RootExpiring,
    WebhookNotAnswering,
    NodeNotReady,
    KubeletUnreachable,
    AgentMissing,
    AgentNotReady,
    AgentUnreachable,
    ProxyMissing,
    ProxyNotReady,
    ProxyUnreachable,
    ProxyNotConnected,
    ProxyBehind,
    ProxyRefused,
    CertificateUnavailable,
    CertificateExpired,
    CertificateExpiring,
    RollingUpdate,
    ClockSkew,
    PodNotEnrolled,
    PodPending,
    PodStillEnrolled,
    PolicyNotAccepted,
    PolicyNotAsWritten,
    ResourceNotAccepted,
    WaypointMissing,
    WaypointNotProgrammed,
}

/// The object that a problem is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Object {
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What kind.
    pub reason: Reason,
    /// Where.
    pub object: Object,
    /// On which node, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What, for a person.
    pub message: String,
    /// Since when, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// What to do.
    pub action: String,
}

/// Everything that is wrong, the worst first, and of the same badness in the order in which one thing depends on another.
pub(crate) fn problems(seen: &Seen) -> Vec<Problem> {
    if let Some(why) = &seen.away {
        return vec![api_server(seen, why)];
    }
    if seen.controller.is_none() && seen.agent.is_none() && seen.proxy.is_none() && seen.own.is_empty() {
        let mut found = unread(seen);
        if found.is_empty() {
            found.push(not_installed(seen));
        }
        return found;
    }
    let mut found = unread(seen);
    control_plane::find(seen, &mut found);
    nodes::find(seen, &mut found);
    workloads::find(seen, &mut found);
    found.sort_by(|a, b| (a.severity, a.reason, &a.object).cmp(&(b.severity, b.reason, &b.object)));
    found
}

impl Problem {
    fn error(reason: Reason, object: Object, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            reason,
            object,
            node: None,
            message: message.into(),
            since: None,
            action: String::new(),
        }
    }

    fn warning(reason: Reason, object: Object, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(reason, object, message) }
    }

    fn on(mut self, node: &str) -> Self {
        self.node = Some(node.to_owned());
        self
    }

    fn since(mut self, since: Option<Timestamp>) -> Self {
        self.since = since;
        self
    }

    fn todo(mut self, action: impl Into<String>) -> Self {
        self.action = action.into();
        self
    }

    /// On one line, for a person, as of `now`.
    pub(crate) fn line(&self, now: Timestamp) -> String {
        let place = match (&self.object.namespace, self.object.kind.as_str()) {
            (Some(namespace), kind) => format!("{} {namespace}/{}", kind.to_lowercase(), self.object.name),
            (None, kind) => format!("{} {}", kind.to_lowercase(), self.object.name),
        };
        // Where the object is the node it is not said twice.
        let node = self.node.iter().filter(|node| **node != self.object.name);
        let node: String = node.map(|node| format!(" on {node}")).collect();
        let since = self.since.map(|since| format!(", for {}", age(seconds(since, now)))).unwrap_or_default();
        format!("{place}{node}: {}{since}; {}", self.message, self.action)
    }
}

/// An object by its kind, namespace (empty for none) and name.
fn object(kind: &str, namespace: &str, name: &str) -> Object {
    let namespace = (!namespace.is_empty()).then(|| namespace.to_owned());
    Object { kind: kind.to_owned(), namespace, name: name.to_owned() }
}

fn api_server(seen: &Seen, why: &str) -> Problem {
    let message = format!("the API server does not answer: {why}");
    Problem::error(Reason::ApiServerUnreachable, object("Cluster", "", &seen.name), message).todo(
        "pods that run keep what they have; see whether kube-apiserver runs and can be reached from here",
    )
}

fn not_installed(seen: &Seen) -> Problem {
    let message = "culvert is not installed there";
    Problem::error(Reason::NotInstalled, object("Namespace", "", &seen.system), message)
        .todo("culvert install, or -i NAMESPACE if it is installed in another one")
}

/// One for each reason why, however many kinds it is about.
fn unread(seen: &Seen) -> Vec<Problem> {
    let mut by_reason: Vec<(&str, Vec<&str>)> = Vec::new();
    for (what, why) in &seen.unread {
        match by_reason.iter_mut().find(|(known, _)| known == why) {
            Some((_, kinds)) => kinds.push(what),
            None => by_reason.push((why, vec![what])),
        }
    }
    by_reason
        .into_iter()
        .map(|(why, kinds)| {
            let message = format!("not read: {}: {why}", kinds.join(", "));
            Problem::warning(Reason::CannotRead, object("Cluster", "", &seen.name), message)
                .todo("what depends on it is not known; `culvert check` says which permissions are needed")
        })
        .collect()
}
