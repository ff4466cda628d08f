//! The one task that writes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_runtime::drain::DrainWatcher;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{StreamExt, StreamMap};

use super::engine::{Engine, Outcome, Write};
use super::follow::{Watches, resource, seen};
use super::{Became, Contribution, Counters, Desired};

/// Between the beginnings of two writes: at most 50 a second.
pub(super) const PACE: Duration = Duration::from_millis(20);
/// One write.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where statuses are written.
pub(super) trait Statuses: Send + Sync {
    /// Applies. `managers` are all of ours, to see in the answer what is whose.
    fn apply(&self, write: &Write, managers: &[&'static str]) -> impl Future<Output = Outcome> + Send;
}

/// The API server.
pub(super) struct KubeStatuses(pub Client);

/// The task's state.
pub(super) struct Writer<S> {
    statuses: S,
    contributions: Vec<Contribution>,
    counters: Counters,
}

type Wanting = StreamMap<usize, WatchStream<Option<Arc<Desired>>>>;

impl<S: Statuses> Writer<S> {
    pub fn new(statuses: S, contributions: Vec<Contribution>, counters: Counters) -> Self {
        Self { statuses, contributions, counters }
    }

    /// Writes while this replica leads, until `drain` starts.
    pub async fn run(self, watches: impl Watches, mut leading: watch::Receiver<bool>, drain: DrainWatcher) {
        loop {
            tokio::select! {
                _ = drain.started() => return,
                led = leading.wait_for(|leads| *leads) => if led.is_err() { return },
            }
            tokio::select! {
                _ = drain.started() => return,
                () = self.lead(&watches, leading.clone()) => {}
            }
            self.counters.waiting.set(0);
        }
    }

    /// From when this replica leads until it does not.
    async fn lead(&self, watches: &impl Watches, mut leading: watch::Receiver<bool>) {
        let mut engine = Engine::new(&self.contributions, fastrand::Rng::new());
        let managers: Vec<&'static str> = self.contributions.iter().map(|it| it.manager).collect();
        let mut watching = watches.begin(&engine.kinds(), &managers);
        let streams = self.contributions.iter().map(|it| WatchStream::new(it.desired.clone()));
        let mut wanting: Wanting = streams.enumerate().collect();
        let mut free = Instant::now();
        loop {
            // Asked only when it may be written: what is there may have changed meanwhile.
            let at = if engine.ready() { Some(free) } else { engine.next_at().map(|at| at.max(free)) };
            self.counters.waiting.set(i64::try_from(engine.waiting()).unwrap_or(i64::MAX));
            tokio::select! {
                biased;
                Ok(()) = leading.changed() => if !*leading.borrow_and_update() { return },
                Some((by, desired)) = wanting.next() => {
                    if let Some(desired) = desired {
                        engine.wants(by, desired);
                    }
                }
                Some((kind, said)) = watching.messages.recv() => engine.seen(kind, said),
                () = sleep_until(at.unwrap_or(free)), if at.is_some() => {
                    let now = Instant::now();
                    if let Some(write) = engine.next(now, &stamp(SystemTime::now())) {
                        free = now + PACE;
                        let outcome = self.statuses.apply(&write, &managers).await;
                        self.note(&write, &outcome);
                        engine.done(&write, outcome, Instant::now());
                    }
                }
            }
        }
    }

    fn note(&self, write: &Write, outcome: &Outcome) {
        let (kind, namespace, name) = (write.target.kind.kind, &write.target.namespace, &write.target.name);
        let became = match outcome {
            Outcome::Written(_) if write.puts_back => {
                tracing::warn!(kind, namespace, name, "what another changed of its status is put back");
                "written"
            }
            Outcome::Written(_) => {
                tracing::debug!(kind, namespace, name, "status written");
                "written"
            }
            Outcome::Taken(whose) => {
                tracing::warn!(kind, namespace, name, whose, "another writes the same fields of its status");
                "taken"
            }
            Outcome::Stale => "stale",
            Outcome::Failed(error) => {
                tracing::warn!(kind, namespace, name, error, "cannot write its status");
                "failed"
            }
        };
        self.counters.writes.get_or_create(&Became { outcome: became }).inc();
    }
}

impl Statuses for KubeStatuses {
    async fn apply(&self, write: &Write, managers: &[&'static str]) -> Outcome {
        let (target, resource) = (&write.target, resource(&write.target.kind, write.version));
        let api: Api<DynamicObject> = if target.namespace.is_empty() {
            Api::all_with(self.0.clone(), &resource)
        } else {
            Api::namespaced_with(self.0.clone(), &target.namespace, &resource)
        };
        let mut metadata = json!({ "name": target.name, "uid": write.uid });
        if let Some(version) = &write.at {
            metadata["resourceVersion"] = version.as_str().into();
        }
        let mut object =
            json!({ "apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata });
        // Without the field all of ours is removed, and with it the field if nothing else is in it.
        if !write.body.status.is_empty() {
            object["status"] = write.body.status.clone().into();
        }
        let params = PatchParams::apply(write.manager);
        let params = if write.force { params.force() } else { params };
        let patch = Patch::Apply(&object);
        match timeout(PATIENCE, api.patch_status(&target.name, &params, &patch)).await {
            Ok(Ok(object)) => Outcome::Written(Box::new(seen(object, managers))),
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
                let causes =
                    status.details.as_ref().map(|details| details.causes.as_slice()).unwrap_or_default();
                if causes.iter().any(|cause| cause.reason == "FieldManagerConflict") {
                    Outcome::Taken(status.message.clone())
                } else {
                    Outcome::Stale
                }
            }
            Ok(Err(error)) => Outcome::Failed(error.to_string()),
            Err(_) => Outcome::Failed("no answer in time".to_owned()),
        }
    }
}

/// As the API server writes times.
fn stamp(now: SystemTime) -> String {
    let now = OffsetDateTime::from(now).replace_nanosecond(0).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    now.format(&Rfc3339).unwrap_or_default()
}
