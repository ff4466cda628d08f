//! `forwarded` (RFC 7239): the original client of a tunnel, `for="ip:port";host=name` (Z17).

use std::net::{IpAddr, SocketAddr};

use http::HeaderValue;

/// Longest value read, in bytes.
const MAX_LEN: usize = 1024;
/// Longest host kept: a DNS name and a port.
const MAX_HOST: usize = 260;

/// The first element of a `forwarded` header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// The client's address and, if said, port (else 0).
    pub client: Option<SocketAddr>,
    /// The service that the client addressed.
    pub host: Option<String>,
}

impl Forwarded {
    /// The header value; `None` if there is nothing to say or the host cannot be written.
    #[must_use]
    pub fn encode(&self) -> Option<HeaderValue> {
        let client = self.client.map(|client| format!("for=\"{client}\""));
        let host = self.host.as_deref().filter(|host| is_host(host)).map(|host| {
            // A port or an IPv6 address holds ':', which only a quoted string may hold (RFC 7239 4).
            if host.bytes().all(is_token) { format!("host={host}") } else { format!("host=\"{host}\"") }
        });
        let parts: Vec<String> = client.into_iter().chain(host).collect();
        if parts.is_empty() { None } else { HeaderValue::try_from(parts.join(";")).ok() }
    }

    /// Reads the first element, skipping pairs that are unknown or malformed. Obfuscated clients (`_x`, `unknown`) are `None`.
    #[must_use]
    pub fn parse(value: &[u8]) -> Self {
        let mut forwarded = Self::default();
        let mut rest = &value[..value.len().min(MAX_LEN)];
        loop {
            let (pair, separator, tail) = next_pair(rest);
            let at = pair.iter().position(|b| *b == b'=');
            if let Some((key, value)) = at.map(|at| (pair[..at].trim_ascii(), unquote(&pair[at + 1..]))) {
                if key.eq_ignore_ascii_case(b"for") {
                    forwarded.client = value.as_deref().and_then(parse_node);
                } else if key.eq_ignore_ascii_case(b"host") {
                    forwarded.host = value.filter(|host| is_host(host));
                }
            }
            match separator {
                Some(b';') => rest = tail,
                _ => return forwarded,
            }
        }
    }
}

/// Splits at the first `;` or `,` outside a quoted string.
fn next_pair(value: &[u8]) -> (&[u8], Option<u8>, &[u8]) {
    let mut quoted = false;
    let mut escaped = false;
    for (at, byte) in value.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b';' | b',' if !quoted => return (&value[..at], Some(*byte), &value[at + 1..]),
            _ => {}
        }
    }
    (value, None, &[])
}

fn unquote(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value.trim_ascii()).ok()?;
    let Some(inner) = text.strip_prefix('"') else { return Some(text.to_owned()) };
    let inner = inner.strip_suffix('"')?;
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next()? } else { c });
    }
    Some(out)
}

/// `ip`, `ip:port`, `[ip6]` or `[ip6]:port` (RFC 7239 6).
fn parse_node(node: &str) -> Option<SocketAddr> {
    if let Ok(address) = node.parse::<SocketAddr>() {
        return Some(address);
    }
    let bare = node.strip_prefix('[').and_then(|node| node.strip_suffix(']')).unwrap_or(node);
    bare.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 0))
}

fn is_host(host: &str) -> bool {
    let plain = |b: u8| b.is_ascii_graphic() && b != b'"' && b != b'\\';
    !host.is_empty() && host.len() <= MAX_HOST && host.bytes().all(plain)
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'~' | b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Z17.
    #[test]
    fn writes_what_it_reads() {
        let forwarded = Forwarded {
            client: "10.0.0.1:4000".parse().ok(),
            host: Some("cart.shop.svc.cluster.local".into()),
        };
        let value = forwarded.encode().unwrap();
        assert_eq!(value.to_str().unwrap(), "for=\"10.0.0.1:4000\";host=cart.shop.svc.cluster.local");
        assert_eq!(Forwarded::parse(value.as_bytes()), forwarded);
    }

    #[test]
    fn reads_what_others_write() {
        let parse = |text: &str| Forwarded::parse(text.as_bytes());
        assert_eq!(parse("For=\"[fd00::1]:80\"; proto=http").client, "[fd00::1]:80".parse().ok());
        assert_eq!(parse("for=192.0.2.43, for=\"x\"").client, "192.0.2.43:0".parse().ok());
        assert_eq!(
            parse("for=\"_hidden\";host=\"a\\b:8\""),
            Forwarded { client: None, host: Some("ab:8".into()) }
        );
        assert_eq!(parse("for=\"a"), Forwarded::default());
    }

    proptest! {
        #[test]
        fn reads_anything(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let _ = Forwarded::parse(&bytes);
        }

        #[test]
        fn round_trip(ip in any::<std::net::IpAddr>(), port in any::<u16>(), host in proptest::option::of("[a-z0-9.:-]{1,80}")) {
            let forwarded = Forwarded { client: Some(SocketAddr::new(ip, port)), host };
            let value = forwarded.encode().unwrap();
            prop_assert_eq!(Forwarded::parse(value.as_bytes()), forwarded);
        }
    }
}
