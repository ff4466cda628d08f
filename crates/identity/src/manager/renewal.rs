//! The life of one identity's certificate: fetch, hold until it is time, fetch again; wait between failures.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use culvert_runtime::backoff::Backoff;
use culvert_runtime::clock::SharedClock;

use super::slots::{Priority, Slot};
use super::{Entry, Shared};
use crate::ca_client::CaError;
use crate::certificate::{ChainError, WorkloadCertificate};
use crate::csr::{CertificateRequest, CsrError};

/// While a connection waits, attempts are at most this far apart, whatever the backoff says. At 8 fetches at once and one
/// attempt an identity every 2 s, a recovering authority sees a load it can plan for.
const DEMAND_INTERVAL: Duration = Duration::from_secs(2);
/// Sleeps until a wall time are cut into pieces of this length, so that a step of the wall clock is noticed.
const WALL_CHECK: Duration = Duration::from_secs(30);
/// Share of the lifetime after which a renewal goes before everything that nobody waits for.
const URGENT: f64 = 0.8;

/// The task of one identity.
pub(super) struct Renewal {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    backoff: Backoff,
    random: fastrand::Rng,
    /// When the certificate at hand nears its end.
    urgent_at: Option<SystemTime>,
}

enum Step {
    Fetch,
    /// A fresh certificate: until its renewal is due, wall time.
    Hold(SystemTime),
    /// A failure: until it is worth another attempt.
    Retry(Duration),
}

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Request(#[from] CsrError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl Renewal {
    pub(super) fn new(shared: Arc<Shared>, entry: Arc<Entry>, mut random: fastrand::Rng) -> Self {
        let backoff = Backoff::new(shared.config.retry, random.fork());
        Self { shared, entry, backoff, random, urgent_at: None }
    }

    /// Runs until aborted.
    pub(super) async fn run(mut self) {
        let expire = expire(self.entry.clone(), self.shared.clock.clone());
        tokio::select! {
            never = self.drive() => match never {},
            never = expire => match never {},
        }
    }

    async fn drive(&mut self) -> Infallible {
        let mut step = Step::Fetch;
        loop {
            step = match step {
                Step::Fetch => self.fetch().await,
                Step::Hold(until) => {
                    self.hold(until).await;
                    Step::Fetch
                }
                Step::Retry(delay) => {
                    self.retry(delay).await;
                    Step::Fetch
                }
            };
        }
    }

    async fn fetch(&mut self) -> Step {
        let slot = self.slot().await;
        let outcome = self.attempt().await;
        drop(slot);
        match outcome {
            Ok(certificate) => Step::Hold(self.succeeded(certificate)),
            Err(error) => Step::Retry(self.failed(&error)),
        }
    }

    /// Waits for a slot; a waiter whose need grows meanwhile changes its place in the queue.
    async fn slot(&self) -> Slot {
        loop {
            let priority = self.priority();
            tokio::select! {
                biased;
                slot = self.shared.slots.acquire(priority) => return slot,
                () = self.need_grows(priority) => {}
            }
        }
    }

    fn priority(&self) -> Priority {
        let urgent = self.urgent_at.is_some_and(|at| at <= self.shared.clock.now());
        if urgent || self.wanted() {
            Priority::Connection
        } else if self.urgent_at.is_some() {
            Priority::Background
        } else {
            Priority::Warmup
        }
    }

    fn wanted(&self) -> bool {
        self.entry.demand.waiting.load(Ordering::Acquire) > 0
    }

    async fn need_grows(&self, from: Priority) {
        if from == Priority::Connection {
            return std::future::pending().await;
        }
        let nears_its_end = async {
            match self.urgent_at {
                Some(at) => sleep_until(&self.shared.clock, at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.entry.demand.raised.notified() => {}
            () = nears_its_end => {}
        }
    }

    async fn attempt(&self) -> Result<WorkloadCertificate, FetchError> {
        let Shared { ca, config, clock, .. } = &*self.shared;
        let request = CertificateRequest::new(&self.entry.identity)?;
        let limit = self.within_lifetime(config.fetch_timeout);
        let elements = tokio::select! {
            biased;
            answer = ca.sign(request.pem(), &self.entry.identity, config.lifetime) => answer?,
            () = clock.sleep(limit) => return Err(CaError::TimedOut(limit).into()),
        };
        let now = clock.now();
        let mut certificate =
            WorkloadCertificate::from_answer(&self.entry.identity, &request, &elements, 0, now)?;
        certificate.number(self.shared.generation.fetch_add(1, Ordering::Relaxed) + 1);
        let mut roots = self.shared.roots.lock();
        if let Some(known) = &*roots {
            certificate.share_roots(known);
        }
        *roots = Some(certificate.roots().clone());
        Ok(certificate)
    }

    /// Publishes; says when to renew.
    fn succeeded(&mut self, certificate: WorkloadCertificate) -> SystemTime {
        self.backoff.reset();
        *self.entry.progress.lock() = super::Progress::default();
        let now = self.shared.clock.now();
        // An authority may backdate by more than a short lifetime: what counts is what is left from now on.
        let left = certificate.not_after().duration_since(now).unwrap_or_default();
        let share = 0.5 * (0.9 + 0.2 * self.random.f64());
        let due = now + left.mul_f64(share).max(self.shared.config.retry.min);
        self.urgent_at = Some(now + left.mul_f64(URGENT));
        tracing::info!(
            identity = %self.entry.identity,
            serial = certificate.serial(),
            generation = certificate.generation(),
            lifetime = ?left,
            "obtained certificate"
        );
        self.entry.current.send_replace(Some(Arc::new(certificate)));
        due
    }

    /// Records; says how long to wait.
    fn failed(&mut self, error: &FetchError) -> Duration {
        let delay = self.backoff.next_delay();
        let delay = self.within_lifetime(delay);
        self.shared.failed.fetch_add(1, Ordering::Relaxed);
        let mut progress = self.entry.progress.lock();
        progress.failures = progress.failures.saturating_add(1);
        progress.last_error = Some(error.to_string());
        tracing::warn!(
            identity = %self.entry.identity,
            failures = progress.failures,
            retry_in = ?delay,
            left = ?self.left(),
            "no certificate: {error}"
        );
        delay
    }

    /// Cuts a time to a quarter of what the certificate at hand still has, so that several attempts fit before it expires;
    /// never to less than the shortest backoff.
    fn within_lifetime(&self, time: Duration) -> Duration {
        match self.left() {
            Some(left) => time.min((left / 4).max(self.shared.config.retry.min)),
            None => time,
        }
    }

    /// What the certificate at hand still has; nothing if there is none or it is over.
    fn left(&self) -> Option<Duration> {
        let current = self.entry.current.borrow();
        let left = current.as_ref()?.not_after().duration_since(self.shared.clock.now()).ok()?;
        (!left.is_zero()).then_some(left)
    }

    /// Waits until the renewal is due. A connection that finds the certificate expired before that (the wall clock jumped) ends
    /// the wait.
    async fn hold(&self, until: SystemTime) {
        loop {
            tokio::select! {
                () = sleep_until(&self.shared.clock, until) => return,
                () = self.entry.demand.raised.notified() => {
                    if self.left().is_none() {
                        return;
                    }
                }
            }
        }
    }

    /// Waits out a delay, or [`DEMAND_INTERVAL`] once a connection waits.
    async fn retry(&self, delay: Duration) {
        let begun = self.shared.clock.instant();
        loop {
            let delay = if self.wanted() { delay.min(DEMAND_INTERVAL) } else { delay };
            let passed = self.shared.clock.instant().saturating_duration_since(begun);
            let Some(left) = delay.checked_sub(passed).filter(|left| !left.is_zero()) else { return };
            tokio::select! {
                () = self.shared.clock.sleep(left) => {}
                () = self.entry.demand.raised.notified() => {}
            }
        }
    }
}

/// Takes a certificate back from subscribers when it expires.
async fn expire(entry: Arc<Entry>, clock: SharedClock) -> Infallible {
    let mut receiver = entry.current.subscribe();
    loop {
        let held = receiver.borrow_and_update().as_ref().map(|c| (c.generation(), c.not_after()));
        let over = async {
            match held {
                Some((_, not_after)) => sleep_until(&clock, not_after).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // `entry` holds the sender, so that the channel is never closed here.
            _ = receiver.changed() => continue,
            () = over => {}
        }
        let taken = entry.current.send_if_modified(|current| {
            let same = current.as_ref().map(|c| c.generation()) == held.map(|(generation, _)| generation);
            if same {
                *current = None;
            }
            same
        });
        if taken {
            tracing::error!(identity = %entry.identity, "the certificate expired and could not be renewed");
        }
    }
}

async fn sleep_until(clock: &SharedClock, wall: SystemTime) {
    while let Ok(left) = wall.duration_since(clock.now())
        && !left.is_zero()
    {
        clock.sleep(left.min(WALL_CHECK)).await;
    }
}
