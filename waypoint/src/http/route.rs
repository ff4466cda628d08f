//! Which rule a request is for, and what that makes of it: a plan.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_model::Str;
use culvert_model::address::NamespacedHostname;
use culvert_model::outcome::Reason;
use culvert_model::route::{Filter, Found, HttpRule, RequestFacts, Retry, Route, Routes, draw};
use culvert_model::workload::Workload;
use http::StatusCode;

use super::head::Head;
use super::pipeline::Refusal;
use crate::target::Target;

/// What is to be done with a request.
#[derive(Debug)]
pub struct Plan {
    /// Where it goes; nowhere where a filter answers.
    pub to: Option<To>,
    /// The rule that says so; none where the service has no routes.
    pub chosen: Option<Chosen>,
    /// The prefix that the rule matched by.
    pub prefix: Option<String>,
}

/// A rule and one of its backends; cloning it copies neither.
#[derive(Clone, Debug)]
pub struct Chosen {
    route: Arc<Route>,
    rule: Arc<HttpRule>,
    backend: Option<usize>,
}

impl Chosen {
    /// Filters of the rule, then those of the backend.
    pub fn filters(&self) -> impl Iterator<Item = &Filter> {
        let backend = self.backend.and_then(|at| self.rule.backends.get(at));
        self.rule.filters.iter().chain(backend.into_iter().flat_map(|backend| &backend.filters))
    }
}

/// Kind, name and rule, for the log.
impl Display for Chosen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Route { kind, namespace, name, .. } = &*self.route;
        write!(f, "{}/{namespace}/{name}", kind.as_str())?;
        match &*self.rule.name.0 {
            "" => Ok(()),
            rule => write!(f, "/{rule}"),
        }
    }
}

/// Where a request goes.
#[derive(Clone, Debug)]
pub enum To {
    /// To an endpoint of a service.
    Service(NamespacedHostname, u16),
    /// To a workload.
    Workload(Arc<Workload>, SocketAddr),
}

/// Plans.
///
/// # Errors
/// There is no rule for it, or its rule cannot be carried out.
pub fn plan(
    routes: &Routes,
    target: &Target,
    namespace: &str,
    head: &Head,
) -> Result<Plan, (Refusal, Option<Chosen>)> {
    let (service, port) = match target {
        Target::Workload(workload, address) => {
            return Ok(Plan::direct(To::Workload(workload.clone(), *address)));
        }
        Target::Service(service, port) => (service, *port),
    };
    let facts = RequestFacts {
        method: &head.method,
        path: &head.path,
        query: head.query.as_deref(),
        headers: &head.headers,
    };
    match routes.find(&service.key, port, Some(namespace), &facts) {
        Found::NoRoute => Ok(Plan::direct(To::Service(service.key.clone(), port))),
        Found::NoMatch => {
            let detail = format!("no rule of the routes of {} port {port} is for it", service.key);
            Err((Refusal::new(StatusCode::NOT_FOUND, "not found", Reason::BadRequest, detail), None))
        }
        Found::Rule { route, rule, matched } => {
            let mut chosen = Chosen { route: route.clone(), rule: rule.clone(), backend: None };
            match destination(&mut chosen) {
                Ok(to) => Ok(Plan { to, chosen: Some(chosen), prefix: matched.prefix().map(str::to_owned) }),
                Err(why) => Err((broken(&why), Some(chosen))),
            }
        }
    }
}

/// Where the rule sends a request; nowhere if a filter answers.
fn destination(chosen: &mut Chosen) -> Result<Option<To>, Str> {
    let rule = chosen.rule.clone();
    if let Some(why) = &rule.broken {
        return Err(why.clone());
    }
    let answers = rule.filters.iter().any(|filter| matches!(filter, Filter::Redirect(_)));
    let mut to = None;
    if !answers {
        let drawn = draw(&rule.backends, &mut |bound| fastrand::u64(0..bound));
        let backend = drawn.ok_or("the rule has no backend")?;
        if let Some(why) = &backend.broken {
            return Err(why.clone());
        }
        chosen.backend = rule.backends.iter().position(|it| std::ptr::eq(it, backend));
        to = Some(To::Service(backend.service.clone(), backend.port));
    }
    let broken = chosen.filters().find_map(|filter| match filter {
        Filter::Broken(why) => Some(why.clone()),
        _ => None,
    });
    broken.map_or(Ok(to), Err)
}

impl Plan {
    fn direct(to: To) -> Self {
        Self { to: Some(to), chosen: None, prefix: None }
    }

    fn rule(&self) -> Option<&HttpRule> {
        self.chosen.as_ref().map(|chosen| &*chosen.rule)
    }

    /// From the request's first byte to the response's last.
    pub fn request_timeout(&self) -> Option<Duration> {
        self.rule()?.request_timeout
    }

    /// Of each attempt.
    pub fn backend_timeout(&self) -> Option<Duration> {
        self.rule()?.backend_timeout
    }

    /// Whether a failed attempt is repeated.
    pub fn retry(&self) -> Option<&Retry> {
        self.rule()?.retry.as_ref()
    }
}

fn broken(why: &str) -> Refusal {
    let detail = format!("its rule cannot be carried out: {why}");
    Refusal::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "the route cannot be used",
        Reason::NoHealthyUpstream,
        detail,
    )
}
