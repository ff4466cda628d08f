//! The mesh part of the Gateway API conformance suite, unchanged, in a real cluster of two nodes.
//!
//! Needs what the Kubernetes test needs, and `CONFORMANCE_BIN`, the directory of the suite and its application (`make conformance`
//! builds it). The suite's log and report are kept beside them.

#[allow(dead_code, reason = "the Kubernetes test uses the rest")]
#[path = "../real_cluster/world.rs"]
mod world;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use culvert_cluster::images::Image;
use world::World;

/// A version of the suite.
struct Version {
    /// Of the Gateway API, and the end of the names of the suite's program and of what it leaves.
    api: &'static str,
    /// Mesh tests in it.
    tests: usize,
}

/// The application, by the names that the manifests of either version have for it.
const ECHO: [&str; 2] = [
    "registry.k8s.io/gateway-api/echo-advanced:v1.5.1",
    "registry.k8s.io/gateway-api/conformance/echo-advanced:v0.1.0",
];

/// W29, as far as it is about a mesh: every mesh feature, none skipped.
#[test]
fn the_mesh_tests_of_the_gateway_api_pass() {
    every_test_passes(&Version { api: "v1.6.3", tests: 22 });
}

/// The same.
#[test]
#[ignore = "needs a newer Go toolchain to build: make conformance"]
fn the_mesh_tests_of_the_next_gateway_api_pass() {
    every_test_passes(&Version { api: "v1.7.0", tests: 23 });
}

fn every_test_passes(version: &Version) {
    let passed = suite(version).expect("the suite");
    assert_eq!(passed, version.tests, "mesh tests that passed");
}

/// Runs it; how many tests passed.
fn suite(version: &Version) -> Result<usize> {
    #[expect(clippy::disallowed_methods, reason = "a test's own setting")]
    let programs: PathBuf = std::env::var_os("CONFORMANCE_BIN")
        .context("CONFORMANCE_BIN is not set: the directory of the suite, client and server (`make e2e` builds it)")?
        .into();
    let world = World::start()?;
    world.gateway_api(version.api)?;
    world.bring(&echo(&world, &programs)?)?;
    world.install(&[])?;
    let at = |end: &str| programs.join(format!("mesh-{}.{end}", version.api));
    let (log, report) = (at("log"), at("yaml"));
    let mut suite = world.api.command(&at("test").to_string_lossy());
    suite.args(["-test.v", "-test.timeout", "20m"]).env("REPORT", &report);
    suite.env("CULVERT_VERSION", concat!("v", env!("CARGO_PKG_VERSION")));
    let output = File::create(&log)?;
    let status = suite.stdout(output.try_clone()?).stderr(output).status()?;
    let said = fs::read_to_string(&log)?;
    let lines = |mark: &str| {
        said.lines().filter(|line| line.starts_with(mark)).map(str::to_owned).collect::<Vec<_>>()
    };
    let about = [lines("    --- FAIL"), lines("    --- SKIP: TestMesh/Mesh"), lines("    --- PASS")].concat();
    about.iter().for_each(|line| println!("{line}"));
    ensure!(lines("    --- FAIL").is_empty() && status.success(), "{} says what failed", log.display());
    Ok(lines("    --- PASS: TestMesh/Mesh").len())
}

/// The suite's application: a client and a server, and the certificate that the server wants.
fn echo(world: &World, programs: &Path) -> Result<Image> {
    let made = rcgen::generate_simple_self_signed(vec!["echo".to_owned()])?;
    let mut copies: Vec<_> =
        ["client", "server"].map(|it| (programs.join(it), format!("/usr/bin/{it}"))).to_vec();
    for (name, text) in [("cert.crt", made.cert.pem()), ("cert.key", made.signing_key.serialize_pem())] {
        let path = world.cluster.files().at(name);
        fs::write(&path, text)?;
        copies.push((path, format!("/{name}")));
    }
    let entrypoint = vec!["/usr/bin/server".to_owned()];
    Ok(Image { names: ECHO.map(str::to_owned).to_vec(), copies, entrypoint, environment: Vec::new() })
}
