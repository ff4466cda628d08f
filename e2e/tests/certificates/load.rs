//! Two minutes of connections on certificates that live for twenty seconds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::FIRST_EXTRA_PORT;
use culvert_e2e::world::{Family, World};
use serde_json::Value;

use crate::{CLIENT, LIFETIME, PORTS, SERVERS};

/// How long the load lasts, seconds.
const SECONDS: u64 = 120;
/// New connections a second.
const RATE: u64 = 30;
/// Between two looks at the proxies' certificates.
const LOOK: Duration = Duration::from_millis(500);

/// What there is to judge afterwards.
pub struct Observed {
    load: Result<Value>,
    stayed: Result<Value>,
    /// Serial numbers by identity, and looks at which a certificate was not valid.
    serials: BTreeMap<String, BTreeSet<String>>,
    invalid: Vec<String>,
}

pub fn run(world: &World) -> Observed {
    let mut observed = Observed {
        load: Err(anyhow::anyhow!("not run")),
        stayed: Err(anyhow::anyhow!("not run")),
        serials: BTreeMap::new(),
        invalid: Vec::new(),
    };
    let done = Instant::now() + Duration::from_secs(SECONDS);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| begin(world));
        let stayed = scope.spawn(|| stay(world));
        // Looks even when the load could not start: the outcome says why.
        while Instant::now() < done && !load.is_finished() {
            for node in ["node-a", "node-b"] {
                if let Err(error) = look(world, node, &mut observed) {
                    observed.invalid.push(format!("{node}: {error:#}"));
                }
            }
            std::thread::sleep(LOOK);
        }
        observed.load = load.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the load panicked")));
        observed.stayed = stayed.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the stay panicked")));
    });
    observed
}

fn begin(world: &World) -> Result<Value> {
    let mut targets = Vec::new();
    for server in SERVERS {
        for family in [Family::V4, Family::V6] {
            targets.push(world.address(server, family)?.to_string());
        }
    }
    let (port, ports) = (FIRST_EXTRA_PORT.to_string(), PORTS.to_string());
    let (rate, seconds) = (RATE.to_string(), SECONDS.to_string());
    let args = ["load", "--targets", &targets.join(","), "--port", &port, "--ports", &ports];
    world.peer(CLIENT, &[&args[..], &["--rate", &rate, "--seconds", &seconds]].concat())
}

/// One connection that is open all the time, over six lifetimes of the certificate it began with.
fn stay(world: &World) -> Result<Value> {
    let target = format!("{}:9000", world.address(SERVERS[0], Family::V4)?);
    let number = ((SECONDS - 5) * 1000).to_string();
    world.peer(CLIENT, &["talk", "stay", &target, "--number", &number])
}

fn look(world: &World, node: &str, observed: &mut Observed) -> Result<()> {
    let certificates = world.admin(node, "/certificates")?;
    for certificate in certificates.as_array().context("not a list")? {
        let identity = certificate["identity"].as_str().context("no identity")?.to_owned();
        let failed = certificate["failures"] != 0;
        match certificate["serial"].as_str() {
            Some(serial) => {
                observed.serials.entry(identity).or_default().insert(serial.to_owned());
            }
            // The very first may be asked for before the controller knows of the pod.
            None if !observed.serials.contains_key(&identity) => continue,
            None => observed.invalid.push(certificate.to_string()),
        }
        if failed {
            observed.invalid.push(certificate.to_string());
        }
    }
    Ok(())
}

pub fn judge(world: &World, observed: Observed, checks: &mut Checks) {
    let Observed { load, stayed, serials, invalid } = observed;
    checks.check("0 failed requests in two minutes on certificates of 20 s", || {
        let load = load?;
        println!("          {load}");
        ensure!(load["total"] == SECONDS * RATE && load["failed"] == 0, "{load}");
        Ok(())
    });
    checks.check("a connection that was open all the time still works", || {
        let stayed = stayed?;
        ensure!(stayed["end"] == "limit" && stayed["asked"].as_u64() > Some(SECONDS), "{stayed}");
        Ok(())
    });
    // asserts Z88
    checks.check("at least five generations of every certificate", || {
        for (identity, serials) in &serials {
            println!("          {identity}: {} generations", serials.len());
        }
        ensure!(serials.len() == 1 + SERVERS.len(), "{:?}", serials.keys());
        let few: Vec<_> = serials.iter().filter(|(_, serials)| serials.len() < 5).collect();
        ensure!(few.is_empty(), "{few:?}");
        Ok(())
    });
    checks.check("every renewal went well", || {
        ensure!(invalid.is_empty(), "{} looks: {:?}", invalid.len(), invalid.first());
        Ok(())
    });
    checks.check("new tunnels every second, and no new stream on an expired certificate", || tunnels(world));
}

/// Judged by the clock and not by what the proxies say of it: a tunnel (one client port at 15008, for one destination) was
/// made with a certificate that lived 20 s at most, so the streams in it must have begun within 20 s of each other.
fn tunnels(world: &World) -> Result<()> {
    let mut began: BTreeMap<(String, String), (f64, f64)> = BTreeMap::new();
    for line in world.access_log("node-b")? {
        if line["src.workload"] != "client" || line["dst.hbone_addr"].is_null() {
            continue;
        }
        ensure!(line["reason"].is_null(), "a stream was refused or cut: {line}");
        let at = start(&line).with_context(|| format!("{line}"))?;
        let text = |key: &str| line[key].as_str().map(str::to_owned).context(key.to_owned());
        let span = began.entry((text("dst.addr")?, text("src.addr")?)).or_insert((at, at));
        *span = (span.0.min(at), span.1.max(at));
    }
    let longest = began.values().map(|(first, last)| last - first).fold(0.0, f64::max);
    let first = format!(":{FIRST_EXTRA_PORT}");
    let to_first = began.keys().filter(|(destination, _)| destination.ends_with(&first)).count() as u64;
    println!("          {} tunnels; the longest took streams for {longest:.1} s", began.len());
    // Four destinations of that port are in use all the time.
    ensure!(to_first >= 4 * SECONDS / LIFETIME, "only {to_first} tunnels to the port that is always in use");
    ensure!(began.len() as u64 >= SECONDS, "only {} tunnels", began.len());
    ensure!(longest <= LIFETIME as f64, "a tunnel took new streams for {longest:.1} s");
    Ok(())
}

/// When the connection of this line began, seconds of the epoch: the line is written at its end.
fn start(line: &Value) -> Result<f64> {
    let format = &time::format_description::well_known::Rfc3339;
    let end = time::OffsetDateTime::parse(line["timestamp"].as_str().context("timestamp")?, format)?;
    let duration = line["duration"].as_str().and_then(|text| text.strip_suffix("ms")).context("duration")?;
    Ok(end.unix_timestamp_nanos() as f64 / 1e9 - duration.parse::<f64>()? / 1e3)
}
