//! Requests and policies to judge.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_model::address::NamespacedHostname;
use culvert_model::identity::Identity;
use culvert_model::request::{
    Authority, Claims, Headers, HttpFacts, Normalised, PolicySet, RequestFacts, RequestPolicy, Verdict,
    judge, normalise,
};
use culvert_model::wire;
use culvert_proto::waypoint as proto;
use prost::Message;

/// A request that owns what its facts borrow.
#[derive(Clone, Debug)]
pub struct Request {
    pub identity: Option<Identity>,
    pub source: Option<IpAddr>,
    pub remote: Option<IpAddr>,
    pub destination: SocketAddr,
    pub server_name: Option<String>,
    pub http: Option<Http>,
}

#[derive(Clone, Debug)]
pub struct Http {
    pub method: String,
    pub authority: Option<Authority>,
    pub path: Normalised<'static>,
    pub headers: Lines,
    /// As JSON.
    pub claims: Option<serde_json::Value>,
    decoded: Option<Claims>,
}

#[derive(Clone, Debug, Default)]
pub struct Lines(pub Vec<(String, String)>);

impl Headers for Lines {
    fn each(&self, name: &str, found: &mut dyn FnMut(&[u8])) {
        for (_, value) in self.0.iter().filter(|(found, _)| found == name) {
            found(value.as_bytes());
        }
    }
}

impl Request {
    /// From `cluster.local/ns/a/sa/x` at 10.0.0.1 to `GET http://shop/a`.
    pub fn usual() -> Self {
        Self {
            identity: Some(identity("cluster.local/ns/a/sa/x")),
            source: Some("10.0.0.1".parse().unwrap()),
            remote: Some("192.0.2.1".parse().unwrap()),
            destination: "10.96.0.1:80".parse().unwrap(),
            server_name: None,
            http: Some(Http {
                method: "GET".into(),
                authority: Some(Authority::parse("shop").unwrap()),
                path: normalise("/a").unwrap().into_owned(),
                headers: Lines::default(),
                claims: None,
                decoded: None,
            }),
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn http(self, change: impl FnOnce(&mut Http)) -> Self {
        self.with(|request| change(request.http.as_mut().unwrap()))
    }

    pub fn path(self, target: &str) -> Self {
        self.http(|http| http.path = normalise(target).unwrap().into_owned())
    }

    pub fn host(self, authority: &str) -> Self {
        self.http(|http| http.authority = Some(Authority::parse(authority).unwrap()))
    }

    pub fn header(self, name: &str, value: &str) -> Self {
        self.http(|http| http.headers.0.push((name.into(), value.into())))
    }

    pub fn claims(self, json: &str) -> Self {
        self.http(|http| {
            http.claims = Some(serde_json::from_str(json).unwrap());
            http.decoded = Some(serde_json::from_str(json).unwrap());
        })
    }

    pub fn no_identity(self) -> Self {
        self.with(|request| request.identity = None)
    }

    pub fn judge(&self, policies: &PolicySet) -> Verdict {
        self.ask(|facts| judge(policies, facts))
    }

    pub fn ask<R>(&self, question: impl FnOnce(&RequestFacts<'_>) -> R) -> R {
        let http = self.http.as_ref().map(|http| HttpFacts {
            method: &http.method,
            authority: http.authority.as_ref(),
            path: &http.path,
            headers: &http.headers,
            claims: http.decoded.as_ref(),
        });
        question(&RequestFacts {
            identity: self.identity.as_ref(),
            source: self.source,
            remote: self.remote,
            destination: self.destination,
            server_name: self.server_name.as_deref(),
            http,
        })
    }
}

pub fn identity(principal: &str) -> Identity {
    format!("spiffe://{principal}").parse().unwrap()
}

/// The service whose policies are judged.
pub fn service() -> NamespacedHostname {
    NamespacedHostname { namespace: "a".into(), hostname: "shop.a.svc.cluster.local".into() }
}

/// A policy `a/NAME` by its fields.
pub fn policy(name: &str, action: proto::policy::Action, rules: Vec<proto::PolicyRule>) -> proto::Policy {
    let provider = if action == proto::policy::Action::Custom { "provider" } else { "" };
    proto::Policy {
        namespace: "a".into(),
        name: name.into(),
        action: action.into(),
        provider: provider.into(),
        rules,
        ..Default::default()
    }
}

pub fn allow(rules: Vec<proto::PolicyRule>) -> proto::Policy {
    policy("allow", proto::policy::Action::Allow, rules)
}

pub fn deny(rules: Vec<proto::PolicyRule>) -> proto::Policy {
    policy("deny", proto::policy::Action::Deny, rules)
}

pub fn from(source: proto::Source) -> proto::PolicyRule {
    proto::PolicyRule { from: vec![source], ..Default::default() }
}

pub fn to(operation: proto::Operation) -> proto::PolicyRule {
    proto::PolicyRule { to: vec![operation], ..Default::default() }
}

pub fn when(key: &str, values: &[&str], not_values: &[&str]) -> proto::PolicyRule {
    let condition =
        proto::Condition { key: key.into(), values: texts(values), not_values: texts(not_values) };
    proto::PolicyRule { when: vec![condition], ..Default::default() }
}

pub fn texts(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

/// What everything passes through: encoded, sent, decoded.
pub fn decode(message: &proto::Policy) -> wire::RequestPolicyResource {
    let name = format!("{}/{}", message.namespace, message.name);
    wire::request::decode(&name, &message.encode_to_vec())
}

/// A set for [`service`]; whatever is not understood in it stays.
pub fn set_of(messages: &[proto::Policy]) -> PolicySet {
    let decoded: Vec<Arc<RequestPolicy>> =
        messages.iter().map(|message| Arc::new(decode(message).policy)).collect();
    PolicySet::new(&decoded, Some(&service()))
}

/// The same of policies that have to be understood.
pub fn set(messages: &[proto::Policy]) -> PolicySet {
    for message in messages {
        assert_eq!(decode(message).error, None, "{message:?}");
    }
    set_of(messages)
}
