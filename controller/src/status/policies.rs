//! What became of policies and of what else people write for the mesh: Istio's conditions (D45), and one of ours that says whether
//! it is in force.
//!
//! `ZtunnelAccepted` and `WaypointAccepted` say whether the data plane takes a policy as it is written. That it is taken does not
//! mean that anything is under it, so [`ENFORCED`] says what people want to know: whether this policy decides on any connection now,
//! and if not, why.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_k8s_api::manifest::FileError;
use culvert_k8s_api::meta::{ObjectMeta, StringMap, selects};
use culvert_k8s_api::networking::ServiceEntry;
use culvert_k8s_api::security::{Action, AuthorizationPolicy, PeerAuthentication, Selector};
use culvert_k8s_api::{Kind, Object, ObjectKey, labels};
use culvert_proto::workload::{TunnelProtocol, address};
use culvert_runtime::drain::DrainWatcher;
use tokio::sync::watch;

use super::keep::keep;
use super::{Condition, Contribution, Desired, Publisher, StatusKind, Target, Wanted, kinds};
use crate::index::Snapshot;
use crate::translate::{self, MeshSettings, PolicyStatus};

/// The field manager. It must stay what it is.
const MANAGER: &str = "culvert-status";
const KINDS: &[StatusKind] = &[
    kinds::AUTHORIZATION_POLICY,
    kinds::PEER_AUTHENTICATION,
    kinds::REQUEST_AUTHENTICATION,
    kinds::SERVICE_ENTRY,
    kinds::WORKLOAD_ENTRY,
    kinds::DESTINATION_RULE,
];

/// Condition: it decides on connections now.
pub const ENFORCED: &str = "culvert.dev/Enforced";
/// Condition: node tunnels take it as it is written.
pub const ZTUNNEL: &str = "ZtunnelAccepted";
/// Condition: a waypoint takes it as it is written.
pub const WAYPOINT: &str = "WaypointAccepted";
/// Condition of what is no policy: it is in force, and what of it is ignored.
pub const ACCEPTED: &str = "Accepted";

/// What is wrong with one object is said up to here; all of it is in the log and on `/debug/errors`.
const MAX_ERRORS: usize = 5;

/// What is always true of kinds that only a waypoint would act on.
const NEEDS_WAYPOINT: &str = "only a waypoint would act on it, and waypoints of this version do not; node tunnels carry TCP and read nothing of it";

/// The contributor, for [`run`] and for the writer.
pub fn contribution() -> (Publisher, Contribution) {
    let (publisher, contribution) = super::contribution(MANAGER, None, KINDS);
    let idle = Condition::new(ENFORCED, false, "WaypointRequired", NEEDS_WAYPOINT);
    let contribution =
        contribution.every(kinds::REQUEST_AUTHENTICATION, &idle).every(kinds::DESTINATION_RULE, &idle);
    (publisher, contribution)
}

/// Publishes what is true, whenever that changes while this replica leads, until `drain` starts.
pub async fn run(
    publisher: Publisher,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    settings: MeshSettings,
    leading: watch::Receiver<bool>,
    drain: DrainWatcher,
) {
    keep(publisher, snapshots, leading, drain, |snapshot| Some(desired(snapshot, &settings))).await;
}

/// What should stand in every status.
pub fn desired(snapshot: &Snapshot, settings: &MeshSettings) -> Desired {
    let facts = Facts::of(snapshot, settings);
    let mut desired = Desired::new();
    let verdicts: BTreeMap<(&str, &str, &str), &PolicyStatus> = snapshot
        .translation
        .policy_status
        .iter()
        .map(|it| ((it.kind, it.namespace.as_str(), it.name.as_str()), it))
        .collect();
    for manifest in snapshot.world.objects.values() {
        let meta = manifest.object.metadata();
        let verdict = |kind| verdicts.get(&(kind, meta.namespace.as_str(), meta.name.as_str())).copied();
        let (kind, conditions) = match &manifest.object {
            Object::AuthorizationPolicy(it) => {
                let Some(verdict) = verdict("AuthorizationPolicy") else { continue };
                (kinds::AUTHORIZATION_POLICY, facts.authorization(it, verdict))
            }
            Object::PeerAuthentication(it) => {
                let Some(verdict) = verdict("PeerAuthentication") else { continue };
                (kinds::PEER_AUTHENTICATION, facts.peer(it, verdict))
            }
            Object::ServiceEntry(it) => (kinds::SERVICE_ENTRY, vec![facts.service_entry(it)]),
            Object::WorkloadEntry(_) => {
                (kinds::WORKLOAD_ENTRY, vec![Condition::new(ACCEPTED, true, "Accepted", "")])
            }
            _ => continue,
        };
        let wanted = Wanted::of(meta.uid.clone(), meta.generation);
        put(&mut desired, kind, meta, conditions.into_iter().fold(wanted, Wanted::condition));
    }
    for ((kind, namespace, name), errors) in &facts.refused {
        let Some(kind) = KINDS.iter().find(|it| it.kind == *kind) else { continue };
        let target = Target::new(*kind, *namespace, *name);
        // It may be of another generation than what is in force in its place: it is told of the object as it is.
        let wanted = facts.refusal(*kind, namespace, name, errors);
        desired.insert(target, wanted.into_iter().fold(Wanted::of("", None), Wanted::condition));
    }
    desired
}

fn put(desired: &mut Desired, kind: StatusKind, meta: &ObjectMeta, wanted: Wanted) {
    desired.insert(Target::new(kind, meta.namespace.as_str(), meta.name.as_str()), wanted);
}

/// What verdicts are made of besides the policy.
struct Facts<'a> {
    snapshot: &'a Snapshot,
    settings: &'a MeshSettings,
    /// Labels of the workloads that a tunnel enforces policies for, by namespace.
    enrolled: BTreeMap<&'a str, Vec<Cow<'a, StringMap>>>,
    /// What the loader refused, by kind, namespace and name.
    refused: BTreeMap<(&'a str, &'a str, &'a str), Vec<&'a FileError>>,
}

impl<'a> Facts<'a> {
    fn of(snapshot: &'a Snapshot, settings: &'a MeshSettings) -> Self {
        let mut enrolled: BTreeMap<&str, Vec<Cow<'_, StringMap>>> = BTreeMap::new();
        for (key, manifest) in &snapshot.world.objects {
            let (uid, labels) = match &manifest.object {
                Object::Pod(pod) => (
                    translate::pod_uid(settings, &key.namespace, &key.name),
                    Cow::Borrowed(&pod.metadata.labels),
                ),
                Object::WorkloadEntry(entry) => {
                    let mut labels = entry.metadata.labels.clone();
                    labels.extend(entry.spec.labels.clone());
                    (translate::entry_uid(settings, &key.namespace, &key.name), Cow::Owned(labels))
                }
                _ => continue,
            };
            let hbone = snapshot.addresses.get(&uid).is_some_and(|address| match &address.message.r#type {
                Some(address::Type::Workload(it)) => it.tunnel_protocol() == TunnelProtocol::Hbone,
                _ => false,
            });
            if hbone {
                enrolled.entry(&key.namespace).or_default().push(labels);
            }
        }
        let mut refused: BTreeMap<_, Vec<&FileError>> = BTreeMap::new();
        for error in &snapshot.world.errors {
            if let Some(name) = parts(&error.file) {
                refused.entry(name).or_default().push(error);
            }
        }
        Self { snapshot, settings, enrolled, refused }
    }

    fn authorization(&self, policy: &AuthorizationPolicy, verdict: &PolicyStatus) -> Vec<Condition> {
        let message = verdict.message.as_str();
        if verdict.targeted {
            return self.targeted(policy, verdict);
        }
        if let reason @ ("UnsupportedValue" | "Invalid") = verdict.reason {
            return not_taken(reason, message);
        }
        let scope = self.scope(&policy.metadata, policy.spec.selector.as_ref());
        let as_written = verdict.reason == "Accepted";
        let accepted = if as_written {
            Condition::new(ZTUNNEL, true, "Accepted", format!("taken for {}", scope.words))
        } else {
            Condition::new(ZTUNNEL, false, "UnsupportedValue", message)
        };
        let enforced = if is_dry_run(policy) {
            let message = format!("a dry run: what it would do is in the access log of {}", scope.words);
            Condition::new(ENFORCED, false, "DryRun", message)
        } else {
            scope.enforced(if as_written { "Enforced" } else { verdict.reason }, message)
        };
        vec![accepted, enforced]
    }

    fn peer(&self, peer: &PeerAuthentication, verdict: &PolicyStatus) -> Vec<Condition> {
        if !verdict.accepted {
            return not_taken(verdict.reason, &verdict.message);
        }
        let scope = self.scope(&peer.metadata, peer.spec.selector.as_ref());
        vec![
            Condition::new(ZTUNNEL, true, "Accepted", format!("taken for {}", scope.words)),
            scope.enforced("Enforced", ""),
        ]
    }

    fn service_entry(&self, entry: &ServiceEntry) -> Condition {
        let meta = &entry.metadata;
        let prefix = format!("ServiceEntry {}/{}: ", meta.namespace, meta.name);
        let notes = self.snapshot.translation.notes.iter().filter_map(|note| note.strip_prefix(&prefix));
        let mut ignored: Vec<String> = notes.map(str::to_owned).collect();
        if ignored.len() >= entry.spec.hosts.len() && !ignored.is_empty() {
            return Condition::new(ACCEPTED, false, "HostConflict", ignored.join("; "));
        }
        if entry.spec.export_to.iter().any(|to| to != "*") {
            ignored.push("spec.exportTo is not honoured: its hosts are known in every namespace".to_owned());
        }
        let udp = entry.spec.ports.iter().filter(|port| port.protocol.eq_ignore_ascii_case("UDP"));
        ignored.extend(udp.map(|port| format!("port {} is UDP, which is not carried", port.name)));
        let reason = if ignored.is_empty() { "Accepted" } else { "PartlyIgnored" };
        Condition::new(ACCEPTED, true, reason, ignored.join("; "))
    }

    fn refusal(
        &self,
        kind: StatusKind,
        namespace: &str,
        name: &str,
        errors: &[&FileError],
    ) -> Vec<Condition> {
        let mut what: Vec<String> = errors.iter().take(MAX_ERRORS).map(|it| it.detail()).collect();
        if errors.len() > MAX_ERRORS {
            what.push(format!("and {} more", errors.len() - MAX_ERRORS));
        }
        let what = what.join("; ");
        let object = |of| {
            let key = ObjectKey { kind: of, namespace: namespace.to_owned(), name: name.to_owned() };
            self.snapshot.world.objects.get(&key).map(|it| &it.object)
        };
        let instead = match kind {
            kinds::AUTHORIZATION_POLICY => match object(Kind::AuthorizationPolicy) {
                Some(Object::AuthorizationPolicy(it)) if denies_all(it) => {
                    "until that is mended, every connection to what it selects is refused"
                }
                _ => "until that is mended, what it said before stays in force",
            },
            kinds::PEER_AUTHENTICATION => match object(Kind::PeerAuthentication) {
                Some(_) => {
                    "until that is mended, what it said before stays in force, or STRICT if nothing did"
                }
                None => "nothing stands for it",
            },
            kinds::SERVICE_ENTRY if object(Kind::ServiceEntry).is_some() => {
                "what it said before stays in force"
            }
            kinds::WORKLOAD_ENTRY if object(Kind::WorkloadEntry).is_some() => {
                "what it said before stays in force"
            }
            _ => "nothing of it is in force",
        };
        let message = format!("{what}; {instead}");
        match kind {
            kinds::AUTHORIZATION_POLICY | kinds::PEER_AUTHENTICATION => not_taken("Invalid", &message),
            _ => vec![Condition::new(ACCEPTED, false, "Invalid", message)],
        }
    }

    /// Whether waypoints take what is for them, and whether there are any to enforce it.
    fn targeted(&self, policy: &AuthorizationPolicy, verdict: &PolicyStatus) -> Vec<Condition> {
        let (reason, message) = (verdict.reason, verdict.message.as_str());
        if verdict.waypoints.is_empty() {
            return vec![
                Condition::new(WAYPOINT, false, reason, message),
                Condition::new(ENFORCED, false, reason, format!("nothing enforces it: {message}")),
            ];
        }
        let who = format!("waypoint {}", verdict.waypoints.join(", "));
        let accepted = if reason == "Accepted" {
            Condition::new(WAYPOINT, true, "Accepted", format!("taken by {who}"))
        } else if reason == "UnsupportedValue" {
            Condition::new(WAYPOINT, false, reason, message)
        } else {
            Condition::new(
                WAYPOINT,
                false,
                reason,
                format!("taken by {who}, but not for all targets: {message}"),
            )
        };
        let waiting: Vec<&str> =
            verdict.waypoints.iter().map(String::as_str).filter(|it| !self.is_programmed(it)).collect();
        let enforced = if is_dry_run(policy) {
            let message = format!("a dry run: what it would do is in the access log of {who}");
            Condition::new(ENFORCED, false, "DryRun", message)
        } else if !waiting.is_empty() {
            let message = format!(
                "waypoint {} is not programmed: what is sent through it is refused until it is",
                waiting.join(", ")
            );
            Condition::new(ENFORCED, false, "WaypointIsNotReady", message)
        } else if reason == "UnsupportedValue" {
            Condition::new(ENFORCED, true, "Widened", message)
        } else if reason == "Accepted" {
            Condition::new(ENFORCED, true, "Enforced", format!("{who} enforces it"))
        } else {
            Condition::new(
                ENFORCED,
                true,
                "Narrowed",
                format!("{who} enforces it; nothing does so for the rest: {message}"),
            )
        };
        vec![accepted, enforced]
    }

    fn is_programmed(&self, gateway: &str) -> bool {
        let (namespace, name) = gateway.split_once('/').unwrap_or(("", gateway));
        let key = ObjectKey { kind: Kind::Gateway, namespace: namespace.to_owned(), name: name.to_owned() };
        match self.snapshot.world.objects.get(&key).map(|it| &it.object) {
            Some(Object::Gateway(it)) => it.status.programmed,
            _ => false,
        }
    }

    fn scope(&self, meta: &ObjectMeta, selector: Option<&Selector>) -> Scope {
        let root = meta.namespace == self.settings.root_namespace;
        let labels = Selector::labels(selector);
        let under = |namespace: &str| root || namespace == meta.namespace;
        let selected = |of: &StringMap| labels.is_none_or(|labels| selects(labels, of));
        let any = self
            .enrolled
            .iter()
            .filter(|(namespace, _)| under(namespace))
            .any(|(_, workloads)| workloads.iter().any(|labels| selected(labels)));
        let mut words = "enrolled workloads".to_owned();
        if !root {
            words += &format!(" of namespace {}", meta.namespace);
        }
        if let Some(labels) = labels {
            let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            words += &format!(" with {}", labels.join(","));
        }
        Scope { words, any }
    }
}

/// Which workloads a policy is for.
struct Scope {
    words: String,
    any: bool,
}

impl Scope {
    fn enforced(&self, reason: &'static str, more: &str) -> Condition {
        if !self.any {
            return Condition::new(ENFORCED, false, "NoWorkload", format!("there are no {}", self.words));
        }
        let more = if more.is_empty() { String::new() } else { format!("; {more}") };
        let message = format!("node tunnels enforce it for {}{more}", self.words);
        Condition::new(ENFORCED, true, reason, message)
    }
}

/// Node tunnels do not take it, and nothing enforces it as it is written.
fn not_taken(reason: &'static str, message: &str) -> Vec<Condition> {
    vec![Condition::new(ZTUNNEL, false, reason, message), Condition::new(ENFORCED, false, reason, message)]
}

fn is_dry_run(policy: &AuthorizationPolicy) -> bool {
    policy.metadata.annotations.get(labels::DRY_RUN).is_some_and(|value| value == "true")
}

/// Allows nothing: what stands for a policy that never could be read, among others.
fn denies_all(policy: &AuthorizationPolicy) -> bool {
    policy.spec.action == Action::Allow && policy.spec.rules.is_empty()
}

/// `KIND NAMESPACE/NAME`, as errors about the API server's objects are named.
fn parts(file: &str) -> Option<(&str, &str, &str)> {
    let (kind, name) = file.split_once(' ')?;
    let (namespace, name) = name.split_once('/')?;
    let named = |word: &str| !word.is_empty() && !word.contains([' ', '/']);
    [kind, namespace, name].into_iter().all(named).then_some((kind, namespace, name))
}
