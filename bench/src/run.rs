//! The whole comparison: each measurement direct, meshed and, if there is a peer, through it, in turn; medians and ratios.

use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;

use crate::RunArgs;
use crate::client::Outcome;
use crate::world::{Route, Setup, World};

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

/// A way from client to server that is measured.
struct Column<'a> {
    name: &'static str,
    world: &'a World,
    route: Route,
}

/// One line of the table: a value for each column.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    unit: &'static str,
    values: Vec<(&'static str, f64)>,
}

/// Memory of the proxies of one world, bytes: idle, then with [`IDLE`] connections.
#[derive(Debug, Serialize)]
struct Memory {
    column: &'static str,
    node: String,
    idle: u64,
    loaded: u64,
}

/// What one measurement of one column gave.
struct Sample {
    outcome: Outcome,
    /// Processor time of both proxies for each byte, request or connection, seconds.
    cpu: f64,
}

/// Runs everything and prints it.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let culvert = match &args.culvert {
        Some(path) => path.clone(),
        None => beside("culvert")?,
    };
    let setup = Setup { same_node: args.same_node, ..Setup::default() };
    let ours = World::start(culvert.clone(), "ours", setup.clone())?;
    let peer = match (&args.peer_ztunnel, args.same_node) {
        (Some(peer), _) => {
            Some(("peer", World::start(culvert, "peer", Setup { peer: Some(peer.clone()), ..setup })?))
        }
        (None, true) => {
            let proxy_args = vec!["--same-node=tunnel"];
            Some(("tunnel", World::start(culvert, "tunnel", Setup { proxy_args, ..setup })?))
        }
        (None, false) => None,
    };
    let mut columns = vec![
        Column { name: "direct", world: &ours, route: Route::Direct },
        Column { name: "culvert", world: &ours, route: Route::Mesh },
    ];
    if let Some((name, world)) = &peer {
        columns.push(Column { name, world, route: Route::Mesh });
    }
    // Before any load: what an idle proxy holds.
    let memory_idle: Vec<_> =
        columns[1..].iter().map(|column| column.world.proxy_memory()).collect::<anyhow::Result<_>>()?;
    let mut rows = Vec::new();
    for (name, measure, connections) in MEASUREMENTS {
        let mut samples: Vec<Vec<Sample>> = columns.iter().map(|_| Vec::new()).collect();
        // Turn about, so that a machine that slows down slows all.
        for _ in 0..args.rounds.max(1) {
            for (column, samples) in columns.iter().zip(&mut samples) {
                samples.push(sample(column, measure, connections, args.seconds)?);
            }
        }
        rows.extend(compare(name, measure, &columns, &samples));
    }
    let mut memory = Vec::new();
    for (column, idle) in columns[1..].iter().zip(memory_idle) {
        let mut open = column.world.idle(IDLE)?;
        let loaded = column.world.proxy_memory()?;
        drop(open.stdin.take());
        open.wait()?;
        memory.extend(idle.into_iter().zip(loaded).map(|((node, idle), (_, loaded))| Memory {
            column: column.name,
            node,
            idle,
            loaded,
        }));
    }
    print(args, &columns, &rows, &memory)
}

fn sample(column: &Column<'_>, measure: &str, connections: usize, seconds: u64) -> anyhow::Result<Sample> {
    let before = column.world.proxy_cpu()?;
    let outcome = column.world.measure(column.route, measure, connections, seconds)?;
    let used = column.world.proxy_cpu()? - before;
    Ok(Sample { cpu: used / (outcome.rate * seconds as f64), outcome })
}

fn compare(name: &str, measure: &str, columns: &[Column<'_>], samples: &[Vec<Sample>]) -> Vec<Row> {
    let row = |what: String, unit, value: &dyn Fn(&Sample) -> f64| Row {
        what,
        unit,
        values: columns.iter().zip(samples).map(|(c, samples)| (c.name, median(samples, value))).collect(),
    };
    let mut rows = match measure {
        "throughput" => vec![row(name.to_owned(), "MB/s", &|s| s.outcome.rate * 1e-6)],
        _ => vec![
            row(name.to_owned(), "/s", &|s| s.outcome.rate),
            row(format!("{name}, p50"), "us", &|s| s.outcome.p50_us),
            row(format!("{name}, p99"), "us", &|s| s.outcome.p99_us),
        ],
    };
    rows.push(match measure {
        "throughput" => row(format!("{name}, CPU of both proxies"), "s/GB", &|s| s.cpu * 1e9),
        _ => row(format!("{name}, CPU of both proxies"), "us", &|s| s.cpu * 1e6),
    });
    rows
}

fn median(samples: &[Sample], value: &dyn Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(args: &RunArgs, columns: &[Column<'_>], rows: &[Row], memory: &[Memory]) -> anyhow::Result<()> {
    if args.output == "json" {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({"rows": rows, "memory": memory}))?);
        return Ok(());
    }
    print!("{:<48} {:>5}", format!("median of {} rounds", args.rounds), "");
    columns.iter().for_each(|column| print!(" {:>10}", column.name));
    print!(" {:>14}", "culvert/direct");
    println!(
        "{}",
        columns.get(2).map_or(String::new(), |other| format!(" {:>14}", format!("culvert/{}", other.name)))
    );
    for row in rows {
        print!("{:<48} {:>5}", row.what, row.unit);
        let values: Vec<f64> = row.values.iter().map(|(_, value)| *value).collect();
        values.iter().for_each(|value| print!(" {value:>10.2}"));
        let direct =
            if row.what.contains("CPU") { String::new() } else { format!("{:.2}x", values[1] / values[0]) };
        print!(" {direct:>14}");
        println!("{}", values.get(2).map_or(String::new(), |peer| format!(" {:>13.2}x", values[1] / peer)));
    }
    println!(
        "\n{:<48} {:>12} {:>22} {:>18}",
        "resident memory of a proxy", "idle", "with 1000 connections", "a connection"
    );
    for m in memory {
        let each = m.loaded.saturating_sub(m.idle) as f64 / IDLE as f64 / 1024.0;
        let (name, idle, loaded) =
            (format!("{}, {}", m.column, m.node), m.idle as f64 / 1e6, m.loaded as f64 / 1e6);
        println!("{name:<48} {idle:>9.1} MB {loaded:>19.1} MB {each:>15.1} KB");
    }
    Ok(())
}

/// The program of this name beside this one.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let path = exe.parent().context("this program has no directory")?.join(name);
    anyhow::ensure!(
        path.exists(),
        "{} is not there; build it first (make build) or say --culvert",
        path.display()
    );
    Ok(path)
}
