//! TCP through one proxy of each kind.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::{BANNER_PORT, COMMAND_PORT, NOBODY_PORT, RESET_PORT};
use culvert_e2e::world::{Family, Pod, World};
use serde_json::Value;

use crate::world::{
    AMBIENT_CLIENT, Direction, EXTERNAL, EXTERNAL_ADDRESS, OUR_CLIENT, OURS, OUTSIDER, ambient_says,
};

/// Each way at once.
const BULK: u64 = 64 << 20;
/// More than all buffers on the way.
const SLOW: u64 = 256 << 20;
/// Connections open at once, each a stream: as many as ambient puts on one tunnel.
const STREAMS: u64 = 100;

pub fn all(world: &World, direction: Direction, checks: &mut Checks) {
    for family in [Family::V4, Family::V6] {
        let name = format!("{}, {family:?}", direction.name);
        closes(world, direction, family, &name, checks);
        resets(world, direction, family, &name, checks);
        checks.check(&format!("{name}: the server speaks first"), || {
            let target = direction.target(world, family, BANNER_PORT)?;
            let seen = direction.talk(world, target, "server-first", &format!("{name}-banner"), 0)?;
            ensure!(seen["reply"] == "250 " && seen["end"] == "eof", "{seen}");
            Ok(())
        });
        checks.check(&format!("{name}: {STREAMS} connections at once"), || {
            let target = direction.target(world, family, COMMAND_PORT)?;
            let seen = direction.talk(world, target, "idle", "-", STREAMS)?;
            ensure!(seen["alive"] == STREAMS, "{seen}");
            Ok(())
        });
        checks.check(&format!("{name}: by the service's address"), || {
            let service = world.service_address("mesh", direction.server.1, family)?;
            let target = SocketAddr::new(service, COMMAND_PORT);
            conversation(world, direction, target, "half-close-client", &format!("{family:?}-service"), 0)
                .and_then(|seen| both_arrived(&seen))
        });
    }
    bulk(world, direction, checks);
}

fn closes(world: &World, direction: Direction, family: Family, name: &str, checks: &mut Checks) {
    for verb in ["half-close-client", "half-close-server"] {
        checks.check(&format!("{name}: {verb}"), || {
            let target = direction.target(world, family, COMMAND_PORT)?;
            let seen = conversation(world, direction, target, verb, &format!("{verb}-{family:?}"), 0)?;
            both_arrived(&seen)
        });
    }
}

/// The other proxy takes a reset for an end on either of its sides, so what comes out of the two is an end of some kind, soon, at
/// the side that did not reset; that ours resets its streams is shown with the Go peer.
fn resets(world: &World, direction: Direction, family: Family, name: &str, checks: &mut Checks) {
    let cases = [
        ("reset-by-client", "/server/end"),
        ("reset-by-client-upload", "/server/end"),
        ("reset-by-client-download", "/server/write"),
        ("reset-by-server", "/client/end"),
        ("reset-by-server-upload", "/client/write"),
        ("reset-by-server-download", "/client/end"),
    ];
    for (verb, seen_at) in cases {
        checks.check(&format!("{name}: {verb}"), || {
            let target = direction.target(world, family, COMMAND_PORT)?;
            let seen = conversation(world, direction, target, verb, &format!("{verb}-{family:?}"), 0)?;
            let found = seen.pointer(seen_at).unwrap_or(&Value::Null);
            ensure!(
                found == "ECONNRESET" || found == "eof" || found == "EPIPE",
                "{seen_at} is {found}: {seen}"
            );
            Ok(())
        });
    }
    for (what, port) in [("resets right after the accept", RESET_PORT), ("refuses", NOBODY_PORT)] {
        checks.check(&format!("{name}: the server {what}"), || {
            let target = direction.target(world, family, port)?;
            let seen = direction.talk(world, target, "first-byte", "-", 0)?;
            // A refusal is told by a status, so where the client's proxy is ours it is a reset.
            let ours = direction.server_node != OURS && port == NOBODY_PORT;
            let clean = seen["first"] == "eof" && !ours;
            ensure!(seen["first"] == "ECONNRESET" || clean, "{seen}");
            Ok(())
        });
    }
}

fn bulk(world: &World, direction: Direction, checks: &mut Checks) {
    checks.check(&format!("{}: {} MiB each way at once", direction.name, BULK >> 20), || {
        let target = direction.target(world, Family::V4, COMMAND_PORT)?;
        let seen = conversation(world, direction, target, "bulk", "bulk", BULK)?;
        ensure!(seen["client"]["received"]["bytes"] == BULK, "{seen}");
        both_arrived(&seen)
    });
    for (verb, from, to) in [("slow-reader", "client", "server"), ("slow-read", "server", "client")] {
        checks.check(&format!("{}: {verb}: the writer blocks, another does not", direction.name), || {
            let target = direction.target(world, Family::V4, COMMAND_PORT)?;
            let seen = conversation(world, direction, target, verb, verb, SLOW)?;
            let client = &seen["client"];
            ensure!(client["blocked"] == true && client["lively"] == true, "{seen}");
            let (sent, received) = (&seen[from]["sent"], &seen[to]["received"]);
            ensure!(sent["bytes"] == SLOW && sent == received, "{seen}");
            Ok(())
        });
    }
}

/// Names: Services in full and by the search domains, a ServiceEntry that cluster DNS does not know, and what is nowhere.
pub fn names(world: &World, checks: &mut Checks) {
    for (whose, client) in [("our", OUR_CLIENT), ("ambient's", AMBIENT_CLIENT)] {
        checks.check(&format!("names, asked from {whose} node"), || {
            let v4 = world.service_address("mesh", "server-b", Family::V4)?.to_string();
            let v6 = world.service_address("mesh", "server-b", Family::V6)?.to_string();
            for name in ["server-b.mesh.svc.cluster.local", "server-b.mesh", "server-b"] {
                let found = resolve(world, client, name)?;
                ensure!(found == [v4.clone(), v6.clone()], "{name} is {found:?}");
            }
            let found = resolve(world, client, EXTERNAL)?;
            ensure!(found == [EXTERNAL_ADDRESS], "{EXTERNAL} is {found:?}");
            let found = resolve(world, client, "nobody.mesh.svc.cluster.local")?;
            ensure!(found.is_empty(), "nobody is {found:?}");
            Ok(())
        });
    }
    checks.check("cluster DNS alone does not know the ServiceEntry", || {
        let found = resolve(world, OUTSIDER, EXTERNAL)?;
        ensure!(found.is_empty(), "{found:?}");
        Ok(())
    });
}

/// What the system's resolver says, sorted; nothing if it says no.
fn resolve(world: &World, client: Pod, name: &str) -> Result<Vec<String>> {
    let output = world.exec(client).args(["getent", "ahosts", name]).output().context("getent")?;
    let text = String::from_utf8(output.stdout)?;
    let mut found: Vec<String> =
        text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// That nothing of it went beside the tunnel, as our proxy and the other one saw it.
pub fn tunnelled(world: &World) -> Result<()> {
    let log = world.access_log(OURS)?;
    let count = |direction: &str, peer: &str, identity: &str| {
        log.iter()
            .filter(|line| line["direction"] == direction && line["security"] == "mutual_tls")
            .filter(|line| line[peer] == format!("spiffe://cluster.local/ns/mesh/sa/{identity}"))
            .count()
    };
    let sent = count("outbound", "dst.identity", "server-b");
    let received = count("inbound", "src.identity", "client-b");
    ensure!(sent > 200 && received > 200, "{sent} sent, {received} received in {} lines", log.len());
    let plain = log.iter().find(|line| line["security"] == "none" && line["reason"].is_null());
    ensure!(plain.is_none(), "plaintext: {plain:?}");
    for (direction, field, whose) in
        [("inbound", "src.identity", "client-a"), ("outbound", "dst.identity", "server-a")]
    {
        ambient_says(world, direction, |line| {
            line["direction"] == direction
                && line[field] == format!("spiffe://cluster.local/ns/mesh/sa/{whose}")
        })?;
    }
    Ok(())
}

/// What both ends saw.
fn conversation(
    world: &World,
    direction: Direction,
    target: SocketAddr,
    verb: &str,
    id: &str,
    number: u64,
) -> Result<Value> {
    let client = direction.talk(world, target, verb, id, number)?;
    let server = world.server_says(direction.server, id)?;
    Ok(serde_json::json!({"client": client, "server": server}))
}

fn both_arrived(seen: &Value) -> Result<()> {
    for (from, to) in [("client", "server"), ("server", "client")] {
        let (sent, received) = (&seen[from]["sent"], &seen[to]["received"]);
        ensure!(sent.is_object() && sent == received, "{from} to {to}: {seen}");
        ensure!(seen[from]["write"] == "ok" && seen[from]["end"] == "eof", "{from}: {seen}");
    }
    Ok(())
}
