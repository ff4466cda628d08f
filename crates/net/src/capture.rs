//! Counting packets on an interface, to prove what is on the wire and what is not.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::NetNs;
use crate::sys;

/// Longest packet that is looked at whole: the largest that segmentation offload makes (BIG TCP).
const PACKET_BUFFER: usize = 512 * 1024;
/// Packets wait here for the thread: a burst of 1 GB/s for 60 ms.
const SOCKET_BUFFER: u32 = 64 * 1024 * 1024;
/// How often the thread looks whether it should stop.
const STOP_INTERVAL: Duration = Duration::from_millis(20);
/// How long after a stop packets are still taken in, if they never pause.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// Most markers searched for; each costs one pass over each packet.
const MAX_MARKERS: usize = 16;

/// What to look for.
#[derive(Clone, Debug, Default)]
pub struct CaptureOptions {
    markers: Vec<Vec<u8>>,
    keep: usize,
}

impl CaptureOptions {
    /// Counts the packets that hold these bytes. A marker that is split over two packets is not found, so let it be short
    /// against a segment and sent by one write.
    #[must_use]
    pub fn marker(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.markers.push(bytes.into());
        self
    }

    /// Keeps whole packets, up to this many bytes together.
    #[must_use]
    pub fn keep(mut self, bytes: usize) -> Self {
        self.keep = bytes;
        self
    }
}

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptureReport {
    /// Packets, those sent and those received.
    pub packets: u64,
    /// Their bytes, with link-layer headers.
    pub bytes: u64,
    /// Packets the kernel had no room for. Unless it is 0, "not seen" proves nothing.
    pub dropped: u64,
    /// For each marker, the packets that held it; 0 is there too.
    pub marker_hits: HashMap<Vec<u8>, u64>,
    /// For each TCP port, packets from or to it. At most 65536 entries of 16 bytes, so 1 MiB.
    pub port_packets: HashMap<u16, u64>,
    /// Whole packets, as far as [`CaptureOptions::keep`] allowed.
    pub kept: Vec<Vec<u8>>,
}

impl CaptureReport {
    /// Packets that held a marker.
    #[must_use]
    pub fn hits(&self, marker: &[u8]) -> u64 {
        self.marker_hits.get(marker).copied().unwrap_or(0)
    }

    /// Packets from or to a TCP port.
    #[must_use]
    pub fn port(&self, port: u16) -> u64 {
        self.port_packets.get(&port).copied().unwrap_or(0)
    }
}

/// A capture that runs on a thread of its own until it is stopped or dropped.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<CaptureReport>>,
}

impl Capture {
    /// Starts to capture on an interface of a namespace, both directions. On a bridge this sees what the bridge forwards.
    /// Everything sent after this returns is seen. On `lo` each packet is seen twice, leaving and arriving.
    ///
    /// # Errors
    /// `ENODEV` for an unknown interface; `EPERM` without `CAP_NET_RAW`; `InvalidInput` for more than 16 markers.
    pub fn start(ns: &NetNs, interface: &str, options: CaptureOptions) -> io::Result<Self> {
        if options.markers.len() > MAX_MARKERS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "at most 16 markers"));
        }
        let socket = ns.run(|| open(interface))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("capture".into())
            .spawn(move || collect(&socket, &options, &stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Stops, after taking in what has arrived, and tells what was seen. Blocks for some 20 ms, at
    /// most one second where packets never pause.
    ///
    /// # Errors
    /// If the thread panicked.
    pub fn stop(mut self) -> io::Result<CaptureReport> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().expect("only stop and drop take the thread");
        thread.join().map_err(|_| io::Error::other("the capture thread panicked"))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn open(interface: &str) -> io::Result<Socket> {
    let index = sys::interface_index(interface)?;
    // Protocol 0 receives nothing yet; the bind below starts it on the one interface, so no other's packets slip in.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &SOCKET_BUFFER)?;
    // A bridge hands up what it forwards only in promiscuous mode.
    let promiscuous = libc::packet_mreq {
        mr_ifindex: index,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    sys::set_option(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &promiscuous)?;
    socket.set_read_timeout(Some(STOP_INTERVAL))?;
    sys::bind_packet(socket.as_fd(), index)?;
    Ok(socket)
}

fn collect(socket: &Socket, options: &CaptureOptions, stop: &AtomicBool) -> CaptureReport {
    let mut report = CaptureReport::default();
    for marker in &options.markers {
        report.marker_hits.insert(marker.clone(), 0);
    }
    let mut buf = vec![0; PACKET_BUFFER];
    let mut room = options.keep;
    let mut deadline = None;
    loop {
        // Read before the receive: what arrived before the stop is then still taken in.
        let stopping = stop.load(Ordering::Acquire);
        if stopping && *deadline.get_or_insert_with(|| Instant::now() + STOP_LIMIT) < Instant::now() {
            break;
        }
        match sys::recv_trunc(socket.as_fd(), &mut buf) {
            Ok(len) => {
                let packet = &buf[..len.min(PACKET_BUFFER)];
                count(&mut report, packet, len);
                if let Some(left) = room.checked_sub(packet.len()).filter(|_| options.keep > 0) {
                    room = left;
                    report.kept.push(packet.to_vec());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if stopping {
                    break;
                }
            }
            // The interface went down or away: there is nothing more to see, unless it comes back.
            Err(_) if stopping => break,
            Err(_) => thread::park_timeout(STOP_INTERVAL),
        }
    }
    let stats =
        sys::get_option::<libc::tpacket_stats>(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS);
    report.dropped = stats.map_or(0, |s| s.tp_drops.into());
    report
}

fn count(report: &mut CaptureReport, packet: &[u8], len: usize) {
    report.packets += 1;
    report.bytes += len as u64;
    for (marker, hits) in &mut report.marker_hits {
        *hits += u64::from(sys::contains(packet, marker));
    }
    if let Some((from, to)) = tcp_ports(packet) {
        *report.port_packets.entry(from).or_default() += 1;
        if from != to {
            *report.port_packets.entry(to).or_default() += 1;
        }
    }
}

/// Source and destination port of a TCP segment in an Ethernet frame. IPv6 extension headers are not followed: TCP does
/// not come behind one in practice.
fn tcp_ports(frame: &[u8]) -> Option<(u16, u16)> {
    let packet = frame.get(14..)?;
    let tcp = match (frame[12], frame[13]) {
        (0x08, 0x00) => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            // Only the first fragment has the ports.
            let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1fff;
            (*packet.get(9)? == libc::IPPROTO_TCP as u8 && fragment == 0).then(|| packet.get(header..))??
        }
        (0x86, 0xdd) => (*packet.get(6)? == libc::IPPROTO_TCP as u8).then(|| packet.get(40..))??,
        _ => return None,
    };
    let ports = tcp.first_chunk::<4>()?;
    Some((u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reading_ports_never_panics(frame: Vec<u8>) {
            let _ = tcp_ports(&frame);
        }
    }
}
