//! How namespaces and paths are compared with what a policy says.

use super::{BadPath, Template, canonical, path};
use crate::Str;
use crate::policy::StringMatch;

/// How a namespace is compared: `*` stands for any characters anywhere, as Istio has it for namespaces alone. The pieces
/// between the stars, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TextPattern(Vec<Str>);

/// How a path is compared. Its texts are normalised as requests are, or they would match none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PathPattern {
    Text(StringMatch),
    Template(Template),
}

/// Why a policy's text is no pattern of paths. It could never match, and whoever wrote it meant something by it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    /// A request with this path would be refused.
    #[error(transparent)]
    Path(#[from] BadPath),
    /// `*` or a brace that is neither `{*}` nor `{**}`.
    #[error("path template {0:?} has * or braces besides {{*}} and {{**}}")]
    Template(String),
    /// It begins with something else than a slash.
    #[error("path {0:?} begins neither with / nor with *, so that no request has it")]
    Relative(String),
}

impl TextPattern {
    pub(crate) fn parse(text: &str) -> Self {
        Self(text.split('*').map(Str::from).collect())
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        let [first, middle @ .., last] = &self.0[..] else {
            return self.0.first().is_some_and(|whole| **whole == *text);
        };
        let Some(mut rest) = text.strip_prefix(&**first) else { return false };
        for piece in middle {
            let Some(at) = rest.find(&**piece) else { return false };
            rest = &rest[at + piece.len()..];
        }
        rest.ends_with(&**last)
    }
}

impl PathPattern {
    pub(crate) fn parse(text: &str) -> Result<Self, BadPattern> {
        if Template::is_meant(text) {
            return Template::parse(text).map(Self::Template);
        }
        let one = if text == "*" {
            StringMatch::Presence
        } else if let Some(end) = text.strip_prefix('*') {
            StringMatch::Suffix(canonical(end)?.into())
        } else if let Some(start) = text.strip_suffix('*') {
            StringMatch::Prefix(prefix(start)?.into())
        } else {
            StringMatch::Exact(path::without_dots(&rooted(text)?)?.into())
        };
        Ok(Self::Text(one))
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        match self {
            Self::Text(StringMatch::Exact(whole)) => **whole == *path,
            Self::Text(StringMatch::Prefix(start)) => path.starts_with(&**start),
            Self::Text(StringMatch::Suffix(end)) => path.ends_with(&**end),
            Self::Text(StringMatch::Presence) => true,
            Self::Template(template) => template.matches(path),
        }
    }
}

/// What follows the last slash is the beginning of a name: `/a/.` begins `/a/.git`.
fn prefix(start: &str) -> Result<String, BadPattern> {
    let start = rooted(start)?;
    let (folders, name) = start.split_at(start.rfind('/').map_or(0, |slash| slash + 1));
    Ok(path::without_dots(folders)? + name)
}

fn rooted(text: &str) -> Result<String, BadPattern> {
    let path = canonical(text)?;
    if path.starts_with('/') { Ok(path) } else { Err(BadPattern::Relative(text.to_owned())) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_star_in_a_namespace_is_anything_anywhere() {
        for (pattern, text, wanted) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("a*", "ab", true),
            ("*b", "ab", true),
            ("a*c", "abc", true),
            ("a*c", "ac", true),
            ("a*a", "a", false),
            ("a*b*b", "ab", false),
            ("*b*", "abc", true),
            ("*b*", "ac", false),
        ] {
            assert_eq!(TextPattern::parse(pattern).matches(text), wanted, "{pattern} {text}");
        }
    }

    #[test]
    fn a_pattern_of_paths_is_normalised_like_a_path() {
        for (pattern, path) in [
            ("/a/../b", "/b"),
            ("/a//b", "/a/b"),
            ("/%61%2fb", "/a/b"),
            ("/a/./b*", "/a/bc"),
            ("/a/.*", "/a/.git"),
            ("/x/..*", "/x/..git"),
            ("/a%3b*", "/a%3Bx"),
            ("*\\b", "/a/b"),
            ("*//b.t%78t", "/a/b.txt"),
            ("/{x}", "/%7Bx%7D"),
            ("/caf\u{e9}", "/caf%C3%A9"),
            ("*", "/a"),
            ("/*", "/"),
        ] {
            assert!(PathPattern::parse(pattern).unwrap().matches(path), "{pattern} {path}");
        }
        for (pattern, path) in [("/a", "/a/"), ("/a*", "/b"), ("*/a", "/b/ab"), ("/{x}", "/x")] {
            assert!(!PathPattern::parse(pattern).unwrap().matches(path), "{pattern} {path}");
        }
    }

    #[test]
    fn what_no_path_has_is_no_pattern() {
        for relative in ["a", "a*", "a/b"] {
            let text = relative.trim_end_matches('*').to_owned();
            assert_eq!(PathPattern::parse(relative), Err(BadPattern::Relative(text)));
        }
        for (bad, byte) in [("/a?b", b'?'), ("/a#b", b'#'), ("*\n", b'\n'), ("/a b*", b' '), ("/%00", 0)] {
            let error = PathPattern::parse(bad).unwrap_err();
            assert_eq!(error, BadPattern::Path(BadPath::Byte { path: bad.trim_matches('*').into(), byte }));
        }
        assert_eq!(PathPattern::parse("/100%*"), Err(BadPattern::Path(BadPath::Escape("/100%".into()))));
        let segment = BadPath::Segment { path: "/..;/a".into(), segment: "..;".into() };
        assert_eq!(PathPattern::parse("/..;/a"), Err(BadPattern::Path(segment)));
    }

    proptest! {
        /// Whatever can be requested can be written in a policy, as it was requested or as it is normalised.
        #[test]
        fn a_path_matches_itself(path in "/[a-b./%2F;\\\\{}é]{0,12}") {
            if let Ok(normal) = crate::request::normalise(&path) {
                prop_assert!(PathPattern::parse(&path).unwrap().matches(normal.path()));
                prop_assert!(PathPattern::parse(normal.path()).unwrap().matches(normal.path()));
            }
        }
    }
}
