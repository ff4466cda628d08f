//! Lists of values: what a rule's `from` and `to` say.

use std::net::IpAddr;

use culvert_proto::waypoint as proto;
use ipnet::IpNet;

use super::{RequestPolicyError, push};
use crate::Str;
use crate::policy::{ServiceAccountMatch, StringMatch};
use crate::request::{Condition, PathPattern, Test, TextPattern};

pub(super) fn source(namespace: &Str, message: proto::Source) -> Result<Vec<Condition>, RequestPolicyError> {
    let mut all = Vec::new();
    let m = message;
    for (wanted, values) in [(true, m.principals), (false, m.not_principals)] {
        push(&mut all, "principals", wanted, values, |f, v| Ok(Test::Principal(texts(f, v)?)))?;
    }
    for (wanted, values) in [(true, m.namespaces), (false, m.not_namespaces)] {
        push(&mut all, "namespaces", wanted, values, |f, v| Ok(Test::Namespace(namespaces(f, v)?)))?;
    }
    for (wanted, values) in [(true, m.service_accounts), (false, m.not_service_accounts)] {
        push(&mut all, "service_accounts", wanted, values, |f, v| {
            Ok(Test::ServiceAccount(accounts(f, namespace, v)?))
        })?;
    }
    for (wanted, values) in [(true, m.ip_blocks), (false, m.not_ip_blocks)] {
        push(&mut all, "ip_blocks", wanted, values, |f, v| Ok(Test::SourceAddress(blocks(f, v)?)))?;
    }
    for (wanted, values) in [(true, m.remote_ip_blocks), (false, m.not_remote_ip_blocks)] {
        push(&mut all, "remote_ip_blocks", wanted, values, |f, v| Ok(Test::RemoteAddress(blocks(f, v)?)))?;
    }
    for (wanted, values) in [(true, m.request_principals), (false, m.not_request_principals)] {
        push(&mut all, "request_principals", wanted, values, |f, v| {
            Ok(Test::RequestPrincipal(texts(f, v)?))
        })?;
    }
    Ok(all)
}

pub(super) fn operation(message: proto::Operation) -> Result<Vec<Condition>, RequestPolicyError> {
    let mut all = Vec::new();
    let m = message;
    for (wanted, values) in [(true, m.ports), (false, m.not_ports)] {
        push(&mut all, "ports", wanted, values, |field, values| {
            let port = |value: u32| port(field, &value.to_string());
            Ok(Test::DestinationPort(values.into_iter().map(port).collect::<Result<_, _>>()?))
        })?;
    }
    for (wanted, values) in [(true, m.methods), (false, m.not_methods)] {
        push(&mut all, "methods", wanted, values, |f, v| Ok(Test::Method(texts(f, v)?)))?;
    }
    for (wanted, values) in [(true, m.hosts), (false, m.not_hosts)] {
        push(&mut all, "hosts", wanted, values, |f, v| Ok(Test::Host(texts_without_case(f, v)?)))?;
    }
    for (wanted, values) in [(true, m.paths), (false, m.not_paths)] {
        push(&mut all, "paths", wanted, values, |f, v| Ok(Test::Path(paths(f, v)?)))?;
    }
    Ok(all)
}

/// `*` is anything, `x*` begins and `*x` ends with x; a star anywhere else is a star (W54).
pub(super) fn texts(field: &Str, values: Vec<String>) -> Result<Vec<StringMatch>, RequestPolicyError> {
    let text = |value: String| {
        if value.is_empty() {
            return Err(RequestPolicyError::Empty { field: field.clone() });
        }
        Ok(if value == "*" {
            StringMatch::Presence
        } else if let Some(end) = value.strip_prefix('*') {
            StringMatch::Suffix(end.into())
        } else if let Some(start) = value.strip_suffix('*') {
            StringMatch::Prefix(start.into())
        } else {
            StringMatch::Exact(value.into())
        })
    };
    values.into_iter().map(text).collect()
}

/// Of what compares without case, and is compared in lower case.
pub(super) fn texts_without_case(
    field: &Str,
    values: Vec<String>,
) -> Result<Vec<StringMatch>, RequestPolicyError> {
    texts(field, values.into_iter().map(|value| value.to_ascii_lowercase()).collect())
}

pub(super) fn namespaces(field: &Str, values: Vec<String>) -> Result<Vec<TextPattern>, RequestPolicyError> {
    let namespace = |value: String| match value.as_str() {
        "" => Err(RequestPolicyError::Empty { field: field.clone() }),
        value => Ok(TextPattern::parse(value)),
    };
    values.into_iter().map(namespace).collect()
}

/// Without a namespace it is the policy's own (D36).
pub(super) fn accounts(
    field: &Str,
    own: &Str,
    values: Vec<String>,
) -> Result<Vec<ServiceAccountMatch>, RequestPolicyError> {
    let account = |value: String| {
        let (namespace, name) = value.split_once('/').unwrap_or((&**own, &value));
        if namespace.is_empty() || name.is_empty() || name.contains('/') || value.contains('*') {
            return Err(RequestPolicyError::Account { field: field.clone(), value: clip(&value) });
        }
        Ok(ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() })
    };
    values.into_iter().map(account).collect()
}

/// A block that is no block is an error, never dropped: dropping could widen what the policy allows (Z65).
pub(super) fn blocks(field: &Str, values: Vec<String>) -> Result<Vec<IpNet>, RequestPolicyError> {
    let block = |value: String| {
        let net = match value.parse::<IpNet>() {
            Ok(net) => Some(net),
            Err(_) => value.parse::<IpAddr>().ok().map(IpNet::from),
        };
        let net =
            net.ok_or_else(|| RequestPolicyError::Block { field: field.clone(), value: clip(&value) })?;
        Ok(unmapped(net).trunc())
    };
    values.into_iter().map(block).collect()
}

/// Addresses are compared as the IPv4 addresses that they are.
fn unmapped(net: IpNet) -> IpNet {
    match (net.addr().to_canonical(), net.prefix_len().checked_sub(96)) {
        (IpAddr::V4(address), Some(length)) if net.addr().is_ipv6() => {
            IpNet::new(address.into(), length).unwrap_or(net)
        }
        _ => net,
    }
}

pub(super) fn ports(field: &Str, values: Vec<String>) -> Result<Vec<u16>, RequestPolicyError> {
    values.iter().map(|value| port(field, value)).collect()
}

fn port(field: &Str, value: &str) -> Result<u16, RequestPolicyError> {
    let digits = value.bytes().all(|b| b.is_ascii_digit());
    let number = if digits { value.parse().ok() } else { None };
    number.ok_or_else(|| RequestPolicyError::Port { field: field.clone(), value: clip(value) })
}

fn paths(field: &Str, values: Vec<String>) -> Result<Vec<PathPattern>, RequestPolicyError> {
    let path = |value: String| {
        if value.is_empty() {
            return Err(RequestPolicyError::Empty { field: field.clone() });
        }
        PathPattern::parse(&value).map_err(|error| RequestPolicyError::Path { field: field.clone(), error })
    };
    values.into_iter().map(path).collect()
}

/// An error quotes the beginning.
pub(super) fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}
