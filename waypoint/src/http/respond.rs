//! Answers that are the waypoint's own, as HTTP and as gRPC say them.

use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, HeaderName, Response, StatusCode};

use super::body::{self, Body};

/// `grpc-status`.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The codes of gRPC that are said here (grpc.io, "Status codes and their use").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Code {
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

/// Whether a request is gRPC's, by its type.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(CONTENT_TYPE) else { return false };
    let rest = kind.as_bytes().strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// An answer with a status and a line of text; to gRPC the code that goes with the status, without a body ("Trailers-Only").
pub fn local(status: StatusCode, text: &'static str, grpc: bool) -> Response<Body> {
    if grpc {
        return grpc_only(code(status), text);
    }
    let mut response = Response::new(body::text(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

/// A gRPC status and nothing else.
pub fn grpc_only(code: Code, message: &'static str) -> Response<Body> {
    let mut response = Response::new(body::empty());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(code as u16));
    headers.insert(GRPC_MESSAGE, HeaderValue::from_static(message));
    response
}

/// The code for a status that the waypoint answers with.
fn code(status: StatusCode) -> Code {
    match status.as_u16() {
        400 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 => Code::ResourceExhausted,
        504 => Code::DeadlineExceeded,
        // Gateway API, GRPCRoute: what has no backend is unavailable; 500 is only how HTTP says so.
        500..=599 => Code::Unavailable,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_is_known_by_its_type() {
        for (kind, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;x=y", true),
            ("application/grpc-web", false),
            ("text/plain", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            assert_eq!(is_grpc(&headers), expected, "{kind}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }

    #[test]
    fn a_refusal_is_said_in_the_callers_words() {
        let http = local(StatusCode::FORBIDDEN, "RBAC: access denied", false);
        assert_eq!(http.status(), 403);
        let grpc = local(StatusCode::FORBIDDEN, "RBAC: access denied", true);
        assert_eq!(
            (grpc.status().as_u16(), &grpc.headers()[GRPC_STATUS]),
            (200, &HeaderValue::from_static("7"))
        );
    }
}
