//! The measuring client. Load is bounded in connections and in time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::protocol::{CHUNK, ECHO, ONE, REQUEST, RESPONSE, SINK};

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Measure {
    /// Bytes a second, one way.
    Throughput,
    /// Small requests, one after another on each connection.
    Requests,
    /// New connections, each with one request, one after another on each worker.
    Connections,
    /// Open connections that say nothing, until standard input ends.
    Idle,
}

/// One measurement's outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Bytes, requests or connections a second.
    pub rate: f64,
    /// Median of a request's time, microseconds.
    pub p50_us: f64,
    /// 99th percentile of a request's time, microseconds.
    pub p99_us: f64,
    /// What failed; must be 0 for the rest to mean anything.
    pub failed: u64,
}

/// Takes one measurement and prints it as JSON.
pub async fn measure(
    what: Measure,
    target: SocketAddr,
    connections: usize,
    length: Duration,
) -> anyhow::Result<()> {
    if what == Measure::Idle {
        return idle(target, connections).await;
    }
    let until = Instant::now() + length;
    let started = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..connections {
        workers.spawn(async move {
            match what {
                Measure::Throughput => throughput(target, until).await,
                Measure::Requests => requests(target, until).await,
                Measure::Connections | Measure::Idle => new_connections(target, until).await,
            }
        });
    }
    let (mut count, mut times, mut failed) = (0u64, Vec::new(), 0);
    while let Some(worker) = workers.join_next().await {
        match worker? {
            Ok((n, mut t)) => {
                count += n;
                times.append(&mut t);
            }
            Err(error) => {
                eprintln!("culvert-bench client: {error}");
                failed += 1;
            }
        }
    }
    times.sort_unstable();
    let at =
        |share: f64| times.get((times.len() as f64 * share) as usize).map_or(0.0, |&ns| f64::from(ns) / 1e3);
    let rate = count as f64 / started.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string(&Outcome { rate, p50_us: at(0.50), p99_us: at(0.99), failed })?);
    Ok(())
}

type Counted = std::io::Result<(u64, Vec<u32>)>;

async fn throughput(target: SocketAddr, until: Instant) -> Counted {
    let mut stream = open(target, SINK).await?;
    let chunk = vec![b'x'; CHUNK];
    while Instant::now() < until {
        stream.write_all(&chunk).await?;
    }
    stream.shutdown().await?;
    // Only what arrived counts.
    Ok((stream.read_u64().await?, Vec::new()))
}

async fn requests(target: SocketAddr, until: Instant) -> Counted {
    let mut stream = open(target, ECHO).await?;
    let mut times = Vec::new();
    while Instant::now() < until {
        times.push(request(&mut stream).await?);
    }
    Ok((times.len() as u64, times))
}

async fn new_connections(target: SocketAddr, until: Instant) -> Counted {
    let mut times = Vec::new();
    while Instant::now() < until {
        let started = Instant::now();
        let mut stream = open(target, ONE).await?;
        request(&mut stream).await?;
        times.push(nanos(started));
        if stream.read(&mut [0]).await? != 0 {
            return Err(std::io::Error::other("more than one answer"));
        }
    }
    Ok((times.len() as u64, times))
}

async fn idle(target: SocketAddr, connections: usize) -> anyhow::Result<()> {
    let mut open_connections = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = open(target, ECHO).await?;
        request(&mut stream).await?;
        open_connections.push(stream);
    }
    println!("{{\"open\":{connections}}}");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut std::io::stdin(), &mut rest)?;
    Ok(())
}

async fn open(target: SocketAddr, what: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&[what]).await?;
    Ok(stream)
}

async fn request(stream: &mut TcpStream) -> std::io::Result<u32> {
    let started = Instant::now();
    stream.write_all(&[b'x'; REQUEST]).await?;
    let mut response = [0; RESPONSE];
    stream.read_exact(&mut response).await?;
    Ok(nanos(started))
}

fn nanos(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_nanos()).unwrap_or(u32::MAX)
}
