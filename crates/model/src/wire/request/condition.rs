//! What a rule's `when` says (W55).

use culvert_proto::waypoint as proto;

use super::values::{accounts, blocks, clip, namespaces, ports, texts, texts_without_case};
use super::{RequestPolicyError, push};
use crate::Str;
use crate::request::{Condition, Test};

/// What a key stands for.
#[derive(Clone)]
enum Key {
    SourceAddress,
    RemoteAddress,
    SourceNamespace,
    SourceAccount,
    SourceTrustDomain,
    SourcePrincipal,
    RequestPrincipal,
    Claim(Vec<Str>),
    DestinationAddress,
    DestinationPort,
    ServerName,
    Header(Str),
    Host,
    Method,
}

pub(super) fn conditions(
    namespace: &Str,
    message: proto::Condition,
) -> Result<Vec<Condition>, RequestPolicyError> {
    let key = parse(&message.key)?;
    let mut all = Vec::new();
    for (wanted, values) in [(true, message.values), (false, message.not_values)] {
        push(&mut all, &message.key, wanted, values, |field, v| {
            Ok(match key.clone() {
                Key::SourceAddress => Test::SourceAddress(blocks(field, v)?),
                Key::RemoteAddress => Test::RemoteAddress(blocks(field, v)?),
                Key::SourceNamespace => Test::Namespace(namespaces(field, v)?),
                Key::SourceAccount => Test::ServiceAccount(accounts(field, namespace, v)?),
                Key::SourceTrustDomain => Test::TrustDomain(texts(field, v)?),
                Key::SourcePrincipal => Test::Principal(texts(field, v)?),
                Key::RequestPrincipal => Test::RequestPrincipal(texts(field, v)?),
                Key::Claim(path) => Test::Claim(path, texts(field, v)?),
                Key::DestinationAddress => Test::DestinationAddress(blocks(field, v)?),
                Key::DestinationPort => Test::DestinationPort(ports(field, v)?),
                Key::ServerName => Test::ServerName(texts_without_case(field, v)?),
                Key::Header(name) => Test::Header(name, texts(field, v)?),
                Key::Host => Test::Host(texts_without_case(field, v)?),
                Key::Method => Test::Method(texts(field, v)?),
            })
        })?;
    }
    Ok(all)
}

fn parse(key: &str) -> Result<Key, RequestPolicyError> {
    Ok(match key {
        "source.ip" => Key::SourceAddress,
        "remote.ip" => Key::RemoteAddress,
        "source.namespace" => Key::SourceNamespace,
        "source.serviceAccount" => Key::SourceAccount,
        "source.trustDomain" => Key::SourceTrustDomain,
        "source.principal" => Key::SourcePrincipal,
        "request.auth.principal" => Key::RequestPrincipal,
        "request.auth.audiences" => Key::Claim(vec!["aud".into()]),
        "request.auth.presenter" => Key::Claim(vec!["azp".into()]),
        "destination.ip" => Key::DestinationAddress,
        "destination.port" => Key::DestinationPort,
        "connection.sni" => Key::ServerName,
        _ => {
            if let Some(brackets) = key.strip_prefix("request.headers[") {
                return header(key, brackets);
            }
            if let Some(brackets) = key.strip_prefix("request.auth.claims[") {
                return claim(key, brackets);
            }
            return Err(RequestPolicyError::Key(clip(key)));
        }
    })
}

/// `Host` and `:authority` are one thing in two versions of HTTP.
fn header(key: &str, brackets: &str) -> Result<Key, RequestPolicyError> {
    let unnamed = || RequestPolicyError::KeyName(clip(key));
    let name = brackets.strip_suffix(']').ok_or_else(unnamed)?.to_ascii_lowercase();
    let pseudo = |instead| Err(RequestPolicyError::Pseudo { key: clip(key), instead });
    match name.as_str() {
        ":authority" | "host" => Ok(Key::Host),
        ":method" => Ok(Key::Method),
        ":path" => pseudo("paths of an operation"),
        ":scheme" => pseudo("ports of an operation"),
        // RFC 9110 section 5.6.2.
        token
            if !token.is_empty()
                && token.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)) =>
        {
            Ok(Key::Header(token.into()))
        }
        _ => Err(unnamed()),
    }
}

/// `a][b]` of `request.auth.claims[a][b]`.
fn claim(key: &str, brackets: &str) -> Result<Key, RequestPolicyError> {
    let unnamed = || RequestPolicyError::KeyName(clip(key));
    let names = brackets.strip_suffix(']').ok_or_else(unnamed)?.split("][");
    let name = |name: &str| {
        let fits = !name.is_empty() && !name.contains(['[', ']']);
        fits.then(|| Str::from(name)).ok_or_else(unnamed)
    };
    Ok(Key::Claim(names.map(name).collect::<Result<_, _>>()?))
}
