//! Whom a request is for: `Host`, or `:authority`.

/// A request's authority in lower case, with and without its port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Authority {
    whole: Box<str>,
    /// How much of it is the host, without the root's dot.
    host: usize,
    port: Option<u16>,
}

/// Why a text is no authority. Such a request is malformed (RFC 9112 section 3.2): answer 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAuthority {
    /// Nothing at all, or a port alone.
    #[error("authority {0:?} names no host")]
    Empty(String),
    /// Longer than any host and port.
    #[error("an authority of {0} bytes; at most {MAX_AUTHORITY} are allowed")]
    TooLong(usize),
    /// A character that no host has: a user's name would end with `@`, and what follows a space is another's reading.
    #[error("authority {text:?} has {character:?}, which no host has")]
    Character {
        /// The authority.
        text: String,
        /// The first such character.
        character: char,
    },
    /// What follows the last colon is no port.
    #[error("authority {0:?} has no port between 0 and 65535 after its colon")]
    Port(String),
}

/// 253 bytes of a name, or an IPv6 address in brackets; a colon, and five digits: with room to spare.
const MAX_AUTHORITY: usize = 300;

impl Authority {
    /// Reads `host`, `host:port`, or either with an IPv6 address in brackets.
    ///
    /// # Errors
    /// [`BadAuthority`] tells what does not fit.
    pub fn parse(text: &str) -> Result<Self, BadAuthority> {
        if text.len() > MAX_AUTHORITY {
            return Err(BadAuthority::TooLong(text.len()));
        }
        let owned = || text.to_owned();
        let (host, port) = split(text).ok_or_else(|| BadAuthority::Port(owned()))?;
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let allowed = |c: char| {
            c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~') || (bare.is_some() && c == ':')
        };
        if let Some(character) = bare.unwrap_or(host).chars().find(|c| !allowed(*c)) {
            return Err(BadAuthority::Character { text: owned(), character });
        }
        let named = host.strip_suffix('.').unwrap_or(host);
        if named.is_empty() || bare == Some("") {
            return Err(BadAuthority::Empty(owned()));
        }
        Ok(Self { whole: text.to_ascii_lowercase().into(), host: named.len(), port })
    }

    /// All of it, in lower case.
    pub fn as_str(&self) -> &str {
        &self.whole
    }

    /// The host alone: without its port and the root's dot.
    pub fn host(&self) -> &str {
        &self.whole[..self.host]
    }

    /// The port, if it is given.
    pub fn port(&self) -> Option<u16> {
        self.port
    }
}

/// `None` where there is a colon and no port behind it.
fn split(text: &str) -> Option<(&str, Option<u16>)> {
    // The colons of an IPv6 address are inside its brackets.
    match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| port.parse().ok()).flatten().map(|port| (host, Some(port)))
        }
        Some(_) | None => Some((text, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_a_host_with_or_without_a_port() {
        for (text, whole, host, port) in [
            ("Shop.Example", "shop.example", "shop.example", None),
            ("shop.example:8080", "shop.example:8080", "shop.example", Some(8080)),
            ("shop.example.", "shop.example.", "shop.example", None),
            ("SHOP.example.:80", "shop.example.:80", "shop.example", Some(80)),
            ("[FD00::1]:80", "[fd00::1]:80", "[fd00::1]", Some(80)),
            ("[::1]", "[::1]", "[::1]", None),
            ("10.0.0.1:0", "10.0.0.1:0", "10.0.0.1", Some(0)),
        ] {
            let authority = Authority::parse(text).unwrap();
            assert_eq!((authority.as_str(), authority.host(), authority.port()), (whole, host, port));
        }
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_no_authority() {
        for (text, character) in [
            ("user@shop", '@'),
            ("a b", ' '),
            ("a/b", '/'),
            ("a\\b", '\\'),
            ("a,b", ','),
            ("a%2e", '%'),
            ("a#b", '#'),
            ("a?b", '?'),
            ("::1", ':'),
            ("[a", '['),
            ("a]:1", ']'),
            ("é", 'é'),
        ] {
            let error = Authority::parse(text).unwrap_err();
            assert_eq!(error, BadAuthority::Character { text: text.into(), character }, "{text}");
        }
        for text in ["", ".", ":80", "[]", "[]:1"] {
            assert_eq!(Authority::parse(text), Err(BadAuthority::Empty(text.into())));
        }
        for text in ["a:", "a:+1", "a:65536", "a:x", "a:80:"] {
            assert_eq!(Authority::parse(text), Err(BadAuthority::Port(text.into())));
        }
        let long = "a".repeat(MAX_AUTHORITY + 1);
        assert_eq!(Authority::parse(&long), Err(BadAuthority::TooLong(MAX_AUTHORITY + 1)));
    }
}
