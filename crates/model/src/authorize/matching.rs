//! One match of a policy against one connection (Z58-Z62).

use super::{ConnectionFacts, MatchResult};
use crate::identity::Identity;
use crate::policy::{Match, ServiceAccountMatch, StringMatch};

const SCHEME: &str = "spiffe://";

/// Fields are all required; values within a field are alternatives; a `not_` field holds if none of its values does. A
/// plaintext peer has no identity, so no value about one holds for it, and every `not_` does (D39: that is how STRICT works).
pub(super) fn evaluate(m: &Match, facts: &ConnectionFacts<'_>) -> MatchResult {
    let source = facts.source.ip().to_canonical();
    let destination = facts.destination.ip().to_canonical();
    let port = facts.destination.port();
    let of_peer = |test: &dyn Fn(&Identity) -> bool| facts.identity.is_some_and(test);
    let namespace = |want: &StringMatch| of_peer(&|peer| parts_match(want, &[peer.namespace()]));
    let principal = |want: &StringMatch| of_peer(&|peer| principal(want, peer));
    let account = |want: &ServiceAccountMatch| of_peer(&|peer| service_account(want, peer));

    let fields = [
        field("namespaces", &m.namespaces, true, namespace),
        field("not_namespaces", &m.not_namespaces, false, namespace),
        field("principals", &m.principals, true, principal),
        field("not_principals", &m.not_principals, false, principal),
        field("service_accounts", &m.service_accounts, true, account),
        field("not_service_accounts", &m.not_service_accounts, false, account),
        field("source_ips", &m.source_ips, true, |net| net.contains(&source)),
        field("not_source_ips", &m.not_source_ips, false, |net| net.contains(&source)),
        field("destination_ips", &m.destination_ips, true, |net| net.contains(&destination)),
        field("not_destination_ips", &m.not_destination_ips, false, |net| net.contains(&destination)),
        field("destination_ports", &m.destination_ports, true, |want| *want == port),
        field("not_destination_ports", &m.not_destination_ports, false, |want| *want == port),
    ];
    fields.into_iter().flatten().fold(MatchResult::Skipped, |so_far, (name, holds)| match so_far {
        MatchResult::Failed(_) => so_far,
        MatchResult::Matched | MatchResult::Skipped if holds => MatchResult::Matched,
        MatchResult::Matched | MatchResult::Skipped => MatchResult::Failed(name),
    })
}

/// `None` for a field without values; otherwise whether it holds.
fn field<V>(
    name: &'static str,
    values: &[V],
    wanted: bool,
    test: impl Fn(&V) -> bool,
) -> Option<(&'static str, bool)> {
    (!values.is_empty()).then(|| (name, values.iter().any(test) == wanted))
}

fn service_account(want: &ServiceAccountMatch, peer: &Identity) -> bool {
    want.namespace == *peer.namespace() && want.service_account == *peer.service_account()
}

/// A principal without its scheme, or with it: a pattern that begins with `spiffe://` means the same without. The scheme is
/// taken off the pattern rather than put before the principal, lest the pattern `s*` match everyone.
pub(crate) fn principal(want: &StringMatch, peer: &Identity) -> bool {
    let parts: [&str; 5] = [peer.trust_domain(), "/ns/", peer.namespace(), "/sa/", peer.service_account()];
    match want {
        StringMatch::Exact(pattern) => equals(&parts, pattern.strip_prefix(SCHEME).unwrap_or(pattern)),
        StringMatch::Prefix(pattern) => starts(&parts, pattern.strip_prefix(SCHEME).unwrap_or(pattern)),
        StringMatch::Suffix(pattern) => match pattern.strip_prefix(SCHEME) {
            Some(whole) => equals(&parts, whole),
            None => ends(&parts, pattern),
        },
        StringMatch::Presence => true,
    }
}

/// Whether the parts, one after another, match.
pub(crate) fn parts_match(want: &StringMatch, parts: &[&str]) -> bool {
    match want {
        StringMatch::Exact(pattern) => equals(parts, pattern),
        StringMatch::Prefix(pattern) => starts(parts, pattern),
        StringMatch::Suffix(pattern) => ends(parts, pattern),
        StringMatch::Presence => true,
    }
}

/// Whether the parts, one after another, are the pattern. Nothing is joined: this is on the path of every connection.
fn equals(parts: &[&str], pattern: &str) -> bool {
    parts.iter().map(|part| part.len()).sum::<usize>() == pattern.len() && starts(parts, pattern)
}

fn starts(parts: &[&str], pattern: &str) -> bool {
    let mut rest = pattern.as_bytes();
    for part in parts.iter().map(|part| part.as_bytes()) {
        if rest.len() <= part.len() {
            return part.starts_with(rest);
        }
        match rest.strip_prefix(part) {
            Some(left) => rest = left,
            None => return false,
        }
    }
    rest.is_empty()
}

fn ends(parts: &[&str], pattern: &str) -> bool {
    let mut rest = pattern.as_bytes();
    for part in parts.iter().rev().map(|part| part.as_bytes()) {
        if rest.len() <= part.len() {
            return part.ends_with(rest);
        }
        match rest.strip_suffix(part) {
            Some(left) => rest = left,
            None => return false,
        }
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(want: &StringMatch, whole: &str) -> bool {
        match want {
            StringMatch::Exact(p) => whole == &**p,
            StringMatch::Prefix(p) => whole.starts_with(&**p),
            StringMatch::Suffix(p) => whole.ends_with(&**p),
            StringMatch::Presence => true,
        }
    }

    proptest! {
        /// Z61: comparing in parts is comparing the whole.
        #[test]
        fn parts_compare_as_the_whole(parts in prop::collection::vec("[ab]{0,3}", 0..5), pattern in "[ab]{0,6}", kind in 0..3) {
            let want = match kind {
                0 => StringMatch::Exact(pattern.as_str().into()),
                1 => StringMatch::Prefix(pattern.as_str().into()),
                _ => StringMatch::Suffix(pattern.as_str().into()),
            };
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            prop_assert_eq!(parts_match(&want, &parts), joined(&want, &parts.concat()));
        }

        /// U22: a principal pattern means the same with and without its scheme, and no pattern matches by the scheme alone.
        #[test]
        fn the_scheme_makes_no_difference(pattern in "(a|d|s|sp)?[a-d/]{0,3}", kind in 0..2) {
            let peer = Identity::new("a", "b", "c").unwrap();
            let of = |p: String| if kind == 0 { StringMatch::Exact(p.into()) } else { StringMatch::Prefix(p.into()) };
            let bare = principal(&of(pattern.clone()), &peer);
            prop_assert_eq!(bare, joined(&of(pattern.clone()), "a/ns/b/sa/c"));
            prop_assert_eq!(principal(&of(format!("spiffe://{pattern}")), &peer), bare);
        }
    }
}
