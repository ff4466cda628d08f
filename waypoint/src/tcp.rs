//! Streams that are no requests: bytes both ways, to an endpoint that a `TLSRoute`, a `TCPRoute` or the service itself names.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use culvert_hbone::copy::{CloseCause, CopyOutcome, IdleLimits, copy_bidirectional, copy_tunnels};
use culvert_hbone::server::Incoming;
use culvert_hbone::stream::TunnelStream;
use culvert_model::Str;
use culvert_model::outcome::Reason;
use culvert_model::route::table::FoundStream;
use culvert_model::route::{StreamRule, draw};
use h2::Reason as ResetCode;
use http::{HeaderMap, StatusCode};
use smallvec::SmallVec;
use tokio::io::AsyncWriteExt;

use crate::accept::Asked;
use crate::connect::{self, Hop};
use crate::endpoint::{Address, Endpoint, InProgress, Wanted, choose};
use crate::observe::stream::Stream;
use crate::shared::{Failure, Shared, Worker};
use crate::state::World;
use crate::target::Target;

/// Endpoints that are tried.
const ATTEMPTS: usize = 2;
/// How long a stream of which one side has ended may stand still.
const HALF_CLOSED: Duration = Duration::from_secs(60 * 60);

/// The way to an endpoint, open, and the endpoint's place in the table of what is in progress.
struct Opened {
    hop: Hop,
    endpoint: Endpoint,
    _counted: InProgress,
}

/// Serves a CONNECT request that has not been answered: with 200 only once the destination has accepted.
pub async fn serve_unanswered(
    shared: Arc<Shared>,
    worker: Arc<Worker>,
    asked: Asked,
    mut incoming: Incoming,
) {
    let mut stream = Stream::begin(&asked);
    let opened = tokio::select! {
        biased;
        opened = Box::pin(open(&shared, &worker, &asked, None, &mut stream)) => opened,
        gone = incoming.abandoned() => {
            let detail = format!("the client gave up before it was answered: {gone}");
            return stream.finish(&shared, Some(Failure::new(Reason::ClientReset, detail)));
        }
    };
    match opened {
        Ok(opened) => match incoming.accept(HeaderMap::new()) {
            Ok(tunnel) => forward(&shared, stream, tunnel, Bytes::new(), opened).await,
            Err(gone) => stream.finish(&shared, Some(Failure::new(Reason::ClientReset, gone.to_string()))),
        },
        Err(failure) => {
            let status = match failure.reason {
                Reason::AuthorizationPolicy | Reason::PolicyUnavailable => StatusCode::UNAUTHORIZED,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            let _ = incoming.refuse(status, HeaderMap::new());
            stream.finish(&shared, Some(failure));
        }
    }
}

/// Serves a tunnel that was accepted and whose first bytes were read.
pub async fn serve(
    shared: Arc<Shared>,
    worker: Arc<Worker>,
    asked: Asked,
    tunnel: TunnelStream,
    (early, server_name): (Bytes, Option<String>),
) {
    let mut stream = Stream::begin(&asked);
    match Box::pin(open(&shared, &worker, &asked, server_name.as_deref(), &mut stream)).await {
        Ok(opened) => forward(&shared, stream, tunnel, early, opened).await,
        Err(failure) => {
            tunnel.reset(ResetCode::CONNECT_ERROR);
            stream.finish(&shared, Some(failure));
        }
    }
}

/// Decides and connects.
async fn open(
    shared: &Shared,
    worker: &Worker,
    asked: &Asked,
    server_name: Option<&str>,
    stream: &mut Stream,
) -> Result<Opened, Failure> {
    let world = shared.state.load_full();
    let target = asked.target.current(shared, &world.snapshot)?;
    let _permit = crate::http::authorize::stream(&world, asked, (&target, server_name), stream)?;
    let mut exclude: SmallVec<[Str; ATTEMPTS]> = SmallVec::new();
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let endpoint = match next(shared, &world, asked, &target, server_name, &exclude) {
            Ok(endpoint) => endpoint,
            // What the first one failed with says more than that there is no other.
            Err(failure) => return Err(last.unwrap_or(failure)),
        };
        exclude.push(endpoint.workload.uid.clone());
        let counted = shared.endpoints.begin(&endpoint.workload.uid);
        stream.endpoint = Some(endpoint.clone());
        match connect::open(shared, worker, &endpoint).await {
            Ok(hop) => return Ok(Opened { hop, endpoint, _counted: counted }),
            Err(failure) => last = Some(failure),
        }
    }
    Err(last.unwrap_or_else(|| Failure::new(Reason::Internal, "nothing was tried")))
}

/// The endpoint to try.
fn next(
    shared: &Shared,
    world: &World,
    asked: &Asked,
    target: &Target,
    server_name: Option<&str>,
    exclude: &[Str],
) -> Result<Endpoint, Failure> {
    let client = asked.peer.address.ip();
    let (service, port) = match target {
        Target::Workload(workload, address) => {
            let address = Address::At(*address);
            return match exclude.is_empty() {
                true => Ok(Endpoint { workload: workload.clone(), address, service: None }),
                false => {
                    Err(Failure::new(Reason::NoHealthyUpstream, "it was asked for by its address and failed"))
                }
            };
        }
        Target::Service(service, port) => (service, *port),
    };
    let namespace = asked.peer.facts.identity.namespace();
    let (backend, port) = match world.routes.find_stream(&service.key, port, Some(namespace), server_name) {
        FoundStream::NoRoute => (&service.key, port),
        FoundStream::NoMatch => {
            let detail = format!("no route of {} is for this stream", service.key);
            return Err(Failure::new(Reason::WrongDestination, detail));
        }
        FoundStream::Rule { rule, .. } => backend(rule)?,
    };
    choose(shared, world, &Wanted { service: backend, port, client, exclude })
}

fn backend(rule: &StreamRule) -> Result<(&culvert_model::address::NamespacedHostname, u16), Failure> {
    let broken =
        |why: &Str| Failure::new(Reason::NoHealthyUpstream, format!("the route cannot be used: {why}"));
    if let Some(why) = &rule.broken {
        return Err(broken(why));
    }
    let drawn = draw(&rule.backends, &mut |bound| fastrand::u64(0..bound));
    let backend = drawn.ok_or_else(|| Failure::new(Reason::NoHealthyUpstream, "the route has no backend"))?;
    match &backend.broken {
        Some(why) => Err(broken(why)),
        None => Ok((&backend.service, backend.port)),
    }
}

/// Bytes, both ways, until both sides are done or one is cut.
async fn forward(shared: &Shared, mut stream: Stream, client: TunnelStream, early: Bytes, opened: Opened) {
    let idle = IdleLimits { open: None, half_closed: Some(HALF_CLOSED) };
    let before = early.len() as u64;
    let forced = shared.drain.forced();
    stream.endpoint = Some(opened.endpoint);
    stream.opened(shared);
    let (outcome, turned) = match opened.hop {
        Hop::Tunnel(server) => (copy_tunnels(client, early, server, idle, (), forced).await, false),
        Hop::Plain(mut server) => {
            if server.write_all(&early).await.is_err() {
                client.reset(ResetCode::CONNECT_ERROR);
                let failure = Failure::new(Reason::UpstreamReset, "the destination left at once");
                return stream.finish(shared, Some(failure));
            }
            (copy_bidirectional(server, client, idle, (), forced).await, true)
        }
    };
    (stream.sent, stream.received) = match turned {
        // There the first side is the server, and what went before is not in the count.
        true => (outcome.received + before, outcome.sent),
        false => (outcome.sent, outcome.received),
    };
    stream.finish(shared, failure(&outcome, turned));
}

/// What ended it, if not both sides.
fn failure(outcome: &CopyOutcome<()>, turned: bool) -> Option<Failure> {
    let client = || Failure::new(Reason::ClientReset, "the source reset the connection");
    let server = || Failure::new(Reason::UpstreamReset, "the destination reset the connection");
    match (outcome.close_cause, turned) {
        (CloseCause::Clean, _) => None,
        (CloseCause::ClientReset, false) | (CloseCause::PeerReset, true) => Some(client()),
        (CloseCause::ClientReset, true) | (CloseCause::PeerReset, false) => Some(server()),
        (CloseCause::ConnectionLost(cause), _) => {
            Some(Failure::new(Reason::TunnelLost, format!("the connection to a peer was lost: {cause}")))
        }
        (CloseCause::IdleTimeout | CloseCause::HalfClosedTimeout, _) => {
            Some(Failure::new(Reason::IdleTimeout, "no bytes for too long"))
        }
        (CloseCause::Killed(()), _) => {
            Some(Failure::new(Reason::Draining, "the deadline of the drain passed"))
        }
    }
}
