//! The DNS server's sockets: UDP and TCP on each address, inside the controller's namespace.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket};
use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::tasks::Tasks;
use hickory_proto::op::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};

use super::Zone;
use crate::lab::{NetNs, NetNsError};

/// Largest UDP answer to a client that says it can take it: fits an Ethernet frame over IPv6 (1500 - 40 - 8), rounded down.
pub(super) const MAX_UDP: u16 = 1400;
/// Largest UDP query read.
const MAX_QUERY: usize = 4096;
/// TCP clients at once: each holds at most one message of 64 KiB, 4 MiB in all.
const MAX_TCP: usize = 64;
/// A silent TCP client is closed after this long.
const IDLE: Duration = Duration::from_secs(10);

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// The namespace could not be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// A socket could not be opened.
    #[error("cannot listen for DNS on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Serves `zone` on port 53 of `addresses` inside `netns`, by tasks of `tasks`. Must be called inside a tokio runtime.
pub fn serve(
    tasks: &Tasks,
    netns: &NetNs,
    addresses: &[IpAddr],
    zone: watch::Receiver<Arc<Zone>>,
) -> Result<(), DnsError> {
    let slots = Arc::new(Semaphore::new(MAX_TCP));
    for address in addresses {
        let address = SocketAddr::new(*address, 53);
        let failed = |source| DnsError::Listen { address, source };
        let (udp, tcp) = netns.run(|| open(address))?.map_err(failed)?;
        let udp = UdpSocket::from_std(udp).map_err(failed)?;
        let tcp = TcpListener::from_std(tcp).map_err(failed)?;
        tasks.spawn("dns udp", serve_udp(udp, zone.clone()));
        tasks.spawn("dns tcp", serve_tcp(tcp, zone.clone(), slots.clone(), tasks.clone()));
    }
    Ok(())
}

fn open(address: SocketAddr) -> io::Result<(StdUdpSocket, StdTcpListener)> {
    let udp = StdUdpSocket::bind(address)?;
    udp.set_nonblocking(true)?;
    let tcp = StdTcpListener::bind(address)?;
    tcp.set_nonblocking(true)?;
    Ok((udp, tcp))
}

async fn serve_udp(socket: UdpSocket, zone: watch::Receiver<Arc<Zone>>) {
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        // Errors are those of earlier answers (a client that closed its port): nothing to do about them.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let current = zone.borrow().clone();
        let Some(answer) = reply(&current, &buffer[..length], true) else { continue };
        let _ = socket.send_to(&answer, client).await;
    }
}

async fn serve_tcp(
    listener: TcpListener,
    zone: watch::Receiver<Arc<Zone>>,
    slots: Arc<Semaphore>,
    tasks: Tasks,
) {
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let zone = zone.clone();
                tasks.spawn("dns tcp client", async move {
                    let _slot = slot;
                    let _ = converse(stream, &zone).await;
                });
            }
            // Out of descriptors, at worst: give others time to close some.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn converse(mut stream: TcpStream, zone: &watch::Receiver<Arc<Zone>>) -> io::Result<()> {
    loop {
        let length = tokio::time::timeout(IDLE, stream.read_u16()).await??;
        let mut query = vec![0; usize::from(length)];
        tokio::time::timeout(IDLE, stream.read_exact(&mut query)).await??;
        let current = zone.borrow().clone();
        let Some(answer) = reply(&current, &query, false) else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend(answer);
        tokio::time::timeout(IDLE, stream.write_all(&framed)).await??;
    }
}

/// The bytes to send back. What cannot be read gets no answer, as it may be forged.
fn reply(zone: &Zone, query: &[u8], udp: bool) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok()?;
    let answer = zone.answer(&query)?;
    let bytes = answer.to_vec().ok()?;
    // RFC 6891: without EDNS a client takes 512 bytes.
    let limit = query.edns.as_ref().map_or(512, |edns| edns.max_payload().clamp(512, MAX_UDP));
    if udp && bytes.len() > usize::from(limit) { answer.truncate().to_vec().ok() } else { Some(bytes) }
}
