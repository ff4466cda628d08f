//! What the kernel knows about a TCP connection.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use crate::sys;

/// State of a TCP connection, in the kernel's numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the states of RFC 9293, section 3.3.2")]
pub enum TcpState {
    Established = 1,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Closed,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    /// A state this list does not know.
    Other,
}

impl From<u8> for TcpState {
    fn from(value: u8) -> Self {
        use TcpState as S;
        const ALL: [S; 11] = [
            S::Established,
            S::SynSent,
            S::SynReceived,
            S::FinWait1,
            S::FinWait2,
            S::TimeWait,
            S::Closed,
            S::CloseWait,
            S::LastAck,
            S::Listen,
            S::Closing,
        ];
        ALL.into_iter().find(|s| *s as u8 == value).unwrap_or(S::Other)
    }
}

/// A picture of a connection at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// Where in its life the connection is.
    pub state: TcpState,
    /// Smoothed round trip time.
    pub rtt: Duration,
    /// Its mean deviation.
    pub rttvar: Duration,
    /// Segments sent again since the connection began.
    pub retrans: u32,
    /// Segments considered lost now.
    pub lost: u32,
    /// Segments sent and not yet acknowledged.
    pub unacked: u32,
    /// Congestion window, in segments.
    pub cwnd: u32,
    /// Largest segment we send, in bytes.
    pub mss: u32,
}

/// Reads `TCP_INFO`.
///
/// # Errors
/// If the descriptor is not a TCP socket.
pub fn tcp_info(socket: &impl AsFd) -> io::Result<TcpInfo> {
    let raw: libc::tcp_info = sys::get_option(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO)?;
    Ok(TcpInfo {
        state: TcpState::from(raw.tcpi_state),
        rtt: Duration::from_micros(raw.tcpi_rtt.into()),
        rttvar: Duration::from_micros(raw.tcpi_rttvar.into()),
        retrans: raw.tcpi_total_retrans,
        lost: raw.tcpi_lost,
        unacked: raw.tcpi_unacked,
        cwnd: raw.tcpi_snd_cwnd,
        mss: raw.tcpi_snd_mss,
    })
}
