//! A program's settings: flags over environment variables over a file over defaults, refused with every mistake found.
//!
//! A program declares each setting once, as a clap argument with its flag, its variable, its default and its text. This
//! module adds the file (YAML, one key for each flag, by the flag's name) and further variables, checks every value where it
//! was written, and says afterwards where each one came from.
//!
//! A setting with a list takes the list of the highest source that has one; lists are not put together. A variable that is
//! empty counts as absent. Unknown variables cannot be refused (the environment is not ours); unknown keys are.

mod file;
mod show;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};

pub use file::{MAX_FILE_BYTES, parse_yaml, parse_yaml_within};
pub use show::{Effective, Setting};

/// Mistakes reported at once; what is beyond shows when the first are mended.
pub const MAX_ERRORS: usize = 32;
/// Names less alike than this (Jaro, from 0 to 1) are not offered as what was meant.
const ALIKE: f64 = 0.7;
/// Id and flag of the argument that names the file.
const FILE_ARGUMENT: &str = "config";
/// Names the file where the command line does not.
pub const FILE_VARIABLE: &str = "CONFIG_FILE";
/// Arguments that are no settings.
const NOT_SETTINGS: [&str; 4] = [FILE_ARGUMENT, "print_config", "help", "version"];

/// What a process was started with.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The command line, the program's name first.
    pub arguments: Vec<OsString>,
    /// The environment; what is no text is left out.
    pub environment: Environment,
}

/// Variables by name.
pub type Environment = BTreeMap<String, String>;

/// Settings by flag name (without dashes), from one place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// The place, as messages name it.
    pub origin: String,
    /// Flag and values.
    pub entries: Vec<(String, Vec<String>)>,
}

/// What is particular to one program.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Layers made of variables that no argument declares, the higher first. They are below declared variables and above
    /// the file. What they say of settings that the called subcommand does not have is passed over.
    pub layers: fn(&Environment) -> Result<Vec<Layer>, ConfigErrors>,
    /// Flags whose values are `NAME=SECRET`: what is behind `=` is never shown.
    pub secrets: &'static [&'static str],
}

/// Settings, and where they came from.
#[derive(Debug)]
pub struct Loaded<C> {
    /// The settings.
    pub settings: C,
    /// The same, to show.
    pub effective: Effective,
}

/// Why there are no settings.
#[derive(Debug)]
pub enum LoadError {
    /// The command line itself, or a call for help.
    Usage(clap::Error),
    /// Something written in the file or the environment.
    Config(ConfigErrors),
}

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
    /// Not YAML, or not a map.
    #[error("{origin}: line {line}: {reason}")]
    Syntax {
        /// File or variable.
        origin: String,
        /// From 1.
        line: u64,
        /// What was expected.
        reason: String,
    },
    /// No setting has this name.
    #[error("{origin}: unknown key {key:?}{}", nearest.as_ref().map(|it| format!("; the nearest is {it:?}")).unwrap_or_default())]
    UnknownKey {
        /// File or variable.
        origin: String,
        /// The key.
        key: String,
        /// A key that looks like it.
        nearest: Option<String>,
    },
    /// A value that the setting does not take.
    #[error("{origin}: {key}: {value:?}: {reason}")]
    Value {
        /// File or variable.
        origin: String,
        /// The setting.
        key: String,
        /// What was written.
        value: String,
        /// What would be right.
        reason: String,
    },
}

impl Sources {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let text =
            |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self {
            arguments: std::env::args_os().collect(),
            environment: std::env::vars_os().filter_map(text).collect(),
        }
    }
}

impl Default for Program {
    fn default() -> Self {
        Self { layers: |_| Ok(Vec::new()), secrets: &[] }
    }
}

/// Reads the settings of a program.
///
/// # Errors
/// Mistakes of the command line as clap words them; otherwise all that can be told apart, at most [`MAX_ERRORS`].
pub fn load<C: CommandFactory + FromArgMatches>(
    sources: &Sources,
    program: Program,
) -> Result<Loaded<C>, LoadError> {
    let mut command = C::command();
    command.build();
    let bare = without_variables(C::command());
    // Help, and what is right of the command line; what is wrong is reported by the last reading.
    let given =
        bare.clone().ignore_errors(true).try_get_matches_from(&sources.arguments).map_err(|error| {
            LoadError::Usage(C::command().try_get_matches_from(&sources.arguments).err().unwrap_or(error))
        })?;
    let settings = Settings::of(&command, &given);
    let written = settings.written(sources, program).map_err(LoadError::Config)?;
    settings.check(&bare, sources, &written).map_err(LoadError::Config)?;
    let mut arguments = sources.arguments.clone();
    arguments.extend(written.iter().flat_map(Written::arguments));
    let matches = bare.try_get_matches_from(arguments).map_err(LoadError::Usage)?;
    let effective = settings.effective(&matches, &written, program.secrets);
    let settings = C::from_arg_matches(&matches).map_err(LoadError::Usage)?;
    Ok(Loaded { settings, effective })
}

/// Variables are read here, not by clap, which would not say that it was a variable that is wrong.
fn without_variables(command: Command) -> Command {
    let command = command.mut_args(|arg| arg.env(Resettable::Reset));
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, without_variables))
}

/// The settings of the program or the subcommand that was called.
struct Settings<'a> {
    /// With a flag each.
    arguments: Vec<&'a Arg>,
    /// What the command line says.
    given: &'a ArgMatches,
    /// Subcommands called, the outermost first.
    path: Vec<String>,
}

/// A setting found outside the command line.
struct Written<'a> {
    argument: &'a Arg,
    values: Vec<String>,
    origin: String,
}

impl<'a> Settings<'a> {
    fn of(mut command: &'a Command, mut given: &'a ArgMatches) -> Self {
        let mut path = Vec::new();
        while let Some((name, below)) = given.subcommand() {
            let Some(called) = command.find_subcommand(name) else { break };
            path.push(name.to_owned());
            (command, given) = (called, below);
        }
        let is_setting =
            |arg: &&Arg| arg.get_long().is_some() && !NOT_SETTINGS.contains(&arg.get_id().as_str());
        Self { arguments: command.get_arguments().filter(is_setting).collect(), given, path }
    }

    fn on_command_line(&self, argument: &Arg) -> bool {
        self.given.value_source(argument.get_id().as_str()) == Some(ValueSource::CommandLine)
    }

    /// What the highest place outside the command line says, for what the command line does not.
    fn written(&self, sources: &Sources, program: Program) -> Result<Vec<Written<'a>>, ConfigErrors> {
        let mut layers = (program.layers)(&sources.environment)?;
        if let Some(path) = self.file(sources) {
            let layer = file::read(&path).map_err(|error| ConfigErrors(vec![error]))?;
            self.refuse_unknown(&layer)?;
            layers.push(layer);
        }
        let open = self.arguments.iter().filter(|argument| !self.on_command_line(argument));
        let found = open.filter_map(|argument| {
            let (origin, values) = variable(argument, &sources.environment).or_else(|| {
                let name = long(argument);
                layers.iter().find_map(|layer| {
                    let (_, values) = layer.entries.iter().find(|(key, _)| key == name)?;
                    Some((layer.origin.clone(), values.clone()))
                })
            })?;
            Some(Written { argument, values, origin })
        });
        Ok(found.collect())
    }

    fn file(&self, sources: &Sources) -> Option<PathBuf> {
        if let Ok(Some(path)) = self.given.try_get_one::<PathBuf>(FILE_ARGUMENT) {
            return Some(path.clone());
        }
        sources.environment.get(FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
    }

    fn refuse_unknown(&self, layer: &Layer) -> Result<(), ConfigErrors> {
        let known = || self.arguments.iter().map(|argument| long(argument));
        let unknown = layer.entries.iter().filter(|(key, _)| !known().any(|name| name == key));
        let error = |(key, _): &(String, Vec<String>)| ConfigError::UnknownKey {
            origin: layer.origin.clone(),
            key: key.clone(),
            nearest: nearest(key, known()),
        };
        none(unknown.map(error).take(MAX_ERRORS).collect())
    }

    /// Each value by itself, so that every wrong one is reported, with its place.
    fn check(&self, bare: &Command, sources: &Sources, written: &[Written<'_>]) -> Result<(), ConfigErrors> {
        let wrong = written.iter().filter_map(|written| {
            let program = sources.arguments.first().cloned().unwrap_or_default();
            let path = self.path.iter().map(OsString::from);
            let arguments = std::iter::once(program).chain(path).chain(written.arguments());
            written.judge(bare.clone().try_get_matches_from(arguments).err())
        });
        none(wrong.take(MAX_ERRORS).collect())
    }

    fn effective(&self, matches: &ArgMatches, written: &[Written<'_>], secrets: &[&str]) -> Effective {
        let mut matches = matches;
        while let Some((_, below)) = matches.subcommand() {
            matches = below;
        }
        let show = |argument: &&Arg| {
            let raw = matches.get_raw(argument.get_id().as_str()).into_iter().flatten();
            let name = long(argument).to_owned();
            let secret = secrets.contains(&name.as_str());
            let values = raw.map(|value| {
                let value = value.to_string_lossy();
                match value.split_once('=') {
                    Some((key, _)) if secret => format!("{key}=(hidden)"),
                    _ => value.into_owned(),
                }
            });
            let from = match written.iter().find(|written| long(written.argument) == name) {
                Some(written) => written.origin.clone(),
                None if self.on_command_line(argument) => "command line".to_owned(),
                None => "default".to_owned(),
            };
            Setting { values: values.collect(), name, from }
        };
        Effective(self.arguments.iter().map(show).collect())
    }
}

impl Written<'_> {
    /// As the command line would say it.
    fn arguments(&self) -> Vec<OsString> {
        let name = long(self.argument);
        if matches!(self.argument.get_action(), ArgAction::SetTrue) {
            let flag = |value: &String| (value == "true").then(|| format!("--{name}").into());
            return self.values.iter().filter_map(flag).collect();
        }
        self.values.iter().map(|value| format!("--{name}={value}").into()).collect()
    }

    /// What is wrong with the value, if that is what clap found wrong: that others are missing is to be expected.
    fn judge(&self, error: Option<clap::Error>) -> Option<ConfigError> {
        let value = self.values.join(",");
        let reason = if matches!(self.argument.get_action(), ArgAction::SetTrue) {
            let is_bool = |value: &String| value == "true" || value == "false";
            (self.values.len() != 1 || !self.values.iter().all(is_bool))
                .then(|| "want true or false".to_owned())?
        } else {
            let error = error?;
            match error.kind() {
                ErrorKind::ArgumentConflict => "one value is enough".to_owned(),
                ErrorKind::ValueValidation | ErrorKind::InvalidValue | ErrorKind::InvalidUtf8 => {
                    reason(&error)
                }
                _ => return None,
            }
        };
        Some(ConfigError::Value {
            origin: self.origin.clone(),
            key: long(self.argument).to_owned(),
            value,
            reason,
        })
    }
}

fn long(argument: &Arg) -> &str {
    argument.get_long().unwrap_or_else(|| argument.get_id().as_str())
}

fn variable(argument: &Arg, environment: &Environment) -> Option<(String, Vec<String>)> {
    let name = argument.get_env()?.to_str()?;
    let value = environment.get(name).filter(|value| !value.is_empty())?;
    Some((format!("variable {name}"), vec![value.clone()]))
}

/// What clap says about a value, without the flag and the value that are shown anyway.
fn reason(error: &clap::Error) -> String {
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) if !valid.is_empty() => {
            format!("want one of {}", valid.join(", "))
        }
        _ => match std::error::Error::source(error) {
            Some(cause) => cause.to_string(),
            None => "not a value of this setting".to_owned(),
        },
    }
}

/// The known name that `key` most looks like; case and separators do not count.
pub fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let plain = |text: &str| text.replace(['-', '_'], "").to_ascii_lowercase();
    let wanted = plain(key);
    let scored = known.map(|name| (strsim::jaro(&wanted, &plain(name)), name));
    let (score, name) = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (score >= ALIKE).then(|| name.to_owned())
}

fn none(errors: Vec<ConfigError>) -> Result<(), ConfigErrors> {
    if errors.is_empty() { Ok(()) } else { Err(ConfigErrors(errors)) }
}

impl LoadError {
    /// Tells the person who started the program, and gives the code to end with: 0 for help, 2 for mistakes.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        match self {
            Self::Usage(error) => {
                let _ = error.print();
                u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
            }
            Self::Config(errors) => {
                eprintln!("{errors}");
                ExitCode::from(2)
            }
        }
    }
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
#[path = "config_tests.rs"]
mod tests;
