//! Everything a run made is gone after `down`, after Ctrl-C, and after a crash. Needs root.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::{SLEEP, World, eventually, machine, pod};
use culvert_sandbox::lab::NetNsId;
use culvert_sandbox::process;

/// A pod, one that hides from its process group, and one that ignores SIGTERM.
fn stubborn() -> String {
    let daemon = "[sh, -c, 'setsid -f sleep 1000001; sleep 1000002']";
    let deaf = "[sh, -c, 'trap \"\" TERM; while true; do sleep 1; done']";
    [pod("plain", "a", "", SLEEP, ""), pod("daemon", "b", "", daemon, ""), pod("deaf", "b", "", deaf, "")]
        .concat()
}

/// The namespaces of a world, to look for their processes afterwards.
fn namespaces(world: &World) -> BTreeSet<NetNsId> {
    let entries = fs::read_dir(world.state().join("netns")).unwrap();
    entries.map(|entry| NetNsId::of(&entry.unwrap().path()).unwrap()).collect()
}

fn kill(signal: &str, pid: u32) {
    assert!(Command::new("kill").args(["-s", signal, &pid.to_string()]).status().unwrap().success());
}

fn assert_gone(world: &World, namespaces: &BTreeSet<NetNsId>) {
    assert_eq!(process::inside(namespaces), [], "processes");
    assert_eq!(world.mounts(), 0, "mounts");
    assert!(!world.state().exists(), "state directory");
}

#[test]
fn down_removes_everything() {
    let before = machine();
    let world = World::new(&[("all.yaml", &stubborn())]);
    world.up(&["--no-mesh"]);
    eventually("the hidden process", || process::inside(&namespaces(&world)).len() >= 5);
    let namespaces = namespaces(&world);
    assert_eq!(namespaces.len(), 7, "fabric, controller, two nodes, three pods");
    world.ok(&["down"]);
    assert_gone(&world, &namespaces);
    assert_eq!(machine(), before);
    world.ok(&["down"]);
    assert_eq!(world.run(&["status"]).status.code(), Some(1));
}

#[test]
fn an_interrupt_removes_everything() {
    let world = World::new(&[("all.yaml", &stubborn())]);
    let mut up = world.up_in_foreground();
    let namespaces = namespaces(&world);
    kill("INT", up.id());
    assert!(up.wait().unwrap().success());
    assert_gone(&world, &namespaces);
}

#[test]
fn after_a_crash_the_next_down_removes_everything() {
    let world = World::new(&[("all.yaml", &stubborn())]);
    let mut up = world.up_in_foreground();
    let namespaces = namespaces(&world);
    kill("KILL", up.id());
    up.wait().unwrap();
    assert!(!process::inside(&namespaces).is_empty(), "the pods outlive the crash");
    world.ok(&["down"]);
    assert_gone(&world, &namespaces);
}

#[test]
fn after_a_crash_the_next_up_starts_afresh() {
    let world = World::new(&[("all.yaml", &stubborn())]);
    let mut crashed = world.up_in_foreground();
    let old = world.report().unwrap();
    let old_processes = process::inside(&namespaces(&world));
    kill("KILL", crashed.id());
    crashed.wait().unwrap();
    world.up(&["--no-mesh"]);
    assert!(!old_processes.iter().any(process::Record::runs), "the old pods are gone");
    let new = world.report().unwrap();
    assert_eq!(new.pods.len(), 3);
    assert!(new.pods.iter().all(|pod| old.pods.iter().all(|old| old.uid != pod.uid)));
    let namespaces = namespaces(&world);
    world.ok(&["down"]);
    assert_gone(&world, &namespaces);
}

#[test]
fn two_do_not_share_a_state_directory() {
    let world = World::new(&[("all.yaml", &pod("p", "a", "", SLEEP, ""))]);
    world.up(&["--no-mesh"]);
    let output = world.run(&["up", "-f", world.manifests().to_str().unwrap(), "--no-mesh", "--detach"]);
    assert!(!output.status.success());
    assert!(common::text(&output).contains("in use"), "{}", common::text(&output));
    assert!(world.report().unwrap().settled, "the first is unharmed");
    // Beside it, another lives with the same addresses.
    let other = World::new(&[("all.yaml", &pod("p", "a", "", SLEEP, ""))]);
    other.up(&["--no-mesh"]);
    assert_eq!(other.report().unwrap().pods[0].addresses, world.report().unwrap().pods[0].addresses);
}

#[test]
fn a_failed_start_leaves_nothing_but_its_log() {
    let world = World::new(&[]);
    let missing = world.dir().join("none");
    let output = world.run(&["up", "-f", missing.to_str().unwrap(), "--no-mesh", "--detach"]);
    assert_eq!(output.status.code(), Some(1));
    let output = world.run(&["up", "-f", world.manifests().to_str().unwrap(), "--bin-dir", "/var/empty"]);
    assert!(common::text(&output).contains("--no-mesh"), "says what to do: {}", common::text(&output));
    assert_eq!(world.mounts(), 0);
    assert!(!Path::new(&world.state()).exists());
}
