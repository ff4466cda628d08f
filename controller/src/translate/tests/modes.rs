//! TRAP10, D39-D43: PeerAuthentication at mesh, namespace, workload and port level, in all combinations, against Istio's rules
//! written out once more. What is compared is what becomes of connections: the policies are put in force as a proxy does.

use culvert_model::authorize::{ConnectionFacts, authorize};
use culvert_model::identity::Identity;
use culvert_model::snapshot::{Snapshot, SnapshotWriter, Update};
use culvert_model::wire;

use super::*;

const MODES: [&str; 4] = ["UNSET", "DISABLE", "PERMISSIVE", "STRICT"];
const PORTS: [u16; 3] = [8080, 9090, 7070];

/// One PeerAuthentication. Its place in the list is its age.
#[derive(Clone, Debug)]
struct Peer {
    namespace: &'static str,
    /// The `app` it selects; `None` is a whole namespace, or the mesh.
    selects: Option<&'static str>,
    /// `None` where it says nothing of mTLS.
    mode: Option<&'static str>,
    ports: Vec<(u16, &'static str)>,
}

impl Peer {
    fn manifest(&self, age: usize) -> String {
        let Self { namespace, .. } = self;
        // The younger its date, the earlier its name: the date has to decide.
        let mut text = format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p{}, namespace: {namespace}, creationTimestamp: \"2026-01-{:02}T00:00:00Z\"}}\nspec:\n  selector: {{matchLabels: {{",
            50 - age,
            age + 1,
        );
        text += &self.selects.map_or_else(String::new, |app| format!("app: {app}"));
        text += "}}\n";
        if let Some(mode) = self.mode {
            text += &format!("  mtls: {{mode: {mode}}}\n");
        }
        if !self.ports.is_empty() {
            text += "  portLevelMtls:\n";
            self.ports.iter().for_each(|(port, mode)| text += &format!("    {port}: {{mode: {mode}}}\n"));
        }
        text
    }
}

/// Whether somebody without an identity is refused: port over workload over namespace over mesh, the oldest of each level,
/// UNSET is what the level above says, DISABLE is as good as PERMISSIVE, and by default everybody is let in.
fn strict(peers: &[Peer], namespace: &str, app: &str, port: u16) -> bool {
    let whole = |of: &str| peers.iter().find(|p| p.namespace == of && p.selects.is_none());
    let says = |mode: Option<&'static str>| mode.filter(|mode| *mode != "UNSET");
    let own = peers
        .iter()
        .find(|p| p.namespace == namespace && namespace != "istio-system" && p.selects == Some(app));
    let of_port = own.and_then(|p| p.ports.iter().find(|(of, _)| *of == port)).map(|(_, mode)| *mode);
    let mode = says(of_port)
        .or_else(|| says(own.and_then(|p| p.mode)))
        .or_else(|| says(whole(namespace).and_then(|p| p.mode)))
        .or_else(|| says(whole("istio-system").and_then(|p| p.mode)));
    mode == Some("STRICT")
}

/// The translation as a proxy has it.
fn in_force(translation: &Translation) -> Snapshot {
    let addresses = translation
        .addresses
        .iter()
        .map(|(name, message)| wire::address(name, &prost::Message::encode_to_vec(message)).unwrap());
    let policies = translation.policies.iter().map(|(name, message)| {
        let decoded = wire::policy(name, &prost::Message::encode_to_vec(message));
        assert_eq!(decoded.error, None);
        decoded.policy
    });
    let update = Update { addresses: addresses.collect(), policies: policies.collect(), ..Update::default() };
    SnapshotWriter::new().apply(update).snapshot
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let namespace = prop_oneof![2 => Just("istio-system"), 4 => Just("n"), 1 => Just("other")];
    let selects = prop_oneof![3 => Just(None), 3 => Just(Some("web")), 1 => Just(Some("db"))];
    let mode = prop::option::weighted(0.8, prop::sample::select(&MODES[..]));
    let port = (prop::sample::select(&PORTS[..2]), prop::sample::select(&MODES[..]));
    let ports = prop_oneof![Just(vec![]), prop::collection::vec(port, 1..3)];
    (namespace, selects, mode, ports).prop_map(|(namespace, selects, mode, mut ports)| {
        ports.dedup_by_key(|(port, _)| *port);
        // Ports without a selector are refused when they are read.
        let ports = if selects.is_some() { ports } else { vec![] };
        Peer { namespace, selects, mode, ports }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// TRAP10, D39-D43: of every workload and port, who has no identity is let in exactly where the rules say, and who has
    /// one always is.
    #[test]
    fn let_in_as_the_levels_say(peers in prop::collection::vec(any_peer(), 0..6)) {
        let pods = [("n", "web"), ("n", "db"), ("n", "none"), ("other", "web"), ("istio-system", "web")];
        let mut text = String::new();
        for (namespace, app) in pods {
            text += &format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {app}, namespace: {namespace}, labels: {{app: {app}}}}}\nspec: {{containers: [{{name: c}}]}}\n");
        }
        // Read in another order than that of their ages.
        peers.iter().enumerate().rev().for_each(|(age, peer)| text += &peer.manifest(age));
        let mut world = world(&text);
        for (number, (namespace, app)) in pods.iter().enumerate() {
            world = world.running(namespace, app, "node-a", &[&format!("100.64.1.{number}")]);
        }
        let snapshot = in_force(&run(&world));
        let somebody = Identity::new("cluster.local", "n", "client").unwrap();
        for (namespace, app) in pods {
            let workload = snapshot.workload_by_uid(&format!("Kubernetes//Pod/{namespace}/{app}")).unwrap();
            for port in PORTS {
                let judged = |identity| {
                    let destination = std::net::SocketAddr::new(workload.addresses[0], port);
                    let source = "198.18.0.9:40000".parse().unwrap();
                    authorize(&snapshot, workload, &ConnectionFacts { identity, source, destination }).is_ok()
                };
                prop_assert!(judged(Some(&somebody)));
                let expected = !strict(&peers, namespace, app, port);
                prop_assert_eq!(judged(None), expected, "{}/{} port {}: {:?}", namespace, app, port, peers);
            }
        }
    }
}
