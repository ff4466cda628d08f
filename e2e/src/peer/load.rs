//! Open-loop load: connections begin when the clock says so, whether earlier ones are done or not, so a stall is seen by
//! everybody it would have hit.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::client::ask;
use super::wire::name;

/// Longest wait for a connection or an answer; longer is a failure.
const PATIENCE: Duration = Duration::from_secs(10);
/// A thread's stack: nothing here recurses.
const STACK: usize = 256 * 1024;
/// Outcomes on their way. At 100 a second and 10 s of patience at most 1,000 requests are open.
const QUEUE: usize = 4096;
/// Failures told one by one.
const TOLD: usize = 20;

/// What to do.
#[derive(Clone, Debug)]
pub struct Load {
    /// Whom with; taken in turn.
    pub targets: Vec<IpAddr>,
    /// The first port. With `ports` more than one, another port comes into use every second.
    pub port: u16,
    /// How many ports there are.
    pub ports: u16,
    /// New connections a second.
    pub rate: u32,
    /// For how long.
    pub time: Duration,
    /// Says each failure when it happens.
    pub tell: bool,
}

struct Done {
    at: Duration,
    took: Duration,
    port: u16,
    error: Option<String>,
}

/// Runs it; how many failed and how long they took.
#[must_use]
pub fn run(load: &Load) -> Value {
    let (done, outcomes) = sync_channel(QUEUE);
    let tell = load.tell;
    let collector = thread::spawn(move || collect(&outcomes, tell));
    println!("{}", json!({"event": "started"}));
    let started = Instant::now();
    let total = u64::from(load.rate) * load.time.as_secs();
    for index in 0..total {
        let due = Duration::from_secs(index) / load.rate;
        thread::sleep(due.saturating_sub(started.elapsed()));
        let target = load.target(index, due);
        let done = done.clone();
        let spawned = thread::Builder::new().stack_size(STACK).spawn(move || {
            let begun = Instant::now();
            let error = request(target, index).err().map(|error| format!("{} ({error})", name(&error)));
            let _ = done.send(Done { at: due, took: begun.elapsed(), port: target.port(), error });
        });
        if let Err(error) = spawned {
            return json!({"failed": total, "text": error.to_string()});
        }
    }
    drop(done);
    collector.join().unwrap_or_default()
}

impl Load {
    fn target(&self, index: u64, due: Duration) -> SocketAddr {
        let address = self.targets[usize::try_from(index).unwrap_or(0) % self.targets.len()];
        // Each second's first time round takes the newest port, the next the first one of all, and so on downwards: new
        // tunnels, shared ones, and one that is in use all the time.
        let known = (due.as_secs() + 1).min(u64::from(self.ports));
        let round = index % u64::from(self.rate) / self.targets.len() as u64;
        let port = if round % 2 == 1 { 0 } else { (known - 1).saturating_sub(round / 2) };
        SocketAddr::new(address, self.port + u16::try_from(port).unwrap_or(0))
    }
}

fn request(target: SocketAddr, index: u64) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"echo load\n")?;
    ask(&mut stream, index)
}

fn collect(outcomes: &Receiver<Done>, tell: bool) -> Value {
    let mut took = Vec::new();
    let mut failures = Vec::new();
    for done in outcomes {
        took.push(done.took);
        if let Some(error) = done.error {
            if tell {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                println!(
                    "{}",
                    json!({"failed_at": (now.saturating_sub(done.took)).as_secs_f64(), "took": done.took.as_secs_f64(), "error": error})
                );
            }
            failures.push(json!({"at": done.at.as_secs_f64(), "took": done.took.as_secs_f64(), "port": done.port, "error": error}));
        }
    }
    took.sort_unstable();
    let at =
        |part: usize| took.get(took.len() * part / 100).or(took.last()).map_or(0.0, Duration::as_secs_f64);
    let failed = failures.len();
    failures.truncate(TOLD);
    json!({"total": took.len(), "failed": failed, "failures": failures, "p50": at(50), "p99": at(99), "max": at(100)})
}
