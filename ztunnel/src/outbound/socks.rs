//! SOCKS5 (RFC 1928), for applications that want to say where they go by name (Z01): CONNECT without authentication, from the
//! pod's own loopback only. What is asked for then goes the way of a captured connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use culvert_model::dns::{DnsDecision, QueryFamily, lookup};
use culvert_model::outcome::{Blame, Reason};
use culvert_model::workload::Workload;
use culvert_net::socket::arm_reset;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::accept::{Opened, open_to};
use super::forward;
use crate::config::HANDSHAKE_TIMEOUT;
use crate::dns::{Upstream, ask, leads_back};
use crate::observe::flow::{End, Failure};
use crate::observe::limits::Limit;
use crate::observe::{Direction, Flow, Phase, Tracked};
use crate::pods::{Pod, adopt};

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    /// An address and a port.
    Address(SocketAddr),
    /// A name of at most 255 bytes, in lower case, and a port.
    Name(String, u16),
}

/// The answer to a request (RFC 1928 section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Reply {
    Succeeded = 0,
    Failure = 1,
    NotAllowed = 2,
    HostUnreachable = 4,
    Refused = 5,
    UnknownCommand = 7,
    UnknownAddressType = 8,
}

/// Why a conversation did not come to a request.
#[derive(Debug, thiserror::Error)]
enum Malformed {
    #[error("not SOCKS5, but version {0}")]
    Version(u8),
    #[error("the client demands authentication")]
    Methods,
    #[error("command {0} is not CONNECT")]
    Command(u8),
    #[error("address type {0}")]
    AddressType(u8),
    #[error("a name that is none")]
    Name,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves one connection to the SOCKS port from accept to close.
pub async fn serve(pod: Arc<Pod>, worker: usize, stream: std::net::TcpStream, client: SocketAddr) {
    // Held while it is being opened too: a drain waits for what it has accepted.
    let _watcher = pod.watcher();
    let Ok((mut stream, own)) = adopt(stream) else { return };
    let mut tracked = pod.shared.observer.begin(Flow::new(Direction::Outbound, client, own));
    tracked.flow.mark(Phase::Accept);
    // At most 2 + 255 bytes of greeting and 4 + 256 + 2 of request, in this time.
    let asked = match timeout(HANDSHAKE_TIMEOUT, Box::pin(negotiate(&mut stream))).await {
        Ok(Ok(asked)) => asked,
        Ok(Err(malformed)) => {
            return tracked.finish(End::Failed(Failure::new(Reason::BadRequest, malformed.to_string())));
        }
        Err(_) => {
            let _ = arm_reset(&stream);
            let late = Failure::new(Reason::BadRequest, "no SOCKS5 request in 10 s");
            return tracked.finish(End::Failed(late.beyond(Limit::HandshakeTime)));
        }
    };
    // Boxed: what opening takes is given back before the bytes flow, and a task is as large as its largest state.
    match Box::pin(open(&pod, worker, asked, &mut tracked)).await {
        Ok(Opened { hop, in_progress }) => match answer(&mut stream, Reply::Succeeded).await {
            Ok(()) => {
                forward::run(&pod, stream, hop, tracked).await;
                drop(in_progress);
            }
            Err(error) => {
                let gone = format!("the client left before it was answered: {error}");
                tracked.finish(End::Failed(Failure::new(Reason::ClientReset, gone)));
            }
        },
        Err(failure) => {
            let _ = answer(&mut stream, Reply::of(&failure)).await;
            tracked.finish(End::Failed(failure));
        }
    }
}

async fn open(pod: &Arc<Pod>, worker: usize, asked: Asked, tracked: &mut Tracked) -> Result<Opened, Failure> {
    let destination = match asked {
        Asked::Address(address) => address,
        Asked::Name(name, port) => SocketAddr::new(address_of(pod, &name).await?, port),
    };
    tracked.flow.destination.address = destination;
    open_to(pod, worker, destination, tracked).await
}

/// The address of a name, as the pod's DNS would say it: the mesh's own answer, with the search domains of the pod's namespace, or
/// else the upstream's. IPv4 before IPv6.
async fn address_of(pod: &Arc<Pod>, name: &str) -> Result<IpAddr, Failure> {
    let shared = &pod.shared;
    let client = pod.workload().await.ok_or_else(|| {
        let detail = format!("the control plane does not know {} yet", pod.workload_uid);
        Failure::new(Reason::UnknownSource, detail)
    })?;
    if let Some(found) = known(pod, &client, name) {
        return found;
    }
    let mut why = String::new();
    for family in [QueryFamily::V4, QueryFamily::V6] {
        let question = || async {
            shared.observer.metrics.on_demand_dns.inc();
            let upstream = Upstream::new(shared.config.dns_upstream.clone().into(), pod.netns.clone());
            ask(&upstream, name, family, |server| leads_back(&shared.state.load(), &client, server)).await
        };
        match shared.names.addresses(name.into(), family, question).await {
            Ok(found) => return Ok(found[fastrand::usize(..found.len())]),
            Err(error) => why = error.to_string(),
        }
    }
    Err(Failure::new(Reason::Unreachable, why))
}

/// What the mesh says of the name; `None` if it is none of ours.
fn known(pod: &Pod, client: &Workload, name: &str) -> Option<Result<IpAddr, Failure>> {
    let snapshot = pod.shared.state.load();
    let domain = pod.shared.config.cluster_domain.as_str();
    let (own, services) = (format!("{}.svc.{domain}", client.namespace), format!("svc.{domain}"));
    let searched = [own.as_str(), &services, domain].map(|suffix| format!("{name}.{suffix}"));
    for candidate in std::iter::once(name).chain(searched.iter().map(String::as_str)) {
        let mut ours = false;
        for family in [QueryFamily::V4, QueryFamily::V6] {
            let mut random = |bound: u64| fastrand::u64(..bound.max(1));
            match lookup(&snapshot, client, domain, candidate, family, &mut random) {
                DnsDecision::Answer { addresses, .. } => return addresses.first().map(|first| Ok(*first)),
                DnsDecision::NoData => ours = true,
                DnsDecision::Forward => {}
            }
        }
        if ours {
            let nothing = format!("{candidate} has no address");
            return Some(Err(Failure::new(Reason::NoHealthyUpstream, nothing)));
        }
    }
    None
}

/// Reads greeting and request, and answers what can be answered before the destination is tried.
async fn negotiate<IO: AsyncRead + AsyncWrite + Unpin>(io: &mut IO) -> Result<Asked, Malformed> {
    let [version, methods] = read(io).await?;
    if version != VERSION {
        return Err(Malformed::Version(version));
    }
    let mut offered = vec![0; usize::from(methods)];
    io.read_exact(&mut offered).await?;
    if !offered.contains(&NO_AUTHENTICATION) {
        io.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(Malformed::Methods);
    }
    io.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let [version, command, _reserved, kind] = read(io).await?;
    if version != VERSION {
        return Err(Malformed::Version(version));
    }
    let host = match kind {
        IPV4 => Ok(IpAddr::from(Ipv4Addr::from(read::<4, _>(io).await?))),
        IPV6 => Ok(IpAddr::from(Ipv6Addr::from(read::<16, _>(io).await?)).to_canonical()),
        NAME => {
            let [length] = read(io).await?;
            let mut name = vec![0; usize::from(length)];
            io.read_exact(&mut name).await?;
            Err(name)
        }
        other => {
            answer(io, Reply::UnknownAddressType).await?;
            return Err(Malformed::AddressType(other));
        }
    };
    let port = u16::from_be_bytes(read(io).await?);
    if command != CONNECT {
        answer(io, Reply::UnknownCommand).await?;
        return Err(Malformed::Command(command));
    }
    match host {
        Ok(address) => Ok(Asked::Address(SocketAddr::new(address, port))),
        Err(name) => match text(name) {
            Some(Ok(address)) => Ok(Asked::Address(SocketAddr::new(address, port))),
            Some(Err(name)) => Ok(Asked::Name(name, port)),
            None => {
                answer(io, Reply::Failure).await?;
                Err(Malformed::Name)
            }
        },
    }
}

/// A name, or an address that came as one, as some clients send it.
fn text(name: Vec<u8>) -> Option<Result<IpAddr, String>> {
    let name = String::from_utf8(name).ok()?.to_ascii_lowercase();
    if let Ok(address) = name.parse::<IpAddr>() {
        return Some(Ok(address.to_canonical()));
    }
    let name = name.strip_suffix('.').unwrap_or(&name);
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let labels =
        !name.is_empty() && name.split('.').all(|label| !label.is_empty() && label.bytes().all(plain));
    labels.then(|| Err(name.to_owned()))
}

async fn read<const N: usize, IO: AsyncRead + Unpin>(io: &mut IO) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    io.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// The address that the connection is made from is not told: nobody uses it, and it may be another node's business.
async fn answer<IO: AsyncWrite + Unpin>(io: &mut IO, reply: Reply) -> io::Result<()> {
    io.write_all(&[VERSION, reply as u8, 0, IPV4, 0, 0, 0, 0, 0, 0]).await
}

impl Reply {
    fn of(failure: &Failure) -> Self {
        match failure.reason {
            Reason::ConnectionRefused => Self::Refused,
            Reason::Unreachable | Reason::ConnectTimeout | Reason::NoHealthyUpstream => Self::HostUnreachable,
            Reason::SelfCall => Self::NotAllowed,
            reason if reason.blame() == Blame::Policy => Self::NotAllowed,
            _ => Self::Failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// What the client's bytes mean, and what it was answered.
    async fn said(bytes: &[u8]) -> (Result<Asked, Malformed>, Vec<u8>) {
        let (mut client, mut proxy) = duplex(1024);
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let asked = negotiate(&mut proxy).await;
        drop(proxy);
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        (asked, heard)
    }

    fn request(command: u8, rest: &[u8]) -> Vec<u8> {
        [&[5, 2, 0, 2, 5, command, 0], rest].concat()
    }

    /// Z01: addresses of both families, and names.
    #[tokio::test]
    async fn what_is_asked_for() {
        let address = |text: &str| Asked::Address(text.parse().unwrap());
        let name = |text: &str, port| Asked::Name(text.to_owned(), port);
        let v6 = [&[4][..], &"fd00::9".parse::<Ipv6Addr>().unwrap().octets(), &[0, 80]].concat();
        let mapped = [&[4][..], &"::ffff:192.0.2.1".parse::<Ipv6Addr>().unwrap().octets(), &[0, 80]].concat();
        for (rest, expected) in [
            (&b"\x01\xc0\0\x02\x01\x1f\x90"[..], address("192.0.2.1:8080")),
            (&v6, address("[fd00::9]:80")),
            (&mapped, address("192.0.2.1:80")),
            (b"\x03\x08Web.Shop\0\x50", name("web.shop", 80)),
            (b"\x03\x04web.\0\x50", name("web", 80)),
            (b"\x03\x09192.0.2.1\0\x50", address("192.0.2.1:80")),
        ] {
            let (asked, heard) = said(&request(CONNECT, rest)).await;
            assert_eq!(asked.unwrap(), expected);
            assert_eq!(heard, [5, 0], "no authentication; the request is answered later");
        }
    }

    #[tokio::test]
    async fn what_is_not_served() {
        let refused = |reply: u8| vec![5, 0, 5, reply, 0, 1, 0, 0, 0, 0, 0, 0];
        let v4 = b"\x01\xc0\0\x02\x01\x1f\x90";
        for (bytes, expected) in [
            (b"\x04\x01\0\x50\xc0\0\x02\x01\0".to_vec(), vec![]),
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![]),
            (vec![5, 1, 2], vec![5, 0xff]),
            (vec![5, 0], vec![5, 0xff]),
            (request(2, v4), refused(7)),
            (request(3, v4), refused(7)),
            (request(CONNECT, b"\x07whatever"), refused(8)),
            (request(CONNECT, b"\x03\0\0\x50"), refused(1)),
            (request(CONNECT, b"\x03\x03a/b\0\x50"), refused(1)),
            (request(CONNECT, b"\x03\x04a..b\0\x50"), refused(1)),
            (request(CONNECT, b"\x03\x04\xff\xff\xff\xff\0\x50"), refused(1)),
            (request(CONNECT, b"\x01\xc0\0"), vec![5, 0]),
            (vec![5], vec![]),
        ] {
            let (asked, heard) = said(&bytes).await;
            assert!(asked.is_err(), "{bytes:?}: {asked:?}");
            assert_eq!(heard, expected, "{bytes:?}");
        }
    }

    #[test]
    fn how_a_failure_is_told() {
        for (reason, reply) in [
            (Reason::ConnectionRefused, Reply::Refused),
            (Reason::ConnectTimeout, Reply::HostUnreachable),
            (Reason::AuthorizationPolicy, Reply::NotAllowed),
            (Reason::SelfCall, Reply::NotAllowed),
            (Reason::NoCertificate, Reply::Failure),
        ] {
            assert_eq!(Reply::of(&Failure::new(reason, "why")), reply, "{reason}");
        }
    }
}
