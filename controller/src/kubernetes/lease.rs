//! Which of the controller's replicas writes: the one that holds a Lease (D69).
//!
//! Every replica serves; only the leader writes status, ConfigMaps and what it provisions. Its right ends [`GIVE_UP`] after its
//! last renewal at its own clock, before any other may take the lease at *its* clock: clocks need to run alike, not to agree.

use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::drain::DrainWatcher;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// The lease's name.
pub const NAME: &str = "culvert-leader";
/// A lease that nobody renewed for this long is free.
pub const LEASE: Duration = Duration::from_secs(15);
/// A leader that could not renew for this long is none any more. Less than [`LEASE`] by what a write that was begun may take.
pub const GIVE_UP: Duration = Duration::from_secs(10);
/// A leader renews this often.
pub const RENEW: Duration = Duration::from_secs(5);
/// Everyone else looks, and a leader that failed tries again, this often.
const RETRY: Duration = Duration::from_secs(2);
/// One call to the API server.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Who has it; empty if it was released.
    pub holder: String,
    /// How often it changed hands.
    pub transitions: i32,
    /// Changes with every write; a write with an old one is refused.
    pub version: String,
    /// How long it is good for after each renewal.
    pub duration: Duration,
}

/// What became of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is there.
    Done(Record),
    /// Somebody else was quicker.
    Conflict,
}

/// A lease, wherever it is kept.
#[tonic::async_trait]
pub trait Leases: Send + Sync + 'static {
    /// What it says now, if it exists.
    ///
    /// # Errors
    /// In words, if there is no answer.
    async fn get(&self) -> Result<Option<Record>, String>;

    /// Makes it, or replaces the one of `version`. `taken` if it changes hands.
    ///
    /// # Errors
    /// In words, if there is no answer.
    async fn put(&self, record: &Record, taken: bool) -> Result<Written, String>;
}

/// The lease of a namespace.
pub struct KubeLease(Api<Lease>);

/// Takes part in an election until it is told to stop.
pub struct Election<L> {
    leases: L,
    me: String,
    leading: watch::Sender<bool>,
    gauge: Gauge,
    /// The record as it was last seen to change, and when that was.
    seen: Option<(Record, Instant)>,
    /// Until when this one leads.
    until: Option<Instant>,
}

impl<L: Leases> Election<L> {
    /// A candidate named `me`, a name that no other has (the pod's).
    pub fn new(leases: L, me: impl Into<String>) -> Self {
        let leading = watch::Sender::new(false);
        Self { leases, me: me.into(), leading, gauge: Gauge::default(), seen: None, until: None }
    }

    /// Whether this one leads. What writes looks before each write.
    pub fn leading(&self) -> watch::Receiver<bool> {
        self.leading.subscribe()
    }

    /// 1 while this one leads.
    pub fn gauge(&self) -> Gauge {
        self.gauge.clone()
    }

    /// Runs until `drain` starts; then gives the lease back, so that the next need not wait.
    pub async fn run(mut self, drain: DrainWatcher) {
        loop {
            let pause = tokio::select! {
                _ = drain.started() => break,
                pause = self.step() => pause,
            };
            tokio::select! {
                _ = drain.started() => break,
                () = sleep(pause) => {}
            }
        }
        self.release().await;
    }

    /// One look, one attempt at most. Returns when to look again.
    async fn step(&mut self) -> Duration {
        let deadline = self.until.unwrap_or_else(|| Instant::now() + PATIENCE).min(Instant::now() + PATIENCE);
        let begun = Instant::now();
        let outcome = tokio::time::timeout_at(deadline, self.attempt()).await;
        match outcome.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
            Ok(true) => {
                // Counted from before the write: another one's clock starts when it sees it, which is later.
                self.until = Some(begun + GIVE_UP);
                self.lead(true);
                return RENEW;
            }
            Ok(false) => {
                self.until = None;
                self.lead(false);
            }
            Err(error) => {
                tracing::warn!(error, "the leader lease cannot be read or written");
                if self.until.is_some_and(|until| until <= Instant::now()) {
                    self.until = None;
                    self.lead(false);
                }
            }
        }
        // A leader wakes up no later than its right ends.
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        left.map_or(RETRY, |left| left.min(RETRY))
    }

    /// Whether the lease is this one's now.
    async fn attempt(&mut self) -> Result<bool, String> {
        let now = Instant::now();
        let current = self.leases.get().await?;
        let taken = match &current {
            None => true,
            Some(record) if record.holder == self.me => false,
            Some(record) => {
                let unchanged =
                    self.seen.as_ref().filter(|(seen, _)| seen == record).map(|(_, since)| *since);
                let since = unchanged.unwrap_or(now);
                if unchanged.is_none() {
                    self.seen = Some((record.clone(), now));
                }
                let good_for = record.duration.max(LEASE);
                if !record.holder.is_empty() && now < since + good_for {
                    return Ok(false);
                }
                true
            }
        };
        let before = current.unwrap_or_default();
        let record = Record {
            holder: self.me.clone(),
            transitions: before.transitions.saturating_add(i32::from(taken && !before.version.is_empty())),
            version: before.version,
            duration: LEASE,
        };
        Ok(matches!(self.leases.put(&record, taken).await?, Written::Done(_)))
    }

    fn lead(&mut self, leads: bool) {
        let me = &self.me;
        let changed = self.leading.send_if_modified(|was| std::mem::replace(was, leads) != leads);
        if changed {
            self.gauge.set(i64::from(leads));
            let text = if leads { "leads: writes from now on" } else { "no longer leads" };
            tracing::info!(replica = me, "{text}");
        }
    }

    async fn release(&mut self) {
        let led = self.until.is_some();
        // First the right, then the lease.
        self.lead(false);
        if !led {
            return;
        }
        let released = async {
            let Some(record) = self.leases.get().await? else { return Ok(()) };
            if record.holder == self.me {
                self.leases.put(&Record { holder: String::new(), ..record }, false).await?;
            }
            Ok::<_, String>(())
        };
        match timeout(PATIENCE, released).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::info!(error, "the leader lease runs out by itself"),
            Err(_) => tracing::info!("the leader lease runs out by itself: no answer"),
        }
    }
}

impl KubeLease {
    /// [`NAME`] in this namespace.
    pub fn new(client: kube::Client, namespace: &str) -> Self {
        Self(Api::namespaced(client, namespace))
    }
}

#[tonic::async_trait]
impl Leases for KubeLease {
    async fn get(&self) -> Result<Option<Record>, String> {
        let lease = self.0.get_opt(NAME).await.map_err(|error| error.to_string())?;
        Ok(lease.map(read))
    }

    async fn put(&self, record: &Record, taken: bool) -> Result<Written, String> {
        let params = PostParams { field_manager: Some("culvert".into()), ..PostParams::default() };
        let outcome = if record.version.is_empty() {
            self.0.create(&params, &written(Lease::default(), record, taken)).await
        } else {
            // Read again for the fields that others may have put there; the version decides whether it is still the same.
            let before = self.0.get(NAME).await.map_err(|error| error.to_string())?;
            self.0.replace(NAME, &params, &written(before, record, taken)).await
        };
        match outcome {
            Ok(lease) => Ok(Written::Done(read(lease))),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(Written::Conflict),
            Err(error) => Err(error.to_string()),
        }
    }
}

fn read(lease: Lease) -> Record {
    let spec = lease.spec.unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        transitions: spec.lease_transitions.unwrap_or_default(),
        version: lease.metadata.resource_version.unwrap_or_default(),
        // A lease of a year would keep everyone out: nobody who uses this name writes more than a minute.
        duration: Duration::from_secs(seconds.unwrap_or_default().min(60)),
    }
}

fn written(before: Lease, record: &Record, taken: bool) -> Lease {
    let now = MicroTime(k8s_openapi::jiff::Timestamp::now());
    let spec = before.spec.unwrap_or_default();
    Lease {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            resource_version: Some(record.version.clone()).filter(|version| !version.is_empty()),
            ..before.metadata
        },
        spec: Some(LeaseSpec {
            acquire_time: if taken { Some(now.clone()) } else { spec.acquire_time },
            holder_identity: Some(record.holder.clone()),
            lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
            lease_transitions: Some(record.transitions),
            renew_time: Some(now),
            ..spec
        }),
    }
}

#[tonic::async_trait]
impl<L: Leases> Leases for Arc<L> {
    async fn get(&self) -> Result<Option<Record>, String> {
        self.as_ref().get().await
    }

    async fn put(&self, record: &Record, taken: bool) -> Result<Written, String> {
        self.as_ref().put(record, taken).await
    }
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
