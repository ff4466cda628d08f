//! What a rule's filters make of a request, before it is passed on, and what is left to do with its response.

use culvert_model::route::{Cors, Filter, Mirror, change};
use http::header::{HeaderValue, LOCATION, ORIGIN};
use http::{HeaderMap, Response, StatusCode};

use super::body::{self, Body};
use super::head::Head;
use super::respond;
use super::route::{Chosen, Plan};

/// What came of it.
#[derive(Default)]
pub struct Applied {
    /// A filter answers.
    pub answer: Option<Response<Body>>,
    /// To be done with the response.
    pub changes: Changes,
    /// Where copies go.
    pub mirrors: Vec<Mirror>,
}

/// To be done with a response.
#[derive(Default)]
pub struct Changes {
    chosen: Option<Chosen>,
    /// What of the request's origin CORS has to know.
    origin: HeaderMap,
}

impl Changes {
    /// Does it.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for filter in self.chosen.iter().flat_map(Chosen::filters) {
            match filter {
                Filter::ResponseHeaders(change) => change::headers(change, headers),
                Filter::Cors(cors) => cors.respond(&self.origin, headers),
                _ => {}
            }
        }
    }
}

/// Applies the filters to a request that came to `port`.
pub fn apply(plan: &Plan, head: &mut Head, port: u16) -> Applied {
    let mut applied = Applied::default();
    let Some(chosen) = &plan.chosen else { return applied };
    let mut answered_by_cors = false;
    for filter in chosen.filters() {
        match filter {
            Filter::RequestHeaders(change) => change::headers(change, &mut head.headers),
            // The response's turn comes later.
            Filter::ResponseHeaders(_) => {}
            Filter::Redirect(redirect) => {
                let asked = change::Asked {
                    scheme: "http",
                    authority: &head.authority,
                    port,
                    path: &head.path,
                    query: head.query.as_deref(),
                };
                let location = change::location(redirect, plan.prefix.as_deref(), &asked);
                applied.answer = Some(redirected(redirect.status, &location));
                break;
            }
            Filter::Rewrite(rewrite) => {
                if let Some(hostname) = &rewrite.hostname {
                    head.authority = hostname.to_string();
                }
                if let Some(path) = &rewrite.path {
                    head.path = change::path(path, plan.prefix.as_deref(), &head.path);
                }
            }
            Filter::Mirror(mirror) => applied.mirrors.push(mirror.clone()),
            Filter::Cors(cors) => {
                if Cors::is_preflight(&head.method, &head.headers) {
                    let mut response = Response::new(body::empty());
                    *response.status_mut() = StatusCode::NO_CONTENT;
                    *response.headers_mut() = cors.preflight(&head.headers);
                    applied.answer = Some(response);
                    answered_by_cors = true;
                    break;
                }
                if let Some(origin) = head.headers.get(ORIGIN) {
                    applied.changes.origin.insert(ORIGIN, origin.clone());
                }
            }
            // The plan was not made then.
            Filter::Broken(_) => {}
        }
    }
    applied.changes.chosen = Some(chosen.clone());
    // An answer to a preflight says all that there is to say.
    if let Some(response) = applied.answer.as_mut().filter(|_| !answered_by_cors) {
        applied.changes.apply(response.headers_mut());
    }
    applied
}

fn redirected(status: StatusCode, location: &str) -> Response<Body> {
    let Ok(location) = HeaderValue::from_str(location) else {
        // The client's own words are in it, and they were read as a host and a path before.
        return respond::local(StatusCode::BAD_REQUEST, "bad request", false);
    };
    let mut response = Response::new(body::empty());
    *response.status_mut() = status;
    response.headers_mut().insert(LOCATION, location);
    response
}
