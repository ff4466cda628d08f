//! Field values that are parsed while they are read, so that what is wrong is known by file, line and field.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::de::{self, Deserializer, Unexpected, Visitor};
use serde::{Deserialize, Serialize};

/// A TCP or UDP port, 1 to 65535. Written as a number; a quoted number is accepted where Istio's API has strings
/// (`ports: ["8080"]`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Port(u16);

/// A target port: a number, or the name of a container port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum IntOrString {
    /// The port itself.
    Int(Port),
    /// The name of a container's port; resolved for each pod (D22).
    Name(String),
}

/// An address or a network in CIDR form. A bare address is a network of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct IpBlock(pub IpNet);

impl Port {
    /// The port, unless `value` is 0.
    pub fn new(value: u16) -> Option<Self> {
        (value != 0).then_some(Self(value))
    }

    /// The port as a number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;
        impl Visitor<'_> for PortVisitor {
            type Value = Port;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port from 1 to 65535")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Port, E> {
                u16::try_from(value)
                    .ok()
                    .and_then(Port::new)
                    .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(value), &self))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Port, E> {
                u64::try_from(value)
                    .map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
                    .and_then(|value| self.visit_u64(value))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Port, E> {
                // `u16::from_str` takes a leading '+', which no port is written with.
                (!value.starts_with('+'))
                    .then(|| value.parse().ok())
                    .flatten()
                    .and_then(Port::new)
                    .ok_or_else(|| E::invalid_value(Unexpected::Str(value), &self))
            }
        }
        deserializer.deserialize_any(PortVisitor)
    }
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TargetVisitor;
        impl Visitor<'_> for TargetVisitor {
            type Value = IntOrString;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port from 1 to 65535 or the name of a container port")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<IntOrString, E> {
                u16::try_from(value)
                    .ok()
                    .and_then(Port::new)
                    .map(IntOrString::Int)
                    .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(value), &self))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<IntOrString, E> {
                let shape = !value.is_empty()
                    && value.len() <= 15
                    && value.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                    && value.bytes().any(|b| b.is_ascii_lowercase());
                if shape {
                    Ok(IntOrString::Name(value.to_owned()))
                } else {
                    Err(E::invalid_value(Unexpected::Str(value), &self))
                }
            }
        }
        deserializer.deserialize_any(TargetVisitor)
    }
}

impl FromStr for IpBlock {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map(|net| Self(net.trunc()))
            .map_err(|_| ())
    }
}

impl fmt::Display for IpBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for IpBlock {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse_str(deserializer, "an IP address or a network such as 10.0.0.0/8", |text| text.parse().ok())
    }
}

/// Reads a string and parses it; `expected` completes "expected ...".
pub(crate) fn parse_str<'de, D, T>(
    deserializer: D,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
{
    struct StrVisitor<F>(&'static str, F);
    impl<T, F: Fn(&str) -> Option<T>> Visitor<'_> for StrVisitor<F> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, value: &str) -> Result<T, E> {
            (self.1)(value).ok_or_else(|| E::invalid_value(Unexpected::Str(value), &self))
        }
    }
    deserializer.deserialize_str(StrVisitor(expected, parse))
}

/// True for a DNS-1123 label: 1 to 63 of `a-z0-9-`, a letter or digit at both ends (RFC 1123 section 2.1).
pub fn is_dns_label(text: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = text.as_bytes();
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// True for a DNS-1123 subdomain: labels joined by dots, at most 253 characters.
pub fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_dns_label)
}

/// True for a host of a ServiceEntry: a subdomain, or `*.` and a subdomain.
pub fn is_service_host(text: &str) -> bool {
    is_dns_subdomain(text.strip_prefix("*.").unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "a-b", "0a", "x.y", &"a".repeat(63)] {
            assert!(is_dns_subdomain(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a..b", ".a", "a.", &"a".repeat(64), "é"] {
            assert!(!is_dns_subdomain(bad), "{bad}");
        }
        assert!(is_service_host("*.example.com"));
        assert!(!is_service_host("*"));
        assert!(!is_service_host("a.*.com"));
    }

    #[test]
    fn blocks_are_truncated_to_their_network() {
        assert_eq!("10.1.2.3/8".parse::<IpBlock>().unwrap().to_string(), "10.0.0.0/8");
        assert_eq!("10.1.2.3".parse::<IpBlock>().unwrap().to_string(), "10.1.2.3/32");
        assert_eq!("::1".parse::<IpBlock>().unwrap().to_string(), "::1/128");
        assert!("10.1.2.3/33".parse::<IpBlock>().is_err());
        assert!("10.1.2".parse::<IpBlock>().is_err());
    }

    #[test]
    fn ports() {
        let port = |json: &str| serde_json::from_str::<Port>(json).map(Port::get);
        assert_eq!(port("80").unwrap(), 80);
        assert_eq!(port("\"8080\"").unwrap(), 8080);
        for bad in ["0", "65536", "-1", "\"+80\"", "\"http\"", "\"\"", "1.5"] {
            assert!(port(bad).is_err(), "{bad}");
        }
        assert_eq!(
            serde_json::from_str::<IntOrString>("\"http\"").unwrap(),
            IntOrString::Name("http".into())
        );
        assert!(serde_json::from_str::<IntOrString>("\"8080\"").is_err());
    }
}
