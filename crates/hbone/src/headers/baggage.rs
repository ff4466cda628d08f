//! `baggage` (W3C Baggage): the workload behind a tunnel (Z17).

use std::fmt::Write as _;

use http::HeaderValue;

/// Longest value read or written, in bytes: W3C Baggage 3.3.2 asks for no more.
pub const MAX_LEN: usize = 8192;
/// Most members looked at: W3C Baggage 3.3.2 asks for no more than 64.
pub const MAX_MEMBERS: usize = 64;
/// Longest decoded value kept, in bytes: Kubernetes names end at 253, and label values at 63.
pub const MAX_VALUE: usize = 256;

/// Workload kinds that give their name in `k8s.<kind>.name`.
const KINDS: [&str; 5] = ["deployment", "cronjob", "job", "pod", "statefulset"];

/// What is said of a workload; empty means not said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: String,
    /// `k8s.namespace.name`.
    pub namespace: String,
    /// The kind in `k8s.<kind>.name`, lower case: deployment, cronjob, job, pod or statefulset.
    pub workload_kind: String,
    /// The value of `k8s.<kind>.name`.
    pub workload: String,
    /// `service.name`: the canonical name.
    pub service: String,
    /// `service.version`: the canonical revision.
    pub version: String,
    /// `cloud.region`.
    pub region: String,
    /// `cloud.availability_zone`.
    pub zone: String,
}

impl Baggage {
    /// The header value; `None` if there is nothing to say. A member that would pass [`MAX_LEN`] is left out.
    #[must_use]
    pub fn encode(&self) -> Option<HeaderValue> {
        let workload_key = format!("k8s.{}.name", self.workload_kind);
        let workload = if KINDS.contains(&self.workload_kind.as_str()) { self.workload.as_str() } else { "" };
        let members = [
            ("k8s.cluster.name", self.cluster.as_str()),
            ("k8s.namespace.name", self.namespace.as_str()),
            (workload_key.as_str(), workload),
            ("service.name", self.service.as_str()),
            ("service.version", self.version.as_str()),
            ("cloud.region", self.region.as_str()),
            ("cloud.availability_zone", self.zone.as_str()),
        ];
        let mut out = String::new();
        for (key, value) in members.into_iter().filter(|(_, value)| !value.is_empty()) {
            let before = out.len();
            if before > 0 {
                out.push(',');
            }
            out.push_str(key);
            out.push('=');
            encode_into(cut(value), &mut out);
            if out.len() > MAX_LEN {
                out.truncate(before);
            }
        }
        if out.is_empty() { None } else { HeaderValue::try_from(out).ok() }
    }

    /// Reads a value, keeping what is known and well formed and skipping the rest. The last of equal keys counts.
    #[must_use]
    pub fn parse(value: &[u8]) -> Self {
        let mut baggage = Self::default();
        let value = &value[..value.len().min(MAX_LEN)];
        for member in value.split(|b| *b == b',').take(MAX_MEMBERS) {
            // Properties after ';' are allowed and mean nothing to us.
            let member = member.split(|b| *b == b';').next().unwrap_or_default();
            let Some(at) = member.iter().position(|b| *b == b'=') else { continue };
            let Ok(key) = std::str::from_utf8(member[..at].trim_ascii()) else { continue };
            let Some(decoded) = decode(member[at + 1..].trim_ascii()) else { continue };
            baggage.set(key, decoded);
        }
        baggage
    }

    fn set(&mut self, key: &str, value: String) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service,
            "service.version" => &mut self.version,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            _ => {
                let kind = key.strip_prefix("k8s.").and_then(|rest| rest.strip_suffix(".name"));
                let Some(kind) = kind.filter(|kind| KINDS.contains(kind)) else { return };
                kind.clone_into(&mut self.workload_kind);
                &mut self.workload
            }
        };
        *field = value;
    }
}

/// The start of `value` that fits [`MAX_VALUE`], cut between characters.
fn cut(value: &str) -> &str {
    let mut end = value.len().min(MAX_VALUE);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    &value[..end]
}

/// Percent-encodes all but the octets that a baggage value may hold as they are (W3C Baggage 3.3.1), `%` included.
fn encode_into(value: &str, out: &mut String) {
    for byte in value.bytes() {
        let plain = byte.is_ascii_graphic() && !matches!(byte, b'"' | b',' | b';' | b'\\' | b'%' | b'=');
        if plain {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a string does not fail");
        }
    }
}

/// Undoes percent-encoding. `None` for what is longer than [`MAX_VALUE`], not UTF-8, or holds control characters, which
/// would forge log lines. A `%` without two hex digits stands for itself (W3C Baggage leaves it to the reader).
fn decode(value: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len().min(MAX_VALUE));
    let mut rest = value;
    while let Some((&first, tail)) = rest.split_first() {
        if bytes.len() == MAX_VALUE {
            return None;
        }
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)).map(|(high, low)| high * 16 + low),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).ok().filter(|text| !text.chars().any(char::is_control))
}

fn hex(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example() -> Baggage {
        Baggage {
            cluster: "Kubernetes".into(),
            namespace: "shop".into(),
            workload_kind: "deployment".into(),
            workload: "cart".into(),
            service: "cart".into(),
            version: "v2".into(),
            region: "r1".into(),
            zone: "z,1".into(),
        }
    }

    /// Z17.
    #[test]
    fn writes_the_members_in_order() {
        let value = example().encode().unwrap();
        assert_eq!(
            value.to_str().unwrap(),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,\
             service.version=v2,cloud.region=r1,cloud.availability_zone=z%2C1"
        );
        assert_eq!(Baggage::parse(value.as_bytes()), example());
        assert_eq!(Baggage::default().encode(), None);
    }

    #[test]
    fn skips_what_it_does_not_know() {
        let parsed =
            Baggage::parse(b" a=b, service.name = x%20y ;p=1,,=,k8s.evil.name=z,service.version=%0a,%");
        assert_eq!(parsed, Baggage { service: "x y".into(), ..Baggage::default() });
    }

    proptest! {
        #[test]
        fn reads_anything(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            let parsed = Baggage::parse(&bytes);
            prop_assert!(parsed.service.len() <= MAX_VALUE);
            // What was read can always be written and read again.
            if let Some(value) = parsed.encode() {
                prop_assert_eq!(Baggage::parse(value.as_bytes()), parsed);
            }
        }

        #[test]
        fn round_trip(cluster in "\\PC{0,60}", namespace in "[a-z0-9-]{0,63}", workload in "\\PC{1,60}",
                      kind in proptest::sample::select(&KINDS[..]), zone in "\\PC{0,60}") {
            let baggage = Baggage { cluster, namespace, workload, workload_kind: kind.into(), zone, ..Baggage::default() };
            let value = baggage.encode().unwrap();
            prop_assert_eq!(Baggage::parse(value.as_bytes()), baggage);
        }
    }
}
