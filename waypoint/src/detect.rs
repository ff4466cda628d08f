//! What is spoken in a tunnel: by what the port says, else by the client's first bytes. A client that says nothing waits for the
//! server to speak first, and is not kept waiting for long.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use culvert_hbone::io::TunnelIo;
use culvert_hbone::server::Incoming;
use culvert_hbone::stream::TunnelStream;
use culvert_model::workload::AppProtocol;
use http::HeaderMap;
use tokio::time::{Instant, timeout_at};

use crate::accept::Asked;
use crate::io::Begun;
use crate::shared::{Shared, Worker};
use crate::{http as requests, tcp};

/// A client that has said nothing for so long leaves it to the server to speak first.
const SILENCE: Duration = Duration::from_millis(100);
/// A client that has begun has so long to say enough to tell what it speaks.
const PATIENCE: Duration = Duration::from_secs(10);
/// The first bytes of HTTP/2 (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest beginning of a TLS stream that is read for its server name: a hello with post-quantum keys has 2 KiB.
const MAX_HELLO: usize = 16 << 10;
/// The longest method that is taken for one where a port does not say what it speaks.
const MAX_METHOD: usize = 20;

/// How a tunnel's bytes are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoken {
    Requests,
    Bytes,
}

/// Serves a tunnel from its CONNECT request to its last byte.
pub async fn serve(shared: Arc<Shared>, worker: Arc<Worker>, asked: Asked, incoming: Incoming) {
    let (spoken, by_name) = {
        let world = shared.state.load();
        (declared(&asked, &world.routes), by_name(&asked, &world.routes))
    };
    match spoken {
        // Whether the destination accepts is what answers the CONNECT, as without a waypoint.
        Some(Spoken::Bytes) if !by_name => tcp::serve_unanswered(shared, worker, asked, incoming).await,
        spoken => {
            let Ok(tunnel) = incoming.accept(HeaderMap::new()) else { return };
            let (tunnel, early, spoken) = match spoken {
                Some(spoken) => (tunnel, Bytes::new(), spoken),
                None => match listen(tunnel).await {
                    Some(heard) => heard,
                    None => return,
                },
            };
            match spoken {
                Spoken::Requests => {
                    let io = Begun::new(early, TunnelIo::new(tunnel));
                    requests::serve(shared, worker, asked, io).await;
                }
                Spoken::Bytes => {
                    let (tunnel, early, name) = match by_name {
                        true => server_name(tunnel, early).await,
                        false => (tunnel, early, None),
                    };
                    tcp::serve(shared, worker, asked, tunnel, (early, name)).await;
                }
            }
        }
    }
}

/// What the port and its routes say; `None` where nothing does.
fn declared(asked: &Asked, routes: &culvert_model::route::Routes) -> Option<Spoken> {
    if let Some(service) = asked.target.service() {
        let client = asked.peer.facts.identity.namespace();
        // A port that has routes of only one sort is of that sort.
        match routes.kinds(&service.key, asked.target.port(), Some(client)) {
            (false, true) => return Some(Spoken::Bytes),
            (true, false) if asked.target.protocol() == AppProtocol::Unknown => {
                return Some(Spoken::Requests);
            }
            _ => {}
        }
    }
    match asked.target.protocol() {
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => Some(Spoken::Requests),
        AppProtocol::Tcp | AppProtocol::Tls => Some(Spoken::Bytes),
        AppProtocol::Unknown => None,
    }
}

/// Whether a stream's route is told by its server name.
fn by_name(asked: &Asked, routes: &culvert_model::route::Routes) -> bool {
    let client = asked.peer.facts.identity.namespace();
    asked
        .target
        .service()
        .is_some_and(|service| routes.wants_server_name(&service.key, asked.target.port(), Some(client)))
}

/// Reads a stream until the server name that its client asks for is known; `None` where it is no TLS, or asks for none.
async fn server_name(tunnel: TunnelStream, early: Bytes) -> (TunnelStream, Bytes, Option<String>) {
    let (mut recv, send) = tunnel.split();
    let mut early = BytesMut::from(&early[..]);
    let until = Instant::now() + PATIENCE;
    let mut hello = rustls::server::Acceptor::default();
    let mut fed = 0;
    let name = loop {
        let mut rest = &early[fed..];
        while !rest.is_empty() && hello.read_tls(&mut rest).is_ok_and(|read| read > 0) {}
        fed = early.len() - rest.len();
        match hello.accept() {
            Ok(Some(accepted)) => break accepted.client_hello().server_name().map(str::to_owned),
            Ok(None) if early.len() < MAX_HELLO => {}
            Ok(None) | Err(_) => break None,
        }
        match timeout_at(until, recv.recv()).await {
            Ok(Ok(Some(bytes))) => {
                recv.release(bytes.len());
                early.extend_from_slice(&bytes);
            }
            _ => break None,
        }
    };
    (TunnelStream::join(recv, send), early.freeze(), name)
}

/// Listens to the client's first bytes. `None` when it is gone before it said anything.
async fn listen(tunnel: TunnelStream) -> Option<(TunnelStream, Bytes, Spoken)> {
    let (mut recv, send) = tunnel.split();
    let mut early = BytesMut::new();
    let mut until = Instant::now() + SILENCE;
    let spoken = loop {
        if let Some(spoken) = sounds_like(&early) {
            break spoken;
        }
        match timeout_at(until, recv.recv()).await {
            Ok(Ok(Some(bytes))) => {
                if early.is_empty() {
                    until = Instant::now() + PATIENCE;
                }
                // Released at once: what is held here is one frame or two at most.
                recv.release(bytes.len());
                early.extend_from_slice(&bytes);
            }
            Ok(Err(_)) => return None,
            // It said all that it will, or nothing yet.
            Ok(Ok(None)) | Err(_) => break Spoken::Bytes,
        }
    };
    Some((TunnelStream::join(recv, send), early.freeze(), spoken))
}

/// `None` where it takes more to tell.
fn sounds_like(early: &[u8]) -> Option<Spoken> {
    if early.is_empty() {
        return None;
    }
    let common = early.len().min(PREFACE.len());
    if early[..common] == PREFACE[..common] {
        return (common == PREFACE.len()).then_some(Spoken::Requests);
    }
    // A method in capitals, a space, and the beginning of a target.
    let method = early.iter().take_while(|b| b.is_ascii_uppercase() || **b == b'-').count();
    match (method, early.get(method), early.get(method + 1)) {
        (0, ..) => Some(Spoken::Bytes),
        (longer, ..) if longer > MAX_METHOD => Some(Spoken::Bytes),
        (_, None, _) | (_, Some(b' '), None) => None,
        (_, Some(b' '), Some(b'/' | b'*' | b'h' | b'H')) => Some(Spoken::Requests),
        _ => Some(Spoken::Bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        for (early, expected) in [
            (&b""[..], None),
            (b"G", None),
            (b"GET", None),
            (b"GET ", None),
            (b"GET /", Some(Spoken::Requests)),
            (b"OPTIONS * HTTP/1.1", Some(Spoken::Requests)),
            (b"GET http://a/ HTTP/1.1", Some(Spoken::Requests)),
            (b"PRI", None),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", None),
            (PREFACE, Some(Spoken::Requests)),
            (b"PRI * HTTP/1.1", Some(Spoken::Requests)),
            (b"\x16\x03\x01", Some(Spoken::Bytes)),
            (b"get /", Some(Spoken::Bytes)),
            (b"HELO example", Some(Spoken::Bytes)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ /", Some(Spoken::Bytes)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Spoken::Bytes)),
        ] {
            assert_eq!(sounds_like(early), expected, "{:?}", String::from_utf8_lossy(early));
        }
    }
}
