//! `culvert demo`: the hello example for real, with a check for each thing that the mesh promises.

mod checks;
mod world;

use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::args::{DemoArgs, Output};
use world::World;

/// The whole outcome, as `-o json` prints it.
#[derive(Debug, Serialize)]
struct Outcome {
    checks: Vec<Check>,
    ok: bool,
}

/// One promise, kept or not.
#[derive(Debug, Serialize)]
struct Check {
    id: &'static str,
    ok: bool,
    detail: String,
}

pub(crate) fn demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let table = matches!(args.output, Output::Table | Output::Wide);
    if table {
        println!("starting two nodes, five pods, the mesh and its control plane ...");
    }
    let world = World::start(args)?;
    let mut checks = Vec::new();
    for (id, run) in checks::ALL {
        let (ok, detail) = match run(&world) {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        if table {
            println!("{} {id:<28} {detail}", if ok { "ok  " } else { "FAIL" });
        }
        checks.push(Check { id, ok, detail });
        // What one check left behind must not decide the next.
        world.reset().with_context(|| format!("after {id}"))?;
    }
    let ok = checks.iter().all(|check| check.ok);
    if !ok && args.keep {
        eprintln!("kept for a look: culvert status --state {}", world.keep().display());
    } else {
        world.stop()?;
    }
    if table {
        let kept = checks.iter().filter(|check| check.ok).count();
        println!("{kept} of {} checks hold; everything is taken down", checks.len());
    } else {
        print!("{}", args.output.data(&Outcome { checks, ok })?.unwrap_or_default());
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
