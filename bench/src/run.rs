//! The whole comparison: each measurement direct and meshed in turn, several rounds, medians and ratios.

use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;

use crate::RunArgs;
use crate::client::Outcome;
use crate::world::{Route, World};

/// One line of the table.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    unit: &'static str,
    direct: f64,
    mesh: f64,
    /// Mesh over direct.
    ratio: f64,
}

/// The measurements: a name, what to run, connections.
const MEASUREMENTS: [(&str, &str, usize); 5] = [
    ("throughput, 1 stream", "throughput", 1),
    ("throughput, 8 streams", "throughput", 8),
    ("requests, 1 connection", "requests", 1),
    ("requests, 16 connections", "requests", 16),
    ("new connections, 8 at a time", "connections", 8),
];
/// Connections held open for the memory figure.
const IDLE: usize = 1000;

/// Runs everything and prints it.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let culvert = match &args.culvert {
        Some(path) => path.clone(),
        None => beside("culvert")?,
    };
    let world = World::start(culvert)?;
    let idle = world.proxy_memory()?;
    let mut rows = Vec::new();
    for (name, measure, connections) in MEASUREMENTS {
        let (mut direct, mut mesh) = (Vec::new(), Vec::new());
        // Turn about, so that a machine that slows down slows both.
        for _ in 0..args.rounds.max(1) {
            direct.push(world.measure(Route::Direct, measure, connections, args.seconds)?);
            mesh.push(world.measure(Route::Mesh, measure, connections, args.seconds)?);
        }
        rows.extend(compare(name, measure, &direct, &mesh));
    }
    let mut open = world.idle(IDLE)?;
    let loaded = world.proxy_memory()?;
    drop(open.stdin.take());
    open.wait()?;
    print(args, &rows, &idle, &loaded)
}

fn compare(name: &str, measure: &str, direct: &[Outcome], mesh: &[Outcome]) -> Vec<Row> {
    let row = |what: String, unit, scale: f64, value: fn(&Outcome) -> f64| {
        let (direct, mesh) = (median(direct, value) * scale, median(mesh, value) * scale);
        Row { what, unit, direct, mesh, ratio: mesh / direct }
    };
    let rate = |unit, scale| row(name.to_owned(), unit, scale, |o| o.rate);
    match measure {
        "throughput" => vec![rate("MB/s", 1e-6)],
        _ => vec![
            rate("/s", 1.0),
            row(format!("{name}, p50"), "us", 1.0, |o| o.p50_us),
            row(format!("{name}, p99"), "us", 1.0, |o| o.p99_us),
        ],
    }
}

fn median(outcomes: &[Outcome], value: fn(&Outcome) -> f64) -> f64 {
    let mut values: Vec<f64> = outcomes.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(
    args: &RunArgs,
    rows: &[Row],
    idle: &[(String, u64)],
    loaded: &[(String, u64)],
) -> anyhow::Result<()> {
    if args.output == "json" {
        let value = serde_json::json!({"rows": rows, "memory_idle": idle, "memory_1000_connections": loaded});
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!("{:<36} {:>5} {:>12} {:>12} {:>8}", "median of rounds", "", "direct", "mesh", "ratio");
    for row in rows {
        println!(
            "{:<36} {:>5} {:>12.1} {:>12.1} {:>7.2}x",
            row.what, row.unit, row.direct, row.mesh, row.ratio
        );
    }
    println!();
    println!("{:<36} {:>12} {:>24}", "resident memory of the proxy", "idle", "with 1000 connections");
    for ((node, before), (_, after)) in idle.iter().zip(loaded) {
        let each = after.saturating_sub(*before) as f64 / IDLE as f64 / 1024.0;
        println!(
            "{:<36} {:>9.1} MB {:>21.1} MB  ({each:.1} KB a connection)",
            node,
            *before as f64 / 1e6,
            *after as f64 / 1e6
        );
    }
    Ok(())
}

fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let path = exe.parent().context("this program has no directory")?.join(name);
    anyhow::ensure!(
        path.exists(),
        "{} is not there; build it first (make build) or say --culvert",
        path.display()
    );
    Ok(path)
}
