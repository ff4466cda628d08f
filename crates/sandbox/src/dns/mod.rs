//! Cluster DNS: the names of services, for pods inside and outside the mesh. Authoritative for `cluster.local`; nothing is
//! ever forwarded, so a name from outside does not exist here.

mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

pub use server::{DnsError, serve};

/// The cluster's domain.
pub const DOMAIN: &str = "cluster.local";

/// Seconds an answer may be kept, a negative one too: endpoints of headless services move.
pub const TTL: u32 = 5;

/// One finished view of all names; a change makes a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zone {
    /// Lower case, without the last dot.
    names: BTreeMap<String, Entry>,
    /// Names that own nothing themselves but have names below: they exist (RFC 8020).
    parents: BTreeSet<String>,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Addresses; none is an answer too: a headless service without ready endpoints.
    Addresses(Vec<IpAddr>),
    /// Another name (an ExternalName service).
    Alias(String),
}

impl Zone {
    /// A zone of these names, each below [`DOMAIN`] and without it, as `web.default.svc`.
    pub fn new(entries: impl IntoIterator<Item = (String, Entry)>) -> Zone {
        let mut zone = Zone::default();
        zone.parents.insert(DOMAIN.to_owned());
        for (name, entry) in entries {
            let name = format!("{}.{DOMAIN}", name.to_ascii_lowercase());
            let mut rest = name.as_str();
            while let Some((_, parent)) = rest.split_once('.') {
                if parent.len() < DOMAIN.len() {
                    break;
                }
                zone.parents.insert(parent.to_owned());
                rest = parent;
            }
            zone.names.insert(name, entry);
        }
        zone
    }

    /// The answer to a query. `None` if the message is no query and gets none.
    pub fn answer(&self, query: &Message) -> Option<Message> {
        if query.metadata.message_type != MessageType::Query {
            return None;
        }
        let mut response = Message::response(query.metadata.id, query.metadata.op_code);
        response.metadata.recursion_desired = query.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.add_queries(query.queries.iter().cloned());
        response.edns = query.edns.as_ref().map(|_| {
            let mut edns = hickory_proto::op::Edns::new();
            edns.set_max_payload(server::MAX_UDP);
            edns
        });
        let [question] = query.queries.as_slice() else {
            response.metadata.response_code = ResponseCode::FormErr;
            return Some(response);
        };
        if query.metadata.op_code != OpCode::Query {
            response.metadata.response_code = ResponseCode::NotImp;
            return Some(response);
        }
        if question.query_class() != DNSClass::IN {
            response.metadata.response_code = ResponseCode::Refused;
            return Some(response);
        }
        self.resolve(question.name(), question.query_type(), &mut response);
        Some(response)
    }

    fn resolve(&self, asked: &Name, record_type: RecordType, response: &mut Message) {
        let mut name = asked.to_lowercase().to_ascii();
        if name.ends_with('.') {
            name.pop();
        }
        if name != DOMAIN && !name.ends_with(&format!(".{DOMAIN}")) {
            response.metadata.response_code = ResponseCode::NXDomain;
            return;
        }
        response.metadata.authoritative = true;
        let record = |data| Record::from_rdata(asked.clone(), TTL, data);
        match self.names.get(&name) {
            Some(Entry::Addresses(addresses)) => {
                let answers = addresses.iter().filter_map(|address| match (address, record_type) {
                    (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(RData::A(A(*v4))),
                    (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(AAAA(*v6))),
                    _ => None,
                });
                response.add_answers(answers.map(record));
                // Spreads clients that take the first one. The id is as good as random.
                let count = response.answers.len().max(1);
                let turn = usize::from(response.metadata.id) % count;
                response.answers.rotate_left(turn);
            }
            Some(Entry::Alias(target)) => {
                if let Ok(target) = Name::from_ascii(format!("{target}.")) {
                    response.add_answer(record(RData::CNAME(CNAME(target))));
                }
            }
            None if self.parents.contains(&name) => {}
            None => response.metadata.response_code = ResponseCode::NXDomain,
        }
        if response.answers.is_empty() {
            response.add_authority(authority());
        }
    }
}

/// Tells a resolver how long it may remember that there is nothing (RFC 2308).
fn authority() -> Record {
    let name = |text: String| Name::from_ascii(text).expect("a constant name");
    let soa = SOA::new(
        name(format!("ns.dns.{DOMAIN}.")),
        name(format!("hostmaster.{DOMAIN}.")),
        1,
        7200,
        1800,
        86400,
        TTL,
    );
    Record::from_rdata(name(format!("{DOMAIN}.")), TTL, RData::SOA(soa))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;

    fn zone() -> Zone {
        let both = ["198.18.128.5", "fd00:18:80::5"].map(|a| a.parse().unwrap());
        Zone::new([
            ("web.default.svc".to_owned(), Entry::Addresses(both.to_vec())),
            ("v4.default.svc".to_owned(), Entry::Addresses(vec![both[0]])),
            ("idle.shop.svc".to_owned(), Entry::Addresses(Vec::new())),
            ("out.default.svc".to_owned(), Entry::Alias("example.com".to_owned())),
        ])
    }

    fn ask(name: &str, record_type: RecordType) -> (ResponseCode, Vec<String>, bool) {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
        let response = zone().answer(&message).unwrap();
        assert_eq!(response.metadata.id, message.metadata.id);
        let answers = response.answers.iter().map(|record| record.data.to_string()).collect();
        (response.metadata.response_code, answers, !response.authorities.is_empty())
    }

    #[test]
    fn services_have_addresses_of_both_families() {
        let ok = ResponseCode::NoError;
        assert_eq!(
            ask("web.default.svc.cluster.local.", RecordType::A),
            (ok, vec!["198.18.128.5".into()], false)
        );
        assert_eq!(
            ask("WEB.Default.svc.cluster.LOCAL.", RecordType::AAAA),
            (ok, vec!["fd00:18:80::5".into()], false)
        );
        assert_eq!(
            ask("out.default.svc.cluster.local.", RecordType::A),
            (ok, vec!["example.com.".into()], false)
        );
    }

    #[test]
    fn nothing_of_that_type_differs_from_no_such_name() {
        let nothing = (ResponseCode::NoError, Vec::new(), true);
        assert_eq!(ask("v4.default.svc.cluster.local.", RecordType::AAAA), nothing);
        assert_eq!(ask("web.default.svc.cluster.local.", RecordType::TXT), nothing);
        assert_eq!(ask("idle.shop.svc.cluster.local.", RecordType::A), nothing);
        assert_eq!(ask("shop.svc.cluster.local.", RecordType::A), nothing);
        assert_eq!(ask("cluster.local.", RecordType::A), nothing);
        let none = (ResponseCode::NXDomain, Vec::new(), true);
        assert_eq!(ask("nobody.default.svc.cluster.local.", RecordType::A), none);
        assert_eq!(ask("web.default.svc.cluster.local.default.svc.cluster.local.", RecordType::A), none);
    }

    #[test]
    fn the_outside_does_not_exist() {
        assert_eq!(ask("example.com.", RecordType::A), (ResponseCode::NXDomain, Vec::new(), false));
        assert_eq!(ask("notcluster.local.", RecordType::A), (ResponseCode::NXDomain, Vec::new(), false));
    }

    #[test]
    fn a_response_is_not_answered() {
        let message = Message::response(7, OpCode::Query);
        assert!(zone().answer(&message).is_none());
    }
}
