//! Passes a request on: an endpoint is chosen, a connection to it taken, and the request sent; again where that failed and may be
//! repeated.

use std::sync::Arc;
use std::time::Duration;

use culvert_model::Str;
use culvert_model::outcome::Reason;
use culvert_model::request::Permit;
use culvert_model::route::{Mirror, WHOLE};
use culvert_model::workload::AppProtocol;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderValue, TRANSFER_ENCODING, UPGRADE};
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body as _, Incoming};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::body::{self, Body, Replay};
use super::filters::Changes;
use super::head::Head;
use super::pipeline::Refusal;
use super::route::{Plan, To};
use super::upstream::{self, GiveBack, Unanswered};
use super::{Served, retry};
use crate::endpoint::{Address, Endpoint, InProgress, Wanted, choose};
use crate::observe::Exchange;
use crate::shared::{Failure, Shared, Worker};
use crate::state::World;
use crate::target;

/// Endpoints that are tried when none can be connected to, whatever the rule says of repetitions: nothing was sent.
const CONNECTS: u32 = 2;
/// How long a mirrored request may take.
const MIRROR_TIME: Duration = Duration::from_secs(10);

/// What is passed on.
pub struct Asked<'a> {
    /// By whose leave.
    #[expect(dead_code, reason = "nothing is passed on by whoever has none")]
    pub permit: Permit,
    /// For whom.
    pub served: &'a Served,
    /// By what is known.
    pub world: &'a Arc<World>,
    /// How.
    pub plan: &'a Plan,
    /// To whom.
    pub to: &'a To,
    /// The head, after the filters.
    pub head: &'a Head,
    /// Where copies go.
    pub mirrors: &'a [Mirror],
}

/// A response.
pub struct Passed {
    /// It, its body still to come.
    pub response: Response<Incoming>,
    /// To be held until the body has been read.
    pub give_back: GiveBack,
    /// Likewise.
    pub in_progress: InProgress,
    /// When it must be over.
    pub deadline: Option<Instant>,
    /// To be done with it.
    pub changes: Changes,
}

/// How one attempt failed.
struct Failed {
    failure: Failure,
    /// Certainly nothing of the request was sent.
    unsent: bool,
    /// It was for a connection that had served others, which may have been closing.
    reused: bool,
    timed_out: bool,
    /// It may be repeated, and that was taken from the budget.
    granted: bool,
}

impl Failed {
    /// It had an answer that the rule repeats, and may be repeated.
    fn answered(status: StatusCode) -> Self {
        let failure = Failure::new(Reason::UpstreamReset, format!("answered {status}"));
        Self { failure, unsent: false, reused: false, timed_out: false, granted: true }
    }
}

/// Passes it on and waits for the head of the response.
///
/// # Errors
/// What to answer instead.
pub async fn run(asked: &Asked<'_>, body: Replay, exchange: &mut Exchange) -> Result<Passed, Refusal> {
    asked.served.worker.budget.request();
    let plan = asked.plan;
    let deadline = plan.request_timeout().map(|limit| Instant::from_std(exchange.begun()) + limit);
    let attempts = attempts(asked, &body, deadline, exchange);
    match deadline {
        None => attempts.await,
        Some(deadline) => match timeout_at(deadline, attempts).await {
            Ok(outcome) => outcome,
            Err(_) => Err(late("the request took longer than its rule allows")),
        },
    }
}

fn late(detail: &str) -> Refusal {
    Refusal::new(StatusCode::GATEWAY_TIMEOUT, "timed out", Reason::ConnectTimeout, detail)
}

async fn attempts(
    asked: &Asked<'_>,
    body: &Replay,
    deadline: Option<Instant>,
    exchange: &mut Exchange,
) -> Result<Passed, Refusal> {
    let policy = asked.plan.retry();
    let mut left = retry::attempts(policy);
    let (mut connects, mut again, mut number) = (CONNECTS, 1, 0);
    let mut exclude: Vec<Str> = Vec::new();
    let mut mirrors = asked.mirrors;
    let mut last: Option<Failure> = None;
    loop {
        let endpoint = match next(asked, &exclude) {
            Ok(endpoint) => endpoint,
            // All that there are have failed, and may be asked again if the rule says so.
            Err(_) if !exclude.is_empty() && (number > 0 || left > 0) => {
                exclude.clear();
                continue;
            }
            Err(failure) => return Err(unavailable(last.unwrap_or(failure))),
        };
        exchange.attempts += 1;
        exchange.endpoint = Some(endpoint.clone());
        let fresh = again == 0;
        let failed =
            match attempt(asked, &endpoint, body, std::mem::take(&mut mirrors), fresh, deadline).await {
                Ok(passed) => {
                    let repeat = retry::failed(policy, passed.response.status())
                        && left > 0
                        && body.is_repeatable()
                        && asked.served.worker.budget.take();
                    if !repeat {
                        return Ok(passed);
                    }
                    Failed::answered(passed.response.status())
                }
                Err(failed) => failed,
            };
        if body.is_cut() {
            let detail = "the client did not send the whole request";
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "bad request", Reason::ClientReset, detail));
        }
        last = Some(failed.failure.clone());
        // On a connection of its own the same endpoint may well answer, if nothing is done twice by that.
        let harmless = body.is_empty() && retry::is_idempotent(&asked.head.method);
        if failed.reused && again > 0 && (failed.unsent || harmless) {
            again -= 1;
            continue;
        }
        if failed.unsent {
            connects = connects.saturating_sub(1);
            if connects > 0 {
                exclude.push(endpoint.workload.uid.clone());
                continue;
            }
        }
        let may = left > 0 && body.is_repeatable();
        let (Some(policy), true) = (policy, may && (failed.granted || asked.served.worker.budget.take()))
        else {
            return Err(if failed.timed_out {
                late(&failed.failure.detail)
            } else {
                unavailable(failed.failure)
            });
        };
        left -= 1;
        number += 1;
        exclude.push(endpoint.workload.uid.clone());
        sleep(retry::backoff(policy, number)).await;
    }
}

fn unavailable(failure: Failure) -> Refusal {
    let text = match failure.reason {
        Reason::NoHealthyUpstream => "no healthy upstream",
        _ => "upstream connect error",
    };
    let status = match failure.reason {
        // A backend that does not exist, or that must not be used like this: the route is wrong, not the moment.
        Reason::UnknownPort | Reason::WaypointRequired => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    Refusal { status, text, failure }
}

fn next(asked: &Asked<'_>, exclude: &[Str]) -> Result<Endpoint, Failure> {
    let client = asked.served.asked.peer.address.ip();
    match asked.to {
        To::Workload(workload, address) if exclude.is_empty() => {
            Ok(Endpoint { workload: workload.clone(), address: Address::At(*address), service: None })
        }
        To::Workload(workload, _) => {
            let detail = format!("{} was asked for by its address and failed", workload.uid);
            Err(Failure::new(Reason::NoHealthyUpstream, detail))
        }
        To::Service(service, port) => {
            let wanted = Wanted { service, port: *port, client, exclude };
            choose(&asked.served.shared, asked.world, &wanted)
        }
    }
}

async fn attempt(
    asked: &Asked<'_>,
    endpoint: &Endpoint,
    body: &Replay,
    mirrors: &[Mirror],
    fresh: bool,
    deadline: Option<Instant>,
) -> Result<Passed, Failed> {
    let served = asked.served;
    let in_progress = served.shared.endpoints.begin(&endpoint.workload.uid);
    let unsent =
        |failure: Failure| Failed { failure, unsent: true, reused: false, timed_out: false, granted: false };
    let http2 = speaks_http2(asked, endpoint);
    let lease =
        upstream::lease(&served.shared, &served.worker, endpoint, http2, fresh).await.map_err(unsent)?;
    let reused = lease.reused;
    let mut sent = body.attempt();
    for mirror in mirrors {
        sent = copy(asked, mirror, sent);
    }
    let request = request(asked.head, sent, http2).map_err(unsent)?;
    let deadline = match asked.plan.backend_timeout().map(|limit| Instant::now() + limit) {
        Some(own) => Some(deadline.map_or(own, |whole| whole.min(own))),
        None => deadline,
    };
    let sending = lease.send(request);
    let outcome = match deadline {
        None => sending.await,
        Some(deadline) => timeout_at(deadline, sending).await.map_err(|_| Failed {
            failure: Failure::new(Reason::ConnectTimeout, "no response in the time that its rule allows"),
            unsent: false,
            reused: false,
            timed_out: true,
            granted: false,
        })?,
    };
    match outcome {
        Ok((response, _))
            if response.status() == StatusCode::SWITCHING_PROTOCOLS && asked.head.upgrade.is_none() =>
        {
            let detail = "the application changed the protocol without being asked";
            let failure = Failure::new(Reason::UpstreamReset, detail);
            Err(Failed { failure, unsent: false, reused: false, timed_out: false, granted: false })
        }
        Ok((response, give_back)) => {
            Ok(Passed { response, give_back, in_progress, deadline, changes: Changes::default() })
        }
        Err(Unanswered { error, unsent }) => {
            let detail = format!("{}: {}", endpoint.workload.uid, chain(&error));
            let failure = Failure::new(Reason::UpstreamReset, detail);
            // What comes back unsent has its body, which the next attempt takes up where this one is dropped.
            Err(Failed { failure, unsent: unsent.is_some(), reused, timed_out: false, granted: false })
        }
    }
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What the endpoint is spoken to: what its port says, and gRPC, which is nothing else; otherwise what the client speaks (R18).
fn speaks_http2(asked: &Asked<'_>, endpoint: &Endpoint) -> bool {
    if asked.head.upgrade.is_some() {
        return false;
    }
    let declared = match (asked.to, &endpoint.service) {
        (To::Service(_, port), Some(service)) => target::service_protocol(service, *port),
        _ => asked.served.asked.target.protocol(),
    };
    match declared {
        AppProtocol::Http2 | AppProtocol::Grpc => true,
        _ => asked.head.grpc || asked.head.version == Version::HTTP_2,
    }
}

/// The request as it is sent.
fn request(head: &Head, body: Body, http2: bool) -> Result<Request<Body>, Failure> {
    let bad = |what: &str| Failure::new(Reason::BadRequest, format!("{what:?} cannot be sent on"));
    let target = head.path_and_query();
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    request.headers_mut().clone_from(&head.headers);
    request.headers_mut().remove(UPGRADE);
    if http2 {
        // An HTTP/1.0 client may say no host, which HTTP/2 has to.
        let authority = if head.authority.is_empty() { "localhost" } else { &head.authority };
        let uri = Uri::builder().scheme("http").authority(authority).path_and_query(target.as_str()).build();
        *request.uri_mut() = uri.map_err(|_| bad(&target))?;
        *request.version_mut() = Version::HTTP_2;
        return Ok(request);
    }
    *request.uri_mut() = target.parse().map_err(|_| bad(&target))?;
    let host = HeaderValue::from_str(&head.authority).map_err(|_| bad(&head.authority))?;
    request.headers_mut().insert(HOST, host);
    // Where a body is unusual it is left out unless it is announced.
    if !request.body().is_end_stream() && !head.headers.contains_key(CONTENT_LENGTH) {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if let Some(protocol) = &head.upgrade {
        request.headers_mut().insert(UPGRADE, protocol.clone());
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    Ok(request)
}

/// Sends a copy of the request to a mirror, if it is one of its share and there is room: without waiting, and without regard to what
/// comes of it. Returns the body that is left to send.
fn copy(asked: &Asked<'_>, mirror: &Mirror, body: Body) -> Body {
    // A protocol is changed with one of them only.
    let alone = asked.head.upgrade.is_some();
    if alone || mirror.backend.broken.is_some() || fastrand::u32(0..WHOLE) >= mirror.share {
        return body;
    }
    let served = asked.served;
    let Ok(place) = served.worker.mirrors.clone().try_acquire_owned() else { return body };
    let (body, copied) = body::tee(body);
    let (service, port) = (mirror.backend.service.clone(), mirror.backend.port);
    let client = served.asked.peer.address.ip();
    let wanted = Wanted { service: &service, port, client, exclude: &[] };
    let Ok(endpoint) = choose(&served.shared, asked.world, &wanted) else { return body };
    let declared = endpoint.service.as_ref().map(|it| target::service_protocol(it, port));
    let http2 = matches!(declared, Some(AppProtocol::Http2 | AppProtocol::Grpc)) || asked.head.grpc;
    let Ok(request) = request(asked.head, copied, http2) else { return body };
    let (shared, worker) = (served.shared.clone(), served.worker.clone());
    served.worker.spawn("mirror", async move {
        let sent = timeout(MIRROR_TIME, send_copy(&shared, &worker, &endpoint, request, http2)).await;
        if let Ok(Err(failure)) = sent {
            tracing::debug!(%failure, "a mirrored request failed");
        }
        drop(place);
    });
    body
}

async fn send_copy(
    shared: &Shared,
    worker: &Arc<Worker>,
    endpoint: &Endpoint,
    request: Request<Body>,
    http2: bool,
) -> Result<(), Failure> {
    let lease = upstream::lease(shared, worker, endpoint, http2, false).await?;
    let sent = lease.send(request).await;
    let (response, give_back) =
        sent.map_err(|unanswered| Failure::new(Reason::UpstreamReset, chain(&unanswered.error)))?;
    if body::drain(response.into_body()).await {
        give_back.give_back(worker);
    }
    Ok(())
}
