//! One name asked of upstream, for a connection to a workload that has a name instead of an address (Z42).

use std::net::IpAddr;
use std::net::SocketAddr;
use std::time::Duration;

use culvert_model::dns::QueryFamily;
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};

use super::answer::Transport;
use super::names::Answer;
use super::upstream::Upstream;

/// Aliases followed within one answer. Resolvers give up at 8 to 16.
const MAX_ALIASES: usize = 8;

/// Asks for the addresses of `name`, again over TCP if the answer was cut.
///
/// # Errors
/// In words: the name is none, nobody answered, or the answer says that it failed. A name that does not exist is an answer
/// without addresses.
pub async fn ask(
    upstream: &Upstream,
    name: &str,
    family: QueryFamily,
    skip: impl Fn(SocketAddr) -> bool,
) -> Result<Answer, String> {
    let name = parse(name)?;
    let query = question(&name, family).to_vec().map_err(|e| e.to_string())?;
    let mut transport = Transport::Udp;
    loop {
        let answered = upstream.ask(&query, transport, &skip).await.map_err(|e| e.to_string())?;
        let message = Message::from_vec(&answered).map_err(|e| format!("the answer cannot be read: {e}"))?;
        if message.metadata.truncation && transport == Transport::Udp {
            transport = Transport::Tcp;
            continue;
        }
        return read(&message, &name, family);
    }
}

/// The whole name: search domains are the client's business, and this one was written in a resource.
fn parse(name: &str) -> Result<Name, String> {
    let mut parsed = Name::from_ascii(name).map_err(|e| format!("{name:?} is no name: {e}"))?;
    parsed.set_fqdn(true);
    Ok(parsed)
}

fn question(name: &Name, family: QueryFamily) -> Message {
    let kind = match family {
        QueryFamily::V4 => RecordType::A,
        QueryFamily::V6 => RecordType::AAAA,
    };
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.clone(), kind));
    message
}

/// The addresses of the name and of what it is an alias of; records of other owners are nobody's question (RFC 2181
/// section 5.4.1).
fn read(message: &Message, name: &Name, family: QueryFamily) -> Result<Answer, String> {
    match message.metadata.response_code {
        ResponseCode::NoError => {}
        ResponseCode::NXDomain => return Ok(Answer { addresses: Vec::new(), ttl: Duration::ZERO }),
        code => return Err(format!("the server answered {code}")),
    }
    let (mut owner, mut ttl) = (name.clone(), u32::MAX);
    let of_class = || message.answers.iter().filter(|record| record.dns_class == DNSClass::IN);
    for _ in 0..=MAX_ALIASES {
        let owned = || of_class().filter(|record| record.name == owner);
        let found = owned().filter_map(|record| {
            let ip = match &record.data {
                RData::A(a) => IpAddr::V4(a.0),
                RData::AAAA(aaaa) => IpAddr::V6(aaaa.0),
                _ => return None,
            };
            (ip.is_ipv4() == (family == QueryFamily::V4)).then_some((ip, record.ttl))
        });
        let found: Vec<_> = found.collect();
        if !found.is_empty() {
            let ttl = found.iter().fold(ttl, |least, (_, one)| least.min(*one));
            let addresses = found.into_iter().map(|(ip, _)| ip).collect();
            return Ok(Answer { addresses, ttl: Duration::from_secs(ttl.into()) });
        }
        let alias = owned().find_map(|record| match &record.data {
            RData::CNAME(target) => Some((target.0.clone(), record.ttl)),
            _ => None,
        });
        match alias {
            Some((target, least)) => (owner, ttl) = (target, ttl.min(least)),
            None => break,
        }
    }
    Ok(Answer { addresses: Vec::new(), ttl: Duration::ZERO })
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::OpCode;
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, AAAA, CNAME};

    use super::*;

    fn name(text: &str) -> Name {
        parse(text).unwrap()
    }

    fn v4(owner: &str, ttl: u32, address: &str) -> Record {
        Record::from_rdata(name(owner), ttl, RData::A(A(address.parse().unwrap())))
    }

    fn alias(owner: &str, ttl: u32, target: &str) -> Record {
        Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(target))))
    }

    fn addresses(records: Vec<Record>) -> (Vec<String>, u64) {
        let mut message = Message::response(1, OpCode::Query);
        message.insert_answers(records);
        let message = Message::from_vec(&message.to_vec().unwrap()).unwrap();
        let answer = read(&message, &name("db.example"), QueryFamily::V4).unwrap();
        (answer.addresses.iter().map(ToString::to_string).collect(), answer.ttl.as_secs())
    }

    /// Z42: every address of the name, for as long as the record that ends first.
    #[test]
    fn all_addresses_and_the_least_ttl() {
        let (found, ttl) =
            addresses(vec![v4("db.example", 60, "192.0.2.1"), v4("DB.example", 30, "192.0.2.2")]);
        assert_eq!(found, ["192.0.2.1", "192.0.2.2"]);
        assert_eq!(ttl, 30);
    }

    /// An alias is followed, whatever the order of the records, and its own TTL counts.
    #[test]
    fn aliases() {
        let (found, ttl) = addresses(vec![
            v4("b.example", 60, "192.0.2.1"),
            alias("a.example", 20, "b.example"),
            alias("db.example", 40, "a.example"),
        ]);
        assert_eq!(found, ["192.0.2.1"]);
        assert_eq!(ttl, 20);
        let round = vec![alias("db.example", 40, "a.example"), alias("a.example", 40, "db.example")];
        assert_eq!(addresses(round).0, [""; 0], "a circle ends");
    }

    /// What was not asked for is not believed.
    #[test]
    fn other_owners_and_families() {
        let aaaa =
            Record::from_rdata(name("db.example"), 60, RData::AAAA(AAAA("2001:db8::1".parse().unwrap())));
        assert_eq!(addresses(vec![v4("evil.example", 60, "192.0.2.66"), aaaa]).0, [""; 0]);
    }

    /// No such name is an answer; a server that fails is none.
    #[test]
    fn codes() {
        let mut message = Message::response(1, OpCode::Query);
        message.metadata.response_code = ResponseCode::NXDomain;
        assert!(read(&message, &name("db.example"), QueryFamily::V4).unwrap().addresses.is_empty());
        message.metadata.response_code = ResponseCode::ServFail;
        assert!(read(&message, &name("db.example"), QueryFamily::V4).is_err());
    }

    /// Z42: asked of the pod's upstream; what a datagram does not hold is asked for again over TCP.
    #[tokio::test]
    async fn long_answers_come_over_tcp() {
        let tasks = culvert_runtime::tasks::Tasks::new("test");
        let fake = crate::dns::fake::fake(&tasks, crate::dns::fake::many).await;
        let netns = std::sync::Arc::new(culvert_net::netns::NetNs::current().unwrap());
        let upstream = Upstream::new([fake.address].into(), netns);
        let answer = ask(&upstream, "db.example", QueryFamily::V4, |_| false).await.unwrap();
        assert_eq!(answer.addresses.len(), 300);
        assert_eq!(answer.addresses[0], IpAddr::from([127, 0, 0, 9]));
        assert_eq!(answer.ttl, Duration::from_secs(60));
        assert_eq!(fake.asked.load(std::sync::atomic::Ordering::Relaxed), 2, "once each way");
        assert!(ask(&upstream, "db.example", QueryFamily::V4, |_| true).await.is_err(), "nobody to ask");
        tasks.abort_all();
    }

    /// A name from a resource may be anything.
    #[test]
    fn what_is_no_name() {
        assert!(parse(&"a.".repeat(200)).is_err());
        assert!(parse(&format!("{}.example", "a".repeat(64))).is_err());
    }
}
