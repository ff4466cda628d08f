//! TCP stays TCP: every conversation is had twice, between two pods of the mesh and between two pods outside of it on the
//! same two nodes, over IPv4 and IPv6, and both must have seen the same.
//!
//! Needs root. `CULVERT_E2E_BULK_MIB` changes how much goes each way in the bulk check; 1024 by default.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::{BANNER_PORT, CLOSE_PORT, COMMAND_PORT, NOBODY_PORT, RESET_PORT};
use culvert_e2e::world::{Family, Pod, World};
use serde_json::{Value, json};

/// Outside of the mesh.
const DIRECT: Side = Side { client: Pod("plain", "client"), server: Pod("plain", "server") };
/// In it.
const MESH: Side = Side { client: Pod("mesh", "client"), server: Pod("mesh", "server") };
/// In it, client and server on one node.
const NEAR: Side = Side { client: Pod("mesh", "client"), server: Pod("mesh", "near") };
/// More than all the buffers on the way, so that a writer must block.
const SLOW_BYTES: u64 = 256 * 1024 * 1024;
/// All that may be under way to somebody who does not read: the kernel's buffers of three connections at about 10 MiB
/// (4 to send, 6 to receive) and the tunnel's windows.
const MOST_BUFFERED: u64 = 64 * 1024 * 1024;
/// A connection attempt may take no longer than the proxy's own connect timeout of 10 s and a little.
const CONNECT_MS: u64 = 12_000;

#[derive(Clone, Copy)]
struct Side {
    client: Pod,
    server: Pod,
}

/// A conversation that the server takes part in.
struct Talk {
    verb: &'static str,
    port: u16,
    number: u64,
    /// Whether the server tells what it saw.
    told: bool,
}

impl Talk {
    fn new(verb: &'static str) -> Self {
        Self { verb, port: COMMAND_PORT, number: 0, told: true }
    }

    fn number(self, number: u64) -> Self {
        Self { number, ..self }
    }

    fn port(self, port: u16) -> Self {
        Self { port, ..self }
    }

    fn untold(self) -> Self {
        Self { told: false, ..self }
    }

    /// What both ends saw.
    fn had(&self, world: &World, side: Side, family: Family) -> Result<Value> {
        let target = SocketAddr::new(world.address(side.server, family)?, self.port);
        self.had_with(world, side, target, &format!("{}-{family:?}", self.verb))
    }

    fn had_with(&self, world: &World, side: Side, target: SocketAddr, id: &str) -> Result<Value> {
        let number = self.number.to_string();
        let args = ["talk", self.verb, &target.to_string(), "--id", id, "--number", &number];
        let client = world.peer(side.client, &args)?;
        let mut server = if self.told { world.server_says(side.server, id)? } else { Value::Null };
        server.as_object_mut().map(|fields| fields.remove("id"));
        Ok(json!({"client": client, "server": server}))
    }
}

/// The same both ways, and as `holds` says.
fn compare(world: &World, talk: &Talk, family: Family, holds: impl Fn(&Value) -> Result<()>) -> Result<()> {
    let direct = talk.had(world, DIRECT, family).context("direct")?;
    holds(&direct).with_context(|| format!("direct: {direct}"))?;
    let mesh = talk.had(world, MESH, family).context("mesh")?;
    holds(&mesh).with_context(|| format!("mesh: {mesh}"))?;
    ensure!(direct == mesh, "\n    direct {direct}\n    mesh   {mesh}");
    Ok(())
}

/// The field at `path` is `wanted`.
fn is(seen: &Value, path: &str, wanted: impl Into<Value>) -> Result<()> {
    let wanted = wanted.into();
    let found = seen.pointer(path).unwrap_or(&Value::Null);
    ensure!(*found == wanted, "{path} is {found}, not {wanted}");
    Ok(())
}

/// What one end sent is what the other received.
fn arrived(seen: &Value, from: &str, to: &str) -> Result<()> {
    let (sent, received) = (&seen[from]["sent"], &seen[to]["received"]);
    ensure!(sent.is_object() && sent == received, "{from} sent {sent}, {to} received {received}");
    Ok(())
}

fn both_arrived(seen: &Value) -> Result<()> {
    for (from, to) in [("client", "server"), ("server", "client")] {
        arrived(seen, from, to)?;
        is(seen, &format!("/{from}/write"), "ok")?;
        is(seen, &format!("/{from}/end"), "eof")?;
    }
    Ok(())
}

fn half_closes(world: &World, family: Family, checks: &mut Checks) {
    // asserts Z27
    for verb in ["half-close-client", "half-close-server"] {
        checks
            .check(&format!("{family:?} {verb}"), || compare(world, &Talk::new(verb), family, both_arrived));
    }
}

fn resets(world: &World, family: Family, checks: &mut Checks) {
    let cases = [
        ("reset-by-client", "/server/end"),
        ("reset-by-client-upload", "/server/end"),
        ("reset-by-client-download", "/server/write"),
        ("reset-by-server", "/client/end"),
        ("reset-by-server-upload", "/client/write"),
        ("reset-by-server-download", "/client/end"),
        ("reset-after-fin", "/client/end"),
        ("fin-then-reset", "/server/end"),
    ];
    for (verb, where_seen) in cases {
        // The client's conversation decides by its verb what it asks the server for.
        checks.check(&format!("{family:?} {verb}"), || {
            compare(world, &Talk::new(verb), family, |seen| is(seen, where_seen, "ECONNRESET"))
        });
    }
    checks.check(&format!("{family:?} a client that has left for good is noticed by a writer"), || {
        compare(world, &Talk::new("leave"), family, |seen| is(seen, "/server/write", "EPIPE"))
    });
    checks.check(&format!("{family:?} reset right after the accept"), || {
        let talk = Talk::new("first-byte").port(RESET_PORT).untold();
        let seen = talk.had(world, MESH, family)?;
        is(&seen, "/client/first", "ECONNRESET").with_context(|| seen.to_string())
    });
    checks.check(&format!("{family:?} closed right after the accept"), || {
        let talk = Talk::new("first-byte").port(CLOSE_PORT).untold();
        let seen = talk.had(world, MESH, family)?;
        is(&seen, "/client/first", "eof").with_context(|| seen.to_string())
    });
}

fn speaking_and_silence(world: &World, family: Family, checks: &mut Checks) {
    checks.check(&format!("{family:?} the server speaks first"), || {
        compare(world, &Talk::new("server-first").port(BANNER_PORT), family, |seen| {
            is(seen, "/client/reply", "250 ")?;
            is(seen, "/client/end", "eof")
        })
    });
    checks.check(&format!("{family:?} 1,000 idle connections still work"), || {
        compare(world, &Talk::new("idle").number(1000).untold(), family, |seen| {
            is(seen, "/client/alive", 1000)
        })
    });
}

fn slow_readers(world: &World, family: Family, checks: &mut Checks) {
    let cases = [("slow-reader", "client", "server"), ("slow-read", "server", "client")];
    for (verb, from, to) in cases {
        checks.check(&format!("{family:?} {verb}: the writer blocks, another conversation does not"), || {
            let talk = Talk::new(verb).number(SLOW_BYTES);
            for side in [DIRECT, MESH] {
                let seen = talk.had(world, side, family)?;
                let holds = || {
                    is(&seen, "/client/blocked", true)?;
                    is(&seen, "/client/lively", true)?;
                    let buffered = seen["client"]["blocked_at"].as_u64().context("blocked_at")?;
                    ensure!(buffered <= MOST_BUFFERED, "{buffered} bytes were taken from the writer");
                    arrived(&seen, from, to)?;
                    is(&seen, &format!("/{from}/sent/bytes"), SLOW_BYTES)?;
                    is(&seen, &format!("/{from}/write"), "ok")?;
                    is(&seen, &format!("/{to}/end"), "eof")
                };
                holds().with_context(|| format!("{:?}: {seen}", side.client))?;
            }
            Ok(())
        });
    }
}

/// A refusal is a refusal: by the kernel at once, or after the proxy's accept by a reset before any byte; never an end.
fn refused(seen: &Value) -> Result<()> {
    let client = &seen["client"];
    let refused = client["connect"] == "ECONNREFUSED";
    let reset = client["connect"] == "ok" && client["first"] == "ECONNRESET";
    ensure!(refused || reset, "not refused: {client}");
    Ok(())
}

fn nobody_there(world: &World, family: Family, checks: &mut Checks) {
    // asserts Z25
    let talk = Talk::new("first-byte").port(NOBODY_PORT).untold();
    for (name, side) in [("directly", DIRECT), ("through the mesh", MESH)] {
        checks.check(&format!("{family:?} a port that refuses, {name}"), || {
            refused(&talk.had(world, side, family)?)
        });
        checks.check(&format!("{family:?} an address that nobody has, {name}"), || {
            let nobody = match family {
                Family::V4 => "100.64.2.250:9000",
                Family::V6 => "[fd00:64:2::fa]:9000",
            };
            let seen = talk.had_with(world, side, nobody.parse()?, "nobody")?;
            let client = &seen["client"];
            let failed = client["connect"] != "ok" || client["first"] == "ECONNRESET";
            ensure!(failed, "somebody was there: {client}");
            let took = client["ms"].as_u64().context("ms")?;
            ensure!(took <= CONNECT_MS, "it took {took} ms");
            Ok(())
        });
    }
    checks.check(&format!("{family:?} refused through the service's address"), || {
        let service = world.service_address("mesh", "refusing", family)?;
        let target = SocketAddr::new(service, COMMAND_PORT);
        refused(&talk.had_with(world, MESH, target, "service")?)
    });
}

fn by_service(world: &World, family: Family, checks: &mut Checks) {
    checks.check(&format!("{family:?} half-close through the service's address"), || {
        let talk = Talk::new("half-close-client");
        let mut seen = Vec::new();
        for side in [DIRECT, MESH] {
            let service = world.service_address(side.server.0, "server", family)?;
            let target = SocketAddr::new(service, COMMAND_PORT);
            let id = format!("service-{family:?}");
            seen.push(talk.had_with(world, side, target, &id)?);
        }
        both_arrived(&seen[1])?;
        ensure!(seen[0] == seen[1], "\n    direct {}\n    mesh   {}", seen[0], seen[1]);
        Ok(())
    });
}

/// Between two pods of one node there is no tunnel, and still nothing may differ.
fn on_one_node(world: &World, checks: &mut Checks) {
    let verbs = ["half-close-client", "half-close-server", "reset-by-client", "reset-by-server"];
    for verb in
        verbs.into_iter().chain(["reset-by-server-upload", "reset-after-fin", "fin-then-reset", "leave"])
    {
        checks.check(&format!("on one node: {verb}"), || {
            let mut seen = Vec::new();
            for side in [DIRECT, NEAR] {
                let target = SocketAddr::new(world.address(side.server, Family::V4)?, COMMAND_PORT);
                seen.push(Talk::new(verb).had_with(world, side, target, &format!("near-{verb}"))?);
            }
            ensure!(seen[0] == seen[1], "\n    direct {}\n    mesh   {}", seen[0], seen[1]);
            Ok(())
        });
    }
    checks.check("on one node: a port that refuses", || {
        let target = SocketAddr::new(world.address(NEAR.server, Family::V4)?, NOBODY_PORT);
        refused(&Talk::new("first-byte").untold().had_with(world, NEAR, target, "near")?)
    });
    let family = Family::V4;
    checks.check("on one node: a writer blocks, another conversation does not", || {
        let seen = Talk::new("slow-reader").number(SLOW_BYTES).had(world, NEAR, family)?;
        let holds = || {
            is(&seen, "/client/blocked", true)?;
            is(&seen, "/client/lively", true)?;
            let buffered = seen["client"]["blocked_at"].as_u64().context("blocked_at")?;
            ensure!(buffered <= MOST_BUFFERED, "{buffered} bytes were taken from the writer");
            arrived(&seen, "client", "server")
        };
        holds().with_context(|| seen.to_string())
    });
    // asserts Z28
    checks.check("on one node: all of it was handed over", || {
        let mut handed = 0;
        for line in world.access_log("node-a")? {
            if line["dst.workload"] == "near" {
                is(&line, "/security", "same_node")?;
                handed += usize::from(line["direction"] == "inbound");
            }
        }
        ensure!(handed >= 9, "only {handed} connections");
        Ok(())
    });
}

/// That the mesh conversations went through the tunnel, or the comparison says nothing.
fn through_the_tunnel(world: &World) -> Result<()> {
    // asserts Z108
    let mut tunnelled = 0;
    for line in world.access_log("node-b")? {
        if line["dst.workload"] == "server" {
            is(&line, "/security", "mutual_tls")?;
            is(&line, "/src.identity", "spiffe://cluster.local/ns/mesh/sa/client")?;
            tunnelled += 1;
        }
    }
    ensure!(tunnelled > 2000, "only {tunnelled} connections in the log of node-b");
    let outside = world.access_log("node-a")?.iter().any(|line| line["src.namespace"] == "plain");
    ensure!(!outside, "the pods outside of the mesh were captured");
    Ok(())
}

fn bulk_bytes() -> u64 {
    // Tests have no command line of their own.
    #[expect(clippy::disallowed_methods, reason = "see above")]
    let asked = std::env::var("CULVERT_E2E_BULK_MIB").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(1024) * 1024 * 1024
}

#[test]
fn tcp_through_the_tunnel_is_tcp() {
    let mut builder = World::builder("fidelity", env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .namespace("plain", false);
    for side in [MESH, DIRECT] {
        builder = builder.client(side.client, "node-a").server(side.server, "node-b", 0).service(
            side.server.0,
            "server",
            "server",
        );
    }
    let refusing = "apiVersion: v1\nkind: Service\nmetadata: {name: refusing, namespace: mesh}\nspec:\n  \
                    selector: {app: server}\n  ipFamilyPolicy: PreferDualStack\n  ports: [{port: 9000, targetPort: 9004}]\n";
    let builder = builder.server(NEAR.server, "node-a", 0).manifest("refusing.yaml", refusing);
    let world = builder.start().expect("a world");
    let mut checks = Checks::default();
    for family in [Family::V4, Family::V6] {
        half_closes(&world, family, &mut checks);
        resets(&world, family, &mut checks);
        speaking_and_silence(&world, family, &mut checks);
        slow_readers(&world, family, &mut checks);
        nobody_there(&world, family, &mut checks);
        by_service(&world, family, &mut checks);
        let bytes = bulk_bytes();
        checks.check(&format!("{family:?} {} MiB each way at once", bytes >> 20), || {
            compare(&world, &Talk::new("bulk").number(bytes), family, |seen| {
                both_arrived(seen)?;
                is(seen, "/client/received/bytes", bytes)
            })
        });
    }
    on_one_node(&world, &mut checks);
    checks.check("all of it went through the tunnel", || through_the_tunnel(&world));
    checks.finish();
}
