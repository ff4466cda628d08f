//! The measuring client. Load is bounded in connections and in time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::protocol::{CHUNK, ECHO, ONE, REQUEST, RESPONSE, SINK, SOURCE};

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Measure {
    /// Bytes a second, one way.
    Throughput,
    /// Bytes a second, from the server.
    Download,
    /// Small requests, one after another on each connection.
    Requests,
    /// New connections, each with one request, one after another on each worker.
    Connections,
    /// Open connections that say nothing, until standard input ends.
    Idle,
    /// Small requests on one connection; again on it after a line on standard input, and on a new one after another line.
    Phases,
}

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections at once.
    pub connections: usize,
    /// For how long.
    pub length: Duration,
    /// Bytes a second of all connections together, at most; only what uploads in bulk looks at it.
    pub rate: Option<f64>,
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
pub async fn measure(what: Measure, target: SocketAddr, load: Load) -> anyhow::Result<()> {
    match what {
        Measure::Idle => return idle(target, load.connections).await,
        Measure::Phases => return phases(target, load.length).await,
        _ => {}
    }
    let started = Instant::now();
    let until = started + load.length;
    let each = load.rate.map(|rate| rate / load.connections as f64);
    let mut workers = JoinSet::new();
    for _ in 0..load.connections {
        workers.spawn(async move {
            match what {
                Measure::Throughput => upload(target, until, each).await,
                Measure::Download => download(target, until).await,
                Measure::Requests => requests(&mut open(target, ECHO).await?, until).await,
                _ => new_connections(target, until).await,
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
    print(count, times, started, failed)
}

fn print(count: u64, mut times: Vec<u32>, started: Instant, failed: u64) -> anyhow::Result<()> {
    times.sort_unstable();
    let at =
        |share: f64| times.get((times.len() as f64 * share) as usize).map_or(0.0, |&ns| f64::from(ns) / 1e3);
    let rate = count as f64 / started.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string(&Outcome { rate, p50_us: at(0.50), p99_us: at(0.99), failed })?);
    Ok(())
}

type Counted = std::io::Result<(u64, Vec<u32>)>;

async fn upload(target: SocketAddr, until: Instant, rate: Option<f64>) -> Counted {
    let mut stream = open(target, SINK).await?;
    let chunk = vec![b'x'; CHUNK];
    let (started, mut sent) = (Instant::now(), 0.0);
    while Instant::now() < until {
        stream.write_all(&chunk).await?;
        sent += CHUNK as f64;
        if let Some(rate) = rate {
            tokio::time::sleep_until((started + Duration::from_secs_f64(sent / rate)).into()).await;
        }
    }
    stream.shutdown().await?;
    // Only what arrived counts.
    Ok((stream.read_u64().await?, Vec::new()))
}

async fn download(target: SocketAddr, until: Instant) -> Counted {
    let mut stream = open(target, SOURCE).await?;
    let (mut chunk, mut total) = (vec![0; CHUNK], 0);
    while Instant::now() < until {
        match stream.read(&mut chunk).await? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            length => total += length as u64,
        }
    }
    Ok((total, Vec::new()))
}

async fn requests(stream: &mut TcpStream, until: Instant) -> Counted {
    let mut times = Vec::new();
    while Instant::now() < until {
        times.push(request(stream).await?);
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

/// What runs beside it changes between the phases; whoever writes the lines knows how.
async fn phases(target: SocketAddr, length: Duration) -> anyhow::Result<()> {
    let mut stream = open(target, ECHO).await?;
    for phase in 0..3 {
        if phase > 0 {
            std::io::stdin().read_line(&mut String::new())?;
        }
        if phase == 2 {
            stream = open(target, ECHO).await?;
        }
        let started = Instant::now();
        let (count, times) = requests(&mut stream, started + length).await?;
        print(count, times, started, 0)?;
    }
    Ok(())
}

pub(crate) async fn open(target: SocketAddr, what: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&[what]).await?;
    Ok(stream)
}

pub(crate) async fn request(stream: &mut TcpStream) -> std::io::Result<u32> {
    let started = Instant::now();
    stream.write_all(&[b'x'; REQUEST]).await?;
    let mut response = [0; RESPONSE];
    stream.read_exact(&mut response).await?;
    Ok(nanos(started))
}

fn nanos(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_nanos()).unwrap_or(u32::MAX)
}
