//! `traceparent` (W3C Trace Context): joins a tunnel to a trace (Z17).

use std::fmt;

use http::HeaderValue;

/// A position in a trace. Neither id is all zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traceparent {
    /// The trace.
    pub trace_id: u128,
    /// The span that sends the request.
    pub parent_id: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

impl Traceparent {
    /// The value to send: a new span in the parent's trace with the parent's flags, or a new trace, not sampled (flags 00).
    #[must_use]
    pub fn child_of(parent: Option<Self>, random: &mut fastrand::Rng) -> Self {
        let parent_id = random.u64(1..);
        match parent {
            Some(parent) => Self { parent_id, ..parent },
            None => Self { trace_id: random.u128(1..), parent_id, flags: 0 },
        }
    }

    /// The header value.
    #[must_use]
    pub fn encode(&self) -> HeaderValue {
        HeaderValue::try_from(self.to_string()).expect("hex digits and dashes are a header value")
    }

    /// Reads a value of version 00, or the known prefix of a later version. `None` for all else, so that a broken parent
    /// starts a new trace (W3C Trace Context 4.3).
    #[must_use]
    pub fn parse(value: &[u8]) -> Option<Self> {
        let version = hex(value.get(..2)?)?;
        let ends_well = match value.get(55) {
            None => value.len() == 55,
            Some(next) => version != 0 && *next == b'-',
        };
        let dashes = [2, 35, 52].iter().all(|at| value.get(*at) == Some(&b'-'));
        if version == 0xff || !ends_well || !dashes {
            return None;
        }
        let trace_id = hex(value.get(3..35)?)?;
        let parent_id = u64::try_from(hex(value.get(36..52)?)?).ok()?;
        let flags = u8::try_from(hex(value.get(53..55)?)?).ok()?;
        (trace_id != 0 && parent_id != 0).then_some(Self { trace_id, parent_id, flags })
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.parent_id, self.flags)
    }
}

/// Up to 32 lower-case hex digits; upper case is not allowed (W3C Trace Context 3.2.1).
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0_u128, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Z17.
    #[test]
    fn follows_the_standard() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parsed = Traceparent::parse(text.as_bytes()).unwrap();
        assert_eq!(parsed.to_string(), text);
        assert!(Traceparent::parse(format!("{text}-x").as_bytes()).is_none());
        assert!(Traceparent::parse(text.replacen("00", "ff", 1).as_bytes()).is_none());
        assert!(Traceparent::parse(format!("{}-x", text.replacen("00", "01", 1)).as_bytes()).is_some());
        assert!(Traceparent::parse(text.to_uppercase().as_bytes()).is_none());

        let mut random = fastrand::Rng::with_seed(7);
        let child = Traceparent::child_of(Some(parsed), &mut random);
        assert_eq!((child.trace_id, child.flags), (parsed.trace_id, 1));
        assert_ne!(child.parent_id, parsed.parent_id);
        assert_eq!(Traceparent::child_of(None, &mut random).flags, 0);
    }

    proptest! {
        #[test]
        fn reads_anything(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Traceparent::parse(&bytes);
        }

        #[test]
        fn round_trip(trace_id in 1_u128.., parent_id in 1_u64.., flags in any::<u8>()) {
            let trace = Traceparent { trace_id, parent_id, flags };
            prop_assert_eq!(Traceparent::parse(trace.encode().as_bytes()), Some(trace));
        }
    }
}
