//! The one path of a request: policies judge it, routes match it, and the application gets it (W63).

use std::borrow::Cow;

/// The longest target that is read, in bytes. HTTP libraries stop near here too; what is made of it is at most three times
/// as long, because each byte may have to be escaped.
pub const MAX_PATH: usize = 64 * 1024;

/// A request's path and query after [`normalise`]. Nothing else makes one, so whoever asks for one gets the same as the
/// policies had.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Normalised<'a> {
    whole: Cow<'a, str>,
    path: usize,
}

impl<'a> Normalised<'a> {
    /// The path, without the query.
    pub fn path(&self) -> &str {
        &self.whole[..self.path]
    }

    /// What follows the question mark, as it was sent; `None` without one.
    pub fn query(&self) -> Option<&str> {
        self.whole[self.path..].strip_prefix('?')
    }

    /// What goes upstream.
    pub fn path_and_query(&self) -> &str {
        &self.whole
    }

    /// The same, free of what it was made from.
    pub fn into_owned(self) -> Normalised<'static> {
        Normalised { whole: Cow::Owned(self.whole.into_owned()), path: self.path }
    }
}

/// Why a target has no path that everyone reads alike. Answer 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// Longer than [`MAX_PATH`].
    #[error("a path of {0} bytes; at most {MAX_PATH} are allowed")]
    TooLong(usize),
    /// It begins with something else than a slash, and is not `*`.
    #[error("path {0:?} does not begin with /")]
    Relative(String),
    /// A character that ends a request line, a string or a header somewhere, or a fragment, which is never sent. Written as
    /// itself or as an escape.
    #[error("path {path:?} has the byte {byte:#04x}")]
    Byte {
        /// Its beginning.
        path: String,
        /// The byte.
        byte: u8,
    },
    /// A `%` without two hexadecimal digits behind it.
    #[error("path {0:?} has a % without two hexadecimal digits")]
    Escape(String),
    /// `..;` and the like: a step up to those who cut parameters off first, and a name to the others.
    #[error("path {path:?} has the segment {segment:?}")]
    Segment {
        /// Its beginning.
        path: String,
        /// The segment.
        segment: String,
    },
}

/// Makes the one path of a request's target, which has no scheme and authority any more.
///
/// Istio lets one choose between four ways (`pathNormalization`); this is the one way of culvert, its strictest,
/// `DECODE_AND_MERGE_SLASHES`, and stricter still. In this order:
///
/// 1. Control characters, spaces and `#` are refused, escaped ones (but `%20` and `%23`) too, and so is a broken escape.
/// 2. Escapes of what may stand for itself in a path are undone, and what may not is escaped. That is more than the
///    unreserved characters of RFC 3986 section 6.2.2.2: `:@!$&'()*+,=` are no delimiters inside of a segment, and servers
///    decode them. `;` and `%3B` stay as they are. Other escapes are written with capitals.
/// 3. `%2F`, `\` and `%5C` are slashes, and several slashes are one.
/// 4. `.` and `..` are taken out (section 5.2.4); above the root is the root. `.;x` and `..;x` are refused.
///
/// An escaped slash that an application wants to see as such is lost: the alternative is a path that means one thing to a
/// policy and another to the application. The query is passed on byte for byte. To normalise twice is to normalise once.
///
/// # Errors
/// [`BadPath`] tells what is refused.
pub fn normalise(target: &str) -> Result<Normalised<'_>, BadPath> {
    if target.len() > MAX_PATH {
        return Err(BadPath::TooLong(target.len()));
    }
    let end = target.find('?').unwrap_or(target.len());
    let (path, query) = target.split_at(end);
    if let Some(byte) = query.bytes().find(|byte| is_refused(*byte) || *byte == b'#') {
        return Err(BadPath::Byte { path: clip(target), byte });
    }
    if target == "*" || is_normal(path) {
        return Ok(Normalised { whole: Cow::Borrowed(target), path: end });
    }
    if !path.starts_with('/') {
        return Err(BadPath::Relative(clip(target)));
    }
    let mut whole = without_dots(&canonical(path)?)?;
    let path = whole.len();
    whole.push_str(query);
    Ok(Normalised { whole: Cow::Owned(whole), path })
}

/// Steps 1 to 3 of [`normalise`] for a piece of a path, as a prefix or a suffix in a policy or a route: without them it would
/// never match.
///
/// # Errors
/// [`BadPath`] tells what is refused; a `?` is, because no path has one.
pub fn canonical(piece: &str) -> Result<String, BadPath> {
    let bytes = piece.as_bytes();
    let mut out = String::with_capacity(piece.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        let (byte, escaped) = if byte == b'%' {
            let digits = bytes.get(at..at + 2).and_then(|two| Some((hex(two[0])?, hex(two[1])?)));
            let (high, low) = digits.ok_or_else(|| BadPath::Escape(clip(piece)))?;
            at += 2;
            (high << 4 | low, true)
        } else {
            (byte, false)
        };
        match byte {
            b'/' | b'\\' => {
                if !out.ends_with('/') {
                    out.push('/');
                }
            }
            b' ' | b'#' | b'?' | b';' if escaped => escape(&mut out, byte),
            _ if is_refused(byte) || matches!(byte, b'#' | b'?') => {
                return Err(BadPath::Byte { path: clip(piece), byte });
            }
            _ if stands_for_itself(byte) => out.push(char::from(byte)),
            _ => escape(&mut out, byte),
        }
    }
    Ok(out)
}

/// Step 4. The path begins with a slash and has no two in a row.
pub(super) fn without_dots(path: &str) -> Result<String, BadPath> {
    let mut out = String::with_capacity(path.len());
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    out.truncate(out.rfind('/').unwrap_or(0));
                }
                if is_last {
                    out.push('/');
                }
            }
            _ if is_veiled_dots(segment) => {
                return Err(BadPath::Segment { path: clip(path), segment: clip(segment) });
            }
            _ => {
                out.push('/');
                out.push_str(segment);
            }
        }
    }
    Ok(out)
}

fn is_veiled_dots(segment: &str) -> bool {
    let rest = segment.strip_prefix("..").or_else(|| segment.strip_prefix('.'));
    rest.is_some_and(|rest| rest.starts_with(';') || rest.starts_with("%3B"))
}

/// Whether nothing is to be done, as for nearly every request. Says no where it is not sure.
fn is_normal(path: &str) -> bool {
    let mut last = 0;
    path.starts_with('/')
        && path.bytes().all(|byte| {
            let fine = match (last, byte) {
                (b'/', b'/' | b'.') => false,
                _ => byte == b'/' || stands_for_itself(byte),
            };
            last = byte;
            fine
        })
}

/// `pchar` of RFC 3986 section 3.3 without escapes.
fn stands_for_itself(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~:@!$&'()*+,=;".contains(&byte)
}

fn is_refused(byte: u8) -> bool {
    byte <= b' ' || byte == 0x7f
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

fn escape(out: &mut String, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    out.extend(['%', digit(byte >> 4), digit(byte & 0xf)]);
}

/// What a client sent may be long: an error quotes its beginning.
fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path(target: &str) -> String {
        normalise(target).unwrap().path_and_query().to_owned()
    }

    /// W63.
    #[test]
    fn a_path_is_written_in_one_way() {
        for (target, wanted) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("*", "*"),
            // Dots, RFC 3986 section 5.2.4.
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/b/..", "/a/"),
            ("/a/b/.", "/a/b/"),
            ("/../../a", "/a"),
            ("/..", "/"),
            ("/.a/..b/...", "/.a/..b/..."),
            ("/a/%2e%2E/b", "/b"),
            ("/a/.%2e", "/"),
            // Slashes.
            ("//a///b//", "/a/b/"),
            ("/a%2Fb%2fc", "/a/b/c"),
            ("/a\\b%5Cc%5cd", "/a/b/c/d"),
            ("/a%2F..%2Fb", "/b"),
            ("/a//../b", "/b"),
            ("/a\\..\\b", "/b"),
            // Escapes.
            ("/%61%2D%7e", "/a-~"),
            ("/v1/x%3Acancel%40%21", "/v1/x:cancel@!"),
            ("/a%3bb;c", "/a%3Bb;c"),
            ("/a%20b%23c%3fd", "/a%20b%23c%3Fd"),
            ("/%25%32%65", "/%252e"),
            ("/a%252fb", "/a%252fb"),
            ("/caf\u{e9}/%c3%a9/%ff", "/caf%C3%A9/%C3%A9/%FF"),
            ("/<\">{|}^`[]", "/%3C%22%3E%7B%7C%7D%5E%60%5B%5D"),
            // The query is nobody's business.
            ("/a?b=/../%2f//\\\u{e9}?c", "/a?b=/../%2f//\\\u{e9}?c"),
            ("/a/..?", "/?"),
        ] {
            assert_eq!(path(target), wanted, "{target}");
        }
    }

    #[test]
    fn a_path_and_its_query_are_told_apart() {
        for (target, path, query) in [
            ("/a//b?c//d?e", "/a/b", Some("c//d?e")),
            ("/a?", "/a", Some("")),
            ("/a%3Fb", "/a%3Fb", None),
            ("/a", "/a", None),
        ] {
            let normal = normalise(target).unwrap().into_owned();
            assert_eq!((normal.path(), normal.query()), (path, query));
        }
    }

    #[test]
    fn what_is_read_in_more_than_one_way_is_refused() {
        for relative in ["", "a", "*a", "*?a", "?a", "\\a", "%2Fa", "http://a/b"] {
            assert_eq!(normalise(relative), Err(BadPath::Relative(relative.into())));
        }
        for (target, byte) in [
            ("/a#b", b'#'),
            ("/a?b#c", b'#'),
            ("/a b", b' '),
            ("/a?b c", b' '),
            ("/a\0", 0),
            ("/%00", 0),
            ("/%0d%0a", b'\r'),
            ("/%7F", 0x7f),
            ("/a\t", b'\t'),
            ("/a?\n", b'\n'),
        ] {
            assert_eq!(normalise(target), Err(BadPath::Byte { path: target.into(), byte }), "{target:?}");
        }
        for escape in ["/%", "/%2", "/%2g", "/%%2e", "/%u0041", "/% 1"] {
            assert_eq!(normalise(escape), Err(BadPath::Escape(escape.into())));
        }
        for veiled in ["..;", ".;", "..;x=1", "..%3Bx", "%2e.%3bx"] {
            let error = normalise(&format!("/a/{veiled}/b")).unwrap_err();
            assert!(matches!(error, BadPath::Segment { .. }), "{veiled}: {error}");
        }
        assert_eq!(normalise(&format!("/{}", "a".repeat(MAX_PATH))), Err(BadPath::TooLong(MAX_PATH + 1)));
        assert!(normalise(&format!("/{}", "a".repeat(MAX_PATH - 1))).is_ok());
    }

    #[test]
    fn what_is_normal_is_not_copied() {
        for target in ["/", "/a/b.c;d=e,f/g:h@i?x=%2f", "*"] {
            assert!(matches!(normalise(target).unwrap().whole, Cow::Borrowed(_)), "{target}");
        }
    }

    /// What an application does that decodes everything and walks folders. It stays within what it was sent.
    fn folders(path: &str) -> Vec<Vec<u8>> {
        let bytes = path.as_bytes();
        let (mut decoded, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            if bytes[at] == b'%' {
                decoded.push(u8::from_str_radix(&path[at + 1..at + 3], 16).unwrap());
                at += 3;
            } else {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
        let mut open: Vec<Vec<u8>> = Vec::new();
        for name in decoded.split(|byte| matches!(byte, b'/' | b'\\')) {
            match name {
                b"" | b"." => {}
                b".." => drop(open.pop()),
                _ => open.push(name.to_vec()),
            }
        }
        open
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn to_normalise_twice_is_to_normalise_once(target in "/([ab./;\\\\:é{?]|%2[eEfF5]|%5c|%61|%3[bB]){0,16}") {
            if let Ok(once) = normalise(&target) {
                let twice = normalise(once.path_and_query()).unwrap();
                prop_assert_eq!(&twice, &once);
                let path = once.path();
                prop_assert!(path.starts_with('/') && !path.contains("//") && !path.contains('\\'), "{}", path);
                prop_assert!(path.split('/').all(|segment| segment != "." && segment != ".."), "{}", path);
                prop_assert!(!path.contains("%2F") && !path.contains("%5C") && !path.contains("%2E"), "{}", path);
            }
        }

        /// However an application reads it, it finds what the policy judged. W63.
        #[test]
        fn an_application_sees_the_same_place(target in "/([ab./\\\\]|%2[eEfF]|%5c|%61){0,16}") {
            let normal = normalise(&target).unwrap();
            prop_assert_eq!(folders(normal.path()), folders(&target));
            let names: Vec<&str> = normal.path().split('/').filter(|name| !name.is_empty()).collect();
            prop_assert_eq!(folders(normal.path()), names.iter().map(|n| n.as_bytes().to_vec()).collect::<Vec<_>>());
        }

        #[test]
        fn any_text_has_one_path_or_none(target in any::<String>(), rest in "/\\PC{0,40}") {
            for target in [target, rest] {
                if let Ok(normal) = normalise(&target) {
                    prop_assert!(normal.path().bytes().all(|b| b.is_ascii_graphic()));
                    prop_assert_eq!(&normalise(normal.path_and_query()).unwrap(), &normal);
                }
            }
        }
    }
}
