//! Paths with `{*}` and `{**}` in them.

use smallvec::{SmallVec, smallvec};

use super::{BadPattern, canonical};

const ONE: &str = "{*}";
const ANY: &str = "{**}";

/// A path in which `{*}` stands for one or more characters of one segment, and `{**}` for any characters, slashes too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template(Vec<Token>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Text(Box<str>),
    One,
    Any,
}

impl Template {
    /// Whether a text is meant as one.
    pub(crate) fn is_meant(text: &str) -> bool {
        text.contains(ONE) || text.contains(ANY)
    }

    /// Reads one.
    pub(crate) fn parse(text: &str) -> Result<Self, BadPattern> {
        if !text.starts_with('/') && !text.starts_with(ANY) {
            return Err(BadPattern::Relative(text.to_owned()));
        }
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.find(['{', '}', '*']).unwrap_or(rest.len());
            let (plain, operator) = rest.split_at(end);
            if !plain.is_empty() {
                tokens.push(Token::Text(canonical(plain)?.into()));
            }
            rest = if let Some(rest) = operator.strip_prefix(ONE) {
                tokens.push(Token::One);
                rest
            } else if let Some(rest) = operator.strip_prefix(ANY) {
                tokens.push(Token::Any);
                rest
            } else if operator.is_empty() {
                operator
            } else {
                return Err(BadPattern::Template(text.to_owned()));
            };
        }
        Ok(Self(tokens))
    }

    /// Whether it describes the whole path. Follows every place where the tokens so far may end at once: time is the path's
    /// length times the template's, whatever is in them.
    pub(crate) fn matches(&self, path: &str) -> bool {
        let path = path.as_bytes();
        let mut ends: SmallVec<[bool; 256]> = smallvec![false; path.len() + 1];
        ends[0] = true;
        for token in &self.0 {
            match token {
                Token::Text(text) => after_text(&mut ends, path, text.as_bytes()),
                Token::One => after_one(&mut ends, path),
                Token::Any => {
                    let first = ends.iter().position(|end| *end).unwrap_or(ends.len());
                    ends[first..].fill(true);
                }
            }
        }
        ends[path.len()]
    }
}

fn after_text(ends: &mut [bool], path: &[u8], text: &[u8]) {
    // From the back, so that nothing is read after it was written: a text moves ends towards the back, and is never empty.
    for end in (0..ends.len()).rev() {
        let start = end.checked_sub(text.len());
        ends[end] = start.is_some_and(|start| ends[start] && path[start..end] == *text);
    }
}

fn after_one(ends: &mut [bool], path: &[u8]) {
    let mut open = false;
    for (at, byte) in path.iter().enumerate() {
        let starts = std::mem::replace(&mut ends[at], open);
        open = (open || starts) && *byte != b'/';
    }
    if let Some(last) = ends.last_mut() {
        *last = open;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::BadPath;

    fn matches(template: &str, path: &str) -> bool {
        Template::parse(template).unwrap().matches(path)
    }

    #[test]
    fn one_is_a_segment_and_any_is_everything() {
        for (template, path, wanted) in [
            ("/a/{*}", "/a/b", true),
            ("/a/{*}", "/a/", false),
            ("/a/{*}", "/a/b/", false),
            ("/a/{*}", "/a/b/c", false),
            ("/a/{*}/c", "/a/b/c", true),
            ("/{*}/{*}", "/a/b", true),
            ("/{*}/{*}", "/a", false),
            ("/a/{**}", "/a/", true),
            ("/a/{**}", "/a/b/c/", true),
            ("/a/{**}", "/a", false),
            ("/a/{**}", "/ab", false),
            ("/{**}/c", "/a/b/c", true),
            ("/{**}/c", "/c", false),
            ("{**}", "/", true),
            ("/a/{**}.txt", "/a/b/c.txt", true),
            ("/a/{*}.txt", "/a/b/c.txt", false),
            ("/a/{*}.txt", "/a/.txt", false),
            ("/{*}/b/{**}", "/a/b/c/d", true),
            ("/{*}/b/{**}", "/a/c/b/d", false),
            ("/%61//{*}", "/a/b", true),
        ] {
            assert_eq!(matches(template, path), wanted, "{template} {path}");
        }
    }

    #[test]
    fn what_is_no_operator_is_refused() {
        for bad in ["/{*}/*", "/{*}/{name}", "/{*}/{}", "/{*}/{name=*}", "/{**}/**", "/{*}}", "/{{*}"] {
            assert_eq!(Template::parse(bad), Err(BadPattern::Template(bad.into())));
        }
        assert_eq!(Template::parse("a/{*}"), Err(BadPattern::Relative("a/{*}".into())));
        assert!(matches!(Template::parse("/{*}?x"), Err(BadPattern::Path(BadPath::Byte { byte: b'?', .. }))));
    }

    /// Written from the meaning of the two, without a thought of time.
    fn naive(tokens: &[Token], path: &str) -> bool {
        let Some((first, rest)) = tokens.split_first() else { return path.is_empty() };
        let cuts = (0..=path.len()).filter(|cut| match first {
            Token::Text(text) => path[..*cut] == **text,
            Token::One => *cut > 0 && !path[..*cut].contains('/'),
            Token::Any => true,
        });
        cuts.into_iter().any(|cut| naive(rest, &path[cut..]))
    }

    proptest! {
        #[test]
        fn following_every_end_is_trying_every_cut(
            template in prop::collection::vec(prop::sample::select(vec!["{*}", "{**}", "/", "a", "ab"]), 0..6),
            path in "/[ab/]{0,7}",
        ) {
            let template = Template::parse(&format!("/{}", template.concat())).unwrap();
            prop_assert_eq!(template.matches(&path), naive(&template.0, &path));
        }
    }
}
