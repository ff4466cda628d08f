//! Termination by signal or request (Z07): the first SIGTERM or SIGINT starts a drain, a SIGINT after that ends the process at once.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

use crate::tasks::Tasks;

/// What asked for a shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: the platform's polite stop.
    Terminate,
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// No signal: the program was asked by other means.
    Request,
}

/// Exit code after the impatient SIGINT: 128 + 2, what a shell reports for a process that SIGINT killed.
const IMPATIENT_EXIT: i32 = 130;

/// Resolves at the first SIGTERM or SIGINT, and leaves behind a task that ends the process (code 130) at the next SIGINT.
///
/// Signals are caught from the first poll on; the default action is gone for the rest of the process.
///
/// # Errors
/// If the signal handlers cannot be installed.
pub async fn shutdown() -> io::Result<Signal> {
    shutdown_or(std::future::pending()).await
}

/// As [`shutdown`]; `request` resolves when the program is asked to end by other means.
///
/// # Errors
/// As for [`shutdown`].
pub async fn shutdown_or(request: impl Future<Output = ()>) -> io::Result<Signal> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let received = tokio::select! {
        _ = terminate.recv() => Signal::Terminate,
        _ = interrupt.recv() => Signal::Interrupt,
        () = request => Signal::Request,
    };
    // Never waited for: it lives exactly as long as the process.
    Tasks::new("signal").spawn("second interrupt", async move {
        if interrupt.recv().await.is_some() {
            eprintln!("interrupted again: not waiting for the drain");
            std::process::exit(IMPATIENT_EXIT);
        }
    });
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, ChildStdout, Command, Stdio};

    /// Not a test by itself: the process that the test below sends signals to.
    #[tokio::test]
    #[ignore = "run as a child of the next test"]
    async fn child() {
        // The parent asks by closing standard input; otherwise it sends signals.
        let request = async {
            let read = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()));
            let _ = read.await;
        };
        let first = shutdown_or(request);
        tokio::pin!(first);
        assert!(futures_util::poll!(&mut first).is_pending(), "the first poll installs the handlers");
        println!("\nready");
        println!("\n{:?}", first.await.unwrap());
        std::future::pending::<()>().await;
    }

    struct Victim {
        input: Option<std::process::ChildStdin>,
        process: Child,
        lines: std::io::Lines<BufReader<ChildStdout>>,
    }

    impl Victim {
        fn start() -> Self {
            let mut process = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "signal::tests::child", "--ignored", "--nocapture"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let lines = BufReader::new(process.stdout.take().unwrap()).lines();
            Self { input: process.stdin.take(), process, lines }
        }

        fn saw(&mut self, line: &str) -> bool {
            self.lines.any(|read| read.unwrap() == line)
        }

        fn kill(&self, signal: &str) {
            let pid = self.process.id().to_string();
            assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        }
    }

    /// Z07.
    #[test]
    fn a_second_interrupt_exits_at_once() {
        for (signal, name) in [("TERM", "Terminate"), ("INT", "Interrupt")] {
            let mut victim = Victim::start();
            assert!(victim.saw("ready"));
            victim.kill(signal);
            assert!(victim.saw(name), "the first {signal} is a request");
            victim.kill("INT");
            assert_eq!(victim.process.wait().unwrap().code(), Some(IMPATIENT_EXIT));
        }
    }

    /// Z07: also after a drain that no signal started.
    #[test]
    fn an_interrupt_after_a_request_exits_at_once() {
        let mut victim = Victim::start();
        assert!(victim.saw("ready"));
        drop(victim.input.take());
        assert!(victim.saw("Request"));
        victim.kill("INT");
        assert_eq!(victim.process.wait().unwrap().code(), Some(IMPATIENT_EXIT));
    }
}
