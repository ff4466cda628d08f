//! What bulk streams do to a small request of the same pod to the same destination, in the mesh and directly.
//!
//! The bulk goes as fast as it can, so that two cores are saturated by its senders and receivers too; the direct path under the
//! same load shows how much of a request's time that alone takes. A second load is paced below what the machine can carry.

use std::io::{BufReader, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use crate::client::Outcome;
use crate::run::beside;
use crate::world::{Route, Setup, World, outcome};

/// Between the start of the bulk and the first measured request: windows and buffers are as full as they get.
const SETTLE: Duration = Duration::from_millis(500);

/// Arguments of `fairness`.
#[derive(Debug, clap::Args)]
pub struct FairnessArgs {
    /// The `culvert` program; beside this one if absent.
    #[arg(long)]
    culvert: Option<PathBuf>,
    /// Each phase's length, seconds.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Times each is measured; the median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Bulk streams.
    #[arg(long, default_value_t = 4)]
    bulk: usize,
    /// Bytes a second of the paced load, all streams together.
    #[arg(long, default_value_t = 200e6)]
    rate: f64,
    /// `table` or `json`.
    #[arg(short, long, default_value = "table")]
    output: String,
}

/// A load that runs beside the requests.
struct Bulk {
    name: &'static str,
    measure: &'static str,
    paced: bool,
}

const BULK: [Bulk; 3] = [
    Bulk { name: "upload", measure: "throughput", paced: false },
    Bulk { name: "download", measure: "download", paced: false },
    Bulk { name: "upload, paced", measure: "throughput", paced: true },
];

/// Requests in the three phases, and the bulk beside them.
#[derive(Debug)]
struct Sample {
    idle: Outcome,
    /// On the connection that was open before the bulk began.
    beside: Outcome,
    /// On a connection opened while the bulk ran.
    fresh: Outcome,
    bulk: f64,
}

/// One printed line.
#[derive(Debug, Serialize)]
struct Row {
    load: &'static str,
    route: &'static str,
    idle_p50_us: f64,
    idle_p99_us: f64,
    beside_p50_us: f64,
    beside_p99_us: f64,
    fresh_p50_us: f64,
    fresh_p99_us: f64,
    bulk_bytes_per_second: f64,
    /// 99th percentile of a new connection's requests beside the bulk, over the idle one.
    ratio: f64,
    /// The same for the connection that was there before.
    ratio_beside: f64,
}

/// Runs everything and prints it.
pub fn run(args: &FairnessArgs) -> anyhow::Result<()> {
    let culvert = match &args.culvert {
        Some(path) => path.clone(),
        None => beside("culvert")?,
    };
    let world = World::start(culvert, "fairness", Setup::default())?;
    let mut rows = Vec::new();
    for load in &BULK {
        let routes = [("direct", Route::Direct), ("culvert", Route::Mesh)];
        let mut samples = [Vec::new(), Vec::new()];
        for _ in 0..args.rounds.max(1) {
            for ((_, route), samples) in routes.iter().zip(&mut samples) {
                samples.push(sample(&world, *route, load, args)?);
            }
        }
        rows.extend(routes.iter().zip(&samples).map(|((name, _), samples)| row(load.name, name, samples)));
    }
    print(args, &rows)
}

fn sample(world: &World, route: Route, load: &Bulk, args: &FairnessArgs) -> anyhow::Result<Sample> {
    let mut requests =
        world.load(route, "phases", 1, args.seconds)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut printed = BufReader::new(requests.stdout.take().context("piped")?);
    let mut go = requests.stdin.take().context("piped")?;
    let idle = outcome(&mut printed)?;
    let mut bulk = world.load(route, load.measure, args.bulk, 2 * args.seconds + 2)?;
    if load.paced {
        bulk.args(["--rate", &args.rate.to_string()]);
    }
    let mut bulk = bulk.stdout(Stdio::piped()).spawn()?;
    std::thread::sleep(SETTLE);
    writeln!(go)?;
    let beside = outcome(&mut printed)?;
    writeln!(go)?;
    let fresh = outcome(&mut printed)?;
    requests.wait()?;
    let moved = outcome(&mut BufReader::new(bulk.stdout.take().context("piped")?))?;
    bulk.wait()?;
    anyhow::ensure!(moved.failed == 0, "{} bulk streams failed", moved.failed);
    Ok(Sample { idle, beside, fresh, bulk: moved.rate })
}

fn row(load: &'static str, route: &'static str, samples: &[Sample]) -> Row {
    let median = |value: &dyn Fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Row {
        load,
        route,
        idle_p50_us: median(&|s| s.idle.p50_us),
        idle_p99_us: median(&|s| s.idle.p99_us),
        beside_p50_us: median(&|s| s.beside.p50_us),
        beside_p99_us: median(&|s| s.beside.p99_us),
        fresh_p50_us: median(&|s| s.fresh.p50_us),
        fresh_p99_us: median(&|s| s.fresh.p99_us),
        bulk_bytes_per_second: median(&|s| s.bulk),
        ratio: median(&|s| s.fresh.p99_us / s.idle.p99_us),
        ratio_beside: median(&|s| s.beside.p99_us / s.idle.p99_us),
    }
}

fn print(args: &FairnessArgs, rows: &[Row]) -> anyhow::Result<()> {
    if args.output == "json" {
        println!("{}", serde_json::to_string_pretty(rows)?);
        return Ok(());
    }
    println!(
        "median of {} rounds, {} bulk streams; request times in us, p50/p99",
        args.rounds.max(1),
        args.bulk
    );
    println!(
        "{:<15} {:<8} {:>13} {:>15} {:>15} {:>10} {:>12} {:>12}",
        "bulk", "route", "idle", "opened before", "opened beside", "bulk MB/s", "p99 before", "p99 beside"
    );
    for r in rows {
        let pair = |p50: f64, p99: f64| format!("{p50:.0}/{p99:.0}");
        println!(
            "{:<15} {:<8} {:>13} {:>15} {:>15} {:>10.0} {:>11.1}x {:>11.1}x",
            r.load,
            r.route,
            pair(r.idle_p50_us, r.idle_p99_us),
            pair(r.beside_p50_us, r.beside_p99_us),
            pair(r.fresh_p50_us, r.fresh_p99_us),
            r.bulk_bytes_per_second * 1e-6,
            r.ratio_beside,
            r.ratio
        );
    }
    Ok(())
}
