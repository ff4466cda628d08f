//! Telling people why a pod is not enrolled: an event of the pod, where `kubectl describe` shows it.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::time::Instant;

use super::source::PodKey;

/// Events in one round of reports, of which there is one each 5 s.
pub const AT_ONCE: usize = 20;
/// What passes by itself within this is not worth an event: a proxy that is about to connect, a sandbox that is made again.
const LASTS: Duration = Duration::from_secs(10);
/// The same is said again of the same pod only after so long.
const AGAIN: Duration = Duration::from_secs(600);
/// And something else after so long.
const OTHER: Duration = Duration::from_secs(60);
/// One event; the API server answers in milliseconds or is away.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a note that the API server takes.
const MAX_NOTE: usize = 1024;
const CONTROLLER: &str = "culvert.dev/agent";
const REASON: &str = "EnrolmentTrouble";

/// Something that keeps a pod from being enrolled as it should be.
#[derive(Clone, Debug)]
pub struct Trouble {
    why: String,
    next: Instant,
}

impl Trouble {
    /// It begins now.
    pub fn new(why: &str, now: Instant) -> Self {
        Self { why: why.to_owned(), next: now + LASTS }
    }

    /// It goes on, in these words: each try may fail in another way.
    pub fn goes_on(&mut self, why: &str, now: Instant) {
        if self.why != why {
            why.clone_into(&mut self.why);
            self.next = self.next.min(now + OTHER);
        }
    }

    /// Its words, if it is time to say them.
    pub fn due(&mut self, now: Instant) -> Option<&str> {
        if now < self.next {
            return None;
        }
        self.next = now + AGAIN;
        Some(&self.why)
    }
}

/// Publishes in the name of the agent of this node.
pub fn recorder(client: Client, node: String) -> Recorder {
    Recorder::new(client, Reporter { controller: CONTROLLER.to_owned(), instance: Some(node) })
}

/// Says it in the log and as an event. What cannot be published is in the log alone.
pub async fn publish(recorder: &Recorder, uid: &str, key: &PodKey, why: &str) {
    let (namespace, name) = key;
    tracing::warn!(pod = %name, %namespace, uid, why, "a pod is not enrolled as it should be");
    let event = Event {
        type_: EventType::Warning,
        reason: REASON.to_owned(),
        note: Some(shorten(why)),
        action: "Enrol".to_owned(),
        secondary: None,
    };
    let pod = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: Some(name.clone()),
        namespace: Some(namespace.clone()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    };
    let published = tokio::time::timeout(PATIENCE, recorder.publish(&event, &pod)).await;
    let error = match published {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    tracing::debug!(pod = %name, %namespace, error, "an event cannot be published");
}

fn shorten(why: &str) -> String {
    match why.char_indices().map(|(at, it)| at + it.len_utf8()).take_while(|end| *end <= MAX_NOTE).last() {
        Some(end) => why[..end].to_owned(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_lasts_is_said_and_not_said_again_for_ten_minutes() {
        let begun = Instant::now();
        let mut trouble = Trouble::new("no rules", begun);
        assert_eq!(trouble.due(begun), None);
        trouble.goes_on("no proxy", begun + LASTS / 2);
        assert_eq!(trouble.due(begun + LASTS), Some("no proxy"));
        assert_eq!(trouble.due(begun + LASTS + AGAIN / 2), None);
        assert_eq!(trouble.due(begun + LASTS + AGAIN), Some("no proxy"));
        let then = begun + LASTS + AGAIN;
        trouble.goes_on("no proxy", then);
        assert_eq!(trouble.due(then + OTHER), None);
        trouble.goes_on("no rules", then);
        assert_eq!(trouble.due(then + OTHER), Some("no rules"));
    }

    #[test]
    fn a_note_is_as_long_as_the_api_server_takes() {
        assert_eq!(shorten("short"), "short");
        let long = shorten(&"ä".repeat(1000));
        assert_eq!(long, "ä".repeat(MAX_NOTE / 2));
        assert_eq!(shorten(""), "");
    }
}
