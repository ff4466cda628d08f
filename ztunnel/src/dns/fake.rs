//! DNS servers that behave as a test wants.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use culvert_net::netns::NetNs;
use culvert_runtime::tasks::Tasks;
use hickory_proto::op::{Message, OpCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

/// What a fake server does with a query: its answer, if any.
pub type Behaviour = fn(&[u8]) -> Option<Vec<u8>>;

/// A DNS server of a test.
pub struct Fake {
    /// UDP and TCP.
    pub address: SocketAddr,
    /// Queries that came.
    pub asked: Arc<AtomicU32>,
}

/// The query as an answer with this code.
pub fn answer(query: &[u8], code: u8) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer[3] |= 0x80 | code;
    answer
}

/// No error, and nothing else.
pub fn good(query: &[u8]) -> Option<Vec<u8>> {
    Some(answer(query, 0))
}

/// Says nothing.
pub fn silent(_: &[u8]) -> Option<Vec<u8>> {
    None
}

/// SERVFAIL.
pub fn failing(query: &[u8]) -> Option<Vec<u8>> {
    Some(answer(query, 2))
}

/// REFUSED.
pub fn refusing(query: &[u8]) -> Option<Vec<u8>> {
    Some(answer(query, 5))
}

/// NXDOMAIN.
pub fn no_such_name(query: &[u8]) -> Option<Vec<u8>> {
    Some(answer(query, 3))
}

/// Says more than fits a datagram.
pub fn huge(query: &[u8]) -> Option<Vec<u8>> {
    let mut answer = answer(query, 0);
    answer[7] = 200; // answers
    answer.resize(6000, 0);
    Some(answer)
}

/// A server on UDP and TCP of one loopback port.
pub async fn fake(tasks: &Tasks, behaviour: Behaviour) -> Fake {
    fake_in(&NetNs::current().unwrap(), tasks, behaviour)
}

/// The same, inside a namespace.
pub fn fake_in(netns: &NetNs, tasks: &Tasks, behaviour: Behaviour) -> Fake {
    let bind = || loop {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0")?;
        // The same number may be taken for TCP.
        if let Ok(tcp) = std::net::TcpListener::bind(udp.local_addr()?) {
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            return Ok((udp, tcp));
        }
    };
    let (udp, tcp) = netns.run(bind).unwrap();
    let (udp, tcp) = (UdpSocket::from_std(udp).unwrap(), TcpListener::from_std(tcp).unwrap());
    let fake = Fake { address: udp.local_addr().unwrap(), asked: Arc::default() };
    let asked = fake.asked.clone();
    tasks.spawn("fake udp", async move {
        let mut buffer = [0; 1024];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            asked.fetch_add(1, Ordering::Relaxed);
            if let Some(answer) = behaviour(&buffer[..length]) {
                udp.send_to(&answer, from).await.unwrap();
            }
        }
    });
    let asked = fake.asked.clone();
    tasks.spawn("fake tcp", async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            asked.fetch_add(1, Ordering::Relaxed);
            let length = stream.read_u16().await.unwrap();
            let mut query = vec![0; length.into()];
            stream.read_exact(&mut query).await.unwrap();
            if let Some(answer) = behaviour(&query) {
                stream.write_u16(answer.len() as u16).await.unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        }
    });
    fake
}

/// 300 addresses, 127.0.0.9 first: more than fits a datagram.
pub fn many(query: &[u8]) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).unwrap();
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.add_queries(query.queries.iter().cloned());
    let owner = query.queries[0].name().clone();
    let address = |n: u32| A(std::net::Ipv4Addr::from(0x7f00_0009 + n));
    answer.insert_answers(
        (0..300).map(|n| Record::from_rdata(owner.clone(), 60, RData::A(address(n)))).collect(),
    );
    Some(answer.to_vec().unwrap())
}
