//! Texts of routes that are checked while they are read.

use serde::{Deserialize, Deserializer, Serialize};

use crate::values::{is_dns_subdomain, parse_str};

/// Longest value of a header, as the Gateway API has it.
const MAX_VALUE: usize = 4096;
/// Longest name of a header.
const MAX_NAME: usize = 256;
/// Longest path.
const MAX_PATH: usize = 1024;

macro_rules! text {
    ($(#[$doc:meta])* $name:ident: $expected:literal, $good:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
        pub struct $name(pub String);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let good: fn(&str) -> bool = $good;
                parse_str(deserializer, $expected, |text| good(text).then(|| Self(text.to_owned())))
            }
        }
    };
}

text! {
    /// Name of a header or of a parameter, as written.
    HeaderName: "at most 256 letters, digits and any of !#$%&'*+-.^_`|~", is_token
}
text! {
    /// Value of a header.
    HeaderValue: "at most 4096 printable characters, no blank at either end", is_value
}
text! {
    /// A host name without a wildcard.
    HostName: "a DNS name", is_dns_subdomain
}
text! {
    /// A path, or what a part of it is replaced by; may be empty.
    ReplacementPath: "at most 1024 printable characters without blanks, ? and #", |text| {
        text.len() <= MAX_PATH && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#".contains(&byte))
    }
}
text! {
    /// A regular expression. Whether it is one is found out by whoever uses it.
    Pattern: "a regular expression of at most 4096 characters", |text| {
        !text.is_empty() && text.len() <= MAX_VALUE
    }
}

/// A time in milliseconds, written as the Gateway API has it: `10s`, `1m30s`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Millis(pub u64);

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a time such as 10s, 1m30s or 500ms: at most four numbers of at most five digits, with h, m, s or ms";
        parse_str(deserializer, expected, |text| millis(text).map(Self))
    }
}

/// RFC 9110 section 5.6.2.
pub(super) fn is_token(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.len() <= MAX_NAME && text.bytes().all(good)
}

pub(super) fn is_value(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_graphic() || byte == b' ' || byte == b'\t';
    !text.is_empty() && text.len() <= MAX_VALUE && text.bytes().all(good) && text.trim() == text
}

/// A path that a request can have: what the Gateway API lets stand in a match.
pub(super) fn is_path(text: &str) -> bool {
    let bytes = text.as_bytes();
    let good = |(at, byte): (usize, &u8)| {
        let hex = |after: usize| bytes.get(at + after).is_some_and(u8::is_ascii_hexdigit);
        byte.is_ascii_alphanumeric()
            || b"-/._~!$&'()*+,;=:@".contains(byte)
            || *byte == b'%' && hex(1) && hex(2)
    };
    let odd = ["//", "/./", "/../", "%2f", "%2F"].iter().any(|it| text.contains(it));
    text.starts_with('/')
        && text.len() <= MAX_PATH
        && bytes.iter().enumerate().all(good)
        && !odd
        && !text.ends_with("/..")
        && !text.ends_with("/.")
}

/// GEP-2257.
fn millis(text: &str) -> Option<u64> {
    let (mut rest, mut total, mut parts) = (text, 0_u64, 0);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = rest.split_at(digits);
        let letters = unit.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, after) = unit.split_at(letters);
        let each = match unit {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            _ => return None,
        };
        parts += 1;
        if !(1..=5).contains(&digits) || parts > 4 {
            return None;
        }
        total += number.parse::<u64>().ok()? * each;
        rest = after;
    }
    (parts > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, expected) in [
            ("0s", Some(0)),
            ("10s", Some(10_000)),
            ("1m30s", Some(90_000)),
            ("500ms", Some(500)),
            ("1h2m3s4ms", Some(3_723_004)),
            ("99999h", Some(359_996_400_000)),
            ("", None),
            ("10", None),
            ("s", None),
            ("100000s", None),
            ("1d", None),
            ("1.5s", None),
            ("-1s", None),
            ("1s1s1s1s1s", None),
            ("1 s", None),
        ] {
            assert_eq!(millis(text), expected, "{text}");
        }
    }

    #[test]
    fn what_a_path_is() {
        for good in ["/", "/a", "/a/b.c", "/a%20b", "/..a", "/a=b;c"] {
            assert!(is_path(good), "{good}");
        }
        for bad in
            ["", "a", "//", "/a//b", "/./a", "/a/..", "/a/.", "/a%2Fb", "/a#b", "/a?b", "/a b", "/a%2", "/é"]
        {
            assert!(!is_path(bad), "{bad}");
        }
    }
}
