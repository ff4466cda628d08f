//! Which namespaces the mesh is about (D30).

use std::collections::BTreeSet;
use std::str::FromStr;

use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::network_policy::{LabelSelector, Requirement};

/// A selector of namespaces by their labels, written as `kubectl get -l` takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceSelector(LabelSelector);

/// Why a text is no selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no label selector: want KEY, !KEY, KEY=VALUE, KEY!=VALUE, KEY in (A,B) or KEY notin (A,B), joined by commas"
)]
pub struct SelectorError(String);

/// The namespaces that are read.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// One of them has to match; without any, every namespace does.
    selectors: Vec<NamespaceSelector>,
    /// Whatever their labels.
    always: BTreeSet<String>,
}

impl Selection {
    /// Namespaces that one of `selectors` matches, and those of `always`.
    pub fn new(selectors: Vec<NamespaceSelector>, always: impl IntoIterator<Item = String>) -> Self {
        Self { selectors, always: always.into_iter().collect() }
    }

    /// Whether there is nothing to ask: every namespace is read.
    pub fn is_everything(&self) -> bool {
        self.selectors.is_empty()
    }

    /// Whether a namespace with these labels is read; `None` while nothing is known of it.
    pub fn has(&self, namespace: &str, labels: Option<&StringMap>) -> bool {
        let matches = |labels| self.selectors.iter().any(|it| it.0.matches(labels));
        self.is_everything() || self.always.contains(namespace) || labels.is_some_and(matches)
    }
}

impl FromStr for NamespaceSelector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let wrong = || SelectorError(text.to_owned());
        let mut selector = LabelSelector::default();
        for part in parts(text) {
            selector.match_expressions.push(requirement(part.trim()).ok_or_else(wrong)?);
        }
        if selector.match_expressions.is_empty() { Err(wrong()) } else { Ok(Self(selector)) }
    }
}

/// Split at commas outside of parentheses.
fn parts(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut from) = (Vec::new(), 0_usize, 0);
    for (at, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[from..]);
    parts
}

fn requirement(text: &str) -> Option<Requirement> {
    let make = |key: &str, operator: &str, values: &[&str]| {
        let (key, values): (&str, Vec<&str>) = (key.trim(), values.iter().map(|it| it.trim()).collect());
        let good = is_key(key) && values.iter().all(|it| is_value(it));
        let values = values.into_iter().map(str::to_owned).collect();
        good.then(|| Requirement { key: key.to_owned(), operator: operator.to_owned(), values })
    };
    if let Some(list) = text.strip_suffix(')') {
        let (left, list) = list.split_once('(')?;
        let (key, operator) = left.trim().rsplit_once(char::is_whitespace)?;
        let operator = match operator {
            "in" => "In",
            "notin" => "NotIn",
            _ => return None,
        };
        return make(key, operator, &list.split(',').collect::<Vec<_>>());
    }
    if let Some((key, value)) = text.split_once("!=") {
        return make(key, "NotIn", &[value]);
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return make(key, "In", &[value]);
    }
    match text.strip_prefix('!') {
        Some(key) => make(key, "DoesNotExist", &[]),
        None => make(text, "Exists", &[]),
    }
}

fn is_key(text: &str) -> bool {
    let name = text.rsplit('/').next().unwrap_or_default();
    !name.is_empty() && text.matches('/').count() <= 1 && text.chars().all(|it| it == '/' || is_part(it))
}

fn is_value(text: &str) -> bool {
    text.len() <= 63 && text.chars().all(is_part)
}

fn is_part(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '_' | '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> StringMap {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// D30.
    #[test]
    fn selectors_are_what_kubectl_takes() {
        for (selector, of_namespace, matches) in [
            ("mesh", "mesh=", true),
            ("mesh", "other=1", false),
            ("!mesh", "other=1", true),
            ("!mesh", "mesh=1", false),
            ("mesh=on", "mesh=on", true),
            ("mesh==on", "mesh=off", false),
            ("mesh != on", "", true),
            ("mesh!=on", "mesh=on", false),
            ("env in (dev, test)", "env=test", true),
            ("env in (dev,test)", "env=prod", false),
            ("env notin (dev,test),mesh", "env=prod,mesh=1", true),
            ("env notin (dev,test),mesh", "env=prod", false),
            ("kubernetes.io/metadata.name=shop", "kubernetes.io/metadata.name=shop", true),
        ] {
            let selection = Selection::new(vec![selector.parse().unwrap()], []);
            assert_eq!(selection.has("n", Some(&labels(of_namespace))), matches, "{selector} {of_namespace}");
        }
        for wrong in ["", ",", "a,", "a b", "a=b=c", "a in b", "a in (b", "a/b/c", "=x", "!", "a near (b)"] {
            let error = wrong.parse::<NamespaceSelector>().unwrap_err();
            assert!(error.to_string().contains("want KEY"), "{wrong}: {error}");
        }
    }

    /// D30: one of several is enough, and some are read whatever their labels.
    #[test]
    fn which_namespaces_are_read() {
        let everything = Selection::default();
        assert!(everything.has("n", None));
        let two = vec!["a=1".parse().unwrap(), "b".parse().unwrap()];
        let some = Selection::new(two, ["istio-system".to_owned()]);
        assert!(some.has("n", Some(&labels("a=1"))) && some.has("n", Some(&labels("b=x"))));
        assert!(!some.has("n", Some(&labels("a=2"))) && !some.has("n", None));
        assert!(some.has("istio-system", None));
    }
}
