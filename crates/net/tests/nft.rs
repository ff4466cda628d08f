//! Transactions against the kernel. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use common::{CLIENT, POD, World, addr, dial, exchange, listen, within};
use culvert_net::NetNs;
use culvert_net::nft::{
    Batch, Chain, Cmp, HookPoint, HookType, NftError, Rule, Set, SetKey, Verdict, read_table,
};

fn every_expression() -> Vec<Rule> {
    let to4 = "10.0.0.1:80".parse().unwrap();
    let to6 = "[fd00::1]:80".parse().unwrap();
    let net = |n: &str| n.parse::<ipnet::IpNet>().unwrap();
    vec![
        Rule::new("meta").iifname(Cmp::Ne, "eth0").oifname(Cmp::Eq, "lo").skuid(1337).mark(Cmp::Ne, 1, 0xff),
        Rule::new("ct").ct_mark(Cmp::Eq, 2, 0xf).ct_state(2 | 4).ct_reply(true).counter().accept(),
        Rule::new("payload").tcp().sport(Cmp::Lt, 1024).dport_cmp(Cmp::Gt, 80).verdict(Verdict::Drop),
        Rule::new("nets").source(net("10.0.0.0/8")).destination(net("10.1.1.1/32")).verdict(Verdict::Return),
        Rule::new("nets6").source(net("fd00::/8")).destination_not(net("fd00::/64")),
        Rule::new("sets")
            .tcp()
            .dport_in("ports")
            .destination_in("nets", false)
            .verdict(Verdict::Jump("sub".into())),
        Rule::new("sets6").udp().dport(53).destination_in("nets6", true).verdict(Verdict::Goto("sub".into())),
        Rule::new("pairs").tcp().sport_in("ports").destination_and_port_in("pairs", false).ct_status(32),
        Rule::new("pairs6").tcp().destination_and_port_in("pairs6", true).skuid(0),
        Rule::new("marks").set_mark(7).set_ct_mark(1, 0xf).restore_mark(),
        Rule::new("nat").ipv4().tcp().one_in(3).dnat(to4),
        Rule::new("nat6").ipv6().tcp().dnat(to6),
        Rule::new("redirect").tcp().redirect(15001),
        Rule::new(&"long ".repeat(60)),
    ]
}

fn fill(batch: &mut Batch, rules: &[Rule]) -> (Vec<Chain>, Vec<Set>) {
    let chains = vec![Chain::base("out", HookType::Nat, HookPoint::Output, -100), Chain::regular("sub")];
    let set = |name: &str, key| Set { name: name.into(), key };
    let nets: Vec<ipnet::IpNet> = ["10.0.0.0/8", "10.0.0.0/16", "255.255.255.0/24", "fd00::/8", "ff00::/8"]
        .map(|n| n.parse().unwrap())
        .to_vec();
    let pairs: std::collections::BTreeSet<std::net::SocketAddr> =
        ["10.0.0.1:80", "10.0.0.1:443", "10.0.0.2:80", "[fd00::1]:80"].map(|it| it.parse().unwrap()).into();
    let sets = vec![
        set("ports", SetKey::Ports([80, 443].into())),
        set("nets", SetKey::Ipv4(nets.clone())),
        set("nets6", SetKey::Ipv6(nets)),
        set("pairs", SetKey::Ipv4Port(pairs.clone())),
        set("pairs6", SetKey::Ipv6Port(pairs)),
    ];
    batch.replace_table("t");
    for set in &sets {
        batch.add_set("t", set);
    }
    for chain in &chains {
        batch.add_chain("t", chain);
    }
    for rule in rules {
        batch.add_rule("t", "out", rule);
    }
    (chains, sets)
}

#[test]
fn every_expression_is_accepted_and_reads_back_as_written() {
    let ns = NetNs::create().unwrap();
    let rules = every_expression();
    let mut batch = Batch::new();
    let (chains, sets) = fill(&mut batch, &rules);
    batch.commit(&ns).unwrap();
    let installed = read_table(&ns, "t", &["ports", "nets", "nets6", "pairs", "pairs6"]).unwrap();
    assert!(installed.has_chains(&chains));
    assert_eq!(installed.pairs(3).len(), 3);
    assert_eq!(installed.pairs(4), ["[fd00::1]:80".parse().unwrap()]);
    assert!(!installed.has_chains(&chains[..1]));
    for (index, set) in sets.iter().enumerate() {
        assert!(installed.has_set(index, set), "{}", set.name);
        assert!(!installed.has_set((index + 1) % 5, set), "{}", set.name);
    }
    assert!(installed.has_rules("out", &rules));
    // Each rule is told from each other, and order matters.
    for at in 1..rules.len() {
        let mut swapped = rules.clone();
        swapped.swap(at - 1, at);
        assert!(!installed.has_rules("out", &swapped), "{at}");
    }
    assert_eq!(installed.comments()[0], ("out".to_owned(), "meta".to_owned()));
    // Zones and notrack belong before conntrack, source NAT after routing.
    let mut more = Batch::new();
    more.add_chain("t", &Chain::base("raw", HookType::Filter, HookPoint::Prerouting, -300))
        .add_chain("t", &Chain::base("post", HookType::Nat, HookPoint::Postrouting, 100))
        .add_rule("t", "raw", &Rule::new("zone").set_ct_zone(1))
        .add_rule("t", "raw", &Rule::new("zone").set_ct_original_zone(2))
        .add_rule("t", "raw", &Rule::new("untracked").notrack())
        .add_rule("t", "post", &Rule::new("snat").ipv4().snat("10.0.0.1:0".parse().unwrap()))
        .add_rule("t", "post", &Rule::new("masquerade").masquerade());
    more.commit(&ns).unwrap();
}

/// C47.
#[test]
fn a_refused_transaction_changes_nothing_and_says_what_was_refused() {
    let ns = NetNs::create().unwrap();
    let mut good = Batch::new();
    good.add_table("t").add_chain("t", &Chain::regular("c")).commit(&ns).unwrap();
    let mut bad = Batch::new();
    bad.replace_table("t")
        .add_chain("t", &Chain::regular("fresh"))
        .add_rule("t", "fresh", &Rule::new("fine").accept())
        .add_rule("t", "absent", &Rule::new("the wrong one").accept());
    let error = bad.commit(&ns).unwrap_err();
    let NftError::Refused { operation, source, .. } = &error else { panic!("{error}") };
    assert_eq!(operation, "add rule t absent (the wrong one)");
    assert_eq!(source.raw_os_error(), Some(libc::ENOENT));
    assert!(read_table(&ns, "t", &[]).unwrap().has_chains(&[Chain::regular("c")]));
}

#[test]
fn deleting_tolerates_absence() {
    let ns = NetNs::create().unwrap();
    let mut delete = Batch::new();
    delete.delete_table("t");
    delete.commit(&ns).unwrap();
    fill(&mut Batch::new(), &[]);
    let mut batch = Batch::new();
    fill(&mut batch, &every_expression());
    batch.commit(&ns).unwrap();
    batch.commit(&ns).unwrap();
    delete.commit(&ns).unwrap();
    assert!(read_table(&ns, "t", &[]).is_err());
}

/// What a node does for Service addresses: spread over endpoints by destination NAT.
#[tokio::test]
async fn connections_are_spread_over_endpoints() {
    let world = World::new();
    let vip = addr("198.18.128.5", 80);
    let endpoints = [addr(POD[0], 8081), addr(POD[0], 8082), addr(POD[0], 8083)];
    let mut batch = Batch::new();
    batch
        .replace_table("svc")
        .add_chain("svc", &Chain::base("pre", HookType::Nat, HookPoint::Prerouting, -100));
    for (left, to) in (1..=endpoints.len() as u32).rev().zip(endpoints) {
        let rule =
            Rule::new("vip").destination(ipnet::IpNet::from(vip.ip())).tcp().dport(vip.port()).one_in(left);
        batch.add_rule("svc", "pre", &rule.dnat(to));
    }
    batch.commit(&world.router).unwrap();
    let listeners = endpoints.map(|e| listen(&world.pod, e));
    let mut seen = [0; 3];
    for _ in 0..60 {
        let mut client = dial(&world.client, vip, None).await.unwrap();
        let [a, b, c] = &listeners;
        let (index, (mut served, peer)) = within(async {
            tokio::select! {
                s = a.accept() => (0, s.unwrap()),
                s = b.accept() => (1, s.unwrap()),
                s = c.accept() => (2, s.unwrap()),
            }
        })
        .await;
        assert_eq!(peer.ip(), addr(CLIENT[0], 0).ip());
        exchange(&mut client, &mut served).await;
        seen[index] += 1;
    }
    // Each misses all of 60 with a chance of (2/3)^60, 3e-11.
    assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
}
