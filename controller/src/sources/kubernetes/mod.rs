//! The world from the Kubernetes API server: a watcher for each kind, all of them into one store.
//!
//! Each watcher lists in pages, then watches with bookmarks; when its place in the history is gone (410) it lists again, and
//! that list replaces what was known of the kind at once, so that nothing is missing for a moment. A connection that breaks is
//! taken up where it was. While the API server is away everything stays as it was.

use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::metrics::Metrics;
use culvert_runtime::tasks::Tasks;
use kube::Client;
use kube::api::{Api, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt;

pub mod convert;
mod definitions;
pub mod kinds;
mod metrics;
pub mod selection;
pub mod store;
#[cfg(test)]
mod tests;

use convert::{convert, key_of};
use definitions::Watchers;
use kinds::Watched;
use metrics::WatchMetrics;
use selection::Selection;
use store::{Said, Store};

use crate::index::World;

/// Nothing new for this long: the burst is over.
pub const QUIET: Duration = Duration::from_millis(10);
/// Taken in after this long even if more comes.
pub const LONGEST: Duration = Duration::from_millis(100);
/// Messages between watchers and store: at about 2 KB each, 2 MB. A watcher waits while it is full.
const MESSAGES: usize = 1_024;
/// Objects in a page of a list: with 10 KB of JSON each, 2 MB for each kind.
const PAGE: u32 = 200;

type Message = (Watched, Said);

/// The source.
#[derive(Debug)]
pub struct Kubernetes {
    store: Store,
    messages: mpsc::Receiver<Message>,
    metrics: WatchMetrics,
}

impl Kubernetes {
    /// Starts to watch, and knows what is in the namespaces of `selection`. The tasks end with `tasks`.
    pub fn start(client: Client, selection: Selection, tasks: &Tasks, metrics: &Metrics) -> Self {
        let (sender, messages) = mpsc::channel(MESSAGES);
        let watches = WatchMetrics::register(metrics);
        let changed = Arc::new(Notify::new());
        tasks.spawn("definitions", definitions::watch(client.clone(), changed.clone()));
        let watchers = Watchers::new(client, tasks.clone(), sender, watches.clone());
        tasks.spawn("kubernetes", definitions::follow(watchers, changed));
        Self { store: Store::new(selection), messages, metrics: watches }
    }

    #[cfg(test)]
    fn of(messages: mpsc::Receiver<Message>) -> Self {
        Self { store: Store::default(), messages, metrics: WatchMetrics::default() }
    }

    /// Waits until something may have changed and the burst is over; false if nothing will any more. Cancel safe: what was
    /// taken in is in the next [`Kubernetes::world`].
    pub async fn changed(&mut self) -> bool {
        let mut changed = false;
        let mut latest = None;
        loop {
            let message = match latest {
                None => self.messages.recv().await,
                Some(latest) => {
                    match timeout_at((Instant::now() + QUIET).min(latest), self.messages.recv()).await {
                        Ok(message) => message,
                        Err(_) => return true,
                    }
                }
            };
            let Some((kind, said)) = message else { return changed };
            let ended = matches!(said, Said::Gone);
            changed |= self.store.apply(&kind, said);
            self.metrics.objects(&kind, (!ended).then(|| self.store.count(&kind)));
            if changed && latest.is_none() {
                latest = Some(Instant::now() + LONGEST);
            }
            if latest.is_some_and(|latest| Instant::now() >= latest) {
                return true;
            }
        }
    }

    /// What is; `None` before every kind was listed once.
    pub fn world(&mut self) -> Option<World> {
        self.store.world()
    }

    /// The kinds that were not listed yet.
    pub fn missing(&self) -> Vec<String> {
        if self.store.is_new() {
            return vec!["which kinds the API server has".to_owned()];
        }
        self.store.missing().map(|kind| kind.plural.clone()).collect()
    }
}

async fn watch(client: Client, kind: Watched, sender: mpsc::Sender<Message>, metrics: WatchMetrics) {
    let api: Api<DynamicObject> = Api::all_with(client, &kind.resource());
    let mut config = watcher::Config::default().page_size(PAGE);
    config.label_selector = kind.labels();
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    while let Some(event) = events.next().await {
        let said = match event {
            Ok(event) => {
                metrics.event(&kind, matches!(event, Event::Init));
                said(&kind, event)
            }
            Err(error) => {
                metrics.error(&kind);
                tracing::warn!(kind = kind.plural, %error, "watching is interrupted; what is known stays");
                if kind.optional && denied(&error) { Said::Denied } else { continue }
            }
        };
        if sender.send((kind.clone(), said)).await.is_err() {
            return;
        }
    }
}

fn said(kind: &Watched, event: Event<DynamicObject>) -> Said {
    match event {
        Event::Init => Said::Init,
        Event::InitDone => Said::Done,
        Event::InitApply(object) => {
            Said::Listed(key_of(kind, &object.metadata), Box::new(convert(kind, object)))
        }
        Event::Apply(object) => {
            Said::Applied(key_of(kind, &object.metadata), Box::new(convert(kind, object)))
        }
        Event::Delete(object) => Said::Deleted(key_of(kind, &object.metadata)),
    }
}

fn denied(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 403,
        _ => false,
    }
}
