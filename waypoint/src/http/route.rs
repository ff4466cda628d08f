//! Which rule a request is for, and what that makes of it: a plan.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_model::address::NamespacedHostname;
use culvert_model::outcome::Reason;
use culvert_model::route::{Backend, Filter, Found, HttpRule, RequestFacts, Retry, Routes, draw};
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
    /// Filters of the rule, then those of the backend.
    pub filters: Vec<Filter>,
    /// The prefix that the rule matched by.
    pub prefix: Option<String>,
    /// From the request's first byte to the response's last.
    pub request_timeout: Option<Duration>,
    /// Of each attempt.
    pub backend_timeout: Option<Duration>,
    /// Whether a failed attempt is repeated.
    pub retry: Option<Retry>,
    /// Kind, name and rule, for the log.
    pub name: Option<String>,
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
) -> Result<Plan, (Refusal, Option<String>)> {
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
            let name = match &*rule.name.0 {
                "" => format!("{}/{}", route.kind.as_str(), route.object()),
                rule => format!("{}/{}/{rule}", route.kind.as_str(), route.object()),
            };
            let prefix = matched.prefix().map(str::to_owned);
            match of_rule(rule, prefix) {
                Ok(plan) => Ok(Plan { name: Some(name), ..plan }),
                Err(why) => Err((broken(&why), Some(name))),
            }
        }
    }
}

fn of_rule(rule: &HttpRule, prefix: Option<String>) -> Result<Plan, String> {
    if let Some(why) = &rule.broken {
        return Err(why.to_string());
    }
    let mut filters = rule.filters.clone();
    let answers = filters.iter().any(|filter| matches!(filter, Filter::Redirect(_)));
    let to = match (answers, draw(&rule.backends, &mut |bound| fastrand::u64(0..bound))) {
        (true, _) => None,
        (false, Some(backend)) => {
            if let Some(why) = &backend.broken {
                return Err(why.to_string());
            }
            filters.extend(backend.filters.iter().cloned());
            let Backend { service, port, .. } = backend;
            Some(To::Service(service.clone(), *port))
        }
        (false, None) => return Err("the rule has no backend".to_owned()),
    };
    if let Some(Filter::Broken(why)) = filters.iter().find(|filter| matches!(filter, Filter::Broken(_))) {
        return Err(why.to_string());
    }
    Ok(Plan {
        to,
        filters,
        prefix,
        request_timeout: rule.request_timeout,
        backend_timeout: rule.backend_timeout,
        retry: rule.retry.clone(),
        name: None,
    })
}

impl Plan {
    fn direct(to: To) -> Self {
        Self {
            to: Some(to),
            filters: Vec::new(),
            prefix: None,
            request_timeout: None,
            backend_timeout: None,
            retry: None,
            name: None,
        }
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
