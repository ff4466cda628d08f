//! What is in force, written into the `status` of objects, where people look for it (D47).
//!
//! ```text
//! contributors: Desired ──► engine (what differs, when) ──► server-side apply on /status, one at a time
//!                             ▲ what is there: a watch of each kind, while this replica leads
//! ```
//!
//! A contributor says what should stand in the status of which objects, all of it, whenever that changes; it never writes, and does
//! not look at what is there. It does so under a field manager of its own, so that two contributors (or another controller) may each
//! have conditions of the same object:
//!
//! ```ignore
//! let (publisher, contribution) = status::contribution("culvert-gateways", Some("culvert.dev/mesh"), &[kinds::GATEWAY]);
//! // handed to `status::start` with the others
//! let gateway = Target::new(kinds::GATEWAY, "shop", "waypoint");
//! let wanted = Wanted::of(&uid, generation)
//!     .condition(Condition::new("Accepted", true, "Accepted", "the class is this mesh's"))
//!     .field("addresses", json!([{ "type": "IPAddress", "value": "10.0.0.7" }]))
//!     .field("listeners", json!([{ "name": "mesh", "attachedRoutes": 0, "supportedKinds": [], "conditions": [condition.to_json()] }]));
//! publisher.publish(Desired::from([(gateway, wanted)]));
//! ```
//!
//! What the writer sees to, so that contributors need not:
//!
//! - Nothing is written that is there already, and nothing twice: the latest of each object counts.
//! - Every list named `conditions`, at any depth, gets `lastTransitionTime` (kept while the condition's `status` is the same) and
//!   `observedGeneration`. Conditions are told apart by `type`, listeners and `supportedFeatures` by `name`.
//! - `parents` and `ancestors` are lists that controllers share: entries whose `controllerName` is another's stay as they are.
//! - What this contributor once wrote and does not want any more is removed, also after a restart: the API server knows whose it is.
//! - An object that is another one now (uid), or newer than what the contributor saw (generation), waits for the contributor.
//! - What somebody else changes is put back once; when that happens again, after 1 minute, 2, 4 and so on to an hour. Two
//!   controllers that want different things do not write in turns.
//! - Only the leader writes, at most 50 times a second, each object again after a failure 1 s to 5 min later.

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::metrics::Metrics;
use culvert_runtime::tasks::Tasks;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

mod engine;
mod follow;
mod keep;
pub mod kinds;
pub mod policies;
#[cfg(test)]
mod policies_tests;
pub mod routes;
mod settle;
#[cfg(test)]
mod tests;
mod write;
#[cfg(test)]
mod write_tests;

/// A kind whose status is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StatusKind {
    /// API group; empty for the core.
    pub group: &'static str,
    /// Such as `Gateway`.
    pub kind: &'static str,
    /// Such as `gateways`.
    pub plural: &'static str,
    /// Versions that may be written, the one to prefer first. A cluster may have none of them.
    pub versions: &'static [&'static str],
}

/// An object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Its kind.
    pub kind: StatusKind,
    /// Empty for kinds without.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What should stand in an object's status.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The object that this was found out of; empty if any of the name will do.
    pub uid: String,
    /// Its generation then; `None` if the status is true of any, as one that says what is wrong with an object that was not taken.
    pub generation: Option<i64>,
    /// The fields of `status`. Conditions are without time and generation.
    pub status: Map<String, Value>,
}

/// All that a contributor wants. What is not in it, it does not want.
pub type Desired = BTreeMap<Target, Wanted>;

/// One condition, without what the writer fills in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Such as `Accepted`.
    pub r#type: &'static str,
    /// `None` is `Unknown`.
    pub status: Option<bool>,
    /// One word.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

/// Where a contributor says what it wants. Dropped, what it said last stays.
#[derive(Debug)]
pub struct Publisher(watch::Sender<Option<Arc<Desired>>>);

/// The writer's end of a [`Publisher`].
#[derive(Debug)]
pub struct Contribution {
    /// Name of the field manager: whose the fields are, at the API server.
    manager: &'static str,
    /// The `controllerName` of its entries in lists that controllers share.
    controller: Option<&'static str>,
    /// What it may ever write to; of these what is not wanted any more is taken away.
    kinds: &'static [StatusKind],
    /// What every object of a kind says that is not in what it published.
    every: BTreeMap<StatusKind, Map<String, Value>>,
    desired: watch::Receiver<Option<Arc<Desired>>>,
}

/// A new contributor. Before it has published once, nothing of it is written or taken away.
///
/// `manager` is for ever: under another name the next version would not find what this one wrote. `controller` is what it writes as
/// `controllerName` in `parents` or `ancestors`, if it does.
pub fn contribution(
    manager: &'static str,
    controller: Option<&'static str>,
    kinds: &'static [StatusKind],
) -> (Publisher, Contribution) {
    let (sender, desired) = watch::channel(None);
    (Publisher(sender), Contribution { manager, controller, kinds, every: BTreeMap::new(), desired })
}

/// Starts to write what `contributions` want, whenever this replica leads, until `drain` starts.
pub fn start(
    client: kube::Client,
    contributions: Vec<Contribution>,
    leading: watch::Receiver<bool>,
    metrics: &Metrics,
    tasks: &Tasks,
    drain: DrainWatcher,
) {
    let counters = Counters::default();
    metrics.register(|registry| {
        let registry = registry.sub_registry_with_prefix("culvert_controller_status");
        registry.register("writes", "Writes of status, by what became of them", counters.writes.clone());
        let help = "Objects whose status is yet to be looked at or to be tried again";
        registry.register("waiting", help, counters.waiting.clone());
    });
    let writer = write::Writer::new(write::KubeStatuses(client.clone()), contributions, counters);
    let watch = follow::Follow { client, tasks: tasks.clone() };
    tasks.spawn("status", writer.run(watch, leading, drain));
}

/// What was written.
#[derive(Clone, Debug, Default)]
struct Counters {
    writes: Family<Became, Counter>,
    waiting: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Became {
    outcome: &'static str,
}

impl Contribution {
    /// Every object of `kind`, which is one of the contributor's, says this unless something is published for it. For kinds of which
    /// the same is true of all, so that nobody needs to look at them.
    #[must_use]
    pub fn every(mut self, kind: StatusKind, condition: &Condition) -> Self {
        let status = json!({ "conditions": [condition.to_json()] });
        if let Value::Object(status) = status {
            self.every.insert(kind, status);
        }
        self
    }
}

impl Publisher {
    /// Says what is wanted from now on. It costs the writer what differs.
    pub fn publish(&self, desired: Desired) {
        let same = |current: &Option<Arc<Desired>>| current.as_deref() == Some(&desired);
        if !same(&self.0.borrow()) {
            self.0.send_replace(Some(Arc::new(desired)));
        }
    }
}

impl Target {
    /// `namespace` is empty for kinds without.
    pub fn new(kind: StatusKind, namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { kind, namespace: namespace.into(), name: name.into() }
    }
}

impl Wanted {
    /// For an object as it was seen.
    pub fn of(uid: impl Into<String>, generation: Option<i64>) -> Self {
        Self { uid: uid.into(), generation, status: Map::new() }
    }

    /// With one more condition of the object itself, in place of one of the same type.
    #[must_use]
    pub fn condition(mut self, condition: Condition) -> Self {
        let conditions = self.status.entry("conditions").or_insert_with(|| json!([]));
        if let Some(conditions) = conditions.as_array_mut() {
            conditions.retain(|other| other["type"] != condition.r#type);
            conditions.push(condition.to_json());
        }
        self
    }

    /// With another field of `status`.
    #[must_use]
    pub fn field(mut self, name: &str, value: Value) -> Self {
        self.status.insert(name.to_owned(), value);
        self
    }
}

impl Condition {
    /// One that is true or false.
    pub fn new(r#type: &'static str, is: bool, reason: &'static str, message: impl Into<String>) -> Self {
        Self { r#type, status: Some(is), reason, message: message.into() }
    }

    /// For lists of conditions within a [`Wanted::field`].
    pub fn to_json(&self) -> Value {
        let status = match self.status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        json!({ "type": self.r#type, "status": status, "reason": self.reason, "message": self.message })
    }
}
