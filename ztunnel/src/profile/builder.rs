//! pprof's `profile.proto`: the messages, and what puts one together.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

/// A profile.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Profile {
    #[prost(message, repeated, tag = "1")]
    pub sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    pub sample: Vec<Sample>,
    #[prost(message, repeated, tag = "4")]
    pub location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    pub function: Vec<Function>,
    /// Everything else refers to texts by their places here; the first is empty.
    #[prost(string, repeated, tag = "6")]
    pub string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    pub time_nanos: i64,
    #[prost(int64, tag = "10")]
    pub duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    pub period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    pub period: i64,
}

/// What a number counts, and in what.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ValueType {
    #[prost(int64, tag = "1")]
    pub r#type: i64,
    #[prost(int64, tag = "2")]
    pub unit: i64,
}

/// A stack, the innermost first, and its numbers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    pub location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    pub value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    pub label: Vec<Label>,
}

/// A text about a sample.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Label {
    #[prost(int64, tag = "1")]
    pub key: i64,
    #[prost(int64, tag = "2")]
    pub str: i64,
}

/// An address in the program.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Location {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(uint64, tag = "3")]
    pub address: u64,
    #[prost(message, repeated, tag = "4")]
    pub line: Vec<Line>,
}

/// A function at a location; several where some are inlined, the innermost first.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Line {
    #[prost(uint64, tag = "1")]
    pub function_id: u64,
    #[prost(int64, tag = "2")]
    pub line: i64,
}

/// A function.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Function {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(int64, tag = "2")]
    pub name: i64,
    /// Field 3, the name before it was demangled, is left out: a name that equals it is taken for mangled, and maimed.
    #[prost(int64, tag = "4")]
    pub filename: i64,
}

/// One function of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Its name, demangled.
    pub function: String,
    /// Its file, empty if not known.
    pub file: String,
    /// The line that is executed, 0 if not known.
    pub line: u32,
}

/// Puts a profile together, each text, function and location once.
pub struct Builder {
    profile: Profile,
    texts: HashMap<String, i64>,
    functions: HashMap<(i64, i64), u64>,
    locations: HashMap<(u64, Vec<Frame>), u64>,
}

impl Builder {
    /// For samples with these numbers.
    pub fn new(sample_types: &[(&str, &str)]) -> Self {
        let mut builder = Self {
            profile: Profile::default(),
            texts: HashMap::new(),
            functions: HashMap::new(),
            locations: HashMap::new(),
        };
        builder.text("");
        let types = sample_types.iter().map(|it| builder.value_type(it.0, it.1)).collect();
        builder.profile.sample_type = types;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        builder.profile.time_nanos = nanos(now);
        builder
    }

    /// How far samples are apart.
    pub fn period(&mut self, kind: &str, unit: &str, period: i64) {
        self.profile.period_type = Some(self.value_type(kind, unit));
        self.profile.period = period;
    }

    /// How long it was sampled.
    pub fn duration(&mut self, duration: Duration) {
        self.profile.duration_nanos = nanos(duration);
    }

    /// The id of a location; `address` 0 if it is not known.
    pub fn location(&mut self, address: u64, frames: Vec<Frame>) -> u64 {
        if let Some(id) = self.locations.get(&(address, frames.clone())) {
            return *id;
        }
        let id = self.profile.location.len() as u64 + 1;
        let lines = frames
            .iter()
            .map(|frame| Line { function_id: self.function(frame), line: i64::from(frame.line) })
            .collect();
        self.profile.location.push(Location { id, address, line: lines });
        self.locations.insert((address, frames), id);
        id
    }

    /// Adds a stack, with a label unless its value is empty.
    pub fn sample(&mut self, location_id: Vec<u64>, value: Vec<i64>, (key, text): (&str, &str)) {
        let label = if text.is_empty() {
            Vec::new()
        } else {
            vec![Label { key: self.text(key), str: self.text(text) }]
        };
        self.profile.sample.push(Sample { location_id, value, label });
    }

    /// The profile.
    pub fn finish(self) -> Profile {
        self.profile
    }

    fn function(&mut self, frame: &Frame) -> u64 {
        let (name, filename) = (self.text(&frame.function), self.text(&frame.file));
        let functions = &mut self.profile.function;
        *self.functions.entry((name, filename)).or_insert_with(|| {
            let id = functions.len() as u64 + 1;
            functions.push(Function { id, name, filename });
            id
        })
    }

    fn value_type(&mut self, kind: &str, unit: &str) -> ValueType {
        ValueType { r#type: self.text(kind), unit: self.text(unit) }
    }

    fn text(&mut self, text: &str) -> i64 {
        if let Some(place) = self.texts.get(text) {
            return *place;
        }
        let place = i64::try_from(self.texts.len()).unwrap_or(i64::MAX);
        self.texts.insert(text.to_owned(), place);
        self.profile.string_table.push(text.to_owned());
        place
    }
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}
