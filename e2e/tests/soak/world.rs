//! Two nodes; on each a client, a server and pods that come and go.

use anyhow::Result;
use culvert_e2e::world::{Pod, World};

pub const NODES: [&str; 2] = ["node-a", "node-b"];
pub const CLIENT_A: Pod = Pod("mesh", "client-a");
pub const CLIENT_B: Pod = Pod("mesh", "client-b");
pub const SERVER_A: Pod = Pod("mesh", "server-a");
pub const SERVER_B: Pod = Pod("mesh", "server-b");
/// Of no mesh: what it sends arrives as plaintext.
pub const OUTSIDER: Pod = Pod("outside", "outsider");
/// They come and go, two of each node.
pub const CHURNED: [Pod; 4] =
    [Pod("mesh", "churn-0"), Pod("mesh", "churn-1"), Pod("mesh", "churn-2"), Pod("mesh", "churn-3")];

/// Certificates live so long, so they are renewed about every ten seconds; unused tunnels are closed after five.
const ARGUMENTS: [&str; 4] =
    ["--controller-arg=--cert-ttl", "--controller-arg=20s", "--proxy-arg=--pool-idle", "--proxy-arg=5s"];

pub fn start(name: &str) -> Result<World> {
    let mut builder = World::builder(name, env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .namespace("outside", false)
        .client(CLIENT_A, NODES[0])
        .client(CLIENT_B, NODES[1])
        .client(OUTSIDER, NODES[0])
        .server(SERVER_A, NODES[0], 0)
        .server(SERVER_B, NODES[1], 0)
        .service("mesh", "server-b", "server-b");
    for (pod, node) in CHURNED.iter().zip(NODES.iter().cycle()) {
        builder = builder.server(*pod, node, 0);
    }
    for argument in ARGUMENTS {
        builder = builder.argument(argument);
    }
    builder.start()
}
