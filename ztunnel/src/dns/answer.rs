//! What a query means: an answer of ours, or somebody else's business. Pure.

use std::net::IpAddr;

use culvert_model::dns::{DnsDecision, QueryFamily, lookup};
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::Workload;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

/// Seconds a client may keep an answer (Z81).
const TTL: u32 = 30;
/// RFC 1035 section 2.3.4: what a client without EDNS takes over UDP.
const PLAIN_UDP: usize = 512;
/// What we ever send over UDP, whatever the client says it takes: DNS flag day 2020, below any usual path MTU.
const MAX_UDP: usize = 1232;

/// What to do about a query.
#[derive(Debug)]
pub enum Action {
    /// Send this back.
    Respond(Vec<u8>),
    /// Ask upstream; the bytes are the client's own.
    Forward,
    /// Not a query: say nothing, so that two servers can never answer each other for ever.
    Ignore,
}

/// How the query arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A datagram; long answers are truncated.
    Udp,
    /// A stream.
    Tcp,
}

/// Who asks, and what the proxy knows.
#[derive(Debug)]
pub struct Asker<'a> {
    /// The proxy's knowledge.
    pub snapshot: &'a Snapshot,
    /// The asking pod; unknown is answered SERVFAIL (Z83).
    pub client: Option<&'a Workload>,
    /// `cluster.local`.
    pub cluster_domain: &'a str,
}

/// Decides a query of at most 64 KiB.
pub fn decide(
    query: &[u8],
    transport: Transport,
    asker: &Asker<'_>,
    random: &mut dyn FnMut(u64) -> u64,
) -> Action {
    let Ok(message) = Message::from_vec(query) else {
        return malformed(query);
    };
    if message.metadata.message_type != MessageType::Query {
        return Action::Ignore;
    }
    if message.metadata.op_code != OpCode::Query || message.queries.len() != 1 {
        return Action::Forward;
    }
    let question = &message.queries[0];
    let family = match (question.query_class(), question.query_type()) {
        (DNSClass::IN, RecordType::A) => QueryFamily::V4,
        (DNSClass::IN, RecordType::AAAA) => QueryFamily::V6,
        _ => return Action::Forward,
    };
    let Some(client) = asker.client else {
        return respond(&message, ResponseCode::ServFail, Vec::new(), transport);
    };
    let name = question.name().to_lowercase().to_ascii();
    match lookup(asker.snapshot, client, asker.cluster_domain, name.trim_end_matches('.'), family, random) {
        DnsDecision::Forward => Action::Forward,
        DnsDecision::NoData => respond(&message, ResponseCode::NoError, Vec::new(), transport),
        DnsDecision::Answer { addresses, canonical } => {
            let records = records(question.name(), canonical.as_deref(), &addresses);
            respond(&message, ResponseCode::NoError, records, transport)
        }
    }
}

/// The answer when upstream cannot be asked (Z82).
pub fn server_failure(query: &[u8]) -> Option<Vec<u8>> {
    let message = Message::from_vec(query).ok()?;
    match respond(&message, ResponseCode::ServFail, Vec::new(), Transport::Udp) {
        Action::Respond(bytes) => Some(bytes),
        Action::Forward | Action::Ignore => None,
    }
}

fn records(asked: &Name, canonical: Option<&str>, addresses: &[IpAddr]) -> Vec<Record> {
    let mut records = Vec::with_capacity(addresses.len() + 1);
    let mut owner = asked.clone();
    if let Some(target) = canonical.and_then(|c| Name::from_ascii(c).ok()) {
        let mut target = target;
        target.set_fqdn(true);
        records.push(Record::from_rdata(owner, TTL, RData::CNAME(CNAME(target.clone()))));
        owner = target;
    }
    for address in addresses {
        let data = match address {
            IpAddr::V4(v4) => RData::A(A(*v4)),
            IpAddr::V6(v6) => RData::AAAA(AAAA(*v6)),
        };
        records.push(Record::from_rdata(owner.clone(), TTL, data));
    }
    records
}

fn respond(query: &Message, code: ResponseCode, answers: Vec<Record>, transport: Transport) -> Action {
    let mut response = Message::response(query.metadata.id, OpCode::Query);
    response.metadata.recursion_desired = query.metadata.recursion_desired;
    response.metadata.recursion_available = true;
    response.metadata.authoritative = code == ResponseCode::NoError;
    response.metadata.response_code = code;
    response.add_queries(query.queries.iter().cloned());
    response.insert_answers(answers);
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP as u16).set_version(0).set_dnssec_ok(asked.flags().dnssec_ok);
        response.set_edns(edns);
    }
    let Ok(bytes) = response.to_vec() else {
        return Action::Forward;
    };
    if transport == Transport::Udp && bytes.len() > udp_limit(query) {
        return match response.truncate().to_vec() {
            Ok(bytes) => Action::Respond(bytes),
            Err(_) => Action::Forward,
        };
    }
    Action::Respond(bytes)
}

fn udp_limit(query: &Message) -> usize {
    query.edns.as_ref().map_or(PLAIN_UDP, |edns| usize::from(edns.max_payload()).clamp(PLAIN_UDP, MAX_UDP))
}

/// FORMERR to what at least has a header that says it is a query.
fn malformed(query: &[u8]) -> Action {
    match query {
        [a, b, flags, ..] if query.len() >= 12 && flags & 0x80 == 0 => {
            let response =
                Message::error_msg(u16::from_be_bytes([*a, *b]), OpCode::Query, ResponseCode::FormErr);
            response.to_vec().map_or(Action::Ignore, Action::Respond)
        }
        _ => Action::Ignore,
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
