//! Listeners that share a port and come and go. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::SOON;
use culvert_net::NetNs;
use culvert_net::socket::{ListenOptions, listen_tcp, migrate_when_closed};

/// Connections that are made and not accepted, in the queues of both listeners: the chance that all are in the new one's is 2^-64.
const WAITING: usize = 64;

/// Z10: who has connected to a proxy that goes is served by the one that comes.
#[test]
fn what_waits_at_a_listener_goes_to_its_successor() {
    let ns = NetNs::create().unwrap();
    common::ip(&ns, "link set lo up");
    ns.run(|| -> std::io::Result<()> {
        migrate_when_closed().unwrap();
        let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
        let address = "127.0.0.1:15001".parse().unwrap();
        let old = listen_tcp(address, &options)?;
        let new = listen_tcp(address, &options)?;
        let clients: Vec<_> = (0..WAITING).map(|_| TcpStream::connect(address).unwrap()).collect();
        drop(old);
        new.set_nonblocking(false)?;
        socket2::SockRef::from(&new).set_read_timeout(Some(SOON))?;
        for _ in 0..WAITING {
            let (mut served, _) = new.accept()?;
            served.write_all(b"hello")?;
        }
        for mut client in clients {
            client.set_read_timeout(Some(SOON))?;
            client.read_exact(&mut [0; 5])?;
        }
        Ok(())
    })
    .unwrap();
}
