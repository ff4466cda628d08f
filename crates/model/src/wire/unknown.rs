//! A walk over a policy's bytes that finds what this proxy does not know.
//!
//! The decoder drops unknown fields silently, and proto3 keeps unknown enum values as numbers. In a policy either may be
//! the condition that was meant to deny, so both are found here, before decoding, by a table of what is known (D06).

/// A message's known fields.
#[derive(Debug)]
pub struct Message {
    name: &'static str,
    fields: &'static [Field],
}

#[derive(Debug)]
struct Field {
    tag: u32,
    name: &'static str,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Numbers, texts and bytes: the decoder checks them.
    Plain,
    /// Numbers below this bound are known.
    Enum(u64),
    /// A message inside.
    Nested(&'static Message),
    /// Somewhere to put what nobody here understands.
    Extension,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownError {
    /// A field that is in no table.
    #[error("unknown field {tag} of {message}")]
    Field {
        /// The message it is in.
        message: &'static str,
        /// Its number.
        tag: u32,
    },
    /// A value that is in no table.
    #[error("unknown value {value} of {message}.{field}")]
    Value {
        /// The message it is in.
        message: &'static str,
        /// The field.
        field: &'static str,
        /// Its number.
        value: u64,
    },
    /// An extension; none is understood.
    #[error("{message}.{field} is not supported")]
    Extension {
        /// The message it is in.
        message: &'static str,
        /// The field.
        field: &'static str,
    },
    /// Messages inside of each other, further than anything means.
    #[error("{message} is too deep inside other messages")]
    Deep {
        /// The message that is too deep.
        message: &'static str,
    },
    /// The bytes are no protobuf message.
    #[error("{message} is malformed at byte {offset}")]
    Malformed {
        /// The message it is in.
        message: &'static str,
        /// How far into that message.
        offset: usize,
    },
}

const fn plain(tag: u32, name: &'static str) -> Field {
    Field { tag, name, kind: Kind::Plain }
}

const fn nested(tag: u32, name: &'static str, message: &'static Message) -> Field {
    Field { tag, name, kind: Kind::Nested(message) }
}

/// `istio.security.Authorization`.
pub static AUTHORIZATION: Message = Message {
    name: "Authorization",
    fields: &[
        plain(1, "name"),
        plain(2, "namespace"),
        Field { tag: 3, name: "scope", kind: Kind::Enum(3) },
        Field { tag: 4, name: "action", kind: Kind::Enum(2) },
        nested(5, "groups", &GROUP),
        plain(6, "dry_run"),
        Field { tag: 7, name: "extensions", kind: Kind::Extension },
    ],
};

static GROUP: Message = Message { name: "Group", fields: &[nested(1, "rules", &RULES)] };

static RULES: Message = Message { name: "Rules", fields: &[nested(2, "matches", &MATCH)] };

static MATCH: Message = Message {
    name: "Match",
    fields: &[
        nested(1, "namespaces", &STRING_MATCH),
        nested(2, "not_namespaces", &STRING_MATCH),
        nested(3, "principals", &STRING_MATCH),
        nested(4, "not_principals", &STRING_MATCH),
        nested(5, "source_ips", &ADDRESS),
        nested(6, "not_source_ips", &ADDRESS),
        nested(7, "destination_ips", &ADDRESS),
        nested(8, "not_destination_ips", &ADDRESS),
        plain(9, "destination_ports"),
        plain(10, "not_destination_ports"),
        nested(11, "service_accounts", &SERVICE_ACCOUNT),
        nested(12, "not_service_accounts", &SERVICE_ACCOUNT),
        Field { tag: 13, name: "extensions", kind: Kind::Extension },
    ],
};

static STRING_MATCH: Message = Message {
    name: "StringMatch",
    fields: &[plain(1, "exact"), plain(2, "prefix"), plain(3, "suffix"), nested(4, "presence", &EMPTY)],
};

static EMPTY: Message = Message { name: "Empty", fields: &[] };

static ADDRESS: Message = Message { name: "Address", fields: &[plain(1, "address"), plain(2, "length")] };

static SERVICE_ACCOUNT: Message =
    Message { name: "ServiceAccountMatch", fields: &[plain(1, "namespace"), plain(2, "service_account")] };

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

/// Its filters hold backends again, so a hostile message could go as deep as it is long: see [`MAX_DEPTH`].
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

/// Messages inside of each other: what is meant has eight, the decoder takes a hundred.
const MAX_DEPTH: usize = 32;

/// Walks a message by its table, no deeper than [`MAX_DEPTH`].
///
/// # Errors
/// The first thing found.
pub fn check(bytes: &[u8], message: &'static Message) -> Result<(), UnknownError> {
    walk(bytes, message, MAX_DEPTH)
}

fn walk(bytes: &[u8], message: &'static Message, depth: usize) -> Result<(), UnknownError> {
    if depth == 0 {
        return Err(UnknownError::Deep { message: message.name });
    }
    let mut reader = Reader { bytes, offset: 0, message: message.name };
    while let Some((tag, value)) = reader.next()? {
        let field = message.fields.iter().find(|f| f.tag == tag);
        let field = field.ok_or(UnknownError::Field { message: message.name, tag })?;
        match (&field.kind, value) {
            (Kind::Extension, _) => {
                return Err(UnknownError::Extension { message: message.name, field: field.name });
            }
            (Kind::Enum(bound), Value::Varint(value)) if value >= *bound => {
                return Err(UnknownError::Value { message: message.name, field: field.name, value });
            }
            (Kind::Nested(inner), Value::Bytes(bytes)) => walk(bytes, inner, depth - 1)?,
            // A wire type that does not fit its field is for the decoder to refuse.
            _ => {}
        }
    }
    Ok(())
}

/// The last value of a number at the top of a message, if the whole message can be walked; `None` where the field is
/// missing.
///
/// # Errors
/// [`UnknownError::Malformed`]: what follows cannot be read, so the field may still be there.
pub fn last_number(bytes: &[u8], tag: u32) -> Result<Option<u64>, UnknownError> {
    let mut reader = Reader { bytes, offset: 0, message: "message" };
    let mut found = None;
    while let Some((at, value)) = reader.next()? {
        if let (true, Value::Varint(number)) = (at == tag, value) {
            found = Some(number);
        }
    }
    Ok(found)
}

struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
    message: &'static str,
}

enum Value<'a> {
    Varint(u64),
    Fixed,
    Bytes(&'a [u8]),
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Option<(u32, Value<'a>)>, UnknownError> {
        if self.offset == self.bytes.len() {
            return Ok(None);
        }
        let key = self.varint()?;
        let tag = u32::try_from(key >> 3).ok().filter(|tag| *tag != 0).ok_or_else(|| self.malformed())?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed)?,
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| self.malformed())?;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Fixed)?,
            // Groups are of proto2: none of these messages has one.
            _ => return Err(self.malformed()),
        };
        Ok(Some((tag, value)))
    }

    fn varint(&mut self) -> Result<u64, UnknownError> {
        let mut value = 0_u64;
        // Ten groups of seven bits hold 64.
        for shift in (0..70).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.malformed())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], UnknownError> {
        let end = self.offset.checked_add(length).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| self.malformed())?;
        let taken = &self.bytes[self.offset..end];
        self.offset = end;
        Ok(taken)
    }

    fn malformed(&self) -> UnknownError {
        UnknownError::Malformed { message: self.message, offset: self.offset }
    }
}
