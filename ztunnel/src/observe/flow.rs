//! The record of one connection: who, where, what decided, how long each phase took, how it ended.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use culvert_model::Str;
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::policy::PolicyKey;
use culvert_model::service::Service;
use culvert_model::workload::Workload;
use smallvec::SmallVec;

use super::limits::Limit;

/// Everything there is to say about one connection.
#[derive(Debug)]
pub struct Flow {
    /// Which way it goes, seen from the pod.
    pub direction: Direction,
    /// The side that opened it.
    pub source: Party,
    /// The side that it was for.
    pub destination: Party,
    /// The service it was addressed to, if any.
    pub service: Option<Arc<Service>>,
    /// The other end of the HBONE connection, if there is one.
    pub tunnel: Option<SocketAddr>,
    /// The policy that allowed or refused it.
    pub policy: Option<PolicyKey>,
    /// What dry-run policies would have done.
    pub dry_run: SmallVec<[(PolicyKey, &'static str); 1]>,
    /// Whether both ends of the last hop proved who they are.
    pub security: Security,
    /// How many endpoints were tried; 0 where none was decided on.
    pub attempts: u8,
    /// The 128-bit trace id, hexadecimal, that joins both proxies' records of this connection.
    pub trace: Option<String>,
    /// Bytes from the source to the destination.
    pub sent: u64,
    /// Bytes from the destination to the source.
    pub received: u64,
    /// How it ended, once it has.
    pub end: Option<End>,
    /// When it was accepted.
    pub accepted_at: SystemTime,
    started: Instant,
    phases: [u32; Phase::COUNT],
}

/// One side of a connection.
#[derive(Clone, Debug)]
pub struct Party {
    /// Its address, as seen by the pod.
    pub address: SocketAddr,
    /// The workload at that address, if known. For a peer that did not prove its identity this is telemetry only.
    pub workload: Option<Arc<Workload>>,
    /// Its identity: proven by a certificate, or our own pod's.
    pub identity: Option<Identity>,
}

/// Which way a connection goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The pod opened it.
    Outbound,
    /// The pod accepted it.
    Inbound,
}

/// How the hop between the two pods' proxies is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Security {
    /// mTLS, both identities proven.
    MutualTls,
    /// It is none: one proxy serves both pods, attested both identities, and no byte left it between them.
    SameNode,
    /// Plain TCP.
    Plaintext,
}

/// The phases of a connection, in order; each has one name in code, logs, metrics and docs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The kernel handed the connection over.
    Accept,
    /// The destination is decided.
    Resolve,
    /// Policy has decided.
    Authorize,
    /// Our certificate is at hand.
    Certificate,
    /// TCP to the next hop stands; not reached where a tunnel is used that stood before.
    Connect,
    /// TLS with the next hop stands, and HTTP/2 waits for nothing more; likewise.
    Handshake,
    /// The tunnel's stream is open (the other proxy has answered), or the destination accepted.
    Open,
    /// First byte towards the destination.
    FirstSent,
    /// First byte back.
    FirstReceived,
    /// All over.
    Close,
}

/// How a connection ended.
#[derive(Clone, Debug)]
pub enum End {
    /// Both sides finished.
    Clean,
    /// It carried bytes, or could have, and was then cut.
    Cut(Failure),
    /// It never opened.
    Failed(Failure),
}

/// A reason with its particulars.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Why, in the mesh's vocabulary.
    pub reason: Reason,
    /// The particulars, for a person.
    pub detail: String,
    /// The bound that was reached, if it was one.
    pub limit: Option<Limit>,
}

impl Flow {
    /// A connection accepted now.
    pub fn new(direction: Direction, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            source: Party::at(source),
            destination: Party::at(destination),
            service: None,
            tunnel: None,
            policy: None,
            dry_run: SmallVec::new(),
            security: Security::Plaintext,
            attempts: 0,
            trace: None,
            sent: 0,
            received: 0,
            end: None,
            accepted_at: SystemTime::now(),
            started: Instant::now(),
            phases: [0; Phase::COUNT],
        }
    }

    /// The phase is over now.
    pub fn mark(&mut self, phase: Phase) {
        // Microseconds in 32 bits reach 71 minutes; a longer connection is told by `duration`.
        self.mark_at(phase, self.started.elapsed());
    }

    /// The phase ended so many microseconds after an earlier one.
    pub fn mark_after(&mut self, earlier: Phase, phase: Phase, micros: u32) {
        self.phases[phase as usize] = self.phases[earlier as usize].saturating_add(micros).max(1);
    }

    /// The phase ended so long after the accept.
    pub fn mark_at(&mut self, phase: Phase, at: Duration) {
        self.phases[phase as usize] = u32::try_from(at.as_micros()).unwrap_or(u32::MAX).max(1);
    }

    /// When the phase ended, after the accept; `None` if it was not reached.
    pub fn phase(&self, phase: Phase) -> Option<Duration> {
        match self.phases[phase as usize] {
            0 => None,
            micros => Some(Duration::from_micros(u64::from(micros))),
        }
    }

    /// Time since the accept.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The reason it failed or was cut, if it was.
    pub fn failure(&self) -> Option<&Failure> {
        match &self.end {
            Some(End::Cut(failure) | End::Failed(failure)) => Some(failure),
            Some(End::Clean) | None => None,
        }
    }
}

impl Party {
    fn at(address: SocketAddr) -> Self {
        Self { address, workload: None, identity: None }
    }

    /// The workload's name, or `None`.
    pub fn workload_name(&self) -> Option<&Str> {
        self.workload.as_ref().map(|w| &w.name)
    }

    /// The workload's cluster, or `None`.
    pub fn cluster(&self) -> Option<&Str> {
        self.workload.as_ref().map(|w| &w.cluster_id).filter(|cluster| !cluster.is_empty())
    }

    /// The workload's namespace, or `None`.
    pub fn namespace(&self) -> Option<&Str> {
        self.workload.as_ref().map(|w| &w.namespace)
    }
}

impl Phase {
    /// How many there are.
    pub const COUNT: usize = 10;
    /// All, in order.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Accept,
        Self::Resolve,
        Self::Authorize,
        Self::Certificate,
        Self::Connect,
        Self::Handshake,
        Self::Open,
        Self::FirstSent,
        Self::FirstReceived,
        Self::Close,
    ];

    /// Its one name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Resolve => "resolve",
            Self::Authorize => "authorize",
            Self::Certificate => "certificate",
            Self::Connect => "connect",
            Self::Handshake => "handshake",
            Self::Open => "open",
            Self::FirstSent => "first_sent",
            Self::FirstReceived => "first_received",
            Self::Close => "close",
        }
    }
}

impl Failure {
    /// A reason and its particulars.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), limit: None }
    }

    /// The failure is that this bound was reached.
    pub fn beyond(self, limit: Limit) -> Self {
        Self { limit: Some(limit), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.detail)
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        })
    }
}
