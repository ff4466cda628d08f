//! The servers of a resolv.conf (Z82): where queries go if nobody says otherwise.

use std::net::{IpAddr, SocketAddr};

/// As many as the usual resolvers read: resolv.conf(5), `MAXNS`.
const MAX_SERVERS: usize = 3;
const PORT: u16 = 53;

/// The servers that `text` names, in order. A zone of a link-local address, and lines that say anything else, are left out.
pub fn servers(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let server = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        server.parse::<IpAddr>().ok()
    };
    text.lines().filter_map(address).take(MAX_SERVERS).map(|ip| SocketAddr::new(ip, PORT)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Z82: what the proxy's own resolver asks, in the order in which it asks.
    #[test]
    fn servers_in_order() {
        let text = "# made by hand\nsearch a.example\nnameserver 192.0.2.1\n\tnameserver\tfd00::1 # second\n\
            nameserver fe80::1%eth0\nnameserver nonsense\nnameserver\nnameservers 192.0.2.9\noptions ndots:5\n\
            nameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        let found: Vec<_> = servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[fd00::1]:53", "192.0.2.3:53"]);
        assert!(servers("").is_empty());
    }
}
