//! Pods, services and names without the mesh. Needs root.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::process::Stdio;

use common::{SLEEP, World, endpoints, machine, pod, service, web};
use culvert_k8s_api::status::Phase;
use culvert_sandbox::container::ContainerState;
use culvert_sandbox::report::Report;

const GET: &str = "curl -sS --max-time 5 ";

fn shop() -> String {
    [
        web("shop/web-1", "a", "app: web"),
        web("shop/web-2", "b", "app: web"),
        pod("client", "a", "", SLEEP, ""),
        service("shop/web", "{selector: {app: web}, ports: [{port: 80, targetPort: http}]}"),
        service("shop/direct", "{clusterIP: None, selector: {app: web}, ports: [{port: 8080}]}"),
        service(
            "shop/fixed",
            "{clusterIP: 198.18.200.1, selector: {app: web}, ports: [{port: 81, targetPort: 8080}]}",
        ),
        service("shop/idle", "{selector: {app: nobody}, ports: [{port: 80}]}"),
    ]
    .concat()
}

#[test]
fn services_by_address_and_name_in_both_families() {
    let before = machine();
    let world = World::new(&[("shop.yaml", &shop())]);
    world.up(&["--no-mesh"]);
    let both = |from: &str, url: &str| {
        for family in ["-4", "-6"] {
            let answers: BTreeSet<_> =
                (0..40).map(|_| world.sh(from, &format!("{GET} {family} {url}"))).collect();
            let expected = [(0, "web-1".to_owned()), (0, "web-2".to_owned())];
            assert_eq!(answers, expected.into(), "{from} {family} {url}");
        }
    };
    both("client", "http://web.shop.svc.cluster.local/");
    both("client", "http://web.shop/");
    // From an endpoint itself: half of these reach the pod that asks.
    both("shop/web-1", "http://web/");
    let (_, direct) = world.sh("client", "getent ahosts direct.shop | cut -d' ' -f1 | sort -u | wc -l");
    assert_eq!(direct.trim(), "4", "a headless name has the addresses of its pods");
    assert_eq!(
        world.sh("client", &format!("{GET} http://198.18.200.1:81/")).0,
        0,
        "the address in the manifest"
    );
    // 7: could not connect, at once; 28 would be a timeout.
    for family in ["-4", "-6"] {
        assert_eq!(
            world.sh("client", &format!("{GET} {family} http://idle.shop/")).0,
            7,
            "no endpoint is refused"
        );
    }
    // 6: no such name.
    assert_eq!(world.sh("client", &format!("{GET} http://nobody.shop/")).0, 6);
    assert_eq!(world.sh("client", &format!("{GET} http://example.com/")).0, 6);
    assert_eq!(machine(), before);
}

#[test]
fn a_node_reaches_services_too() {
    let host = pod("onnode", "a", "", SLEEP, "  hostNetwork: true\n");
    let world = World::new(&[("shop.yaml", &(shop() + &host))]);
    world.up(&["--no-mesh"]);
    for family in ["-4", "-6"] {
        for _ in 0..10 {
            assert_eq!(world.sh("onnode", &format!("{GET} {family} http://web.shop/")).0, 0);
        }
        assert_eq!(world.sh("onnode", &format!("{GET} {family} http://idle.shop/")).0, 7);
    }
    let report = world.report().unwrap();
    let node = &report.nodes[0];
    let pod = report.pods.iter().find(|pod| pod.key.name == "onnode").unwrap();
    assert_eq!(pod.addresses, node.addresses);
}

#[test]
fn udp_services() {
    let server = "import socket\ns=socket.socket(socket.AF_INET6,socket.SOCK_DGRAM)\ns.bind(('::',9))\n\
        while 1:\n d,a=s.recvfrom(99);s.sendto(d.upper(),a)\n";
    let client = "import socket,sys\nf=socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n\
        s=socket.socket(f,socket.SOCK_DGRAM);s.settimeout(5);s.connect((sys.argv[1],99))\n\
        s.send(b'hello');print(s.recv(99).decode())";
    let yaml = [
        pod("echo", "b", "app: echo", &serde_json::to_string(&["python3", "-c", server]).unwrap(), ""),
        pod("client", "a", "", SLEEP, ""),
        service("echo", "{selector: {app: echo}, ports: [{port: 99, targetPort: 9, protocol: UDP}]}"),
    ];
    let world = World::new(&[("all.yaml", &yaml.concat())]);
    world.up(&["--no-mesh"]);
    let report = world.wait("endpoint", |report| endpoints(report, "echo") == 2);
    for address in &report.services[0].addresses {
        let try_it = || {
            let output = world.run(&["exec", "client", "--", "python3", "-c", client, &address.to_string()]);
            common::text(&output).contains("HELLO")
        };
        // There is no probe for UDP: the server may still be starting.
        common::eventually("an answer", try_it);
    }
}

#[test]
fn readiness_moves_endpoints() {
    let world = World::new(&[("shop.yaml", &shop())]);
    world.up(&["--no-mesh"]);
    let report = world.wait("endpoints", |report| endpoints(report, "web") == 4);
    let pid = |report: &Report| {
        let pod = report.pods.iter().find(|pod| pod.key.name == "web-1").unwrap();
        match pod.containers[0].state {
            ContainerState::Running { pid, .. } => Some(pid),
            _ => None,
        }
    };
    let first = pid(&report).unwrap();
    assert_eq!(world.sh("shop/web-1", &format!("kill -9 {first}")).0, 0);
    world.wait("one pod less", |report| endpoints(report, "web") == 2);
    let answers: BTreeSet<_> =
        (0..10).map(|_| world.sh("client", &format!("{GET} http://web.shop/"))).collect();
    assert_eq!(answers, [(0, "web-2".to_owned())].into());
    let report = world.wait("the pod to return", |report| endpoints(report, "web") == 4);
    assert_ne!(pid(&report), Some(first));
    let pod = report.pods.iter().find(|pod| pod.key.name == "web-1").unwrap();
    assert_eq!(pod.containers[0].restarts, 1);
}

#[test]
fn changes_on_disk() {
    let world = World::new(&[("shop.yaml", &shop())]);
    world.up(&["--no-mesh"]);
    let uid = |report: &Report, name: &str| {
        report.pods.iter().find(|pod| pod.key.name == name).map(|pod| pod.uid.clone())
    };
    let before = world.wait("endpoints", |report| endpoints(report, "web") == 4);

    world.write("more.yaml", &web("shop/web-3", "c", "app: web"));
    let added = world.wait("a third pod on a third node", |report| endpoints(report, "web") == 6);
    assert_eq!(added.nodes.len(), 3);
    let answers: BTreeSet<_> =
        (0..40).map(|_| world.sh("client", &format!("{GET} http://web.shop/")).1).collect();
    assert!(answers.contains("web-3"), "{answers:?}");

    world.write("more.yaml", &web("shop/web-3", "c", "app: other"));
    let relabelled = world.wait("another label", |report| endpoints(report, "web") == 4);
    assert_eq!(uid(&relabelled, "web-3"), uid(&added, "web-3"), "a label does not restart a pod");

    world.write("more.yaml", &pod("shop/web-3", "c", "app: other", SLEEP, ""));
    world.wait("another command", |report| {
        let now = uid(report, "web-3");
        now.is_some() && now != uid(&added, "web-3")
    });

    world.write("more.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: broken}\nspec: {containers: 7}\n");
    let broken = world.wait("a complaint", |report| report.problems.iter().any(|p| p.contains("more.yaml")));
    assert!(uid(&broken, "web-3").is_some(), "the last good content stays in force");

    world.remove("more.yaml");
    let removed =
        world.wait("removal", |report| uid(report, "web-3").is_none() && report.problems.is_empty());
    assert_eq!(uid(&removed, "web-1"), uid(&before, "web-1"));
    assert!(!world.state().join("status/pods/shop.web-3.json").exists());
    assert!(!world.state().join("netns/pod.shop.web-3").exists());
}

#[test]
fn exec_logs_and_the_end_of_pods() {
    let say = "[sh, -c, 'echo $GREETING from $(hostname) on $NODE at $IP; exit $0', \"$(CODE)\"]";
    let env = |code: &str| {
        let field = |name: &str, path: &str| {
            format!("{{name: {name}, valueFrom: {{fieldRef: {{fieldPath: {path}}}}}}}")
        };
        let fields = [field("NODE", "spec.nodeName"), field("IP", "status.podIP")].join(", ");
        let values = format!("{{name: GREETING, value: hello}}, {{name: CODE, value: \"{code}\"}}");
        format!("    env: [{values}, {fields}]\n  restartPolicy: Never\n")
    };
    let yaml = [
        pod("good", "a", "", say, &env("0")),
        pod("bad", "a", "", say, &env("3")),
        pod("client", "a", "", SLEEP, "    env: [{name: OWN, value: mine}]\n"),
    ];
    let world = World::new(&[("all.yaml", &yaml.concat())]);
    world.up(&["--no-mesh"]);
    // A pod without a readiness probe is ready while it runs, so `up` may be done before they end.
    let phase =
        |report: &Report, name: &str| report.pods.iter().find(|pod| pod.key.name == name).unwrap().phase;
    let ended = |phase| matches!(phase, Phase::Succeeded | Phase::Failed);
    let report =
        world.wait("both have ended", |report| ["good", "bad"].iter().all(|it| ended(phase(report, it))));
    assert_eq!(phase(&report, "good"), Phase::Succeeded);
    assert_eq!(phase(&report, "bad"), Phase::Failed);
    let address = report.pods.iter().find(|pod| pod.key.name == "bad").unwrap().addresses[0];
    assert_eq!(world.ok(&["logs", "bad"]), format!("hello from bad on a at {address}\n"));

    let output = world.run(&["exec", "client", "--", "sh", "-c", "echo $OWN; exit 42"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(42), &b"mine\n"[..]));
    assert_eq!(world.run(&["exec", "client", "--", "no-such-program"]).status.code(), Some(127));
    assert_eq!(world.run(&["exec", "nobody", "--", "true"]).status.code(), Some(1));
    let mut child = world
        .command(&["exec", "-i", "client", "--", "tr", "a-z", "A-Z"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"shout").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"SHOUT");
    // Other namespaces are out of sight, and so is the machine's resolver.
    let netns = world.state().join("netns");
    assert_eq!(
        world.sh("client", &format!("grep -c {} /proc/self/mountinfo", netns.display())).1.trim(),
        "0"
    );
    assert!(world.sh("client", "cat /etc/resolv.conf").1.starts_with("nameserver 198.18.0.3\n"));
}

#[test]
fn one_family_alone() {
    for (family, curl, other) in [("ipv4", "-4", "-6"), ("ipv6", "-6", "-4")] {
        let world = World::new(&[("shop.yaml", &shop().replace("198.18.200.1", "None"))]);
        world.up(&["--no-mesh", "--family", family]);
        let report = world.wait("endpoints", |report| endpoints(report, "web") == 2);
        assert_eq!(report.services.iter().find(|s| s.key.name == "web").unwrap().addresses.len(), 1);
        assert_eq!(world.sh("client", &format!("{GET} {curl} http://web.shop/")).0, 0);
        assert_ne!(world.sh("client", &format!("{GET} {other} http://web.shop/")).0, 0);
    }
}
