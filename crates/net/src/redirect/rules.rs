//! The rules themselves, as a value: pure, so that installing and verifying use the same.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};

use super::RedirectConfig;
use crate::nft::{Batch, Chain, Cmp, HookPoint, HookType, Rule, Set, SetKey, Verdict};

/// Before conntrack (-200), which is when a zone can still be chosen.
const RAW: i32 = -300;
/// After conntrack, before NAT: the place of mark rules.
const MANGLE: i32 = -150;
/// Where destination NAT happens, in prerouting and in output.
const NAT: i32 = -100;

/// After NAT, when it is settled by which interface a packet leaves.
const FILTER: i32 = 0;
/// After source NAT.
const LAST: i32 = 300;

const DNS: u16 = 53;
/// Conntrack zone of the proxy's own DNS queries (C38).
const PROXY_DNS_ZONE: u16 = 1;
/// Conntrack zone, in the original direction, of what the proxy says to the application.
const PROXY_DIAL_ZONE: u16 = 2;

const OUTBOUND_V4: &str = "exclude_outbound_v4";
const OUTBOUND_V6: &str = "exclude_outbound_v6";
const OUTBOUND_PORTS: &str = "exclude_outbound_ports";
const INBOUND_PORTS: &str = "exclude_inbound_ports";
const PROBE_PORTS: &str = "probe_ports";

/// All that goes into the table.
pub(super) struct Program {
    pub sets: Vec<Set>,
    pub chains: Vec<(Chain, Vec<Rule>)>,
}

impl Program {
    /// Adds all of it to a table that is empty.
    pub(super) fn put(&self, batch: &mut Batch, table: &str) {
        for set in &self.sets {
            batch.add_set(table, set);
        }
        for (chain, _) in &self.chains {
            batch.add_chain(table, chain);
        }
        for (chain, rules) in &self.chains {
            for rule in rules {
                batch.add_rule(table, &chain.name, rule);
            }
        }
    }
}

pub(super) fn program(config: &RedirectConfig) -> Program {
    use HookPoint::{Output, Postrouting, Prerouting};
    let mut chains = vec![
        (Chain::base("mangle_prerouting", HookType::Filter, Prerouting, MANGLE), mangle_prerouting(config)),
        // Type route: a mark set here makes the kernel look for a route again, now by that mark.
        (Chain::base("mangle_output", HookType::Route, Output, MANGLE), mangle_output(config)),
        (Chain::base("nat_prerouting", HookType::Nat, Prerouting, NAT), nat_prerouting(config)),
        (Chain::base("nat_output", HookType::Nat, Output, NAT), nat_output(config)),
        (Chain::base("raw_output", HookType::Filter, Output, RAW), raw_output(config)),
        (
            Chain::base("filter_postrouting", HookType::Filter, Postrouting, FILTER),
            filter_postrouting(config),
        ),
    ];
    if config.dns_port.is_some() {
        chains
            .push((Chain::base("raw_prerouting", HookType::Filter, Prerouting, RAW), raw_prerouting(config)));
    }
    leave_ipv6(config, &mut chains);
    Program { sets: sets(config), chains }
}

fn leave_ipv6(config: &RedirectConfig, chains: &mut [(Chain, Vec<Rule>)]) {
    if !config.ipv6 {
        for (_, rules) in chains {
            rules.insert(0, Rule::new("IPv6 is not redirected").ipv6().accept());
        }
    }
}

/// Drops what enters or leaves, before connection tracking sees it.
pub(super) fn gate(table: &str) -> Batch {
    let (enters, leaves) = ("enters", "leaves");
    let mut batch = Batch::new();
    batch
        .replace_table(table)
        .add_chain(table, &Chain::base(enters, HookType::Filter, HookPoint::Prerouting, RAW - 1))
        .add_chain(table, &Chain::base(leaves, HookType::Filter, HookPoint::Output, RAW - 1))
        .add_rule(table, enters, &Rule::new("closed").iifname(Cmp::Ne, "lo").verdict(Verdict::Drop))
        .add_rule(table, leaves, &Rule::new("closed").oifname(Cmp::Ne, "lo").verdict(Verdict::Drop));
    batch
}

fn sets(config: &RedirectConfig) -> Vec<Set> {
    let set = |name: &str, key| Set { name: name.to_owned(), key };
    let mut sets = Vec::new();
    if excludes(config, false) {
        sets.push(set(OUTBOUND_V4, SetKey::Ipv4(config.exclude_outbound.clone())));
    }
    if excludes(config, true) {
        sets.push(set(OUTBOUND_V6, SetKey::Ipv6(config.exclude_outbound.clone())));
    }
    if !config.exclude_outbound_ports.is_empty() {
        sets.push(set(OUTBOUND_PORTS, SetKey::Ports(config.exclude_outbound_ports.clone())));
    }
    if !config.exclude_inbound_ports.is_empty() {
        sets.push(set(INBOUND_PORTS, SetKey::Ports(config.exclude_inbound_ports.clone())));
    }
    if !config.probe_ports.is_empty() {
        sets.push(set(PROBE_PORTS, SetKey::Ports(config.probe_ports.clone())));
    }
    sets
}

fn excludes(config: &RedirectConfig, v6: bool) -> bool {
    config.exclude_outbound.iter().any(|net| net.addr().is_ipv6() == v6)
}

/// C35: what the proxy sends to the application marks the connection for the way back.
fn mangle_prerouting(config: &RedirectConfig) -> Vec<Rule> {
    let (proxy, back) = (config.proxy_mark, config.return_mark);
    vec![
        Rule::new("remember connections of the proxy")
            .mark(Cmp::Eq, proxy.value, proxy.mask)
            .set_ct_mark(back.value, back.mask),
    ]
}

/// C35: the application's replies on such a connection take the mark that leads to table 100.
fn mangle_output(config: &RedirectConfig) -> Vec<Rule> {
    let back = config.return_mark;
    vec![
        Rule::new("replies to the proxy's connections stay here")
            .ct_mark(Cmp::Eq, back.value, back.mask)
            .restore_mark(),
    ]
}

/// What answers the proxy was received in a tunnel and must go back into one. Should its routing rule or route be taken away,
/// the answer would leave in plaintext; it is lost instead until they are back.
fn filter_postrouting(config: &RedirectConfig) -> Vec<Rule> {
    let back = config.return_mark;
    vec![
        Rule::new("replies to the proxy's connections never leave")
            .mark(Cmp::Eq, back.value, back.mask)
            .oifname(Cmp::Ne, "lo")
            .verdict(Verdict::Drop),
    ]
}

/// C36, in its order.
fn nat_prerouting(config: &RedirectConfig) -> Vec<Rule> {
    let proxy = config.proxy_mark;
    let mut rules = loopback_passes();
    for interface in &config.virtual_interfaces {
        let arriving = |comment: &str| Rule::new(comment).iifname(Cmp::Eq, interface);
        rules.push(arriving("behind the pod: outbound").tcp().redirect(config.outbound_port));
        rules.push(arriving("behind the pod: the rest passes").accept());
    }
    if config.bypass_inbound {
        return rules;
    }
    rules.extend(inbound_passes(config));
    rules.push(
        Rule::new("inbound to the proxy")
            .tcp()
            .dport_cmp(Cmp::Ne, config.hbone_port)
            .mark(Cmp::Ne, proxy.value, proxy.mask)
            .redirect(config.inbound_port),
    );
    rules
}

/// C37, in its order.
fn nat_output(config: &RedirectConfig) -> Vec<Rule> {
    let (proxy, back) = (config.proxy_mark, config.return_mark);
    let mut rules = loopback_passes();
    rules.extend(probe_answers_pass(config));
    if let Some(port) = config.dns_port {
        // A resolver in the pod itself, reached over lo, is left alone for UDP.
        rules.push(
            Rule::new("DNS over UDP to the proxy")
                .udp()
                .oifname(Cmp::Ne, "lo")
                .dport(DNS)
                .mark(Cmp::Ne, proxy.value, proxy.mask)
                .redirect(port),
        );
        rules.push(
            Rule::new("DNS over TCP to the proxy")
                .tcp()
                .dport(DNS)
                .mark(Cmp::Ne, proxy.value, proxy.mask)
                .redirect(port),
        );
    }
    rules.push(
        Rule::new("replies to the proxy's connections pass")
            .tcp()
            .mark(Cmp::Eq, back.value, back.mask)
            .accept(),
    );
    // C43: the pod's own address is reached over lo; a Service address of its own is not, and is captured.
    rules.push(Rule::new("self calls pass").oifname(Cmp::Eq, "lo").accept());
    rules.extend(outbound_passes(config));
    rules.push(
        Rule::new("outbound to the proxy")
            .tcp()
            .mark(Cmp::Ne, proxy.value, proxy.mask)
            .redirect(config.outbound_port),
    );
    rules
}

/// Probes at the ports that are probed, and exclusions.
fn inbound_passes(config: &RedirectConfig) -> Vec<Rule> {
    let mut rules = Vec::new();
    if !config.probe_ports.is_empty() {
        let probe = |source| Rule::new("probes pass").tcp().source(source).dport_in(PROBE_PORTS).accept();
        rules.extend(probes(config).map(probe));
    }
    if !config.exclude_inbound_ports.is_empty() {
        rules.push(Rule::new("excluded inbound ports pass").tcp().dport_in(INBOUND_PORTS).accept());
    }
    rules
}

fn probe_answers_pass(config: &RedirectConfig) -> Vec<Rule> {
    let answer =
        |source| Rule::new("answers to probes pass").tcp().destination(source).sport_in(PROBE_PORTS).accept();
    let probed = !config.bypass_inbound && !config.probe_ports.is_empty();
    probes(config).filter(|_| probed).map(answer).collect()
}

fn outbound_passes(config: &RedirectConfig) -> Vec<Rule> {
    let mut rules = Vec::new();
    for (v6, set) in [(false, OUTBOUND_V4), (true, OUTBOUND_V6)] {
        if excludes(config, v6) {
            rules.push(Rule::new("excluded destinations pass").tcp().destination_in(set, v6).accept());
        }
    }
    if !config.exclude_outbound_ports.is_empty() {
        rules.push(Rule::new("excluded outbound ports pass").tcp().dport_in(OUTBOUND_PORTS).accept());
    }
    rules
}

/// What must not happen while the rules are in force, and would happen without them: stopped, and counted. `None` where nothing is
/// redirected.
///
/// Nothing here looks at established connections other than those that are redirected, so that connections older than the rules go
/// on (they are not tracked).
pub(super) fn guard(config: &RedirectConfig) -> Option<Program> {
    if *config == config.return_path_only() {
        return None;
    }
    let hook = |name, point, priority| Chain::base(name, HookType::Filter, point, priority);
    let mut chains = vec![
        // After the destination has been rewritten.
        (hook("output", HookPoint::Output, FILTER), guard_output(config)),
        // After the source has been.
        (hook("postrouting", HookPoint::Postrouting, LAST), guard_postrouting(config)),
    ];
    if !config.bypass_inbound {
        chains.push((hook("input", HookPoint::Input, FILTER), guard_input(config)));
    }
    leave_ipv6(config, &mut chains);
    Some(Program { sets: sets(config), chains })
}

/// The bit of a connection's state that says that it is new, of one's status that its destination is rewritten.
const NEW: u32 = 8;
const REDIRECTED: u32 = 32;

/// A redirected packet goes to loopback. The interface shown here is the one from before that.
fn guard_output(config: &RedirectConfig) -> Vec<Rule> {
    let proxy = config.proxy_mark;
    let programs = |comment: &str| Rule::new(comment).mark(Cmp::Ne, proxy.value, proxy.mask);
    let mut rules = vec![Rule::new("local passes").oifname(Cmp::Eq, "lo").accept()];
    rules.extend(loopback_passes());
    if config.dns_port.is_some() {
        rules.push(programs("DNS that was not redirected").udp().dport(DNS).counter().verdict(Verdict::Drop));
    }
    rules.extend(probe_answers_pass(config));
    rules.extend(outbound_passes(config));
    rules.push(
        programs("outbound that was not redirected").tcp().ct_state(NEW).counter().verdict(Verdict::Drop),
    );
    rules.push(
        programs("outbound that is redirected no more")
            .tcp()
            .ct_reply(false)
            .ct_status(REDIRECTED)
            .counter()
            .verdict(Verdict::Drop),
    );
    rules
}

fn guard_postrouting(config: &RedirectConfig) -> Vec<Rule> {
    let back = config.return_mark;
    let ports = [Some(config.outbound_port), Some(config.inbound_port), config.dns_port];
    // Over loopback too: the program would take it for another connection's, and reset that.
    let shown = |port| {
        Rule::new("answers that show the proxy's port")
            .tcp()
            .sport(Cmp::Eq, port)
            .ct_reply(true)
            .ct_status(REDIRECTED)
            .counter()
            .verdict(Verdict::Drop)
    };
    let mut rules: Vec<Rule> = ports.into_iter().flatten().map(shown).collect();
    rules.push(
        Rule::new("answers to the proxy that left the way back")
            .oifname(Cmp::Ne, "lo")
            .tcp()
            .ct_mark(Cmp::Eq, back.value, back.mask)
            .counter()
            .verdict(Verdict::Drop),
    );
    rules
}

fn guard_input(config: &RedirectConfig) -> Vec<Rule> {
    let arriving = |comment: &str| Rule::new(comment).iifname(Cmp::Ne, "lo");
    let mut rules = vec![Rule::new("local passes").iifname(Cmp::Eq, "lo").accept()];
    for port in [config.hbone_port, config.inbound_port, config.outbound_port] {
        rules.push(Rule::new("the proxy's own ports").tcp().dport(port).accept());
    }
    rules.extend(inbound_passes(config));
    rules.push(
        arriving("inbound that was not redirected").tcp().ct_state(NEW).counter().verdict(Verdict::Drop),
    );
    rules.push(
        arriving("inbound that is redirected no more")
            .tcp()
            .ct_reply(false)
            .ct_status(REDIRECTED)
            .counter()
            .verdict(Verdict::Drop),
    );
    rules
}

/// C38. A program's query and the proxy's query for it can have the same addresses and ports. In one zone conntrack would
/// take them for one connection, and hand the proxy's answer to the program or back to the proxy's listener.
fn raw_prerouting(config: &RedirectConfig) -> Vec<Rule> {
    let proxy = config.proxy_mark;
    vec![
        Rule::new("answers to the proxy's own DNS")
            .udp()
            .sport(Cmp::Eq, DNS)
            .mark(Cmp::Ne, proxy.value, proxy.mask)
            .set_ct_zone(PROXY_DNS_ZONE),
    ]
}

/// C38, the other half, and a zone for dials with the client's address.
///
/// Such a dial may use the very port of a client's connection that was redirected to the proxy: the kernel picks a port
/// without knowing of that one. Conntrack would take the two for one connection, redirect the dial back to the proxy and
/// send the client's replies to loopback. So what the proxy says over `lo` is in a zone of its own; only in its original
/// direction, as the application's replies cannot be told apart before conntrack has found the connection.
fn raw_output(config: &RedirectConfig) -> Vec<Rule> {
    let proxy = config.proxy_mark;
    let mut rules = vec![
        Rule::new("the proxy's dials to the application")
            .tcp()
            .oifname(Cmp::Eq, "lo")
            .mark(Cmp::Eq, proxy.value, proxy.mask)
            .set_ct_original_zone(PROXY_DIAL_ZONE),
    ];
    if config.dns_port.is_some() {
        rules.push(
            Rule::new("the proxy's own DNS")
                .udp()
                .dport(DNS)
                .mark(Cmp::Eq, proxy.value, proxy.mask)
                .set_ct_zone(PROXY_DNS_ZONE),
        );
    }
    rules
}

/// C44, and all of 127.0.0.0/8 where ambient names only 127.0.0.1: stub resolvers sit on 127.0.0.53.
fn loopback_passes() -> Vec<Rule> {
    vec![
        Rule::new("loopback passes")
            .destination(Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8))
            .accept(),
        Rule::new("loopback passes").destination(IpNet::from(IpAddr::V6(Ipv6Addr::LOCALHOST))).accept(),
    ]
}

/// Where probes come from, as host networks.
fn probes(config: &RedirectConfig) -> impl Iterator<Item = IpNet> {
    let v4 = config.probe_source.map(|ip| IpNet::from(IpAddr::V4(ip)));
    let v6 = config.probe_source_v6.map(|ip| IpNet::from(IpAddr::V6(ip)));
    v4.into_iter().chain(v6)
}
