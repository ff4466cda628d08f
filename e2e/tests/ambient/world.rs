//! Two nodes and their pods. Our proxy serves `node-a`, the other one `node-b`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use culvert_e2e::ambient;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::programs::program;
use culvert_e2e::world::{Family, PATIENCE, Pod, Running, World, wait_for};
use serde_json::Value;
use std::net::SocketAddr;

pub const OURS: &str = "node-a";
pub const AMBIENT: &str = "node-b";
pub const OUR_CLIENT: Pod = Pod("mesh", "client-a");
pub const OUR_SERVER: Pod = Pod("mesh", "server-a");
pub const AMBIENT_CLIENT: Pod = Pod("mesh", "client-b");
pub const AMBIENT_SERVER: Pod = Pod("mesh", "server-b");
/// Of no mesh.
pub const OUTSIDER: Pod = Pod("outside", "outsider");
/// What only a node proxy knows: cluster DNS has never heard of it.
pub const EXTERNAL: &str = "only.mesh.example";
/// Its address.
pub const EXTERNAL_ADDRESS: &str = "240.240.7.7";

/// From whose pod to whose.
#[derive(Clone, Copy, Debug)]
pub struct Direction {
    pub name: &'static str,
    pub client: Pod,
    pub server: Pod,
    pub server_node: &'static str,
}

impl Direction {
    pub const TO_AMBIENT: Self =
        Self { name: "ours to ambient", client: OUR_CLIENT, server: AMBIENT_SERVER, server_node: AMBIENT };
    pub const FROM_AMBIENT: Self =
        Self { name: "ambient to ours", client: AMBIENT_CLIENT, server: OUR_SERVER, server_node: OURS };

    /// A conversation of the two, as the client's last line tells it.
    pub fn talk(
        &self,
        world: &World,
        target: SocketAddr,
        verb: &str,
        id: &str,
        number: u64,
    ) -> Result<Value> {
        let (target, number) = (target.to_string(), number.to_string());
        world.peer(self.client, &["talk", verb, &target, "--id", id, "--number", &number])
    }

    pub fn target(&self, world: &World, family: Family, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(world.address(self.server, family)?, port))
    }

    /// A conversation that goes on for so many milliseconds or until it is cut; open when this returns.
    pub fn open(&self, world: &World, milliseconds: u64) -> Result<Running> {
        let target = self.target(world, Family::V4, COMMAND_PORT)?.to_string();
        let number = milliseconds.to_string();
        let mut talk = world.spawn_peer(self.client, &["talk", "stay", &target, "--number", &number])?;
        talk.line()?;
        Ok(talk)
    }

    pub fn reaches(&self, world: &World) -> Result<bool> {
        reaches(world, self.client, self.server)
    }
}

/// Whether a new connection gets an answer.
pub fn reaches(world: &World, client: Pod, server: Pod) -> Result<bool> {
    let target = SocketAddr::new(world.address(server, Family::V4)?, COMMAND_PORT).to_string();
    Ok(world.peer(client, &["talk", "stay", &target, "--number", "0"])?["end"] == "limit")
}

pub fn becomes(world: &World, client: Pod, server: Pod, reachable: bool) -> Result<()> {
    let what = if reachable { "a connection" } else { "a refusal" };
    wait_for(what, PATIENCE, || Ok((reaches(world, client, server)? == reachable).then_some(())))
}

/// The last line of a log that the other proxy writes, or an error that names what was wanted.
pub fn ambient_says(world: &World, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let log = world.node_dir(AMBIENT).join("logs/proxy.log");
    wait_for(&format!("a line of the ambient proxy's log: {what}"), PATIENCE, || {
        let text = std::fs::read_to_string(&log).with_context(|| log.display().to_string())?;
        let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.find(|line| wanted(line)))
    })
}

fn ztunnel() -> PathBuf {
    // Tests have no command line of their own.
    #[expect(clippy::disallowed_methods, reason = "see above")]
    let path = std::env::var_os("ZTUNNEL").filter(|path| !path.is_empty());
    path.map(PathBuf::from)
        .expect("ZTUNNEL must be the path of an ambient ztunnel binary: make interop ZTUNNEL=path")
}

/// Starts it, or panics with what is missing.
pub fn start(name: &str, arguments: &[&str]) -> World {
    try_start(name, arguments).expect("a world")
}

fn try_start(name: &str, arguments: &[&str]) -> Result<World> {
    let dir = std::env::temp_dir().join(format!("cve2e-{name}-bin-{}", std::process::id()));
    let ours = program("ztunnel")?;
    let ours = ours.parent().context("ztunnel has no directory")?;
    let bin = ambient::programs(&dir, ours, &ztunnel(), &[AMBIENT])?;
    let external = format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: only, namespace: mesh}}\nspec:\n  \
         hosts: [{EXTERNAL}]\n  addresses: [{EXTERNAL_ADDRESS}]\n  ports: [{{number: 9000, name: tcp, protocol: TCP}}]\n  \
         resolution: STATIC\n  endpoints: [{{address: 100.64.9.9}}]\n"
    );
    let mut builder = World::builder(name, env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .namespace("outside", false)
        .client(OUR_CLIENT, OURS)
        .client(AMBIENT_CLIENT, AMBIENT)
        .client(OUTSIDER, OURS)
        .server(OUR_SERVER, OURS, 0)
        .server(AMBIENT_SERVER, AMBIENT, 0)
        .service("mesh", "server-a", "server-a")
        .service("mesh", "server-b", "server-b")
        .manifest("external.yaml", &external)
        .argument(&format!("--bin-dir={}", bin.display()));
    for argument in arguments {
        builder = builder.argument(argument);
    }
    let world = builder.start()?;
    let pid = world.pid("proxy", Some(AMBIENT))?;
    let runs = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(runs == std::fs::canonicalize(ztunnel())?, "{AMBIENT} runs {}", runs.display());
    Ok(world)
}
