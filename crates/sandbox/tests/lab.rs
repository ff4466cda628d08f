//! Namespaces, links and routes with real sockets. Needs root.

#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use culvert_sandbox::lab::{Lab, NetNs};
use culvert_sandbox::plan::{self, Family};

const TIMEOUT: Duration = Duration::from_secs(5);

/// What the machine's own namespace looks like: links, routes, forwarding.
fn machine() -> Vec<String> {
    let links: BTreeSet<_> = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|entry| format!("{:?}", entry.unwrap().file_name()))
        .collect();
    let mut seen: Vec<String> = links.into_iter().collect();
    for file in [
        "/proc/net/route",
        "/proc/net/ipv6_route",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/net/ipv6/conf/all/forwarding",
        "/proc/sys/net/ipv4/conf/all/rp_filter",
    ] {
        // Use counters of routes change by themselves; the destination, gateway and link are what counts.
        let text = fs::read_to_string(file).unwrap_or_default();
        seen.extend(text.lines().map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            if file.ends_with("ipv6_route") {
                format!("{} {} {} {}", words[0], words[1], words[4], words[words.len() - 1])
            } else {
                words.join(" ")
            }
        }));
    }
    seen
}

/// Connects from one namespace to an address in another and exchanges a few bytes; returns the source the server saw.
fn talk(from: &NetNs, to: &NetNs, address: IpAddr) -> IpAddr {
    let listener = to.run(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            let mut text = [0; 4];
            stream.read_exact(&mut text).unwrap();
            stream.write_all(&text).unwrap();
            peer.ip()
        });
        let mut stream = from.run(|| TcpStream::connect_timeout(&target, TIMEOUT)).unwrap().unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.write_all(b"ping").unwrap();
        let mut text = [0; 4];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"ping");
        server.join().unwrap()
    })
}

fn mounts_below(dir: &Path) -> usize {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter(|line| line.contains(dir.to_str().unwrap())).count()
}

#[test]
fn pods_talk_across_nodes_and_on_one_node_in_both_families() {
    let before = machine();
    let dir = tempfile::tempdir().unwrap();
    let netns_dir = dir.path().join("netns");
    let mut lab = Lab::create(&netns_dir, Family::Dual).unwrap();
    lab.add_node("a").unwrap();
    lab.add_node("b").unwrap();
    let one = lab.add_pod("a", "default.one", &plan::pod_addresses(1, 5)).unwrap();
    let two = lab.add_pod("a", "default.two", &plan::pod_addresses(1, 6)).unwrap();
    let far = lab.add_pod("b", "default.far", &plan::pod_addresses(2, 5)).unwrap();

    for family in 0..2 {
        let own = plan::pod_addresses(1, 5)[family];
        assert_eq!(talk(&one, &two, plan::pod_addresses(1, 6)[family]), own, "one node");
        assert_eq!(talk(&one, &far, plan::pod_addresses(2, 5)[family]), own, "across nodes, source kept");
        assert_eq!(talk(&far, &one, own), plan::pod_addresses(2, 5)[family]);
        assert_eq!(talk(&one, lab.controller(), plan::dns_addresses()[family]), own, "pod to DNS");
        let node = lab.node("a").unwrap();
        assert_eq!(talk(&node.netns, &one, own), plan::node_addresses(1)[family], "node to its pod");
        assert_eq!(
            talk(&node.netns, &far, plan::pod_addresses(2, 5)[family]),
            plan::node_addresses(1)[family]
        );
        let source = talk(lab.controller(), &far, plan::pod_addresses(2, 5)[family]);
        assert!([plan::controller_addresses()[family], plan::dns_addresses()[family]].contains(&source));
        assert_eq!(talk(&one, &one, own), own, "itself");
    }
    assert_eq!(machine(), before, "the machine's own namespace is as it was");
    lab.destroy().unwrap();
    assert_eq!(mounts_below(dir.path()), 0);
    assert!(!netns_dir.exists());
    assert_eq!(machine(), before);
}

#[test]
fn a_pod_removed_at_run_time_frees_its_name_and_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut lab = Lab::create(&dir.path().join("netns"), Family::Dual).unwrap();
    lab.add_node("a").unwrap();
    let addresses = plan::pod_addresses(1, 9);
    let client = lab.add_pod("a", "default.client", &plan::pod_addresses(1, 8)).unwrap();
    for _ in 0..3 {
        let pod = lab.add_pod("a", "default.server", &addresses).unwrap();
        // Held open by a socket of a process that is slow to end: the address must still be free for the next pod.
        let _held = pod.run(|| TcpListener::bind((addresses[0], 80)).unwrap()).unwrap();
        talk(&client, &pod, addresses[0]);
        talk(&client, &pod, addresses[1]);
        lab.remove_pod("a", "default.server").unwrap();
        assert!(!pod.path().exists());
    }
    lab.remove_pod("a", "default.server").unwrap();
}

#[test]
fn a_pod_reaches_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let mut lab = Lab::create(&dir.path().join("netns"), Family::Dual).unwrap();
    lab.add_node("a").unwrap();
    let pod = lab.add_pod("a", "default.p", &plan::pod_addresses(1, 9)).unwrap();
    for outside in ["192.0.2.1:80", "[2001:db8::1]:80"] {
        let target: SocketAddr = outside.parse().unwrap();
        let outcome = pod.run(|| TcpStream::connect_timeout(&target, TIMEOUT)).unwrap();
        assert!(outcome.is_err(), "{outside} answered");
    }
}

#[test]
fn one_family_alone() {
    for (family, kept) in [(Family::Ipv4, 0), (Family::Ipv6, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let mut lab = Lab::create(&dir.path().join("netns"), family).unwrap();
        lab.add_node("a").unwrap();
        lab.add_node("b").unwrap();
        let one = lab.add_pod("a", "default.one", &plan::pod_addresses(1, 5)[kept..=kept]).unwrap();
        let far = lab.add_pod("b", "default.far", &plan::pod_addresses(2, 5)[kept..=kept]).unwrap();
        talk(&one, &far, plan::pod_addresses(2, 5)[kept]);
        let loopback = ["127.0.0.1", "::1"][1 - kept].parse().unwrap();
        talk(&one, &one, loopback);
    }
}

#[test]
fn two_sandboxes_side_by_side_with_the_same_addresses() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let labs: Vec<_> = dirs
        .iter()
        .map(|dir| {
            let mut lab = Lab::create(&dir.path().join("netns"), Family::Dual).unwrap();
            lab.add_node("a").unwrap();
            let pod = lab.add_pod("a", "default.p", &plan::pod_addresses(1, 9)).unwrap();
            (lab, pod)
        })
        .collect();
    for (lab, pod) in &labs {
        talk(&lab.node("a").unwrap().netns, pod, plan::pod_addresses(1, 9)[0]);
    }
}
