//! The chart's values: values.yaml, its schema and the page that lists them name the same keys, and each has a comment.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

const VALUES: &str = "helm/culvert/values.yaml";
const SCHEMA: &str = "helm/culvert/values.schema.json";
const PAGE: &str = "docs/reference/values.md";

/// Helm's own key, which a parent chart may set.
const OF_HELM: &str = "global";

/// Keys that one of the three lacks, keys without a comment, and a schema that takes any key.
///
/// # Errors
/// If one of them cannot be read.
pub fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let read = |file: &str| fs::read_to_string(root.join(file)).with_context(|| file.to_owned());
    let (keys, mut problems) = of_values(&read(VALUES)?);
    let schema: Value = serde_json::from_str(&read(SCHEMA)?).context(SCHEMA)?;
    let others = [(SCHEMA, of_schema(&schema, &mut problems)), (PAGE, of_page(&read(PAGE)?))];
    for (file, theirs) in others {
        problems.extend(keys.difference(&theirs).map(|key| format!("{file}: {key} of {VALUES} is missing")));
        problems.extend(theirs.difference(&keys).map(|key| format!("{file}: {key} is not in {VALUES}")));
    }
    Ok(problems)
}

/// Keys of the second level, `group.key`, by their indentation.
fn of_values(text: &str) -> (BTreeSet<String>, Vec<String>) {
    let (mut keys, mut problems) = (BTreeSet::new(), Vec::new());
    let (mut group, mut before) = ("", "");
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        if let Some((key, _)) = line.trim_start().split_once(':')
            && indent <= 2
            && !line.trim_start().starts_with('#')
        {
            if !before.trim_start().starts_with('#') {
                problems.push(format!("{VALUES}: {key} has no comment"));
            }
            if indent == 0 {
                group = key;
            } else {
                keys.insert(format!("{group}.{key}"));
            }
        }
        before = line;
    }
    (keys, problems)
}

fn of_schema(schema: &Value, problems: &mut Vec<String>) -> BTreeSet<String> {
    let properties = |value: &Value| value["properties"].as_object().cloned().unwrap_or_default();
    let mut keys = BTreeSet::new();
    let mut closed = |name: &str, value: &Value| {
        if value["additionalProperties"] != Value::Bool(false) {
            problems.push(format!("{SCHEMA}: {name} takes unknown keys"));
        }
    };
    closed("the whole", schema);
    for (group, value) in properties(schema) {
        if group != OF_HELM {
            closed(&group, &value);
            keys.extend(properties(&value).keys().map(|key| format!("{group}.{key}")));
        }
    }
    keys
}

/// Rows of tables that begin with a key in backticks.
fn of_page(text: &str) -> BTreeSet<String> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|rest| Some(rest.split_once('`')?.0.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_the_chart_agree() {
        assert_eq!(check(&crate::root()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn what_differs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(VALUES, "# A.\na:\n  # B.\n  b: 1\n  c:\n    deep: 1\n");
        write(
            SCHEMA,
            r#"{"additionalProperties":false,"properties":{"global":{},"a":{"properties":{"b":{},"d":{}}}}}"#,
        );
        write(PAGE, "| key |\n| `a.b` | text |\n| `a.c` | text |\n");
        assert_eq!(
            check(dir.path()).unwrap(),
            [
                "helm/culvert/values.yaml: c has no comment",
                "helm/culvert/values.schema.json: a takes unknown keys",
                "helm/culvert/values.schema.json: a.c of helm/culvert/values.yaml is missing",
                "helm/culvert/values.schema.json: a.d is not in helm/culvert/values.yaml",
            ]
        );
    }
}
