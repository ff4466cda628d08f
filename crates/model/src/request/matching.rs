//! One condition of a policy against one request (W54, W55).

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Claims, Condition, Headers, HttpFacts, RequestFacts, Test, Truth};
use crate::Str;
use crate::authorize::{parts_match, principal};
use crate::identity::Identity;
use crate::policy::StringMatch;

/// How surely a condition holds. Values are alternatives; a `not` holds if none of them does.
pub(super) fn evaluate(condition: &Condition, facts: &RequestFacts<'_>) -> Truth {
    let truth = compare(&condition.test, facts);
    if condition.wanted { truth } else { truth.negated() }
}

fn compare(test: &Test, facts: &RequestFacts<'_>) -> Truth {
    let peer = |test: &dyn Fn(&Identity) -> bool| Truth::from(facts.identity.is_some_and(test));
    // W56: what a rule says of HTTP is uncertain where there is none.
    let http = |test: &dyn Fn(&HttpFacts<'_>) -> Truth| facts.http.as_ref().map_or(Truth::Maybe, test);
    match test {
        Test::Principal(values) => peer(&|peer| values.iter().any(|want| principal(want, peer))),
        Test::Namespace(values) => peer(&|peer| values.iter().any(|want| want.matches(peer.namespace()))),
        Test::ServiceAccount(values) => peer(&|peer| {
            values.iter().any(|want| {
                want.namespace == *peer.namespace() && want.service_account == *peer.service_account()
            })
        }),
        Test::TrustDomain(values) => peer(&|peer| any_text(values, peer.trust_domain())),
        Test::SourceAddress(blocks) => address(blocks, facts.source),
        Test::RemoteAddress(blocks) => address(blocks, facts.remote),
        Test::DestinationAddress(blocks) => address(blocks, Some(facts.destination.ip())),
        Test::DestinationPort(ports) => ports.contains(&facts.destination.port()).into(),
        Test::ServerName(values) => {
            match facts.server_name.filter(|name| !name.is_empty()) {
                Some(name) => any_text(values, &name.to_ascii_lowercase()).into(),
                // What a stream begins with may not have been read, or not in full.
                None if facts.http.is_none() => Truth::Maybe,
                None => Truth::No,
            }
        }
        Test::RequestPrincipal(values) => {
            http(&|http| http.claims.map_or(Truth::No, |claims| request_principal(values, claims)))
        }
        Test::Claim(path, values) => {
            http(&|http| http.claims.is_some_and(|claims| claim(path, values, claims)).into())
        }
        Test::Host(values) => http(&|http| host(values, http)),
        Test::Method(values) => http(&|http| any_text(values, http.method).into()),
        Test::Path(values) => http(&|http| values.iter().any(|want| want.matches(http.path.path())).into()),
        Test::Header(name, values) => http(&|http| header(name, values, http.headers)),
    }
}

fn any_text(values: &[StringMatch], text: &str) -> bool {
    any_bytes(values, text.as_bytes())
}

fn any_bytes(values: &[StringMatch], text: &[u8]) -> bool {
    values.iter().any(|want| match want {
        StringMatch::Exact(pattern) => text == pattern.as_bytes(),
        StringMatch::Prefix(pattern) => text.starts_with(pattern.as_bytes()),
        StringMatch::Suffix(pattern) => text.ends_with(pattern.as_bytes()),
        StringMatch::Presence => true,
    })
}

fn address(blocks: &[IpNet], address: Option<IpAddr>) -> Truth {
    address.map_or(Truth::Maybe, |address| {
        let address = address.to_canonical();
        blocks.iter().any(|block| block.contains(&address)).into()
    })
}

/// Sure is what matches the authority as it was sent, as Istio compares it. The same host with another spelling, with a port
/// or the root's dot, reaches the same application, so it is not sure that it is another.
fn host(values: &[StringMatch], http: &HttpFacts<'_>) -> Truth {
    match http.authority {
        Some(authority) if any_text(values, authority.as_str()) => Truth::Yes,
        Some(authority) if any_text(values, authority.host()) => Truth::Maybe,
        Some(_) | None => Truth::No,
    }
}

/// A list holds each of its values.
fn claim(path: &[Str], values: &[StringMatch], claims: &Claims) -> bool {
    let mut holds = false;
    claims.each(path, &mut |value| holds |= !value.is_empty() && any_text(values, value));
    holds
}

/// A principal is `issuer/subject`, both of them there. Where the subject has a slash, another issuer and subject would be
/// written alike, and what does not tell them apart is not sure.
fn request_principal(values: &[StringMatch], claims: &Claims) -> Truth {
    let there = |name| claims.text(name).filter(|text| !text.is_empty());
    let (Some(issuer), Some(subject)) = (there("iss"), there("sub")) else { return Truth::No };
    let one = |want: &StringMatch| {
        if !parts_match(want, &[issuer, "/", subject]) {
            return Truth::No;
        }
        let sure = !subject.contains('/')
            || match want {
                StringMatch::Exact(_) => false,
                StringMatch::Prefix(pattern) => {
                    let whole_issuer = pattern.rsplit_once('/').is_some_and(|(first, _)| first == issuer);
                    whole_issuer || issuer.starts_with(&**pattern)
                }
                StringMatch::Suffix(pattern) => !pattern.contains('/'),
                StringMatch::Presence => true,
            };
        if sure { Truth::Yes } else { Truth::Maybe }
    };
    values.iter().map(one).max().unwrap_or(Truth::No)
}

/// Applications read a header that is sent on several lines in several ways: the first line, the last one, all, or all in
/// one, with commas between (RFC 9110 section 5.3). Sure is what holds for every line and for all of them joined; what holds
/// for one of these is uncertain. So a DENY is not evaded by another line, nor an ALLOW satisfied by one. Lines of `cookie`
/// are pieces of one value (RFC 9113 section 8.2.3).
fn header(name: &str, values: &[StringMatch], headers: &dyn Headers) -> Truth {
    let (mut lines, mut held) = (0_usize, 0_usize);
    headers.each(name, &mut |value| {
        lines += 1;
        held += usize::from(any_bytes(values, value));
    });
    if lines <= 1 {
        return (held == 1).into();
    }
    let joined = |separator: &[u8]| {
        let mut all: Vec<u8> = Vec::new();
        let mut first = true;
        headers.each(name, &mut |value| {
            if !std::mem::take(&mut first) {
                all.extend_from_slice(separator);
            }
            all.extend_from_slice(value);
        });
        any_bytes(values, &all)
    };
    if name == "cookie" {
        return joined(b"; ").into();
    }
    let readings = [joined(b","), joined(b", ")].into_iter().filter(|holds| *holds).count();
    match held + readings {
        0 => Truth::No,
        all if all == lines + 2 => Truth::Yes,
        _ => Truth::Maybe,
    }
}
