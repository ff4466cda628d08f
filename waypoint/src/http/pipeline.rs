//! One request from its head to its response.

use std::fmt::Display;
use std::sync::Arc;

use culvert_model::outcome::Reason;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;

use super::body::{Body, Replay};
use super::head::Head;
use super::{Served, authorize, deliver, filters, forward, respond, route};
use crate::observe::{self, Exchange};
use crate::shared::Failure;
use crate::state::World;

/// A request that is answered here, because it cannot be passed on.
#[derive(Debug)]
pub struct Refusal {
    /// The answer's status; gRPC is told the code that goes with it.
    pub status: StatusCode,
    /// The answer's text: nothing that the client should not know.
    pub text: &'static str,
    /// For the log.
    pub failure: Failure,
}

impl Refusal {
    /// A status and a text for the client, a reason and particulars for the log.
    pub fn new(status: StatusCode, text: &'static str, reason: Reason, detail: impl Display) -> Self {
        Self { status, text, failure: Failure::new(reason, detail.to_string()) }
    }
}

/// Answers a request, whatever becomes of it.
pub async fn handle(served: Arc<Served>, mut request: Request<Incoming>) -> Response<Body> {
    let serving = served.watch.serving();
    let client_upgrade = hyper::upgrade::on(&mut request);
    let (parts, incoming) = request.into_parts();
    let grpc = respond::is_grpc(&parts.headers);
    let line = (&parts.method, parts.uri.path());
    let mut exchange = Exchange::begin(&served.shared, &served.asked.peer, line, grpc);
    // One world for the whole request.
    let world = served.shared.state.load_full();
    exchange.source = observe::source(&served.shared, &world.snapshot, &served.asked.peer);
    exchange.service = served.asked.target.service().cloned();
    let place = served.shared.requests.clone().try_acquire_owned();
    let answered = match Head::read(parts) {
        _ if place.is_err() => {
            let detail = "as many requests as there may be are being served";
            Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", Reason::Overloaded, detail))
        }
        Ok(head) => answer(&served, &world, head, incoming, &mut exchange).await,
        Err(bad) => Err(Refusal::new(bad.status, "bad request", Reason::BadRequest, bad.detail)),
    };
    exchange.place = place.ok();
    match answered {
        Ok(Answer::Passed(passed)) => deliver::response(&served, exchange, *passed, client_upgrade, serving),
        Ok(Answer::Made(response)) => deliver::local(exchange, response, serving),
        Err(refusal) => {
            let response = respond::local(refusal.status, refusal.text, grpc);
            exchange.failure = Some(refusal.failure);
            deliver::local(exchange, response, serving)
        }
    }
}

/// How a request is answered.
pub enum Answer {
    /// By an endpoint.
    Passed(Box<forward::Passed>),
    /// By a filter.
    Made(Response<Body>),
}

async fn answer(
    served: &Served,
    world: &Arc<World>,
    mut head: Head,
    incoming: Incoming,
    exchange: &mut Exchange,
) -> Result<Answer, Refusal> {
    exchange.authority.clone_from(&head.authority);
    let target = served.asked.target.current(&served.shared, &world.snapshot).map_err(|failure| {
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        Refusal { status: unavailable, text: "no longer served here", failure }
    })?;
    exchange.service = target.service().cloned();
    let permit = authorize::request(served, world, &target, &head, exchange)?;
    let namespace = served.asked.peer.facts.identity.namespace();
    let plan = match route::plan(&world.routes, &target, namespace, &head) {
        Ok(plan) => plan,
        Err((refusal, chosen)) => {
            exchange.route = chosen;
            return Err(refusal);
        }
    };
    exchange.route.clone_from(&plan.chosen);
    let applied = filters::apply(&plan, &mut head, target.port());
    if let Some(response) = applied.answer {
        return Ok(Answer::Made(response));
    }
    let Some(to) = &plan.to else {
        let detail = "a rule without a backend and without an answer";
        return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "no backend", Reason::Internal, detail));
    };
    let keep = plan.retry().is_some();
    let body = Replay::new(incoming, keep, exchange.request_bytes.clone());
    let asked =
        forward::Asked { permit, served, world, plan: &plan, to, head: &head, mirrors: &applied.mirrors };
    let passed = forward::run(&asked, body, exchange).await?;
    Ok(Answer::Passed(Box::new(forward::Passed { changes: applied.changes, ..passed })))
}
