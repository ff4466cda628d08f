//! The text of one file, to objects and errors.

use std::collections::HashSet;
use std::sync::Arc;

use super::tree::{self, Node, Value};
use super::{FileError, Manifest, Note};
use crate::object::{DecodeError, Decoded, Object, ObjectKey};

/// Errors reported for one file; a file that is no manifest at all would fill the page otherwise.
const MAX_ERRORS: usize = 50;

const UNENFORCED: &str = "only a waypoint would act on it, and waypoints of this version do not";

/// What a file holds. It is good only if `errors` is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParsedFile {
    /// In the order of its documents; what is good of a bad file is here too, for tools that show it.
    pub objects: Vec<Arc<Manifest>>,
    /// At most 50.
    pub errors: Vec<FileError>,
    /// Documents that are none of ours.
    pub notes: Vec<Note>,
}

/// Reads the text of a file named `file` in errors.
pub fn parse_file(file: &str, text: &str) -> ParsedFile {
    let mut reader = Reader { file: Arc::from(file), out: ParsedFile::default(), seen: HashSet::new() };
    match tree::parse(text) {
        Ok(documents) => {
            for document in &documents {
                reader.document(document);
            }
        }
        Err(error) => reader.error(error.line, "", "", &error.reason, "YAML"),
    }
    reader.out.errors.truncate(MAX_ERRORS);
    reader.out
}

/// Reads one object as the API server gives it, by the rules of [`parse_file`]; `name` stands for the file in errors. There are
/// no lines: all are 0.
pub fn parse_value(name: &str, value: &serde_json::Value) -> ParsedFile {
    let mut reader = Reader { file: Arc::from(name), out: ParsedFile::default(), seen: HashSet::new() };
    reader.document(&Node::from_json(value));
    reader.out.errors.truncate(MAX_ERRORS);
    reader.out
}

/// As [`parse_value`], and of kinds that nothing enforces yet (RequestAuthentication, DestinationRule) says what is wrong with them,
/// or notes that they do nothing: for whoever judges an object before it is stored.
pub fn judge_value(name: &str, value: &serde_json::Value) -> ParsedFile {
    let document = Node::from_json(value);
    let Some(checked) = Object::check_unenforced(&document) else { return parse_value(name, value) };
    let mut reader = Reader { file: Arc::from(name), out: ParsedFile::default(), seen: HashSet::new() };
    reader.decoded(&document, checked.map(|()| Decoded::Ignored(UNENFORCED.to_owned())));
    reader.out
}

struct Reader {
    file: Arc<str>,
    out: ParsedFile,
    seen: HashSet<ObjectKey>,
}

impl Reader {
    fn document(&mut self, document: &Node) {
        if !matches!(document.value, Value::Map(_)) {
            return self.error(document.line, "", "", "is not a map", "a Kubernetes manifest");
        }
        if document.text("apiVersion") == Some("v1") && document.text("kind") == Some("List") {
            return match document.get("items").map(|items| &items.value) {
                Some(Value::Seq(items)) => items.iter().for_each(|item| self.item(item)),
                _ => self.error(document.line_of("items"), "items", "", "is required", "a list of manifests"),
            };
        }
        self.item(document);
    }

    fn item(&mut self, document: &Node) {
        self.decoded(document, Object::decode(document));
    }

    fn decoded(&mut self, document: &Node, decoded: Result<Decoded, DecodeError>) {
        match decoded {
            Ok(Decoded::Object(object)) => self.object(document, object),
            Ok(Decoded::Ignored(text)) => {
                self.out.notes.push(Note { file: self.file.to_string(), line: document.line, text });
            }
            Err(DecodeError::Shape { prefix, error }) => {
                let inner = error.field();
                let joined = prefix.is_empty() || inner.is_empty() || inner.starts_with('[');
                let dot = if joined { "" } else { "." };
                let field = format!("{prefix}{dot}{inner}");
                self.error(error.line, &field, &error.value, &error.reason, &error.expected);
            }
            Err(DecodeError::Invalid(found)) => {
                for invalid in found {
                    let line = document.line_of(&invalid.field);
                    self.error(line, &invalid.field, &invalid.value, &invalid.reason, &invalid.expected);
                }
            }
        }
    }

    fn object(&mut self, document: &Node, object: Object) {
        let key = object.key();
        if self.seen.contains(&key) {
            let reason = format!("{key} is already in this file");
            return self.error(document.line_of("metadata.name"), "metadata.name", &key.name, &reason, "");
        }
        if let Object::Pod(pod) = &object
            && !pod.spec.init_containers.is_empty()
        {
            let text = format!("{key}: init containers run only in Kubernetes");
            let line = document.line_of("spec.initContainers");
            self.out.notes.push(Note { file: self.file.to_string(), line, text });
        }
        if matches!(object, Object::NetworkPolicy(_) | Object::OtherNetworkPolicy(_)) {
            let text = format!(
                "{key}: enforced by a cluster's network alone; here it only keeps pods from being handed over on a node"
            );
            self.out.notes.push(Note { file: self.file.to_string(), line: document.line, text });
        }
        if let Some(route) = object.route() {
            for fault in route.faults().take(MAX_ERRORS) {
                let text = format!("{key}: {fault}: what the rule matches is answered with an error");
                self.out.notes.push(Note {
                    file: self.file.to_string(),
                    line: fault.line.max(document.line),
                    text,
                });
            }
        }
        self.seen.insert(key);
        let manifest = Manifest { file: Arc::clone(&self.file), line: document.line, object };
        self.out.objects.push(Arc::new(manifest));
    }

    fn error(&mut self, line: u32, field: &str, value: &str, reason: &str, expected: &str) {
        // A value is quoted to find it; a page of text would hide it.
        let value = value.chars().take(120).collect();
        self.out.errors.push(FileError {
            file: self.file.to_string(),
            line,
            field: field.to_owned(),
            value,
            reason: reason.to_owned(),
            expected: expected.to_owned(),
        });
    }
}
