//! The settings file: a flat map in YAML.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::{ConfigError, Layer};

/// No settings file is longer: 1 MiB, some 20,000 lines.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Nodes of one text, aliases replayed: what 1 MiB can hold at 4 bytes each, so that only tricks meet it.
const MAX_NODES: usize = 256 * 1024;
/// Levels below the top.
const MAX_DEPTH: usize = 64;

/// Reads a file of settings.
///
/// # Errors
/// [`ConfigError::File`], [`ConfigError::Syntax`], or [`ConfigError::Value`] for a value that can be no setting's.
pub(super) fn read(path: &Path) -> Result<Layer, ConfigError> {
    let unreadable = |reason: String| ConfigError::File { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| unreadable(error.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(unreadable(format!("longer than {MAX_FILE_BYTES} bytes")));
    }
    let origin = path.display().to_string();
    let entries = parse_yaml(&text, &origin)?
        .into_iter()
        .map(|(key, value)| match texts(&value) {
            Some(values) => Ok((key, values)),
            None => Err(ConfigError::Value {
                origin: origin.clone(),
                key,
                value: value.to_string(),
                reason: "want a value, a list of values, or a map of names to values".to_owned(),
            }),
        })
        .collect::<Result<_, _>>()?;
    Ok(Layer { origin, entries })
}

/// A map in YAML (or JSON, which is YAML); nothing at all is an empty one. A key that stands twice is refused.
///
/// # Errors
/// [`ConfigError::Syntax`].
pub fn parse_yaml(text: &str, origin: &str) -> Result<Map<String, Value>, ConfigError> {
    parse_yaml_within(text, origin, MAX_NODES)
}

/// As [`parse_yaml`], for texts of up to `max_nodes` nodes.
///
/// # Errors
/// [`ConfigError::Syntax`].
pub fn parse_yaml_within(
    text: &str,
    origin: &str,
    max_nodes: usize,
) -> Result<Map<String, Value>, ConfigError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: MAX_DEPTH, max_nodes: max_nodes, max_events: max_nodes.saturating_mul(2) },
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options::<Option<Map<String, Value>>>(text, options)
        .map(Option::unwrap_or_default)
        .map_err(|error| {
            let line = error.location().map_or(1, |location| location.line());
            let rendered = error.without_snippet().to_string();
            // What follows is advice for programmers, and the place again.
            let reason = rendered.lines().next().and_then(|line| line.split(", set ").next());
            let reason = reason.unwrap_or("not YAML").to_owned();
            ConfigError::Syntax { origin: origin.to_owned(), line, reason }
        })
}

/// A setting's values as the command line would have them; a map becomes a list of `NAME=VALUE`.
fn texts(value: &Value) -> Option<Vec<String>> {
    let scalar = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    };
    match value {
        Value::Array(items) => items.iter().map(scalar).collect(),
        Value::Object(map) => {
            map.iter().map(|(key, value)| Some(format!("{key}={}", scalar(value)?))).collect()
        }
        one => Some(vec![scalar(one)?]),
    }
}
