//! PeerAuthentication to DENY policies (D39 to D42): node tunnels know no modes, only "deny who has no identity".

use std::collections::BTreeMap;

use culvert_k8s_api::meta::{StringMap, selects};
use culvert_k8s_api::security::{MtlsMode, PeerAuthentication, Selector};
use culvert_proto::security as proto;
use culvert_proto::security::string_match::MatchType;

use super::view::View;
use super::{PolicyStatus, Translation};

/// The name of the policy that workloads under plain STRICT are selected by.
const STATIC_STRICT: &str = "istio_converted_static_strict";
/// Prefix of the name of a policy that says something about single ports.
const CONVERTED: &str = "converted_peer_authentication_";

/// Whether a connection without an identity is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Strict,
    Permissive,
}

/// The modes in force, by level.
pub(super) struct Levels {
    mesh: Mode,
    namespaces: BTreeMap<String, Mode>,
    /// By namespace, the oldest first.
    workloads: BTreeMap<String, Vec<WorkloadLevel>>,
    static_strict: String,
}

struct WorkloadLevel {
    labels: StringMap,
    /// The resource that a workload under it is selected by.
    policy: Option<String>,
}

impl Levels {
    /// The resource that enforces the mode of a workload; none under PERMISSIVE.
    pub fn policy_for(&self, namespace: &str, labels: &StringMap) -> Option<String> {
        let own =
            self.workloads.get(namespace).and_then(|all| all.iter().find(|one| selects(&one.labels, labels)));
        if let Some(own) = own {
            return own.policy.clone();
        }
        (self.base(namespace) == Mode::Strict).then(|| self.static_strict.clone())
    }

    fn base(&self, namespace: &str) -> Mode {
        self.namespaces.get(namespace).copied().unwrap_or(self.mesh)
    }
}

/// Finds the modes and makes the policies that enforce them.
pub(super) fn convert_all(view: &View<'_>, out: &mut Translation) -> Levels {
    let root = view.settings.root_namespace.as_str();
    let mut all: Vec<&PeerAuthentication> = view.peers.values().copied().collect();
    // Several of one level: the oldest wins (D42).
    all.sort_by_key(|peer| peer.metadata.age());
    let (selecting, whole): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|peer| Selector::labels(peer.spec.selector.as_ref()).is_some());

    let static_strict = format!("{root}/{STATIC_STRICT}");
    let mut levels = Levels {
        mesh: Mode::Permissive,
        namespaces: BTreeMap::new(),
        workloads: BTreeMap::new(),
        static_strict: static_strict.clone(),
    };
    out.policies.insert(static_strict.clone(), policy(root, STATIC_STRICT, vec![vec![anonymous()]]));

    let mut taken: BTreeMap<&str, &str> = BTreeMap::new();
    for peer in whole {
        let namespace = peer.metadata.namespace.as_str();
        let mut status = accepted(peer);
        if let Some(older) = taken.get(namespace) {
            status.shadow(format!("{older} is older and for the same namespace"));
        } else {
            taken.insert(namespace, &peer.metadata.name);
            match (mode(peer.spec.mtls.unwrap_or_default().mode), namespace == root) {
                (Some(mode), true) => levels.mesh = mode,
                (Some(mode), false) => {
                    levels.namespaces.insert(namespace.to_owned(), mode);
                }
                (None, _) => {}
            }
        }
        out.policy_status.push(status);
    }
    for peer in selecting {
        let mut status = accepted(peer);
        if peer.metadata.namespace == root {
            status.shadow("a selector means nothing in the root namespace".to_owned());
        } else {
            workload_level(peer, &mut levels, &mut status, out);
        }
        out.policy_status.push(status);
    }
    levels
}

fn workload_level(
    peer: &PeerAuthentication,
    levels: &mut Levels,
    status: &mut PolicyStatus,
    out: &mut Translation,
) {
    let (meta, spec) = (&peer.metadata, &peer.spec);
    let base = mode(spec.mtls.unwrap_or_default().mode).unwrap_or_else(|| levels.base(&meta.namespace));
    // An UNSET port is as the workload is; so is one that says the same.
    let mut others: Vec<u32> = Vec::new();
    for (port, tls) in &spec.port_level_mtls {
        if mode(tls.mode).is_some_and(|mode| mode != base) {
            others.extend(port.parse::<u16>().ok().map(u32::from));
        }
    }
    others.sort_unstable();
    let converted = format!("{CONVERTED}{}", meta.name);
    let policy = if others.is_empty() {
        (base == Mode::Strict).then(|| levels.static_strict.clone())
    } else {
        let groups = match base {
            // One group: refused unless it is one of these ports.
            Mode::Strict => {
                vec![std::iter::once(anonymous()).chain(others.into_iter().map(not_port)).collect()]
            }
            // A group for each port that is strict by itself.
            Mode::Permissive => others.into_iter().map(|port| vec![anonymous(), at_port(port)]).collect(),
        };
        let resource = format!("{}/{converted}", meta.namespace);
        out.policies.insert(resource.clone(), self::policy(&meta.namespace, &converted, groups));
        Some(resource)
    };
    status.resource.clone_from(&policy);
    let labels = Selector::labels(spec.selector.as_ref()).cloned().unwrap_or_default();
    levels.workloads.entry(meta.namespace.clone()).or_default().push(WorkloadLevel { labels, policy });
}

fn accepted(peer: &PeerAuthentication) -> PolicyStatus {
    PolicyStatus {
        kind: "PeerAuthentication",
        namespace: peer.metadata.namespace.clone(),
        name: peer.metadata.name.clone(),
        accepted: true,
        reason: "Accepted",
        message: String::new(),
        resource: None,
        targeted: false,
        waypoints: Vec::new(),
    }
}

impl PolicyStatus {
    fn shadow(&mut self, message: String) {
        self.accepted = false;
        self.reason = "Shadowed";
        self.message = message;
    }
}

/// DISABLE is PERMISSIVE (D42); UNSET is what the level above says.
fn mode(mode: MtlsMode) -> Option<Mode> {
    match mode {
        MtlsMode::Unset => None,
        MtlsMode::Disable | MtlsMode::Permissive => Some(Mode::Permissive),
        MtlsMode::Strict => Some(Mode::Strict),
    }
}

fn policy(namespace: &str, name: &str, groups: Vec<Vec<proto::Match>>) -> proto::Authorization {
    let clause = |one| proto::Rules { matches: vec![one] };
    let group = |clauses: Vec<_>| proto::Group { rules: clauses.into_iter().map(clause).collect() };
    proto::Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: proto::Scope::WorkloadSelector.into(),
        action: proto::Action::Deny.into(),
        groups: groups.into_iter().map(group).collect(),
        dry_run: false,
        extensions: Vec::new(),
    }
}

fn anonymous() -> proto::Match {
    let any = proto::StringMatch { match_type: Some(MatchType::Presence(())) };
    proto::Match { not_principals: vec![any], ..proto::Match::default() }
}

fn at_port(port: u32) -> proto::Match {
    proto::Match { destination_ports: vec![port], ..proto::Match::default() }
}

fn not_port(port: u32) -> proto::Match {
    proto::Match { not_destination_ports: vec![port], ..proto::Match::default() }
}
