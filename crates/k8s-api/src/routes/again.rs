//! What outlives one attempt at one endpoint: retries and sessions.

use super::raw::{RawLifetime, RawRetry, RawSession, RawSessionType};
use super::read::Reader;
use super::{Retry, SessionBy, SessionPersistence};
use crate::manifest::tree::Node;

impl Reader {
    pub fn retry(&mut self, path: &str, node: &Node) -> Option<Retry> {
        let raw = self.take::<RawRetry>(path, node)?;
        if let Some(bad) = raw.codes.iter().find(|code| !(400..600).contains(*code)) {
            self.wrong(node, &format!("{path}.codes"), &bad.to_string(), "invalid value", "400 to 599");
        }
        if raw.codes.len() > 200 {
            self.wrong(node, &format!("{path}.codes"), "", "has more than 200", "");
        }
        // More than that is no retry but a load of its own.
        if let Some(bad) = raw.attempts.filter(|attempts| *attempts > 100) {
            self.wrong(node, &format!("{path}.attempts"), &bad.to_string(), "invalid value", "at most 100");
        }
        Some(Retry { codes: raw.codes, attempts: raw.attempts, backoff: raw.backoff })
    }

    pub fn session(&mut self, path: &str, node: &Node) -> Option<SessionPersistence> {
        let raw = self.take::<RawSession>(path, node)?;
        let header = raw.type_ == RawSessionType::Header;
        let cookie = raw.cookie.or(raw.cookie_config).unwrap_or_default();
        if cookie.path.as_deref().is_some_and(|it| it != "/") {
            let reason = "is not carried out: the cookie is for every path";
            self.wrong(
                node,
                &format!("{path}.cookie.path"),
                cookie.path.as_deref().unwrap_or_default(),
                reason,
                "/",
            );
        }
        let permanent = cookie.lifetime_type == RawLifetime::Permanent;
        if permanent && raw.absolute_timeout.is_none() {
            let field = format!("{path}.absoluteTimeout");
            self.wrong(node, &field, "", "is required with a permanent cookie", "a time");
        }
        let name = if header { raw.header.map(|it| it.name) } else { cookie.name };
        let name = name.or(raw.session_name).map(|it| it.0);
        if header && name.is_none() {
            self.wrong(node, &format!("{path}.header"), "", "is required with type Header", "a name");
        }
        Some(SessionPersistence {
            by: if header { SessionBy::Header } else { SessionBy::Cookie },
            name: name.unwrap_or_default(),
            absolute_timeout: raw.absolute_timeout,
            idle_timeout: raw.idle_timeout,
            permanent,
        })
    }
}
