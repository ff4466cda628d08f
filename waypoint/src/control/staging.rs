//! What has arrived and is not yet in force.

use std::collections::HashSet;
use std::sync::Arc;

use culvert_model::Str;
use culvert_model::request::RequestPolicy;
use culvert_model::route::Route;
use culvert_model::snapshot::{Changed, SnapshotWriter, Update};
use culvert_model::wire;
use culvert_proto::{ADDRESS_TYPE_URL, POLICY_TYPE_URL, ROUTE_TYPE_URL};
use culvert_xds::Generation;
use culvert_xds::gate::{Gate, Verdict};
use culvert_xds::state::{Delivery, Rejection};

use super::TYPES;
use crate::state::World;

/// `R` is how a delivery is answered.
pub struct Staging<R> {
    writer: SnapshotWriter,
    world: World,
    gate: Gate,
    /// Acknowledged parts of a push whose end is still to come: the server does not send them again.
    parts: Vec<Part>,
    /// Complete for their type, to be acknowledged with the commit.
    held: Vec<Held<R>>,
    /// Types of which a whole push has been applied.
    applied: HashSet<String>,
    /// Applied and not yet put in force.
    changed: Changed,
}

/// One delivery, decoded.
#[derive(Default)]
pub struct Part {
    /// Workloads and services.
    pub update: Update,
    /// Routes to add or replace.
    pub routes: Vec<Route>,
    /// Names of routes that are gone.
    pub removed_routes: Vec<Str>,
    /// Policies to add or replace, by their names on the wire.
    pub policies: Vec<(Str, RequestPolicy)>,
    /// Names of policies that are gone.
    pub removed_policies: Vec<Str>,
}

struct Held<R> {
    type_url: String,
    part: Part,
    rejections: Vec<Rejection>,
    responder: R,
}

/// What follows from a delivery.
pub struct Staged<R> {
    /// [`Staging::world`] is to be put in force; how it differs from the one before.
    pub commit: Option<Changed>,
    /// To be answered afterwards.
    pub answers: Vec<(R, Vec<Rejection>)>,
}

impl<R> Staging<R> {
    /// Nothing has arrived.
    pub fn new() -> Self {
        Self {
            writer: SnapshotWriter::new(),
            world: World::default(),
            gate: Gate::new(TYPES),
            parts: Vec::new(),
            held: Vec::new(),
            applied: HashSet::new(),
            changed: Changed::default(),
        }
    }

    /// The world with all that was applied.
    pub fn world(&self) -> World {
        World { snapshot: self.writer.snapshot().clone(), ..self.world.clone() }
    }

    /// A new connection: what was held was not acknowledged, so the control plane sends it again.
    pub fn connected(&mut self) {
        self.gate.connected();
        self.held.clear();
    }

    /// Takes in one delivery.
    pub fn delivered(&mut self, delivery: Delivery, responder: R) -> Staged<R> {
        let verdict = self.gate.delivered(&delivery);
        let type_url = delivery.type_url.clone();
        let (part, rejections) = decode(delivery);
        if matches!(verdict, Verdict::Acknowledge) {
            self.parts.push(part);
            return Staged { commit: None, answers: vec![(responder, rejections)] };
        }
        self.held.push(Held { type_url, part, rejections, responder });
        match verdict {
            Verdict::Commit => self.apply_held(),
            Verdict::Acknowledge | Verdict::Hold => Staged { commit: None, answers: Vec::new() },
        }
    }

    fn apply_held(&mut self) -> Staged<R> {
        let mut answers = Vec::new();
        for part in std::mem::take(&mut self.parts) {
            self.apply_part(part);
        }
        for held in std::mem::take(&mut self.held) {
            self.apply_part(held.part);
            self.applied.insert(held.type_url);
            answers.push((held.responder, held.rejections));
        }
        // Until there is something of every type, nothing is in force: a service without its policies would let everyone in.
        let whole = TYPES.iter().all(|type_url| self.applied.contains(*type_url));
        Staged { commit: whole.then(|| std::mem::take(&mut self.changed)), answers }
    }

    /// Applies what is whole by itself; it is in force with the next [`Self::world`].
    pub fn apply(&mut self, part: Part) -> Changed {
        self.apply_part(part);
        std::mem::take(&mut self.changed)
    }

    fn apply_part(&mut self, part: Part) {
        let changed = self.writer.apply(part.update).changed;
        self.changed.workloads.extend(changed.workloads);
        self.changed.services.extend(changed.services);
        if !part.routes.is_empty() || !part.removed_routes.is_empty() {
            self.world.routes = self.world.routes.with(&part.removed_routes, part.routes);
        }
        if !part.policies.is_empty() || !part.removed_policies.is_empty() {
            let policies = self.world.policies.with(&part.removed_policies, part.policies);
            self.world.policies = Arc::new(policies);
        }
    }
}

fn decode(delivery: Delivery) -> (Part, Vec<Rejection>) {
    let generation = match delivery.generation {
        Generation::Ours { number, .. } => number,
        Generation::Foreign(_) => 0,
    };
    let mut part = Part { update: Update { generation, ..Update::default() }, ..Part::default() };
    let mut rejections = Vec::new();
    let removed: Vec<Str> = delivery.removed.into_iter().map(Str::from).collect();
    let mut reject =
        |name: &Str, reason: String| rejections.push(Rejection { name: name.to_string(), reason });
    match delivery.type_url.as_str() {
        ADDRESS_TYPE_URL => {
            part.update.removed_addresses = removed;
            for resource in delivery.added {
                match wire::address(&resource.name, &resource.body) {
                    Ok(address) => part.update.addresses.push(address),
                    Err(error) => reject(&resource.name, error.to_string()),
                }
            }
        }
        ROUTE_TYPE_URL => {
            part.removed_routes = removed;
            for resource in delivery.added {
                let decoded = wire::route(&resource.name, &resource.body);
                // In force even so: what it might have been for gets a 500.
                part.routes.extend(decoded.route);
                if let Some(error) = decoded.error {
                    reject(&resource.name, error.to_string());
                }
            }
        }
        POLICY_TYPE_URL => {
            part.removed_policies = removed;
            for resource in delivery.added {
                let decoded = wire::request::decode(&resource.name, &resource.body);
                if let Some(error) = decoded.error {
                    reject(&resource.name, error.to_string());
                }
                // In force even so: it denies what it might have denied.
                part.policies.push((resource.name, decoded.policy));
            }
        }
        _ => {}
    }
    (part, rejections)
}

#[cfg(test)]
mod tests {
    use culvert_proto::{waypoint, workload};
    use culvert_xds::RawResource;
    use prost::Message;

    use super::*;

    fn delivery(type_url: &str, generation: &str, added: Vec<(&str, Vec<u8>)>) -> Delivery {
        let raw = |(name, body): (&str, Vec<u8>)| RawResource {
            name: name.into(),
            version: "1".to_owned(),
            body: body.into(),
        };
        Delivery {
            type_url: type_url.to_owned(),
            generation: Generation::parse(generation),
            added: added.into_iter().map(raw).collect(),
            removed: Vec::new(),
            nonce: "1".to_owned(),
        }
    }

    fn service() -> (&'static str, Vec<u8>) {
        let service = workload::Service {
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            hostname: "web.shop".to_owned(),
            ..Default::default()
        };
        let kind = workload::address::Type::Service(service);
        ("shop/web.shop", workload::Address { r#type: Some(kind) }.encode_to_vec())
    }

    fn route() -> waypoint::Route {
        waypoint::Route {
            kind: "HTTPRoute".to_owned(),
            namespace: "shop".to_owned(),
            name: "r".to_owned(),
            service_namespace: "shop".to_owned(),
            service_hostname: "web.shop".to_owned(),
            http_rules: vec![waypoint::HttpRule::default()],
            ..Default::default()
        }
    }

    const ROUTE: &str = "HTTPRoute/shop/r/shop/web.shop/0";

    /// A service is never in force without its policies and routes.
    #[test]
    fn all_types_are_committed_at_once() {
        let mut staging = Staging::new();
        let staged = staging.delivered(delivery(ADDRESS_TYPE_URL, "culvert/7", vec![service()]), "a");
        assert!(staged.commit.is_none() && staged.answers.is_empty());
        let routes = vec![(ROUTE, route().encode_to_vec())];
        let staged = staging.delivered(delivery(ROUTE_TYPE_URL, "culvert/7", routes), "r");
        assert!(staged.commit.is_none());
        let staged = staging.delivered(delivery(POLICY_TYPE_URL, "culvert/7", vec![]), "p");
        assert_eq!(staged.commit.unwrap().services.len(), 1);
        assert_eq!(staged.answers.iter().map(|(who, _)| *who).collect::<Vec<_>>(), ["a", "r", "p"]);
        let world = staging.world();
        assert_eq!((world.snapshot.generation(), world.routes.len()), (7, 1));
    }

    /// What cannot be used is told, and in force all the same as far as it refuses something.
    #[test]
    fn what_cannot_be_used_is_told_and_refuses() {
        let mut staging = Staging::new();
        let mut body = route().encode_to_vec();
        body.extend_from_slice(&[0xf8, 0x07, 0x01]);
        let staged = staging.delivered(delivery(ROUTE_TYPE_URL, "other/1", vec![(ROUTE, body)]), ());
        assert_eq!(staged.answers[0].1[0].name, ROUTE);
        let junk = vec![("shop/p", vec![0xff])];
        let staged = staging.delivered(delivery(POLICY_TYPE_URL, "other/1", junk), ());
        assert_eq!(staged.answers[0].1[0].name, "shop/p");
        assert!(staged.commit.is_none(), "there are no services yet");
        let staged = staging.delivered(delivery(ADDRESS_TYPE_URL, "other/1", vec![service()]), ());
        assert!(staged.commit.is_some());
        let world = staging.world();
        assert_eq!((world.routes.len(), world.policies.iter().count()), (1, 1));
        assert!(world.policies.iter().all(|policy| policy.undecodable.is_some()));
    }
}
