//! The vocabulary of reasons, against the page that explains it to people.

use std::collections::BTreeMap;

use culvert_model::outcome::{Blame, Reason};

const PAGE: &str = include_str!("../../../../docs/reference/reasons.md");

const ALL: [Reason; 29] = [
    Reason::UnknownSource,
    Reason::SelfCall,
    Reason::NoHealthyUpstream,
    Reason::UnknownPort,
    Reason::UnknownWaypoint,
    Reason::UnknownNetworkGateway,
    Reason::UnsupportedProtocol,
    Reason::WrongDestination,
    Reason::BadRequest,
    Reason::AuthorizationPolicy,
    Reason::AuthorizationPolicyLate,
    Reason::PolicyUnavailable,
    Reason::WaypointRequired,
    Reason::NetworkPolicy,
    Reason::NoCertificate,
    Reason::TlsHandshake,
    Reason::PeerIdentity,
    Reason::Http2Handshake,
    Reason::TunnelRefused,
    Reason::ConnectionRefused,
    Reason::Unreachable,
    Reason::ConnectTimeout,
    Reason::TunnelLost,
    Reason::ClientReset,
    Reason::UpstreamReset,
    Reason::Overloaded,
    Reason::Draining,
    Reason::IdleTimeout,
    Reason::Internal,
];

/// Z106: name, who has to act and Istio's flag are what the page says, for every reason and no other.
#[test]
fn the_page_says_what_is_reported() {
    let rows: BTreeMap<&str, (&str, &str)> = PAGE
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
            (cells.len() == 6 && line.starts_with("| `")).then(|| (cells[1], (cells[3], cells[4])))
        })
        .collect();
    assert_eq!(rows.len(), ALL.len(), "a row for each reason: {:?}", rows.keys());
    for reason in ALL {
        let (blame, flag) = rows.get(reason.as_str()).unwrap_or_else(|| panic!("no row for {reason:?}"));
        assert_eq!(reason.response_flag(), *flag, "{reason}");
        let said = match reason.blame() {
            Blame::Client => "client",
            Blame::Upstream => "upstream",
            Blame::Policy => "policy",
            Blame::Us => "us",
        };
        assert_eq!(said, *blame, "{reason}");
        assert_eq!(reason.to_string(), reason.as_str());
    }
}
