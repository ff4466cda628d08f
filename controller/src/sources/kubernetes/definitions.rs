//! Which kinds there are: asked for when a definition comes, changes or goes, so that the kinds of a chart are read about as soon
//! as they can be.
//!
//! A definition (CustomResourceDefinition) is there before its kind is served, and nothing tells when it is. So after each sign of a
//! change it is asked several times, further and further apart. And an API server that starts serves the kinds of definitions
//! last: a kind ends with its definition, not when it is not listed. What comes without a definition (a server behind the API server)
//! is found by asking now and then.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::tasks::{Task, Tasks};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;
use tokio_stream::StreamExt;

use super::kinds::{self, Defined, Watched};
use super::metrics::WatchMetrics;
use super::store::Said;
use super::{Message, PAGE};

/// From a sign that something changed, or from the look before, to the next look.
const LOOKS: [Duration; 7] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Between looks when nothing is known to have changed.
const IDLE: Duration = Duration::from_secs(60);
/// While the API server does not answer.
const AWAY: Duration = Duration::from_secs(1);

/// The watchers that run.
pub(super) struct Watchers {
    client: Client,
    tasks: Tasks,
    sender: mpsc::Sender<Message>,
    metrics: WatchMetrics,
    running: BTreeMap<Watched, Task>,
}

/// The receiver is gone.
struct Ended;

/// Says when a definition comes, changes or goes. Only names are transferred, not schemas.
pub(super) async fn watch(client: Client, changed: Arc<Notify>) {
    let api: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(client);
    let config = watcher::Config::default().page_size(PAGE);
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(_) | Event::Delete(_) | Event::InitDone) => changed.notify_one(),
            Ok(Event::Init | Event::InitApply(_)) => {}
            Err(error) => {
                tracing::warn!(%error, "definitions are not watched; they are looked for every {IDLE:?}")
            }
        }
    }
}

/// Keeps a watcher for each kind that is defined.
pub(super) async fn follow(mut watchers: Watchers, changed: Arc<Notify>) {
    // The next of LOOKS.
    let mut look = LOOKS.len();
    loop {
        let pause = match kinds::defined(&watchers.client).await {
            Ok(defined) => {
                if watchers.take_in(defined).await.is_err() {
                    return;
                }
                LOOKS.get(look).copied().unwrap_or(IDLE)
            }
            Err(error) => {
                tracing::warn!(%error, "cannot ask the API server what is defined");
                AWAY
            }
        };
        tokio::select! {
            () = sleep(pause) => look = (look + 1).min(LOOKS.len()),
            () = changed.notified() => {
                // Many come at once: a chart brings all of its own.
                sleep(LOOKS[0]).await;
                look = 1;
            }
        }
    }
}

/// What to do about one kind.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Begin(Watched),
    /// The same kind is served in another version: nothing of it is gone.
    Replace {
        old: Watched,
        new: Watched,
    },
    End(Watched),
}

/// What to do, of what is watched and what is there.
fn steps<'a>(running: impl Iterator<Item = &'a Watched>, defined: Defined) -> Vec<Step> {
    let mut running: Vec<&Watched> = running.collect();
    let Defined { kinds, unknown, definitions } = defined;
    let mut steps = Vec::new();
    for kind in kinds::builtin().into_iter().chain(kinds) {
        let same = |it: &&Watched| it.group == kind.group && it.kind == kind.kind;
        match running.iter().position(same).map(|at| running.swap_remove(at)) {
            Some(old) if *old == kind => {}
            Some(old) => steps.push(Step::Replace { old: old.clone(), new: kind }),
            None => steps.push(Step::Begin(kind)),
        }
    }
    let gone = |it: &&Watched| !unknown.contains(&it.group) && !definitions.contains(&it.definition());
    steps.extend(running.into_iter().filter(gone).cloned().map(Step::End));
    steps
}

impl Watchers {
    pub fn new(client: Client, tasks: Tasks, sender: mpsc::Sender<Message>, metrics: WatchMetrics) -> Self {
        Self { client, tasks, sender, metrics, running: BTreeMap::new() }
    }

    async fn take_in(&mut self, defined: Defined) -> Result<(), Ended> {
        let mut begun = Vec::new();
        // All are told of before any is watched: otherwise the first to be listed would seem to be all.
        for step in steps(self.running.keys(), defined) {
            match step {
                Step::Begin(kind) => {
                    tracing::debug!(kind = kind.plural, version = kind.version, "watched from now on");
                    self.say(kind.clone(), Said::Begun).await?;
                    begun.push(kind);
                }
                Step::Replace { old, new } => {
                    tracing::info!(
                        kind = new.plural,
                        before = old.version,
                        now = new.version,
                        "another version"
                    );
                    self.end(&old);
                    self.say(new.clone(), Said::Replaces(old)).await?;
                    begun.push(new);
                }
                Step::End(kind) => {
                    tracing::info!(kind = kind.plural, version = kind.version, "not defined any more");
                    self.end(&kind);
                    self.say(kind, Said::Gone).await?;
                }
            }
        }
        for kind in begun {
            let (client, sender, metrics) = (self.client.clone(), self.sender.clone(), self.metrics.clone());
            let watch = super::watch(client, kind.clone(), sender, metrics);
            self.running.insert(kind, self.tasks.spawn("watch", watch));
        }
        Ok(())
    }

    fn end(&mut self, kind: &Watched) {
        if let Some(task) = self.running.remove(kind) {
            task.abort();
        }
    }

    async fn say(&self, kind: Watched, said: Said) -> Result<(), Ended> {
        self.sender.send((kind, said)).await.map_err(|_| Ended)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use culvert_k8s_api::Kind;

    use super::*;

    fn kind(version: &str, group: &str) -> Watched {
        Watched {
            group: group.to_owned(),
            version: version.to_owned(),
            kind: "AuthorizationPolicy".to_owned(),
            plural: "authorizationpolicies".to_owned(),
            is: Kind::AuthorizationPolicy,
            optional: false,
        }
    }

    fn seen(kinds: &[Watched], unknown: &[&str]) -> Defined {
        let unknown = unknown.iter().map(|it| (*it).to_owned()).collect();
        Defined { kinds: kinds.to_vec(), unknown, definitions: BTreeSet::new() }
    }

    #[test]
    fn kinds_begin_change_their_version_and_end() {
        let builtin = kinds::builtin();
        let first = steps(std::iter::empty(), seen(&[kind("v1beta1", "a.io")], &[]));
        assert_eq!(first.len(), builtin.len() + 1);
        assert!(first.iter().all(|step| matches!(step, Step::Begin(_))));
        let old = kind("v1beta1", "a.io");
        let running = || builtin.iter().chain(std::iter::once(&old));
        assert_eq!(steps(running(), seen(std::slice::from_ref(&old), &[])), []);
        let new = kind("v1", "a.io");
        let replaced = Step::Replace { old: old.clone(), new: new.clone() };
        assert_eq!(steps(running(), seen(&[new], &[])), [replaced]);
        assert_eq!(steps(running(), seen(&[], &["b.io"])), [Step::End(old.clone())]);
        assert_eq!(steps(running(), seen(&[], &["a.io"])), [], "a group that is away keeps what it had");
        let not_served = Defined { definitions: [old.definition()].into(), ..Defined::default() };
        assert_eq!(steps(running(), not_served), [], "a kind that is defined is not gone");
        let other = kind("v1", "b.io");
        assert_eq!(steps(running(), seen(&[old.clone(), other.clone()], &[])), [Step::Begin(other)]);
    }
}
