//! A day in minutes: connections of every kind, pods that come and go under the same addresses, policies pushed, certificates
//! that live seconds, tunnels that fall idle. Afterwards nothing is left of it: descriptors and threads are back where they were,
//! no socket is half closed in any namespace, and memory has not grown since the warm-up.
//!
//! Needs root. `make soak` runs the five minutes; `CULVERT_SOAK_SECONDS` makes them longer or shorter.

mod churn;
mod load;
mod measure;
mod verdict;
mod world;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use culvert_e2e::world::World;

use crate::measure::{Sample, sample};
use crate::verdict::Flat;
use crate::world::start;

/// The whole of it.
const FIVE_MINUTES: Duration = Duration::from_secs(300);
/// The part of it that every change must pass.
const SHORT: Duration = Duration::from_secs(30);
/// Samples of one run: a row of the printed series each.
const SAMPLES: u32 = 30;

/// How one run went.
struct Soaked {
    before: Sample,
    series: Vec<Sample>,
    after: Sample,
    done: Vec<String>,
}

#[test]
fn half_a_minute_leaves_nothing_behind() {
    soak("soak-short", SHORT, &Flat::SHORT);
}

#[test]
#[ignore = "five minutes: make soak, make test-all"]
fn five_minutes_leave_nothing_behind() {
    soak("soak", asked().unwrap_or(FIVE_MINUTES), &Flat::LONG);
}

fn asked() -> Option<Duration> {
    // Tests have no command line of their own.
    #[expect(clippy::disallowed_methods, reason = "see above")]
    let text = std::env::var("CULVERT_SOAK_SECONDS").ok()?;
    Some(Duration::from_secs(text.parse().expect("CULVERT_SOAK_SECONDS is a number")))
}

fn soak(name: &str, length: Duration, flat: &Flat) {
    let world = start(name).expect("a world");
    let soaked = run(&world, length).expect("a run");
    verdict::print(&soaked.series);
    for line in &soaked.done {
        println!("{line}");
    }
    let problems = verdict::judge(&soaked, flat);
    assert!(problems.is_empty(), "left behind:\n  {}", problems.join("\n  "));
}

/// Runs all of it at once for `length`; fails if any part does.
fn run(world: &World, length: Duration) -> Result<Soaked> {
    load::touch_everything(world)?;
    let before = measure::quiet(world, None)?;
    let (began, stop) = (Instant::now(), AtomicBool::new(false));
    let mut series = Vec::new();
    let done = thread::scope(|scope| {
        let mut parts = Vec::new();
        for steady in load::STEADY {
            parts.push(scope.spawn(move || load::steady(world, &steady, length)));
        }
        for (client, server) in load::TALKERS {
            let stop = &stop;
            parts.push(scope.spawn(move || load::talk(world, client, server, stop)));
        }
        parts.push(scope.spawn(|| load::stay(world, length)));
        parts.push(scope.spawn(|| churn::policies(world, &stop)));
        for pod in world::CHURNED {
            let stop = &stop;
            parts.push(scope.spawn(move || churn::pod(world, pod, stop)));
        }
        for step in 1..=SAMPLES {
            thread::sleep((length * step / SAMPLES).saturating_sub(began.elapsed()));
            match sample(world, began.elapsed()) {
                Ok(sample) => series.push(sample),
                Err(error) => eprintln!("no sample at {:?}: {error:#}", began.elapsed()),
            }
        }
        stop.store(true, Ordering::Relaxed);
        let joined = parts.into_iter().map(|part| part.join().map_err(|_| anyhow!("a part panicked"))?);
        joined.collect::<Result<Vec<String>>>()
    })
    .context("a part of the load")?;
    let after = measure::quiet(world, Some(&before))?;
    Ok(Soaked { before, series, after, done })
}
