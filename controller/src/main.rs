//! The controller program: settings, log, application, signal, exit.

use std::process::ExitCode;
use std::time::Duration;

use culvert_controller::app::Opening;
use culvert_controller::args::Args;
use culvert_runtime::config::{Program, Sources, load};
use culvert_runtime::telemetry::{self, Format};
use culvert_runtime::{signal, tasks};

/// The last log lines are few.
const FLUSH: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let loaded = match load::<Args>(&Sources::of_process(), Program::default()) {
        Ok(loaded) => loaded,
        Err(error) => return error.report(),
    };
    let args = loaded.settings;
    if args.print_config {
        print!("{}", loaded.effective.to_yaml());
        return ExitCode::SUCCESS;
    }
    let format = if args.log_json { Format::Json } else { Format::Text };
    let log = match telemetry::init(format, &args.log) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("controller: {error}");
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("controller: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(&args, &log.filter()));
    // Connections that are still open are not waited for: their clients come back to the next controller.
    runtime.shutdown_background();
    let code = match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("cannot start: {error:#}");
            eprintln!("controller: {error:#}");
            ExitCode::FAILURE
        }
    };
    log.flush(FLUSH);
    code
}

async fn run(args: &Args, filter: &telemetry::FilterHandle) -> anyhow::Result<()> {
    // Caught before anything is open, so that an early SIGTERM ends it in order too.
    let (asked, told) = tokio::sync::oneshot::channel();
    let signals = tasks::Tasks::new("main");
    signals.spawn("signal", async move {
        let received = signal::shutdown().await;
        let _ = asked.send(received);
    });
    let opening = Opening::new(args, Some(filter))?;
    tracing::info!(metrics = %opening.admin_address, "reading everything before anything is served");
    let mut told = told;
    let app = tokio::select! {
        told = &mut told => {
            // Nobody is served yet, so there is nobody to take leave of.
            say(told);
            return Ok(());
        }
        app = opening.serve(args) => app?,
    };
    tracing::info!(xds = %app.address, metrics = %app.admin_address, "serving");
    say(told.await);
    app.stop().await;
    Ok(())
}

fn say(told: Result<std::io::Result<signal::Signal>, tokio::sync::oneshot::error::RecvError>) {
    match told {
        Ok(Ok(signal)) => tracing::info!(?signal, "stopping"),
        Ok(Err(error)) => tracing::error!(%error, "no signals can be received"),
        Err(_) => tracing::error!("nobody waits for signals"),
    }
}
