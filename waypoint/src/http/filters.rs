//! What a rule's filters make of a request, before it is passed on, and what is left to do with its response.

use culvert_model::route::{Cors, Filter, HeaderChange, Mirror, change};
use http::header::{HeaderValue, LOCATION, ORIGIN};
use http::{HeaderMap, Response, StatusCode};

use super::body::{self, Body};
use super::head::Head;
use super::respond;
use super::route::Plan;

/// What came of it.
#[derive(Default)]
pub struct Applied {
    /// A filter answers.
    pub answer: Option<Response<Body>>,
    /// To be done with the response, in this order.
    pub changes: Changes,
    /// Where copies go.
    pub mirrors: Vec<Mirror>,
}

/// To be done with a response.
#[derive(Default)]
pub struct Changes {
    headers: Vec<HeaderChange>,
    /// And what of the request's origin it has to know.
    cors: Option<(Cors, HeaderMap)>,
}

impl Changes {
    /// Does it.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for change in &self.headers {
            change::headers(change, headers);
        }
        if let Some((cors, asked)) = &self.cors {
            cors.respond(asked, headers);
        }
    }
}

/// Applies the filters to a request that came to `port`.
pub fn apply(plan: &Plan, head: &mut Head, port: u16) -> Applied {
    let mut applied = Applied::default();
    for filter in &plan.filters {
        match filter {
            Filter::RequestHeaders(change) => change::headers(change, &mut head.headers),
            Filter::ResponseHeaders(change) => applied.changes.headers.push(change.clone()),
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
                    break;
                }
                let origin = head.headers.get(ORIGIN).map(|origin| (ORIGIN, origin.clone()));
                applied.changes.cors = Some((cors.clone(), origin.into_iter().collect()));
            }
            // The plan was not made then.
            Filter::Broken(_) => {}
        }
    }
    if let Some(response) = &mut applied.answer {
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
