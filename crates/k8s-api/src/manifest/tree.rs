//! A document as a tree that remembers lines, so that what is wrong with a field can be said with its place.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Options, Spanned};

/// Depth of nesting. The deepest mesh field is at 10; a pod's at about 12.
const MAX_DEPTH: usize = 64;
/// Nodes of one file: a 4 MiB file of two-byte items stays under it, what aliases add does not.
const MAX_NODES: usize = 2_000_000;
/// Events that aliases may add to one file. People use anchors to share a label map, not a tree.
const MAX_REPLAYED: usize = 10_000;
/// Documents in one file.
const MAX_DOCUMENTS: usize = 10_000;

/// A value and the line, from 1, on which it (or its key) starts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub line: u32,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Str(String),
    Seq(Vec<Node>),
    Map(Vec<(String, Node)>),
    /// Never outside of this file: a word that the library took for no finite number, by its bytes in the text.
    Word(std::ops::Range<usize>),
}

/// Not YAML, or too much of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub line: u32,
    pub reason: String,
}

/// The documents of a file, empty ones left out. JSON is read the same way: it is YAML.
pub(crate) fn parse(text: &str) -> Result<Vec<Node>, SyntaxError> {
    let mut documents: Vec<Node> =
        serde_saphyr::from_multiple_with_options(text, options()).map_err(|error| {
            let line =
                error.location().map_or(1, |location| u32::try_from(location.line()).unwrap_or(u32::MAX));
            let rendered = error.without_snippet().to_string();
            let reason = rendered.lines().next().unwrap_or("not YAML").to_owned();
            SyntaxError { line: line.max(1), reason }
        })?;
    documents.iter_mut().for_each(|document| document.spell_out(text));
    Ok(documents)
}

fn options() -> Options {
    let mut options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_events: MAX_NODES * 2,
            max_nodes: MAX_NODES,
            max_documents: MAX_DOCUMENTS,
            max_anchors: 1_000,
            max_aliases: 1_000,
        },
        // `yes` and `on` stay text: as in YAML 1.2, and a boolean field refuses them by name.
        strict_booleans: true,
        with_snippet: false,
    };
    #[allow(deprecated, reason = "the fields are public and the macro does not reach nested ones")]
    {
        options.alias_limits.max_total_replayed_events = MAX_REPLAYED;
        options.alias_limits.max_replay_stack_depth = 8;
    }
    options
}

impl Node {
    /// The entry of a map.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// A tree without lines. As deep as the JSON, which its reader bounds (at 128).
    pub fn from_json(value: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let value = match value {
            Json::Null => Value::Null,
            Json::Bool(it) => Value::Bool(*it),
            Json::Number(it) => match (it.as_u64(), it.as_i64()) {
                (Some(it), _) => Value::Unsigned(it),
                (None, Some(it)) => Value::Signed(it),
                (None, None) => Value::Float(it.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(it) => Value::Str(it.clone()),
            Json::Array(items) => Value::Seq(items.iter().map(Self::from_json).collect()),
            Json::Object(entries) => {
                Value::Map(entries.iter().map(|(key, it)| (key.clone(), Self::from_json(it))).collect())
            }
        };
        Self { line: 0, value }
    }

    /// The same as JSON; a number that is none becomes null.
    pub fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null | Value::Word(_) => serde_json::Value::Null,
            Value::Bool(it) => (*it).into(),
            Value::Unsigned(it) => (*it).into(),
            Value::Signed(it) => (*it).into(),
            Value::Float(it) => (*it).into(),
            Value::Str(it) => it.as_str().into(),
            Value::Seq(items) => items.iter().map(Self::to_json).collect(),
            Value::Map(entries) => entries
                .iter()
                .map(|(key, it)| (key.clone(), it.to_json()))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }

    /// Text at a key, if it is text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.value {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The line of the deepest part of `path` that exists (`spec.rules[0].to`, keys with dots as `["a.b/c"]`).
    pub fn line_of(&self, path: &str) -> u32 {
        let mut at = self;
        for segment in segments(path) {
            let next = match (&at.value, segment) {
                (Value::Map(_), Segment::Key(key)) => at.get(key),
                (Value::Seq(items), Segment::Index(index)) => items.get(index),
                _ => None,
            };
            match next {
                Some(next) => at = next,
                None => break,
            }
        }
        at.line
    }
}

impl Node {
    fn spell_out(&mut self, text: &str) {
        match &mut self.value {
            Value::Word(bytes) => {
                let word = text.get(bytes.clone()).unwrap_or_default().trim().trim_matches(['"', '\'']);
                self.value = Value::Str(word.to_owned());
            }
            Value::Seq(items) => items.iter_mut().for_each(|item| item.spell_out(text)),
            Value::Map(entries) => entries.iter_mut().for_each(|(_, entry)| entry.spell_out(text)),
            _ => {}
        }
    }
}

enum Segment<'a> {
    Key(&'a str),
    Index(usize),
}

fn segments(path: &str) -> impl Iterator<Item = Segment<'_>> {
    let mut rest = path;
    std::iter::from_fn(move || {
        rest = rest.strip_prefix('.').unwrap_or(rest);
        if let Some(quoted) = rest.strip_prefix("[\"") {
            let (key, after) = quoted.split_once("\"]")?;
            rest = after;
            return Some(Segment::Key(key));
        }
        if let Some(indexed) = rest.strip_prefix('[') {
            let (index, after) = indexed.split_once(']')?;
            rest = after;
            return index.parse().ok().map(Segment::Index);
        }
        let end = rest.find(['.', '[']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(end);
        rest = after;
        (!key.is_empty()).then_some(Segment::Key(key))
    })
}

/// A map's key as it appears in a path.
pub(crate) fn path_key(key: &str) -> String {
    if key.contains(['.', '/', '[', ' ']) || key.is_empty() { format!("[\"{key}\"]") } else { key.to_owned() }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        let line = u32::try_from(spanned.referenced.line()).unwrap_or(u32::MAX);
        let value = match spanned.value {
            // `sleep infinity` and `name: nan` are words in Kubernetes: JSON has no such numbers. The library hands them
            // over in YAML's canonical spelling.
            Value::Str(word) if [".inf", "-.inf", ".nan"].contains(&word.as_str()) => {
                let span = spanned.referenced.span();
                let at = usize::try_from(span.byte_offset().unwrap_or(0)).unwrap_or(usize::MAX);
                let length = usize::try_from(span.byte_len().unwrap_or(0)).unwrap_or(usize::MAX);
                Value::Word(at..at.saturating_add(length))
            }
            value => value,
        };
        Ok(Self { line, value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Signed(value), Value::Unsigned))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Str(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Str(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Seq(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let mut node: Node = map.next_value()?;
            // The line of the key: where a person looks, and where a block value begins.
            node.line = u32::try_from(key.referenced.line()).unwrap_or(node.line);
            entries.push((key.value, node));
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_sound_like_numbers_are_words() {
        let documents =
            parse("# ä\ncommand: [sleep, infinity, nan]\nrest: Infinity\n---\ninf: -inf\n").unwrap();
        let Value::Map(map) = &documents[0].value else { panic!("{documents:?}") };
        let Value::Seq(words) = &map[0].1.value else { panic!("{documents:?}") };
        let words: Vec<_> = words.iter().map(|word| word.value.clone()).collect();
        assert_eq!(words, ["sleep", "infinity", "nan"].map(|word| Value::Str(word.to_owned())));
        assert_eq!(map[1].1.value, Value::Str("Infinity".to_owned()));
        let Value::Map(map) = &documents[1].value else { panic!("{documents:?}") };
        assert_eq!(map[0].1.value, Value::Str("-inf".to_owned()));
    }

    #[test]
    fn lines_and_types() {
        let nodes =
            parse("# c\na: 1\nb:\n  - x\n  - y: \"2\"\n---\n---\nc: {d: [true, null, -3, 1.5]}\n").unwrap();
        assert_eq!(nodes.len(), 2);
        let first = &nodes[0];
        assert_eq!(first.line_of("a"), 2);
        assert_eq!(first.line_of("b"), 3);
        assert_eq!(first.line_of("b[0]"), 4);
        assert_eq!(first.line_of("b[1].y"), 5);
        assert_eq!(first.line_of("b[1].nothing.here"), 5);
        assert_eq!(first.get("b").unwrap().value, {
            let y = Node { line: 5, value: Value::Str("2".into()) };
            Value::Seq(vec![
                Node { line: 4, value: Value::Str("x".into()) },
                Node { line: 5, value: Value::Map(vec![("y".into(), y)]) },
            ])
        });
        assert_eq!(nodes[1].line_of("c.d[3]"), 8);
        let Value::Seq(items) = &nodes[1].get("c").unwrap().get("d").unwrap().value else { panic!() };
        let kinds: Vec<&Value> = items.iter().map(|node| &node.value).collect();
        assert_eq!(kinds, [&Value::Bool(true), &Value::Null, &Value::Signed(-3), &Value::Float(1.5)]);
    }

    #[test]
    fn dotted_keys_are_found() {
        let nodes = parse("metadata:\n  labels:\n    istio.io/x: y\n").unwrap();
        let path = format!("metadata.labels{}", path_key("istio.io/x"));
        assert_eq!(nodes[0].line_of(&path), 3);
    }

    #[test]
    fn json_is_yaml() {
        let nodes = parse("{\n\t\"a\": [\"b\", 3],\n\t\"c\": {\"d\": \"e\"}\n}\n").unwrap();
        assert_eq!(nodes[0].get("c").unwrap().text("d"), Some("e"));
    }

    #[test]
    fn bombs_and_broken_text_are_refused() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for level in 1..9 {
            let previous = format!("*a{}", level - 1);
            bomb += &format!("a{level}: &a{level} [{}]\n", [previous.as_str(); 10].join(","));
        }
        assert!(parse(&bomb).is_err());
        assert!(parse(&"[".repeat(100)).is_err());
        assert!(parse(&("a: ".to_owned() + &"[".repeat(70) + &"]".repeat(70))).is_err());
        assert_eq!(parse("a: 1\nb: [1\nc: 2\n").unwrap_err().line, 3);
        assert_eq!(parse("a: 1\na: 2\n").unwrap_err().line, 2);
    }
}
