//! What is known of `culvert.waypoint.v1.Route`.

use super::{Field, Kind, Message, nested, plain};

/// `culvert.waypoint.v1.Route`.
pub static ROUTE: Message = Message {
    name: "Route",
    fields: &[
        plain(1, "kind"),
        plain(2, "namespace"),
        plain(3, "name"),
        plain(4, "created"),
        plain(5, "service_namespace"),
        plain(6, "service_hostname"),
        plain(7, "port"),
        plain(8, "consumer_namespace"),
        nested(9, "http_rules", &HTTP_RULE),
        nested(10, "stream_rules", &STREAM_RULE),
        plain(11, "hostnames"),
    ],
};

static HTTP_RULE: Message = Message {
    name: "HttpRule",
    fields: &[
        plain(1, "name"),
        nested(2, "matches", &HTTP_MATCH),
        nested(3, "filters", &FILTER),
        nested(4, "backends", &BACKEND),
        nested(5, "timeouts", &TIMEOUTS),
        nested(6, "retry", &RETRY),
        nested(7, "session_persistence", &SESSION_PERSISTENCE),
    ],
};

static STREAM_RULE: Message = Message { name: "StreamRule", fields: &[nested(1, "backends", &BACKEND)] };

static HTTP_MATCH: Message = Message {
    name: "HttpMatch",
    fields: &[
        nested(1, "path", &PATH_MATCH),
        plain(2, "method"),
        nested(3, "headers", &VALUE_MATCH),
        nested(4, "query_params", &VALUE_MATCH),
    ],
};

static PATH_MATCH: Message = Message {
    name: "PathMatch",
    fields: &[plain(1, "exact"), plain(2, "prefix"), plain(3, "regex"), nested(4, "grpc", &GRPC_METHOD)],
};

static GRPC_METHOD: Message =
    Message { name: "GrpcMethod", fields: &[plain(1, "service"), plain(2, "method"), plain(3, "regex")] };

static VALUE_MATCH: Message =
    Message { name: "ValueMatch", fields: &[plain(1, "name"), plain(2, "exact"), plain(3, "regex")] };

static FILTER: Message = Message {
    name: "Filter",
    fields: &[
        nested(1, "request_headers", &HEADER_CHANGE),
        nested(2, "response_headers", &HEADER_CHANGE),
        nested(3, "redirect", &REDIRECT),
        nested(4, "rewrite", &REWRITE),
        nested(5, "mirror", &MIRROR),
        nested(6, "cors", &CORS),
        plain(7, "broken"),
    ],
};

static HEADER_CHANGE: Message = Message {
    name: "HeaderChange",
    fields: &[nested(1, "set", &HEADER), nested(2, "add", &HEADER), plain(3, "remove")],
};

static HEADER: Message = Message { name: "Header", fields: &[plain(1, "name"), plain(2, "value")] };

static REDIRECT: Message = Message {
    name: "Redirect",
    fields: &[
        plain(1, "scheme"),
        plain(2, "hostname"),
        plain(3, "port"),
        nested(4, "path", &PATH_CHANGE),
        plain(5, "status"),
    ],
};

static REWRITE: Message =
    Message { name: "Rewrite", fields: &[plain(1, "hostname"), nested(2, "path", &PATH_CHANGE)] };

static PATH_CHANGE: Message = Message { name: "PathChange", fields: &[plain(1, "full"), plain(2, "prefix")] };

static MIRROR: Message =
    Message { name: "Mirror", fields: &[nested(1, "backend", &BACKEND), plain(2, "share")] };

static CORS: Message = Message {
    name: "Cors",
    fields: &[
        plain(1, "allow_origins"),
        plain(2, "allow_credentials"),
        plain(3, "allow_methods"),
        plain(4, "allow_headers"),
        plain(5, "expose_headers"),
        plain(6, "max_age_seconds"),
    ],
};

/// Its filters hold backends again, so a hostile message could go as deep as it is long: see [`super::MAX_DEPTH`].
static BACKEND: Message = Message {
    name: "Backend",
    fields: &[
        plain(1, "service_namespace"),
        plain(2, "service_hostname"),
        plain(3, "port"),
        plain(4, "weight"),
        nested(5, "filters", &FILTER),
        plain(6, "broken"),
    ],
};

static TIMEOUTS: Message =
    Message { name: "Timeouts", fields: &[plain(1, "request_ms"), plain(2, "backend_ms")] };

static RETRY: Message =
    Message { name: "Retry", fields: &[plain(1, "attempts"), plain(2, "codes"), plain(3, "backoff_ms")] };

static SESSION_PERSISTENCE: Message = Message {
    name: "SessionPersistence",
    fields: &[
        Field { tag: 1, name: "kind", kind: Kind::Enum(2) },
        plain(2, "name"),
        plain(3, "absolute_timeout_ms"),
        plain(4, "idle_timeout_ms"),
        plain(5, "permanent"),
    ],
};
