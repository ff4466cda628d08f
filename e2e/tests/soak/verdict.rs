//! Whether anything was left behind.

use crate::Soaked;
use crate::measure::{SPARE_THREADS, Sample, pids};

/// What counts as flat: the first third of a run is warm-up, and the highest of the last third is at most so much above the highest
/// of the one between. Highest against highest: what is held rises and falls with the connections that are open, by a tenth.
#[derive(Clone, Copy, Debug)]
pub struct Flat {
    /// Per cent.
    share: u64,
    /// KiB: a page here and there is no growth. The larger of the two counts.
    least: u64,
}

impl Flat {
    /// Of five minutes: ten thousand connections in each third, so two hundred bytes kept of each would be too much.
    pub const LONG: Self = Self { share: 4, least: 1024 };
    /// Of half a minute, most of which is warm-up: only what keeps some KiB of every connection shows.
    pub const SHORT: Self = Self { share: 10, least: 4096 };
}

/// Sockets that may wait for their peers' FIN at any moment: those whose pods have just been deleted, or which the other side
/// keeps half open on purpose. They are gone within a minute, so the table is bounded by a minute's worth.
const MOST_FIN_WAIT_2: usize = 2000;

pub fn judge(soaked: &Soaked, flat: &Flat) -> Vec<String> {
    let mut problems = memory(&soaked.series, flat);
    let (before, after) = (&soaked.before, &soaked.after);
    if pids(before) != pids(after) {
        problems.push(format!("programs were replaced: {:?} then {:?}", pids(before), pids(after)));
    }
    for (name, then) in &before.programs {
        let Some(now) = after.programs.get(name) else { continue };
        if now.descriptors > then.descriptors {
            problems.push(format!("{name}: {} descriptors, then {}", then.descriptors, now.descriptors));
        }
        if now.threads > then.threads + SPARE_THREADS {
            problems.push(format!("{name}: {} threads, then {}", then.threads, now.threads));
        }
    }
    for socket in &after.close_wait_in {
        problems.push(format!("in CLOSE-WAIT: {socket}"));
    }
    if after.sockets.fin_wait_2 > 0 {
        problems.push(format!("{} sockets in FIN-WAIT-2", after.sockets.fin_wait_2));
    }
    if after.sockets.established > before.sockets.established {
        let (then, now) = (before.sockets.established, after.sockets.established);
        problems.push(format!("{then} established connections, then {now}"));
    }
    let most = soaked.series.iter().map(|sample| sample.sockets.fin_wait_2).max().unwrap_or(0);
    if most > MOST_FIN_WAIT_2 {
        problems.push(format!("{most} sockets in FIN-WAIT-2 at once"));
    }
    problems
}

fn memory(series: &[Sample], flat: &Flat) -> Vec<String> {
    let third = series.len() / 3;
    if third == 0 {
        return vec![format!("only {} samples", series.len())];
    }
    let mut problems = Vec::new();
    for name in series[0].programs.keys() {
        let highest = |part: &[Sample]| {
            part.iter().filter_map(|sample| Some(sample.programs.get(name)?.resident)).max().unwrap_or(0)
        };
        let (warm, last) = (highest(&series[third..2 * third]), highest(&series[2 * third..]));
        let most = warm + (warm * flat.share / 100).max(flat.least);
        println!("{name:<16} {warm:>7} KiB at most after the warm-up, {last:>7} in the end (allowed {most})");
        if last > most {
            problems
                .push(format!("{name}: {warm} KiB after the warm-up, {last} in the end, more than {most}"));
        }
    }
    problems
}

/// The series: resident memory in MiB, descriptors and threads of each program, sockets by state.
pub fn print(series: &[Sample]) {
    let Some(first) = series.first() else { return };
    let names: Vec<&String> = first.programs.keys().collect();
    let columns: Vec<String> = names.iter().map(|name| format!("{name:>20}")).collect();
    println!("{:>6} {} {:>6} {:>6} {:>6}", "s", columns.join(" "), "ESTAB", "CLOSEW", "FINW2");
    println!("{:>6} {:>20}", "", "MiB/fds/threads");
    for sample in series {
        let cells: Vec<String> = names
            .iter()
            .map(|name| {
                let program = sample.programs.get(*name).copied().unwrap_or_default();
                let resident = program.resident as f64 / 1024.0;
                format!("{:>20}", format!("{resident:.1}/{}/{}", program.descriptors, program.threads))
            })
            .collect();
        let sockets = sample.sockets;
        println!(
            "{:>6} {} {:>6} {:>6} {:>6}",
            sample.at.as_secs(),
            cells.join(" "),
            sockets.established,
            sockets.close_wait,
            sockets.fin_wait_2
        );
    }
}
