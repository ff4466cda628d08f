//! What is open now: listed for people, re-judged when policy changes, closable.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use culvert_model::Str;
use culvert_model::identity::Identity;
use parking_lot::Mutex;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::flow::{Direction, Failure, Flow, Security};
use super::metrics::Labels;

/// Every open connection of the process.
#[derive(Debug, Default)]
pub struct Connections {
    // One lock: taken twice in a connection's life, and for as long as a walk clones the handles.
    open: Mutex<HashMap<u64, Arc<Live>>>,
    next: AtomicU64,
}

/// One open connection.
#[derive(Debug)]
pub struct Live {
    id: u64,
    /// What policy saw, so that it can be asked again.
    pub facts: LiveFacts,
    pub(super) labels: Labels,
    opened_at: SystemTime,
    sent: AtomicU64,
    received: AtomicU64,
    /// What the metrics have been told of, so that a scrape adds only what is new.
    pub(super) told: Mutex<(u64, u64)>,
    kill: CancellationToken,
    killed_for: OnceLock<Failure>,
}

/// What a connection was judged by.
#[derive(Clone, Debug)]
pub struct LiveFacts {
    /// Which way it goes.
    pub direction: Direction,
    /// The local pod's workload uid.
    pub pod: Str,
    /// The peer's address.
    pub source: SocketAddr,
    /// The peer's proven identity.
    pub identity: Option<Identity>,
    /// The final destination.
    pub destination: SocketAddr,
    /// The other end of the tunnel.
    pub tunnel: Option<SocketAddr>,
    /// The workload (uid) on this node that handed it in, if one did.
    pub handed_in_by: Option<Str>,
}

/// A connection as the admin page lists it.
#[derive(Debug, Serialize)]
pub struct Listed {
    id: u64,
    direction: String,
    workload: Str,
    source: SocketAddr,
    source_identity: Option<Identity>,
    destination: SocketAddr,
    hbone: Option<SocketAddr>,
    sent: u64,
    received: u64,
    open_for_ms: u128,
}

impl Connections {
    pub(super) fn open(&self, flow: &Flow) -> Arc<Live> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let pod = match flow.direction {
            Direction::Outbound => &flow.source,
            Direction::Inbound => &flow.destination,
        };
        let live = Arc::new(Live {
            id,
            facts: LiveFacts {
                direction: flow.direction,
                pod: pod.workload.as_ref().map_or_else(|| Str::from(""), |w| w.uid.clone()),
                source: flow.source.address,
                identity: flow.source.identity.clone(),
                destination: flow.destination.address,
                tunnel: flow.tunnel,
                handed_in_by: handed_in_by(flow),
            },
            labels: Labels::of(flow),
            opened_at: SystemTime::now(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            told: Mutex::new((0, 0)),
            kill: CancellationToken::new(),
            killed_for: OnceLock::new(),
        });
        self.open.lock().insert(id, live.clone());
        live
    }

    pub(super) fn close(&self, live: &Live) {
        self.open.lock().remove(&live.id);
    }

    /// Every open connection, at one moment.
    pub fn all(&self) -> Vec<Arc<Live>> {
        self.open.lock().values().cloned().collect()
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.open.lock().len()
    }

    /// True when none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For the admin page, oldest first.
    pub fn list(&self) -> Vec<Listed> {
        let mut all: Vec<_> = self.all().iter().map(|live| live.listed()).collect();
        all.sort_by_key(|c| c.id);
        all
    }
}

impl Live {
    /// Counts bytes towards the destination.
    pub fn count_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes back to the source.
    pub fn count_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes towards the destination so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes back so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Ends the connection for this reason; the first reason stays.
    pub fn kill(&self, failure: Failure) {
        let _ = self.killed_for.set(failure);
        self.kill.cancel();
    }

    /// Resolves once somebody has ended the connection.
    pub fn killed(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.kill.clone().cancelled_owned()
    }

    /// Why it was ended, if it was.
    pub fn killed_for(&self) -> Option<&Failure> {
        self.killed_for.get()
    }

    fn listed(&self) -> Listed {
        Listed {
            id: self.id,
            direction: self.facts.direction.to_string(),
            workload: self.facts.pod.clone(),
            source: self.facts.source,
            source_identity: self.facts.identity.clone(),
            destination: self.facts.destination,
            hbone: self.facts.tunnel,
            sent: self.sent(),
            received: self.received(),
            open_for_ms: self.opened_at.elapsed().unwrap_or_default().as_millis(),
        }
    }
}

fn handed_in_by(flow: &Flow) -> Option<Str> {
    let inbound = flow.direction == Direction::Inbound && flow.security == Security::SameNode;
    flow.source.workload.as_ref().filter(|_| inbound).map(|workload| workload.uid.clone())
}
