//! How much of a tunnel the kernel may queue: what waits there goes before a small message of another stream.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use crate::sys;

/// Bytes written and not yet sent, at most, beside what one write brings. The kernel's own limit is megabytes.
const UNSENT: u32 = 128 << 10;
/// Smallest receive buffer: holds what comes while the reader waits 1 ms for its turn at 1 GB/s.
const LEAST: u64 = 1 << 20;
/// Paths that need more are long: there the queue is in the network, and the kernel's own tuning does better than we.
const MOST: u64 = 4 << 20;
/// Bytes a second that a tunnel shall reach: 10 Gbit/s.
const RATE: u64 = 1_250_000_000;

/// Keeps the queues of a connected socket that carries many streams short: at most 128 KiB unsent, and a receive buffer of what
/// 10 Gbit/s has in flight over this path, from 1 MiB to 4 MiB by the round trip time that the handshake took. Beyond that the
/// kernel goes on tuning it (to 6 MB, or what `net.ipv4.tcp_rmem` says).
///
/// # Errors
/// Only if the descriptor is not a TCP socket.
pub fn tune_tunnel(stream: &impl AsFd) -> io::Result<()> {
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)?;
    let Some(buffer) = receive_buffer(super::tcp_info(stream)?.rtt) else { return Ok(()) };
    // Forced past `net.core.rmem_max`, which is 208 KiB where nobody changed it. The kernel doubles it for its own overhead.
    if sys::set_option(stream.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &buffer).is_err() {
        // Without CAP_NET_ADMIN: no limit is better than one that is too small.
        return Ok(());
    }
    Ok(())
}

/// None: leave it to the kernel.
fn receive_buffer(round_trip: Duration) -> Option<u32> {
    let in_flight =
        u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX).saturating_mul(RATE / 1_000_000);
    (in_flight <= MOST).then(|| u32::try_from(in_flight.max(LEAST)).expect("at most 4 MiB"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_buffer_follows_the_path() {
        assert_eq!(receive_buffer(Duration::ZERO), Some(1 << 20));
        assert_eq!(receive_buffer(Duration::from_millis(2)), Some(2_500_000));
        assert_eq!(receive_buffer(Duration::from_millis(50)), None);
        assert_eq!(receive_buffer(Duration::MAX), None);
    }

    /// What a reader does not read: bounded by us, not by the kernel's megabytes. As root only.
    #[test]
    fn little_is_queued() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        for stream in [&near, &far] {
            tune_tunnel(stream).unwrap();
        }
        near.set_nonblocking(true).unwrap();
        let (chunk, mut queued) = (vec![0; 64 << 10], 0);
        let blocked = loop {
            match near.write(&chunk) {
                Ok(n) => queued += n,
                Err(error) => break error,
            }
        };
        assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
        assert!(queued >= 512 << 10, "{queued}: a turn's worth fits");
        assert!(queued <= 5 << 19, "{queued}: the receive buffer, what is unsent, and one write");
    }
}
