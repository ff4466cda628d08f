//! Which regular expressions a waypoint can use: it refuses a whole route for one that it cannot, so that is found out here, where the
//! rule alone is broken by it and the status says so.

use std::collections::HashMap;
use std::sync::LazyLock;

use culvert_k8s_api::routes::{Fault, HttpMatch, HttpRule, PathMatch, Pattern, TextMatch, ValueMatch};
use parking_lot::Mutex;
use regex::RegexBuilder;

/// The largest program that an expression may become, in bytes: as much as a waypoint gives it.
const PROGRAM: usize = 256 << 10;
/// Verdicts that are remembered, each with its expression of at most 4 KiB. Translating again looks at all of them again, and making a
/// program takes some 50 us.
const REMEMBERED: usize = 4_096;

static KNOWN: LazyLock<Mutex<HashMap<String, Option<String>>>> = LazyLock::new(Mutex::default);

/// What is wrong with the expressions of a rule.
pub(super) fn faults(path: &str, rule: &HttpRule) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (index, one) in rule.matches.iter().enumerate() {
        let mut check = |field: String, pattern: &str| {
            if let Some(reason) = wrong(pattern) {
                let reason = format!("is no regular expression that can be used: {reason}");
                let value = pattern.chars().take(120).collect();
                faults.push(Fault { field, value, reason, ..Fault::default() });
            }
        };
        let at = format!("{path}.matches[{index}]");
        match &one.path {
            Some(PathMatch::Regex(Pattern(pattern))) => check(format!("{at}.path.value"), pattern),
            Some(PathMatch::Grpc { service, method, regex: true }) => {
                for (field, pattern) in [("service", service), ("method", method)] {
                    if let Some(pattern) = pattern {
                        check(format!("{at}.method.{field}"), pattern);
                    }
                }
            }
            _ => {}
        }
        for (field, list) in [("headers", &one.headers), ("queryParams", &one.query_params)] {
            for it in list {
                if let TextMatch::Regex(Pattern(pattern)) = &it.value {
                    check(format!("{at}.{field}[{}]", it.name), pattern);
                }
            }
        }
    }
    faults
}

/// The match without what cannot be used of it: it matches more.
pub(super) fn without(it: &HttpMatch) -> HttpMatch {
    let bad = |pattern: &Option<String>| pattern.as_deref().is_some_and(|it| wrong(it).is_some());
    let path = it.path.clone().filter(|path| match path {
        PathMatch::Regex(Pattern(pattern)) => wrong(pattern).is_none(),
        PathMatch::Grpc { service, method, regex } => !regex || !(bad(service) || bad(method)),
        _ => true,
    });
    let good = |it: &&ValueMatch| match &it.value {
        TextMatch::Regex(Pattern(pattern)) => wrong(pattern).is_none(),
        TextMatch::Exact(_) => true,
    };
    HttpMatch {
        path,
        method: it.method.clone(),
        headers: it.headers.iter().filter(good).cloned().collect(),
        query_params: it.query_params.iter().filter(good).cloned().collect(),
    }
}

fn wrong(pattern: &str) -> Option<String> {
    if let Some(known) = KNOWN.lock().get(pattern) {
        return known.clone();
    }
    let build = |text: &str| RegexBuilder::new(text).size_limit(PROGRAM).dfa_size_limit(PROGRAM).build();
    // By itself first: what is wrong must not become right by what is put around it.
    let verdict = build(pattern).and_then(|_| build(&format!("^(?:{pattern})$"))).err().map(|error| {
        // The last line says what is wrong, those before show where.
        error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
    });
    let mut known = KNOWN.lock();
    if known.len() >= REMEMBERED {
        known.clear();
    }
    known.insert(pattern.to_owned(), verdict.clone());
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_expression_is_found_and_left_out() {
        for good in ["a|b", "/c[0-9]+", "(?i)x", "a{1,100}"] {
            assert_eq!(wrong(good), None, "{good}");
        }
        for bad in ["(", "a)(b", "[", "(?P<", "(a{1000}){1000}", "(?=x)"] {
            assert!(wrong(bad).is_some_and(|it| !it.is_empty()), "{bad}");
            assert_eq!(wrong(bad), wrong(bad), "it is the same when it is known");
        }
        let value = |name: &str, pattern: &str| ValueMatch {
            name: name.to_owned(),
            value: TextMatch::Regex(Pattern(pattern.to_owned())),
        };
        let one = HttpMatch {
            path: Some(PathMatch::Regex(Pattern("(".to_owned()))),
            method: Some("GET".to_owned()),
            headers: vec![value("a", "x.*"), value("b", "[")],
            query_params: Vec::new(),
        };
        let rule = HttpRule { matches: vec![one.clone()], ..HttpRule::default() };
        let fields: Vec<String> = faults("spec.rules[0]", &rule).into_iter().map(|it| it.field).collect();
        assert_eq!(fields, ["spec.rules[0].matches[0].path.value", "spec.rules[0].matches[0].headers[b]"]);
        let left = without(&one);
        assert_eq!((left.path, left.method.as_deref(), left.headers.len()), (None, Some("GET"), 1));
    }
}
