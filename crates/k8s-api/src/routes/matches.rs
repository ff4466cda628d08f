//! What requests a rule is for. Part by part: what cannot be read of a match is left out, so that the match is wider.

use super::raw::{Matching, PathMatching, RawMethod, RawPathMatch, RawValue};
use super::read::{FEW, Reader};
use super::values::{Pattern, is_path, is_value};
use super::{HttpMatch, PathMatch, TextMatch, ValueMatch};
use crate::manifest::tree::Node;

impl Reader {
    pub fn http_match(&mut self, path: &str, node: &Node) -> HttpMatch {
        self.known(path, node, &["path", "method", "headers", "queryParams"]);
        HttpMatch {
            path: node.get("path").and_then(|node| self.path_match(&format!("{path}.path"), node)),
            method: node.get("method").and_then(|node| self.method(&format!("{path}.method"), node)),
            headers: self.values(path, "headers", node),
            query_params: self.values(path, "queryParams", node),
        }
    }

    pub fn grpc_match(&mut self, path: &str, node: &Node) -> HttpMatch {
        self.known(path, node, &["method", "headers"]);
        let at = format!("{path}.method");
        let method = node.get("method").and_then(|node| self.grpc_method(&at, node));
        HttpMatch { path: method, headers: self.values(path, "headers", node), ..HttpMatch::default() }
    }

    fn grpc_method(&mut self, path: &str, node: &Node) -> Option<PathMatch> {
        let raw = self.take::<RawMethod>(path, node)?;
        let regex = matches!(raw.type_, Matching::RegularExpression);
        // A name of protobuf's, with its package: `/` would reach into the other part.
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
        let given = [("service", &raw.service), ("method", &raw.method)];
        for (field, value) in given {
            let Some(value) = value else { continue };
            if value.is_empty() || value.len() > 1024 || !regex && !plain(value) {
                let expected = "at most 1024 letters, digits, _ and .";
                self.wrong(node, &format!("{path}.{field}"), value, "invalid value", expected);
                return None;
            }
        }
        if raw.service.is_none() && raw.method.is_none() {
            self.wrong(node, path, "", "has neither service nor method", "at least one");
            return None;
        }
        Some(PathMatch::Grpc { service: raw.service, method: raw.method, regex })
    }

    fn path_match(&mut self, path: &str, node: &Node) -> Option<PathMatch> {
        let raw = self.take::<RawPathMatch>(path, node)?;
        let regex = matches!(raw.type_, PathMatching::RegularExpression);
        let good = if regex { !raw.value.is_empty() && raw.value.len() <= 1024 } else { is_path(&raw.value) };
        if !good {
            let expected = if regex {
                "a regular expression of at most 1024 characters"
            } else {
                "a path that begins with /, without // and parts of dots"
            };
            self.wrong(node, &format!("{path}.value"), &raw.value, "invalid value", expected);
            return None;
        }
        Some(match raw.type_ {
            PathMatching::Exact => PathMatch::Exact(raw.value),
            PathMatching::PathPrefix => PathMatch::Prefix(raw.value),
            PathMatching::RegularExpression => PathMatch::Regex(Pattern(raw.value)),
        })
    }

    fn method(&mut self, path: &str, node: &Node) -> Option<String> {
        const METHODS: [&str; 9] =
            ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
        let method = self.take::<String>(path, node)?;
        if METHODS.contains(&method.as_str()) {
            return Some(method);
        }
        self.wrong(node, path, &method, "unknown value", &format!("one of {}", METHODS.join(", ")));
        None
    }

    fn values(&mut self, path: &str, field: &str, node: &Node) -> Vec<ValueMatch> {
        let list = self.list(&format!("{path}.{field}"), node.get(field), FEW);
        let mut all: Vec<ValueMatch> = Vec::new();
        for (path, node) in list {
            let Some(raw) = self.take::<RawValue>(&path, node) else { continue };
            let header = field == "headers";
            // Of several with one name the first counts: that is what the Gateway API says.
            let same =
                |name: &str| if header { name.eq_ignore_ascii_case(&raw.name.0) } else { name == raw.name.0 };
            if all.iter().any(|it| same(&it.name)) {
                continue;
            }
            let (regex, text) = (matches!(raw.type_, Matching::RegularExpression), raw.value);
            let good =
                if header && !regex { is_value(&text) } else { !text.is_empty() && text.len() <= 4096 };
            if good {
                let value = if regex { TextMatch::Regex(Pattern(text)) } else { TextMatch::Exact(text) };
                all.push(ValueMatch { name: raw.name.0, value });
            } else {
                let expected = "1 to 4096 printable characters, no blank at either end";
                self.wrong(node, &format!("{path}.value"), &text, "invalid value", expected);
            }
        }
        all
    }
}
