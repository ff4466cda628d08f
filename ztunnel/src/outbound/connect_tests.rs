use std::io;
use std::time::Duration;

use culvert_hbone::error::{HandshakeError, LostCause};
use http::{HeaderMap, StatusCode};

use super::*;

fn peer() -> SocketAddr {
    "100.64.2.9:15008".parse().unwrap()
}

fn dialled(error: DialError) -> (Reason, bool, String) {
    let to = match &error {
        DialError::Refused(to)
        | DialError::Unreachable(to, _)
        | DialError::TimedOut(to)
        | DialError::Exhausted(to, _)
        | DialError::Other(to, _) => *to,
    };
    let error = HopError::dial(&error, to);
    (error.failure.reason, error.another_may_do, error.failure.detail)
}

fn opened(error: OpenError<Failure>) -> (Reason, bool) {
    let error = HopError::tunnel(error, peer());
    (error.failure.reason, error.another_may_do)
}

/// Why a connection was not made is told apart, and every such endpoint may be passed over.
#[test]
fn dials() {
    let app: SocketAddr = "100.64.2.9:8080".parse().unwrap();
    let error = || io::Error::other("why");
    for (failed, reason) in [
        (DialError::Refused(app), Reason::ConnectionRefused),
        (DialError::Unreachable(app, error()), Reason::Unreachable),
        (DialError::TimedOut(app), Reason::ConnectTimeout),
        (DialError::Other(app, error()), Reason::Internal),
    ] {
        let (told, another_may_do, detail) = dialled(failed);
        assert_eq!((told, another_may_do), (reason, true));
        assert!(!detail.contains("NetworkPolicy"), "{detail}");
    }
}

/// Z25: a tunnel's port that does not answer is most often closed by a NetworkPolicy.
#[test]
fn the_usual_cause_is_named() {
    let (reason, _, detail) = dialled(DialError::TimedOut(peer()));
    assert_eq!(reason, Reason::ConnectTimeout);
    assert!(detail.contains("NetworkPolicy") && detail.contains("15008"), "{detail}");
    assert_eq!(reason.response_flag(), "NETWORK_POLICY");
}

/// Z20: what the peer's status means; only a destination that did not accept may be passed over for another.
#[test]
fn statuses() {
    for (status, reason, another_may_do) in [
        (400, Reason::TunnelRefused, false),
        (401, Reason::AuthorizationPolicy, false),
        (403, Reason::AuthorizationPolicy, false),
        (500, Reason::TunnelRefused, false),
        (503, Reason::ConnectionRefused, true),
    ] {
        let status = StatusCode::from_u16(status).unwrap();
        let refused = ConnectError::Refused { status, headers: Box::new(HeaderMap::new()) };
        assert_eq!(opened(OpenError::Connect(refused)), (reason, another_may_do), "{status}");
    }
}

/// What the peer may have acted on is not done twice (RFC 9113 section 8.7).
#[test]
fn lost_tunnels() {
    let lost = |unprocessed| ConnectError::ConnectionLost {
        cause: LostCause::Transport(io::ErrorKind::ConnectionReset),
        unprocessed,
    };
    for (error, another_may_do) in [
        (lost(true), true),
        (lost(false), false),
        (ConnectError::Reset(h2::Reason::REFUSED_STREAM), true),
        (ConnectError::Reset(h2::Reason::CANCEL), false),
        (ConnectError::Timeout(Duration::from_secs(15)), false),
        (ConnectError::Busy(100), true),
    ] {
        let text = error.to_string();
        assert_eq!(opened(OpenError::Connect(error)), (Reason::TunnelLost, another_may_do), "{text}");
    }
}

/// What goes wrong before a stream is asked for.
#[test]
fn no_connection() {
    let dial = Failure::new(Reason::PeerIdentity, "somebody else");
    assert_eq!(opened(OpenError::Dial(Arc::new(dial))), (Reason::PeerIdentity, true));
    let handshake = HandshakeError::Timeout(Duration::from_secs(10));
    assert_eq!(opened(OpenError::Handshake(handshake)), (Reason::Http2Handshake, true));
    assert_eq!(opened(OpenError::Exhausted(16_384)), (Reason::Overloaded, false));
    assert_eq!(opened(OpenError::Draining), (Reason::Draining, false));
}

/// Bounds that are reached on the way are counted as such, whoever meets them.
#[test]
fn bounds_are_named() {
    let to = peer();
    let dialled = HopError::dial(&DialError::Exhausted(to, io::Error::other("no descriptors")), to);
    assert_eq!((dialled.failure.limit, dialled.another_may_do), (Some(Limit::Descriptors), false));
    assert_eq!(dialled.failure.reason, Reason::Overloaded);
    let tunnel = |error| HopError::tunnel(error, to).failure.limit;
    assert_eq!(tunnel(OpenError::Exhausted(16_384)), Some(Limit::Tunnels));
    let handshake = HandshakeError::Timeout(Duration::from_secs(10));
    assert_eq!(tunnel(OpenError::Handshake(handshake)), Some(Limit::HandshakeTime));
    let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    let refused = ConnectError::Refused { status, headers: Box::new(HeaderMap::new()) };
    assert_eq!(tunnel(OpenError::Connect(refused)), Some(Limit::Headers));
    assert_eq!(tunnel(OpenError::Draining), None);
}

/// A tunnel that was dialled for this connection shows when TCP and TLS stood; one that stood before shows neither.
#[test]
fn the_phases_of_a_dial() {
    let mut flow = Flow::new(crate::observe::Direction::Outbound, peer(), peer());
    DialTimes::new(&flow).write(&mut flow);
    assert_eq!((flow.phase(Phase::Connect), flow.phase(Phase::Handshake)), (None, None));
    let times = DialTimes::new(&flow);
    times.note(&times.connect);
    times.note(&times.handshake);
    times.write(&mut flow);
    let (connect, handshake) = (flow.phase(Phase::Connect), flow.phase(Phase::Handshake));
    assert!(connect.is_some() && connect <= handshake && handshake <= Some(flow.elapsed()));
}

/// What breaks a handshake is TLS's fault; that the peer is somebody else is told apart in `gateway`'s tests.
#[test]
fn tls_errors() {
    let broken = io::Error::new(io::ErrorKind::InvalidData, rustls::Error::HandshakeNotComplete);
    assert_eq!(tls_failure(&broken, &peer()).reason, Reason::TlsHandshake);
    let cut = io::Error::from(io::ErrorKind::UnexpectedEof);
    assert_eq!(tls_failure(&cut, &peer()).reason, Reason::TlsHandshake);
}
