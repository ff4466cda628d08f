//! The mesh part of the Gateway API conformance suite, unchanged, in a real cluster of two nodes.
//!
//! Needs what the Kubernetes test needs, and `CONFORMANCE_BIN`, the directory of the suite and its application (`make conformance`
//! builds it). The suite's log and report are kept beside them.

#[allow(dead_code, reason = "the Kubernetes test uses the rest")]
#[path = "../kubernetes/world.rs"]
mod world;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use culvert_cluster::images::Image;
use world::World;

/// The application, by the names that the suite's manifests have for it.
const ECHO: [&str; 1] = ["registry.k8s.io/gateway-api/echo-advanced:v1.5.1"];
/// None is skipped.
const TESTS: usize = 22;

#[test]
#[ignore = "minutes, and a build of its own: make conformance"]
fn the_mesh_tests_of_the_gateway_api_pass() {
    let passed = suite().expect("the suite");
    assert_eq!(passed, TESTS, "mesh tests that passed");
}

/// Runs it; how many tests passed.
fn suite() -> Result<usize> {
    #[expect(clippy::disallowed_methods, reason = "a test's own setting")]
    let programs: PathBuf = std::env::var_os("CONFORMANCE_BIN")
        .context("CONFORMANCE_BIN is not set: the directory of mesh.test, client and server (`make conformance` builds it)")?
        .into();
    let world = World::start()?;
    world.gateway_api()?;
    world.bring(&echo(&world, &programs)?)?;
    world.install(&[])?;
    let (log, report) = (programs.join("mesh.log"), programs.join("mesh.yaml"));
    let mut suite = world.api.command(&programs.join("mesh.test").to_string_lossy());
    suite.args(["-test.v", "-test.timeout", "30m"]).env("REPORT", &report);
    suite.env("CULVERT_VERSION", concat!("v", env!("CARGO_PKG_VERSION")));
    let output = File::create(&log)?;
    let status = suite.stdout(output.try_clone()?).stderr(output).status()?;
    let said = fs::read_to_string(&log)?;
    let lines = |mark: &str| {
        said.lines().filter(|line| line.starts_with(mark)).map(str::to_owned).collect::<Vec<_>>()
    };
    for line in [lines("    --- FAIL"), lines("    --- SKIP"), lines("    --- PASS")].concat() {
        println!("{line}");
    }
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
