//! `-o table|wide|json|yaml`, the same for every command that shows something.

use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

use crate::table::render;

/// How results are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For people with wide screens: more columns.
    Wide,
    /// For programs.
    Json,
    /// The same, for people who read data.
    Yaml,
}

/// The version of what `-o json` and `-o yaml` print. A field that is there stays, with its meaning, until this changes.
pub(crate) const API_VERSION: &str = "culvert.dev/v1";

/// Rows of which some columns are for wide screens only.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// Heading, and whether it is for wide screens only.
    columns: Vec<(&'static str, bool)>,
    rows: Vec<Vec<String>>,
}

/// What a list looks like as data.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct List<T> {
    api_version: &'static str,
    kind: &'static str,
    items: Vec<T>,
}

impl Output {
    /// Data as JSON or YAML; `None` if people are to read a table.
    pub(crate) fn data<T: Serialize>(self, value: &T) -> anyhow::Result<Option<String>> {
        match self {
            Output::Table | Output::Wide => Ok(None),
            Output::Json => Ok(Some(serde_json::to_string_pretty(value)? + "\n")),
            Output::Yaml => yaml(value).map(Some),
        }
    }

    pub(crate) fn is_wide(self) -> bool {
        self == Output::Wide
    }
}

impl<T> List<T> {
    pub(crate) fn new(kind: &'static str, items: Vec<T>) -> Self {
        Self { api_version: API_VERSION, kind, items }
    }
}

impl Table {
    /// `columns` are headings; one that begins with `+` is for wide screens only.
    pub(crate) fn new(columns: &[&'static str]) -> Self {
        let column = |name: &&'static str| name.strip_prefix('+').map_or((*name, false), |name| (name, true));
        Self { columns: columns.iter().map(column).collect(), rows: Vec::new() }
    }

    /// A row; what is empty is shown as `-`.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let dash = |cell: String| if cell.is_empty() { "-".to_owned() } else { cell };
        self.rows.push(cells.into_iter().map(dash).collect());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(crate) fn render(&self, wide: bool) -> String {
        let shown: Vec<usize> = (0..self.columns.len()).filter(|at| wide || !self.columns[*at].1).collect();
        let heading: Vec<&str> = shown.iter().map(|at| self.columns[*at].0).collect();
        let cell = |row: &Vec<String>, at: usize| row.get(at).cloned().unwrap_or_default();
        let rows: Vec<Vec<String>> =
            self.rows.iter().map(|row| shown.iter().map(|at| cell(row, *at)).collect()).collect();
        render(&heading, &rows)
    }
}

/// YAML of any value, as kubectl would print it: what JSON says, in block style.
pub(crate) fn yaml<T: Serialize>(value: &T) -> anyhow::Result<String> {
    // By way of JSON, so that both say the same.
    let mut text = String::new();
    block(&serde_json::to_value(value)?, 0, &mut text);
    Ok(text.trim_start().to_owned() + "\n")
}

/// A value after its key or dash. A text that YAML might take for something else is quoted as in JSON, which is YAML too.
fn block(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                let nested = if value.is_array() { depth } else { depth + 1 };
                text.push_str(&format!("\n{indent}{}:", scalar(key)));
                block(value, nested, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let mut nested = String::new();
                block(item, depth + 1, &mut nested);
                // The first line goes beside the dash.
                text.push_str(&format!("\n{indent}- {}", nested.trim_start()));
            }
        }
        Value::Object(_) => text.push_str(" {}"),
        Value::Array(_) => text.push_str(" []"),
        Value::String(string) => text.push_str(&format!(" {}", scalar(string))),
        other => text.push_str(&format!(" {other}")),
    }
}

/// Plain if it is a word that can be nothing else than text.
fn scalar(text: &str) -> String {
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '_');
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte));
    let other = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    if begins && plain && !other.contains(&text.to_ascii_lowercase().as_str()) {
        return text.to_owned();
    }
    Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What YAML would take for something else (`n`, `1.0`, `2026-01-01`) stays text.
    #[test]
    fn yaml_reads_back_as_it_was() {
        let value = json!({
            "a": "n", "b": "1.0", "c": 1.5, "d": [], "e": {}, "f": null, "g": [{"h": "2026-01-01", "i": "x: y"}],
            "j": "two\nlines", "r": [[1, []], [{}], {"a": [{"b": [], "c": {}}]}], "s": {"t": {"u": [1]}}, "v:": "-", "1": "no",
            "w": "e\u{301}\u{7f}\t\\", "x": [{"y": [{"z": []}]}, []], "k": "- no list", "l": true, "m": "true", "n": "", "o": "'quoted'", "p": "0x10", "q": "~",
        });
        let text = yaml(&value).unwrap();
        let back: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(back, value, "{text}");
    }

    #[test]
    fn columns_for_wide_screens_are_left_out() {
        let mut table = Table::new(&["NAME", "+UID", "NODE"]);
        table.row(["a".to_owned(), "u".to_owned(), String::new()]);
        assert_eq!(table.render(false), "NAME   NODE\na      -\n");
        assert_eq!(table.render(true), "NAME   UID   NODE\na      u     -\n");
    }

    #[test]
    fn a_list_says_what_it_is() {
        let text = Output::Json.data(&List::new("WorkloadList", vec![1])).unwrap().unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value, json!({"apiVersion": "culvert.dev/v1", "kind": "WorkloadList", "items": [1]}));
        assert_eq!(Output::Wide.data(&1).unwrap(), None);
    }
}
