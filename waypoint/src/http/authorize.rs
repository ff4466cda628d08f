//! May this request, or this stream, pass? Decided by [`culvert_model::request`] from the policies of the service that it is for.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_model::outcome::Reason;
use culvert_model::request::{
    Denial, Findings, Headers, HttpFacts, Permit, PolicySet, RequestFacts, Verdict, judge,
};
use http::{HeaderMap, StatusCode};

use super::Served;
use super::head::Head;
use super::pipeline::Refusal;
use crate::accept::Asked;
use crate::observe::Exchange;
use crate::observe::stream::Stream;
use crate::shared::Failure;
use crate::state::World;
use crate::target::Target;

/// A request's headers, as policies look them up.
struct Lines<'a>(&'a HeaderMap);

impl Headers for Lines<'_> {
    fn each(&self, name: &str, found: &mut dyn FnMut(&[u8])) {
        for value in self.0.get_all(name) {
            found(value.as_bytes());
        }
    }
}

/// Judges a request.
///
/// # Errors
/// What to answer (W57).
pub fn request(
    served: &Served,
    world: &World,
    target: &Target,
    head: &Head,
    exchange: &mut Exchange,
) -> Result<Permit, Refusal> {
    let http = HttpFacts {
        method: head.method.as_str(),
        authority: head.named.as_ref(),
        path: &head.normal,
        headers: &Lines(&head.headers),
        claims: None,
    };
    let facts = facts(&served.asked, Some(http));
    match verdict(policies(world, target), &facts) {
        Ok(permit) => {
            exchange.policy = permit.by().map(ToString::to_string);
            exchange.dry_run = told(permit.findings());
            Ok(permit)
        }
        Err(denial) => {
            exchange.policy = denial.policy.as_ref().map(ToString::to_string);
            exchange.dry_run = told(&denial.findings);
            let failure = Failure::new(denial.reason, denial.detail);
            Err(Refusal { status: StatusCode::FORBIDDEN, text: Denial::BODY, failure })
        }
    }
}

/// Judges a stream that is no requests: what a policy says of requests is uncertain then, so no ALLOW policy that asks for it
/// matches, and every DENY policy does.
///
/// # Errors
/// Why not.
pub fn stream(
    world: &World,
    asked: &Asked,
    (target, server_name): (&Target, Option<&str>),
    stream: &mut Stream,
) -> Result<Permit, Failure> {
    let facts = RequestFacts { server_name, ..facts(asked, None) };
    match verdict(policies(world, target), &facts) {
        Ok(permit) => {
            stream.policy = permit.by().map(ToString::to_string);
            Ok(permit)
        }
        Err(denial) => {
            stream.policy = denial.policy.as_ref().map(ToString::to_string);
            Err(Failure::new(denial.reason, denial.detail))
        }
    }
}

fn policies<'a>(world: &'a World, target: &Target) -> &'a Arc<PolicySet> {
    world.policies.of(target.service().map(|service| &service.key))
}

fn facts<'a>(asked: &'a Asked, http: Option<HttpFacts<'a>>) -> RequestFacts<'a> {
    let client: SocketAddr = asked.peer.address;
    RequestFacts {
        identity: Some(&asked.peer.facts.identity),
        source: Some(client.ip()),
        remote: Some(client.ip()),
        destination: asked.destination,
        server_name: None,
        http,
    }
}

fn verdict(policies: &PolicySet, facts: &RequestFacts<'_>) -> Result<Permit, Denial> {
    match judge(policies, facts) {
        Verdict::Allow(permit) => Ok(permit),
        Verdict::Deny(denial) => Err(denial),
        // Nobody is asked yet; what has to be asked is refused.
        Verdict::Ask(question) => Err(match question.asked().first() {
            Some(asked) => question.refused(asked, "external authorization is not supported yet"),
            None => Denial {
                reason: Reason::PolicyUnavailable,
                policy: None,
                detail: "somebody has to be asked, and it is not said who".to_owned(),
                findings: Findings::default(),
            },
        }),
    }
}

/// What policies that decide nothing said, for the log.
fn told(findings: &Findings) -> Option<String> {
    let dry_run = findings.dry_run.iter().map(|one| format!("{} would {}", one.policy, one.would));
    let audit = findings.audit.iter().map(|policy| format!("{policy} audits"));
    let all: Vec<String> = dry_run.chain(audit).collect();
    (!all.is_empty()).then(|| all.join(", "))
}
