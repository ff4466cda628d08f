//! The examples, as users are given them, on nodes that have IPv4, IPv6 or both.
//!
//! Needs root.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::programs::program;
use culvert_e2e::world::{PATIENCE, Pod, World, wait_for};
use serde_json::Value;

const FAMILIES: [&str; 3] = ["ipv4", "ipv6", "dual"];
/// How many checks `culvert demo` makes; fewer would be a demo that leaves some out.
const DEMO_CHECKS: usize = 11;

/// `examples/hello` with everything that the demo promises of it.
#[test]
fn hello_keeps_its_promises_in_every_family() {
    let mut checks = Checks::default();
    for family in FAMILIES {
        checks.check(&format!("hello, {family}"), || hello(family));
    }
    checks.finish();
}

/// `examples/shop`: five services that call one another, each open to its callers only.
#[test]
fn shop_sells_in_every_family() {
    let mut checks = Checks::default();
    for family in FAMILIES {
        checks.check(&format!("shop, {family}"), || shop(family));
    }
    checks.finish();
}

fn hello(family: &str) -> Result<()> {
    let output =
        Command::new(program("culvert")?).args(["demo", "-o", "json", "--family", family]).output()?;
    let outcome: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{}", String::from_utf8_lossy(&output.stderr)))?;
    let checks = outcome["checks"].as_array().context("no checks")?;
    let failed: Vec<_> = checks.iter().filter(|check| check["ok"] != true).collect();
    ensure!(failed.is_empty() && output.status.success(), "{failed:?}");
    ensure!(checks.len() == DEMO_CHECKS, "{} checks", checks.len());
    Ok(())
}

fn shop(family: &str) -> Result<()> {
    let world = World::builder(&format!("shop-{family}"), "")
        .example("shop")?
        .argument("--family")
        .argument(family)
        .start()?;
    let visitor = Pod("shop", "visitor");
    let answer =
        wait_for("the visitor opens the shop", PATIENCE, || get(&world, visitor, "http://frontend/"))?;
    let called = |path: &str| answer.pointer(path).is_some();
    ensure!(called("/calls/catalog") && called("/calls/cart/calls/inventory"), "{answer}");
    ensure!(called("/calls/checkout/calls/cart") && called("/calls/checkout/calls/inventory"), "{answer}");
    for closed in ["catalog", "cart", "checkout", "inventory"] {
        let answer = get(&world, visitor, &format!("http://{closed}/"))?;
        ensure!(answer.is_none(), "{closed} answered a visitor: {answer:?}");
    }
    only_in(&world, family)
}

/// Every pod has addresses of the family, and of no other.
fn only_in(world: &World, family: &str) -> Result<()> {
    let status = world.status()?;
    let pods = status["pods"].as_array().context("no pods")?;
    ensure!(!pods.is_empty(), "no pods");
    for pod in pods {
        let ips: Vec<_> = pod["podIPs"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let v6 = ips.iter().filter(|ip| ip.contains(':')).count();
        let found = match (ips.len() - v6, v6) {
            (1, 0) => "ipv4",
            (0, 1) => "ipv6",
            (1, 1) => "dual",
            _ => "other",
        };
        ensure!(found == family, "{} has {ips:?}", pod["name"]);
    }
    Ok(())
}

/// The body, or nothing where the connection is refused.
fn get(world: &World, pod: Pod, url: &str) -> Result<Option<Value>> {
    let output = world.exec(pod).args(["curl", "--silent", "--fail", "--max-time", "5", url]).output()?;
    if !output.status.success() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}
