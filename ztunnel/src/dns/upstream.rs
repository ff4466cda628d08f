//! Passing on what is not ours: each upstream in turn, a fresh port and id a query, nothing accepted that does not
//! answer the question asked.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::socket::{DialOptions, bind_udp, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::answer::Transport;
use crate::config::PROXY_MARK;

/// One upstream's time: glibc gives a server 5 s in all, so two of ours fit.
const PER_SERVER: Duration = Duration::from_secs(2);
/// The largest datagram read back.
const MAX_DATAGRAM: usize = 4096;

/// The servers that queries are passed on to, in order of preference.
#[derive(Clone, Debug)]
pub struct Upstream {
    servers: Arc<[SocketAddr]>,
    netns: Arc<NetNs>,
}

impl Upstream {
    /// Asks `servers` from inside the pod's namespace, so that the pod's own network rules hold for its queries.
    pub fn new(servers: Arc<[SocketAddr]>, netns: Arc<NetNs>) -> Self {
        Self { servers, netns }
    }

    /// The first server's answer, its id put back to the client's.
    ///
    /// # Errors
    /// The last server's failure; `NotConnected` when none is configured.
    pub async fn ask(&self, query: &[u8], transport: Transport) -> io::Result<Vec<u8>> {
        let mut last = io::Error::new(io::ErrorKind::NotConnected, "no upstream DNS server is configured");
        for &server in self.servers.iter() {
            let asked = match transport {
                Transport::Udp => timeout(PER_SERVER, self.ask_udp(server, query)).await,
                Transport::Tcp => timeout(PER_SERVER, self.ask_tcp(server, query)).await,
            };
            match asked {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => last = error,
                Err(_) => {
                    last = io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {server} in 2 s"))
                }
            }
        }
        Err(last)
    }

    async fn ask_udp(&self, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
        let any: SocketAddr = match server {
            SocketAddr::V4(_) => (IpAddr::from(Ipv4Addr::UNSPECIFIED), 0).into(),
            SocketAddr::V6(_) => (IpAddr::from(Ipv6Addr::UNSPECIFIED), 0).into(),
        };
        let socket = UdpSocket::from_std(self.netns.run(|| bind_udp(any, Some(PROXY_MARK)))?)?;
        socket.connect(server).await?;
        let (id, ours) = with_random_id(query)?;
        socket.send(&ours).await?;
        let mut buffer = vec![0; MAX_DATAGRAM];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if answers(&buffer[..length], &ours) {
                buffer.truncate(length);
                buffer[..2].copy_from_slice(&id);
                return Ok(buffer);
            }
        }
    }

    async fn ask_tcp(&self, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
        let options = DialOptions { mark: Some(PROXY_MARK), nodelay: true, ..DialOptions::default() };
        let mut stream = connect(&self.netns, server, &options, PER_SERVER)
            .await
            .map_err(|e| io::Error::other(e.to_string()))?;
        let (id, ours) = with_random_id(query)?;
        let length = u16::try_from(ours.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(&ours);
        stream.write_all(&framed).await?;
        let length = usize::from(stream.read_u16().await?);
        let mut buffer = vec![0; length];
        stream.read_exact(&mut buffer).await?;
        if !answers(&buffer, &ours) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{server} answered another question"),
            ));
        }
        buffer[..2].copy_from_slice(&id);
        Ok(buffer)
    }
}

/// The client's id, and the query under an id of our own that an attacker cannot know.
fn with_random_id(query: &[u8]) -> io::Result<([u8; 2], Vec<u8>)> {
    let Some(&[a, b]) = query.get(..2) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut ours = query.to_vec();
    ours[..2].copy_from_slice(&fastrand::u16(..).to_be_bytes());
    Ok(([a, b], ours))
}

/// The id matches, it is a response, and the question is the same bytes (RFC 5452 section 9.1).
fn answers(response: &[u8], query: &[u8]) -> bool {
    let Some(question) = query.get(12..).and_then(question_length).map(|n| &query[12..12 + n]) else {
        return false;
    };
    response.len() >= 12
        && response[..2] == query[..2]
        && response[2] & 0x80 != 0
        && response.get(12..12 + question.len()).is_some_and(|theirs| theirs.eq_ignore_ascii_case(question))
}

/// Bytes of the first question: its name, type and class.
fn question_length(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match *bytes.get(at)? {
            0 => return (at + 5 <= bytes.len()).then_some(at + 5),
            length if length < 64 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03www\x07example\0\0\x01\0\x01";

    #[test]
    fn an_answer_to_another_question_is_not_ours() {
        let mut good = QUERY.to_vec();
        good[2] |= 0x80;
        assert!(answers(&good, QUERY));
        assert!(!answers(QUERY, QUERY), "a query is no answer");
        let mut other_id = good.clone();
        other_id[0] ^= 1;
        assert!(!answers(&other_id, QUERY));
        let mut other_name = good.clone();
        other_name[14] = b'x';
        assert!(!answers(&other_name, QUERY));
        assert!(!answers(&good[..20], QUERY));
    }

    #[test]
    fn the_question_ends_where_it_ends() {
        assert_eq!(question_length(&QUERY[12..]), Some(17));
        assert_eq!(question_length(b"\x03ww"), None);
        assert_eq!(question_length(b"\xc0\x0c\0\x01\0\x01"), None);
    }
}
