//! The mesh part of the Gateway API conformance suite, unchanged, in a real cluster of two nodes.
//!
//! Needs what the Kubernetes test needs, and `CONFORMANCE_BIN`, the directory of the suite and its application (`make conformance`
//! builds it). The suite's log and report are kept beside them.

#[allow(dead_code, reason = "the Kubernetes test uses the rest")]
#[path = "../kubernetes/world.rs"]
mod world;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use culvert_cluster::images::Image;
use culvert_cluster::run;
use serde_json::Value;
use world::{PATIENCE, World};

/// The suite's version, and that of the kinds it wants to find.
const VERSION: &str = "v1.6.3";
/// The application, by the names that the suite's manifests have for it.
const ECHO: [&str; 1] = ["registry.k8s.io/gateway-api/echo-advanced:v1.5.1"];
/// As they are counted by the suite: 20 that are about a feature of the mesh profiles or a route's, and none is skipped.
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
    kinds(&world)?;
    world.bring(&echo(&world, &programs)?)?;
    world.install(&[])?;
    let (log, report) = (programs.join("mesh.log"), programs.join("mesh.yaml"));
    let mut suite = world.api.command(&programs.join("mesh.test").to_string_lossy());
    suite.args(["-test.v", "-test.timeout", "30m"]).env("REPORT", &report);
    suite.env("CULVERT_VERSION", concat!("v", env!("CARGO_PKG_VERSION")));
    let output = File::create(&log)?;
    let status = suite.stdout(output.try_clone()?).stderr(output).status()?;
    let said = fs::read_to_string(&log)?;
    let lines = |mark: &str| said.lines().filter(|line| line.starts_with(mark)).map(str::to_owned).collect::<Vec<_>>();
    for line in [lines("    --- FAIL"), lines("    --- SKIP"), lines("    --- PASS")].concat() {
        println!("{line}");
    }
    ensure!(lines("    --- FAIL").is_empty() && status.success(), "{} says what failed", log.display());
    Ok(lines("    --- PASS: TestMesh/Mesh").len())
}

/// The Gateway API's own definitions, at their standard channel, as the suite wants them.
fn kinds(world: &World) -> Result<()> {
    let module = format!("sigs.k8s.io/gateway-api@{VERSION}");
    let said = run(Command::new("go").args(["mod", "download", "-json", &module]))?;
    let said: Value = serde_json::from_str(&said)?;
    let dir = PathBuf::from(said["Dir"].as_str().context("no directory")?).join("config/crd/standard");
    world.api.kubectl(&["apply", "--server-side", "-f", &dir.to_string_lossy()])?;
    world.api.wait("the kinds of the Gateway API", PATIENCE, |api| {
        let served = api.get("/apis/gateway.networking.k8s.io/v1")?;
        let has = |name: &str| served["resources"].as_array().is_some_and(|all| all.iter().any(|it| it["name"] == name));
        Ok(["httproutes", "grpcroutes", "gateways"].iter().all(|it| has(it)).then_some(()))
    })
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
