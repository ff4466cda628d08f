//! Durations and sizes as people write them: `250ms`, `10s`, `64KiB`.
//!
//! For serde: `#[serde(with = "culvert_runtime::units::duration")]` and `...::bytes`; for clap:
//! `value_parser = culvert_runtime::units::parse_duration`.

use std::time::Duration;

/// Text that is not a duration or size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadUnit {
    /// Not `N` followed by a known unit.
    #[error("{0:?} is not a duration: want a whole number and one of ns, us, ms, s, m, h, such as \"250ms\"")]
    Duration(String),
    /// Not `N` followed by nothing or a known unit.
    #[error("{0:?} is not a size: want a whole number of bytes, or with one of KB, MB, GB, KiB, MiB, GiB")]
    Size(String),
}

const DURATIONS: [(&str, u64); 6] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

const SIZES: [(&str, u64); 8] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
    ("", 1),
];

/// Reads `10s`, `250ms`, `0s`; one number and one unit, up to 584 years.
///
/// # Errors
/// Names the text that is not a duration.
pub fn parse_duration(text: &str) -> Result<Duration, BadUnit> {
    scaled(text, &DURATIONS).map(Duration::from_nanos).ok_or_else(|| BadUnit::Duration(text.to_owned()))
}

/// Reads `4096`, `64KiB`, `3 MiB`, `1GB`.
///
/// # Errors
/// Names the text that is not a size.
pub fn parse_bytes(text: &str) -> Result<u64, BadUnit> {
    scaled(text, &SIZES).ok_or_else(|| BadUnit::Size(text.to_owned()))
}

/// Writes a duration in the largest unit that keeps it whole, so that [`parse_duration`] gives it back.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    if nanos == 0 {
        return "0s".to_owned();
    }
    let (unit, scale) =
        DURATIONS.into_iter().find(|(_, scale)| nanos.is_multiple_of(*scale)).unwrap_or(("ns", 1));
    format!("{}{unit}", nanos / scale)
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let (_, scale) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*scale)
}

/// Durations as text.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes [`super::format_duration`].
    ///
    /// # Errors
    /// The serializer's own.
    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::format_duration(*value))
    }

    /// Reads [`super::parse_duration`].
    ///
    /// # Errors
    /// If the value is not text, or not a duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        super::parse_duration(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// Sizes as text or a plain number of bytes.
pub mod bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(u64),
        Text(String),
    }

    /// Writes the number of bytes.
    ///
    /// # Errors
    /// The serializer's own.
    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(*value)
    }

    /// Reads a number, or [`super::parse_bytes`].
    ///
    /// # Errors
    /// If the value is neither, or not a size.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Number(bytes) => Ok(bytes),
            Written::Text(text) => super::parse_bytes(&text).map_err(D::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_and_refuses() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        for bad in [
            "",
            "5",
            "s",
            "1.5s",
            "-1s",
            "1 day",
            "1s5",
            "99999999999999999999s",
            "18446744073s5",
            "6000000h",
        ] {
            assert_eq!(parse_duration(bad), Err(BadUnit::Duration(bad.to_owned())));
        }
        assert_eq!(parse_bytes("64KiB"), Ok(65536));
        assert_eq!(parse_bytes("3 MiB"), Ok(3 << 20));
        assert_eq!(parse_bytes("17"), Ok(17));
        for bad in ["", "KB", "1kib", "-4", "99999999999GiB"] {
            assert_eq!(parse_bytes(bad), Err(BadUnit::Size(bad.to_owned())));
        }
    }

    proptest! {
        #[test]
        fn a_written_duration_reads_back(nanos: u64) {
            let duration = Duration::from_nanos(nanos);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,12}") {
            let _ = (parse_duration(&text), parse_bytes(&text));
        }
    }
}
