//! Commands that are run to their end.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Runs a command and gives what it said.
///
/// # Errors
/// If it cannot be started or fails; with what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {}", words(command)))?;
    ensure!(
        output.status.success(),
        "{}: {}: {}",
        words(command),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as a person would type it; long ones are cut.
fn words(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for word in command.get_args() {
        text.push(' ');
        text.push_str(&word.to_string_lossy());
    }
    if text.len() > 300 {
        let cut = (0..=300).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(cut);
        text.push_str(" ...");
    }
    text
}
