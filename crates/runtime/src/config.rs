//! Settings from a JSON file, the environment and the command line, in rising precedence, refused with every mistake found.
//!
//! Files are JSON: it needs no further dependency, and YAML is for manifests. A setting type should carry
//! `#[serde(deny_unknown_fields)]` at every level: that is what refuses a misspelt key, with its path. Durations and sizes
//! are in [`crate::units`].

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

/// No settings file is longer: 1 MiB, some 20,000 lines.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Mistakes reported from one load; a file with more has its later ones reported after the first are mended.
pub const MAX_ERRORS: usize = 32;

/// Everything wrong with the settings, at least one thing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

/// One thing wrong with the settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file asked for.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file is not JSON, or not an object.
    #[error("{}:{line}:{column}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1; 0 when the file as a whole is meant.
        line: usize,
        /// Column, from 1; 0 as above.
        column: usize,
        /// What was expected.
        reason: String,
    },
    /// A key or value that the settings do not allow.
    #[error("{key} ({origin}): {reason}")]
    Value {
        /// Path of the setting, such as `xds.address`.
        key: String,
        /// Where it was written: the file, the variable, or the command line.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads settings for this process.
///
/// - `file`: a JSON object; none means every setting has its default.
/// - `env_prefix`: `CULVERT` makes `CULVERT_XDS__ADDRESS` the setting `xds.address`: lower case, two underscores go one level
///   down. An empty prefix reads no variable.
/// - `overrides`: pairs such as `("xds.address", "https://[::1]:15012")` from the command line.
///
/// Text from the environment and the command line counts as JSON where the setting wants a number, a truth value or a list,
/// and as itself where it wants text.
///
/// # Errors
/// All mistakes that can be told apart, at most [`MAX_ERRORS`]. After a wrong value the rest is still checked, unless the
/// value was one without which nothing more can be said (a required one).
pub fn load<T: DeserializeOwned>(
    file: Option<&Path>,
    env_prefix: &str,
    overrides: &[(String, String)],
) -> Result<T, ConfigErrors> {
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    load_from(file, environment, env_prefix, overrides)
}

/// [`load`] with the environment passed in.
///
/// # Errors
/// As [`load`].
pub fn load_from<T: DeserializeOwned>(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    env_prefix: &str,
    overrides: &[(String, String)],
) -> Result<T, ConfigErrors> {
    let (root, origin) = match file {
        Some(path) => (read(path).map_err(|error| ConfigErrors(vec![error]))?, path.display().to_string()),
        None => (Map::new(), "settings".to_owned()),
    };
    let mut settings = Settings { root: Value::Object(root), origin, texts: BTreeMap::new() };
    let mut errors = Vec::new();
    let mut written: Vec<_> = environment.filter_map(|pair| variable(pair, env_prefix)).collect();
    written.sort();
    written.extend(overrides.iter().map(|(key, text)| Text::new(key, text, "command line")));
    for text in written {
        errors.extend(settings.insert(text).err());
    }
    settings.parse(errors)
}

fn read(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let unreadable = |reason: String| ConfigError::File { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(|error| unreadable(error.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(unreadable(format!("longer than {MAX_FILE_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: error.line(),
        column: error.column(),
        reason: error.to_string(),
    })
}

fn variable((name, text): (String, String), prefix: &str) -> Option<Text> {
    if prefix.is_empty() {
        return None;
    }
    let key = name.strip_prefix(prefix)?.strip_prefix('_')?.to_ascii_lowercase().replace("__", ".");
    Some(Text::new(&key, &text, &format!("variable {name}")))
}

/// A setting written as text, outside the file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Text {
    path: Vec<String>,
    text: String,
    origin: String,
    /// Why its JSON reading was refused, once it was and the text itself is tried instead.
    refused: Option<String>,
}

struct Settings {
    root: Value,
    origin: String,
    texts: BTreeMap<Vec<String>, Text>,
}

impl Text {
    fn new(key: &str, text: &str, origin: &str) -> Self {
        let path = key.split('.').map(str::to_owned).collect();
        Self { path, text: text.to_owned(), origin: origin.to_owned(), refused: None }
    }

    fn error(&self, reason: &str) -> ConfigError {
        ConfigError::Value {
            key: self.path.join("."),
            origin: self.origin.clone(),
            reason: reason.to_owned(),
        }
    }
}

impl Settings {
    fn insert(&mut self, text: Text) -> Result<(), ConfigError> {
        let value = serde_json::from_str(&text.text).unwrap_or_else(|_| Value::String(text.text.clone()));
        let mut at = &mut self.root;
        for key in &text.path {
            if key.is_empty() {
                return Err(text.error("an empty key"));
            }
            let Value::Object(map) = at else {
                return Err(text.error("lies inside a value that is not an object"));
            };
            at = map.entry(key.clone()).or_insert_with(|| Value::Object(Map::new()));
        }
        *at = value;
        self.texts.insert(text.path.clone(), text);
        Ok(())
    }

    /// Deserializes; takes out what is wrong and tries again, to find the next mistake.
    fn parse<T: DeserializeOwned>(mut self, mut errors: Vec<ConfigError>) -> Result<T, ConfigErrors> {
        // Each round removes a value or turns one text to a string, so this ends with the errors or the texts.
        let rounds = MAX_ERRORS + self.texts.len();
        for _ in 0..rounds {
            let error = match serde_path_to_error::deserialize::<_, T>(&self.root) {
                Ok(settings) if errors.is_empty() => return Ok(settings),
                Ok(_) => break,
                Err(error) => error,
            };
            let path = keys(error.path());
            let reason = error.inner().to_string();
            if self.retry_as_text(&path, &reason) {
                continue;
            }
            // What was taken out for being wrong is not missing as well.
            let consequence = errors.iter().any(|known| {
                matches!(known, ConfigError::Value { key, .. }
                    if reason == format!("missing field `{}`", key.rsplit('.').next().unwrap_or(key)))
            });
            if !consequence {
                errors.push(self.describe(error.path().to_string(), &path, reason));
            }
            if errors.len() >= MAX_ERRORS || !self.remove(&path) {
                break;
            }
        }
        Err(ConfigErrors(errors))
    }

    fn retry_as_text(&mut self, path: &[String], reason: &str) -> bool {
        let Some(text) = self.texts.get_mut(path) else { return false };
        if text.refused.is_some() {
            return false;
        }
        text.refused = Some(reason.to_owned());
        let value = Value::String(text.text.clone());
        match lookup(&mut self.root, path) {
            Some(at) if *at != value => {
                *at = value;
                true
            }
            _ => false,
        }
    }

    fn describe(&self, key: String, path: &[String], reason: String) -> ConfigError {
        match self.texts.get(path) {
            Some(text) => text.error(text.refused.as_deref().unwrap_or(&reason)),
            None => ConfigError::Value { key, origin: self.origin.clone(), reason },
        }
    }

    fn remove(&mut self, path: &[String]) -> bool {
        let Some((last, parents)) = path.split_last() else { return false };
        match lookup(&mut self.root, parents) {
            Some(Value::Object(map)) => map.remove(last).is_some(),
            _ => false,
        }
    }
}

fn lookup<'a>(mut at: &'a mut Value, path: &[String]) -> Option<&'a mut Value> {
    for key in path {
        at = at.get_mut(key)?;
    }
    Some(at)
}

/// The keys down to the first list: a mistake inside a list takes the whole list out of the next round.
fn keys(path: &serde_path_to_error::Path) -> Vec<String> {
    let key = |segment: &Segment| match segment {
        Segment::Map { key } => Some(key.clone()),
        Segment::Seq { .. } | Segment::Enum { .. } | Segment::Unknown => None,
    };
    path.iter().map_while(key).collect()
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::io::Write;
    use std::time::Duration;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Example {
        name: String,
        port: u16,
        xds: Xds,
        peers: Vec<u8>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Xds {
        address: String,
        #[serde(with = "crate::units::duration")]
        timeout: Duration,
        #[serde(with = "crate::units::bytes")]
        buffer: u64,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Strict {
        port: u16,
    }

    fn load_text<T: DeserializeOwned>(
        json: &str,
        env: &[(&str, &str)],
        over: &[(&str, &str)],
    ) -> Result<T, Vec<String>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(json.as_bytes()).unwrap();
        let pair = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
        let overrides: Vec<_> = over.iter().map(pair).collect();
        let name = file.path().display().to_string();
        load_from(Some(file.path()), env.iter().map(pair), "TEST", &overrides)
            .map_err(|errors| errors.0.iter().map(|error| error.to_string().replace(&name, "FILE")).collect())
    }

    #[test]
    fn later_sources_win() {
        let json = r#"{"name":"file","port":1,"xds":{"address":"a","timeout":"250ms","buffer":"64KiB"}}"#;
        let env =
            [("TEST_PORT", "2"), ("TEST_XDS__ADDRESS", "7"), ("TEST_PEERS", "[1,2]"), ("OTHER_NAME", "x")];
        let loaded: Example = load_text(json, &env, &[("port", "3"), ("xds.buffer", "5")]).unwrap();
        let xds = Xds { address: "7".into(), timeout: Duration::from_millis(250), buffer: 5 };
        assert_eq!(loaded, Example { name: "file".into(), port: 3, xds, peers: vec![1, 2] });
    }

    #[test]
    fn every_mistake_is_reported_with_its_place() {
        let json = r#"{"name":1,"prot":5,"xds":{"timeout":"soon","adress":"a"},"peers":[1,300]}"#;
        let mut errors =
            load_text::<Example>(json, &[("TEST_PORT", "70000")], &[("xds.buffer", "many")]).unwrap_err();
        errors.sort();
        let starts = [
            "name (FILE): invalid type: integer `1`",
            "peers[1] (FILE): invalid value: integer `300`",
            "port (variable TEST_PORT): invalid value: integer `70000`",
            "prot (FILE): unknown field `prot`",
            "xds.adress (FILE): unknown field `adress`",
            "xds.buffer (command line): \"many\" is not a size",
            "xds.timeout (FILE): \"soon\" is not a duration",
        ];
        assert_eq!(errors.len(), starts.len(), "{errors:#?}");
        for (error, start) in errors.iter().zip(starts) {
            assert!(error.starts_with(start), "{error} should start with {start}");
        }
    }

    #[test]
    fn a_wrong_required_value_is_not_called_missing() {
        assert_eq!(load_text::<Strict>("{}", &[], &[("port", "1")]), Ok(Strict { port: 1 }));
        let errors = load_text::<Strict>(r#"{"port":"x"}"#, &[], &[]).unwrap_err();
        assert_eq!(errors, [r#"port (FILE): invalid type: string "x", expected u16"#]);
        assert_eq!(load_text::<Strict>("{}", &[], &[]).unwrap_err(), [". (FILE): missing field `port`"]);
    }

    #[test]
    fn unreadable_files() {
        let missing =
            load_from::<Example>(Some(Path::new("/nonexistent/x.json")), std::iter::empty(), "", &[]);
        assert!(matches!(&missing.unwrap_err().0[..], [ConfigError::File { .. }]));
        let errors = load_text::<Example>("{\n  \"name\": }", &[], &[]).unwrap_err();
        assert!(errors[0].starts_with("FILE:2:11: "), "{errors:?}");
        assert!(load_text::<Example>("[]", &[], &[]).is_err());
        assert!(load_text::<Example>("{}", &[], &[("name.first", "x")]).is_err());
        let nothing: Example = load_from(None, std::iter::empty(), "TEST", &[]).unwrap();
        assert_eq!(nothing, Example::default());
    }
}
