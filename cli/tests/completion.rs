//! Completion scripts, and the page that lists every command.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::fs;
use std::process::Command as Process;

use clap::{Command, CommandFactory};
use culvert_cli::args::Cli;

fn script(shell: &str) -> String {
    let output = Process::new(env!("CARGO_BIN_EXE_culvert")).args(["completion", shell]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What bash offers after these words.
fn offered(words: &[&str]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("culvert.bash");
    fs::write(&file, script("bash")).unwrap();
    let last = words.len() - 1;
    let quoted: Vec<_> = words.iter().map(|word| format!("'{word}'")).collect();
    let ask = format!(
        "source {}; COMP_WORDS=({}); COMP_CWORD={last}; _culvert culvert '{}' '{}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        file.display(),
        quoted.join(" "),
        words[last],
        words[last - 1],
    );
    let output = Process::new("bash").args(["--norc", "-c", &ask]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// K31.
#[test]
fn bash_completes_commands_their_flags_and_their_values() {
    assert_eq!(offered(&["culvert", "way"]), ["waypoint"]);
    assert_eq!(offered(&["culvert", "waypoint", "ap"]), ["apply"]);
    let flags = offered(&["culvert", "status", "--"]);
    for flag in ["--context", "--kubeconfig", "--namespace", "--system-namespace", "--mesh", "--output"] {
        assert!(flags.iter().any(|it| it == flag), "{flag} in {flags:?}");
    }
    assert_eq!(offered(&["culvert", "status", "-o", "j"]), ["json"]);
    assert_eq!(offered(&["culvert", "get", "cert"]), ["certificates"]);
}

/// K31.
#[test]
fn every_shell_has_a_script_that_names_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = script(shell);
        for command in ["status", "check", "waypoint", "explain"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    assert_eq!(
        Process::new(env!("CARGO_BIN_EXE_culvert"))
            .args(["completion", "tcsh"])
            .output()
            .unwrap()
            .status
            .code(),
        Some(2)
    );
}

fn visible(command: &Command, found: &mut Vec<String>) {
    for argument in command.get_arguments().filter(|it| !it.is_hide_set()) {
        found.extend(
            argument.get_long().filter(|it| !["help", "version"].contains(it)).map(|it| format!("--{it}")),
        );
    }
    for below in command.get_subcommands().filter(|it| !it.is_hide_set() && it.get_name() != "help") {
        found.push(below.get_name().to_owned());
        visible(below, found);
    }
}

#[test]
fn the_reference_names_every_command_and_flag() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/cli.md");
    let page = fs::read_to_string(path).unwrap();
    let mut all = Vec::new();
    visible(&Cli::command(), &mut all);
    assert!(all.len() > 60, "{all:?}");
    all.retain(|name| !page.contains(&format!("`{name}`")) && !page.contains(&format!("`{name} ")));
    assert!(all.is_empty(), "docs/reference/cli.md does not name {all:?}");
}
