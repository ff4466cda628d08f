//! Small requests at a fixed pace for as long as asked, to see whether any of them has to wait: on one open connection, and
//! each on a connection of its own.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};

use crate::client::{open, request};
use crate::protocol::{ECHO, ONE};

/// A wait longer than this is a stall.
pub const STALL: Duration = Duration::from_millis(5);

/// How long requests took, microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Times {
    pub count: usize,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    /// Requests that took longer than [`STALL`]; the next one is sent only when one is answered, so each stall counts once.
    pub stalls: usize,
}

/// One probe's outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Probed {
    /// On one connection.
    pub requests: Times,
    /// Each with a connection of its own.
    pub connections: Times,
}

/// Probes and prints a [`Probed`] as JSON.
pub async fn probe(target: SocketAddr, length: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + length;
    let (requests, connections) = tokio::join!(requests(target, until), connections(target, until));
    let probed = Probed { requests: times(requests?), connections: times(connections?) };
    println!("{}", serde_json::to_string(&probed)?);
    Ok(())
}

/// One every millisecond.
async fn requests(target: SocketAddr, until: Instant) -> std::io::Result<Vec<Duration>> {
    let mut stream = open(target, ECHO).await?;
    let mut taken = Vec::new();
    let mut pace = interval(Duration::from_millis(1));
    pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while Instant::now() < until {
        pace.tick().await;
        let started = Instant::now();
        request(&mut stream).await?;
        taken.push(started.elapsed());
    }
    Ok(taken)
}

/// One every ten milliseconds.
async fn connections(target: SocketAddr, until: Instant) -> std::io::Result<Vec<Duration>> {
    let mut taken = Vec::new();
    let mut pace = interval(Duration::from_millis(10));
    pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while Instant::now() < until {
        pace.tick().await;
        let started = Instant::now();
        let mut stream = open(target, ONE).await?;
        request(&mut stream).await?;
        taken.push(started.elapsed());
        let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut [0]).await?;
    }
    Ok(taken)
}

fn times(mut taken: Vec<Duration>) -> Times {
    taken.sort_unstable();
    let at = |share: f64| {
        taken.get((taken.len() as f64 * share) as usize).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    };
    Times {
        count: taken.len(),
        p50: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
        max: taken.last().map_or(0.0, |time| time.as_secs_f64() * 1e6),
        stalls: taken.iter().filter(|time| **time > STALL).count(),
    }
}
