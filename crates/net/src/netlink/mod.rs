//! A small netlink client: one socket, requests with acknowledgement, dumps. nf_tables and routing sit on it.

pub(crate) mod attr;

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, Type};

use crate::sys;
use attr::Attrs;

pub(crate) const HEADER_LEN: usize = 16;
/// One receive: the kernel never builds a netlink datagram beyond 32 KiB for a dump.
const RECV_BUFFER: usize = 64 * 1024;
/// All answers of one dump together. A pod's own rules are some 10 KiB; beyond this somebody floods us.
const MAX_DUMP_BYTES: usize = 16 * 1024 * 1024;
/// Acknowledgements of one batch wait in the socket: at most `nft::MAX_OPERATIONS` (4096) of about 1 KiB each.
const SOCKET_BUFFER: u32 = 4 * 1024 * 1024;
/// The kernel answers inside the system call; waiting longer than this means that it never will.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump that the kernel says was disturbed by a change is repeated this often.
const DUMP_ATTEMPTS: usize = 8;

pub(crate) const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub(crate) const ACK: u16 = libc::NLM_F_ACK as u16;
pub(crate) const DUMP: u16 = libc::NLM_F_DUMP as u16;
pub(crate) const CREATE: u16 = libc::NLM_F_CREATE as u16;
pub(crate) const EXCL: u16 = libc::NLM_F_EXCL as u16;
pub(crate) const REPLACE: u16 = libc::NLM_F_REPLACE as u16;
pub(crate) const APPEND: u16 = libc::NLM_F_APPEND as u16;
const DUMP_INTERRUPTED: u16 = 0x10;
const ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Message type and payload of each answer to a dump.
pub(crate) type Answers = Vec<(u16, Vec<u8>)>;

/// One message to send: type, flags, the protocol's fixed header, attributes.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub kind: u16,
    pub flags: u16,
    pub fixed: Vec<u8>,
    pub attrs: Attrs,
}

impl Message {
    pub(crate) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        Self { kind, flags: flags | REQUEST, fixed: fixed.to_vec(), attrs: Attrs::default() }
    }

    /// Appends the message to `out` as it goes on the wire.
    pub(crate) fn write(&self, seq: u32, out: &mut Vec<u8>) {
        let len = HEADER_LEN + self.fixed.len() + self.attrs.as_bytes().len();
        out.extend_from_slice(&(len as u32).to_ne_bytes());
        out.extend_from_slice(&self.kind.to_ne_bytes());
        out.extend_from_slice(&self.flags.to_ne_bytes());
        out.extend_from_slice(&seq.to_ne_bytes());
        out.extend_from_slice(&0_u32.to_ne_bytes());
        out.extend_from_slice(&self.fixed);
        out.extend_from_slice(self.attrs.as_bytes());
    }
}

/// One received message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Incoming<'a> {
    pub kind: u16,
    pub flags: u16,
    pub seq: u32,
    pub payload: &'a [u8],
}

impl Incoming<'_> {
    /// The outcome, if this message is an error or an acknowledgement.
    pub(crate) fn outcome(&self) -> Option<Result<(), Refusal>> {
        if self.kind != libc::NLMSG_ERROR as u16 {
            return None;
        }
        let code = self.payload.first_chunk::<4>().map_or(-libc::EPROTO, |b| i32::from_ne_bytes(*b));
        if code == 0 {
            return Some(Ok(()));
        }
        // NETLINK_CAP_ACK is on: after the code comes only the header of the message that failed, then TLVs.
        let detail = (self.flags & ACK_TLVS != 0)
            .then(|| self.payload.get(4 + HEADER_LEN..))
            .flatten()
            .and_then(|tlvs| attr::find(tlvs, NLMSGERR_ATTR_MSG))
            .map(|text| String::from_utf8_lossy(text.strip_suffix(b"\0").unwrap_or(text)).into_owned());
        Some(Err(Refusal { errno: -code, detail }))
    }
}

/// The kernel said no: the errno and, where it gave one, its sentence.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub errno: i32,
    pub detail: Option<String>,
}

impl From<Refusal> for io::Error {
    /// Keeps the errno, by which callers tell refusals apart; the sentence is lost.
    fn from(refusal: Refusal) -> Self {
        io::Error::from_raw_os_error(refusal.errno)
    }
}

/// Splits a datagram into messages; stops at the first malformed one.
pub(crate) fn messages(mut data: &[u8]) -> impl Iterator<Item = Incoming<'_>> {
    std::iter::from_fn(move || {
        let header = data.first_chunk::<HEADER_LEN>()?;
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let payload = data.get(HEADER_LEN..len)?;
        let message = Incoming {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            seq: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            payload,
        };
        data = data.get(attr::align(len)..).unwrap_or_default();
        Some(message)
    })
}

/// One datagram, of at most [`RECV_BUFFER`] bytes.
pub(crate) fn receive(mut socket: &socket2::Socket) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; RECV_BUFFER];
    let n = socket.read(&mut buf)?;
    buf.truncate(n);
    Ok(buf)
}

/// A netlink socket of the namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct NetlinkSocket {
    inner: socket2::Socket,
    seq: u32,
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl NetlinkSocket {
    /// Opens a socket of a netlink family (`NETLINK_ROUTE`, `NETLINK_NETFILTER`) in the current namespace.
    pub(crate) fn open(family: libc::c_int) -> io::Result<Self> {
        let inner =
            socket2::Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(family)))?;
        sys::enable(inner.as_fd(), libc::SOL_NETLINK, libc::NETLINK_CAP_ACK)?;
        sys::enable(inner.as_fd(), libc::SOL_NETLINK, libc::NETLINK_EXT_ACK)?;
        for option in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            sys::set_option(inner.as_fd(), libc::SOL_SOCKET, option, &SOCKET_BUFFER)?;
        }
        inner.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        // Without a port of its own a socket gets answers, but no multicast.
        sys::bind_netlink(inner.as_fd())?;
        Ok(Self { inner, seq: 0 })
    }

    /// Joins a multicast group, so that events of it arrive.
    pub(crate) fn join(&self, group: u32) -> io::Result<()> {
        sys::set_option(self.as_fd(), libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, &group)
    }

    pub(crate) fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.inner.set_nonblocking(nonblocking)
    }

    /// Reserves `count` sequence numbers and returns the first.
    pub(crate) fn sequence(&mut self, count: u32) -> u32 {
        let first = self.seq.wrapping_add(1);
        self.seq = self.seq.wrapping_add(count);
        first
    }

    pub(crate) fn send(&self, data: &[u8]) -> io::Result<()> {
        let sent = self.inner.send(data)?;
        if sent == data.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// One datagram, of at most [`RECV_BUFFER`] bytes.
    pub(crate) fn recv(&self) -> io::Result<Vec<u8>> {
        receive(&self.inner)
    }

    /// The bare socket, to be watched for events.
    pub(crate) fn into_inner(self) -> socket2::Socket {
        self.inner
    }

    /// Sends one request and waits for its acknowledgement.
    pub(crate) fn request(&mut self, message: Message) -> io::Result<()> {
        self.ask(message).map(drop)
    }

    /// Sends one request; what the kernel answers before the acknowledgement.
    pub(crate) fn ask(&mut self, mut message: Message) -> io::Result<Answers> {
        message.flags |= ACK;
        let seq = self.sequence(1);
        let mut out = Vec::new();
        message.write(seq, &mut out);
        self.send(&out)?;
        let mut answers = Vec::new();
        loop {
            let data = self.recv()?;
            for m in messages(&data).filter(|m| m.seq == seq) {
                match m.outcome() {
                    Some(outcome) => return Ok(outcome.map(|()| answers)?),
                    None => answers.push((m.kind, m.payload.to_vec())),
                }
            }
        }
    }

    /// All answers to a dump request, as (message type, payload). A dump during which something changed is repeated.
    pub(crate) fn dump(&mut self, mut message: Message) -> io::Result<Answers> {
        message.flags |= DUMP;
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(answers) = self.dump_once(&message)? {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "the kernel's tables keep changing during a dump"))
    }

    fn dump_once(&mut self, message: &Message) -> io::Result<Option<Answers>> {
        let seq = self.sequence(1);
        let mut out = Vec::new();
        message.write(seq, &mut out);
        self.send(&out)?;
        let (mut answers, mut bytes, mut disturbed) = (Vec::new(), 0, false);
        loop {
            let data = self.recv()?;
            bytes += data.len();
            for m in messages(&data).filter(|m| m.seq == seq) {
                disturbed |= m.flags & DUMP_INTERRUPTED != 0;
                if let Some(outcome) = m.outcome() {
                    outcome?;
                    return Ok(Some(answers));
                }
                if m.kind == libc::NLMSG_DONE as u16 {
                    let code = m.payload.first_chunk::<4>().map_or(0, |b| i32::from_ne_bytes(*b));
                    return match code {
                        0 => Ok((!disturbed).then_some(answers)),
                        code => Err(io::Error::from_raw_os_error(-code)),
                    };
                }
                answers.push((m.kind, m.payload.to_vec()));
            }
            if bytes > MAX_DUMP_BYTES {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a netlink dump exceeds 16 MiB"));
            }
        }
    }
}
