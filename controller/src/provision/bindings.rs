//! What became of each binding, and what is known of Gateways, said in their status while this replica leads (D44, D46).

use std::sync::Arc;
use std::time::Duration;

use culvert_k8s_api::manifest::Manifest;
use culvert_k8s_api::{Kind, Object, ObjectKey};
use culvert_runtime::drain::DrainWatcher;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::report;
use super::run::{State, of_kind, wished};
use crate::gateways::{self, Owner};
use crate::index::{Snapshot, World};
use crate::status::{self, Condition, Contribution, Desired, Publisher, Target, Wanted, kinds};
use crate::translate::MeshSettings;
use crate::translate::waypoints::{self, BOUND_BY};

/// Condition of what is bound.
pub const CONDITION: &str = "istio.io/WaypointBound";
/// Between two looks at all bindings: one costs a look at every service.
const PAUSE: Duration = Duration::from_secs(1);

/// What says the status, and what writes it.
pub struct Reports {
    gateways: Publisher,
    bindings: Publisher,
}

/// Two contributors: conditions of Gateways and classes, and of what is bound to them.
pub fn reports() -> (Reports, [Contribution; 2]) {
    const GATEWAYS: &[status::StatusKind] = &[kinds::GATEWAY, kinds::GATEWAY_CLASS];
    const BOUND: &[status::StatusKind] = &[kinds::SERVICE, kinds::SERVICE_ENTRY, kinds::WORKLOAD_ENTRY];
    let (gateways, of_gateways) =
        status::contribution("culvert-gateways", Some(gateways::CONTROLLER), GATEWAYS);
    let (bindings, of_bindings) = status::contribution("culvert-bindings", None, BOUND);
    (Reports { gateways, bindings }, [of_gateways, of_bindings])
}

/// Says it whenever it may be another, until `drain` starts.
pub async fn run(
    reports: Reports,
    settings: MeshSettings,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    mut state: watch::Receiver<State>,
    mut leading: watch::Receiver<bool>,
    drain: DrainWatcher,
) {
    let mut looked: Option<Arc<World>> = None;
    let mut next = Instant::now();
    loop {
        let leads = *leading.borrow_and_update();
        let (world, state_now) =
            (snapshots.borrow_and_update().world.clone(), state.borrow_and_update().clone());
        let mut due = false;
        if leads {
            reports.gateways.publish(of_gateways(&world, &state_now, settings.compat));
            due = looked.as_ref().is_none_or(|before| differs(&before.objects, &world.objects));
            if due && Instant::now() >= next {
                reports.bindings.publish(of_bindings(&world, &settings));
                looked = Some(world);
                next = Instant::now() + PAUSE;
                due = false;
            } else if !due {
                // Nothing of this was about bindings: the next look need not pass over it again.
                looked = Some(world);
            }
        } else {
            looked = None;
        }
        tokio::select! {
            _ = drain.started() => return,
            Ok(()) = snapshots.changed() => {}
            Ok(()) = state.changed() => {}
            Ok(()) = leading.changed() => {}
            () = sleep_until(next), if due => {}
            else => return,
        }
    }
}

/// Whether anything changed that a binding depends on.
fn differs(before: &OrdMap<ObjectKey, Arc<Manifest>>, after: &OrdMap<ObjectKey, Arc<Manifest>>) -> bool {
    before.diff(after).any(|difference| match difference {
        DiffItem::Add(key, _) | DiffItem::Remove(key, _) | DiffItem::Update { new: (key, _), .. } => {
            BOUND_BY.contains(&key.kind)
        }
    })
}

fn of_gateways(world: &World, state: &State, compat: bool) -> Desired {
    let manifests: Vec<Arc<Manifest>> = [Kind::Gateway, Kind::GatewayClass]
        .into_iter()
        .flat_map(|kind| of_kind(&world.objects, kind).cloned())
        .collect();
    let mut desired = Desired::new();
    for manifest in &manifests {
        if let Object::GatewayClass(class) = &manifest.object
            && gateways::owner(&class.metadata.name, Some(class), compat) == Owner::Us
        {
            let target = Target::new(kinds::GATEWAY_CLASS, "", class.metadata.name.as_str());
            desired.insert(target, report::class(class));
        }
    }
    for (gateway, owner) in wished(&manifests, compat) {
        if owner == Owner::Us {
            let meta = &gateway.metadata;
            let provisioned = state.gateways.get(&(meta.namespace.clone(), meta.name.clone()));
            let target = Target::new(kinds::GATEWAY, meta.namespace.as_str(), meta.name.as_str());
            desired.insert(target, report::gateway(gateway, provisioned));
        }
    }
    desired
}

fn of_bindings(world: &World, settings: &MeshSettings) -> Desired {
    let all = waypoints::bindings(world, settings).into_iter();
    all.filter_map(|binding| {
        let kind = match binding.kind {
            Kind::Service => kinds::SERVICE,
            Kind::ServiceEntry => kinds::SERVICE_ENTRY,
            Kind::WorkloadEntry => kinds::WORKLOAD_ENTRY,
            _ => return None,
        };
        let (meta, bound) = (&binding.metadata, binding.bound);
        let condition = Condition::new(CONDITION, bound.accepted, bound.reason, bound.message);
        // It depends on labels, which have no generation.
        let wanted = Wanted::of(meta.uid.as_str(), None).condition(condition);
        Some((Target::new(kind, meta.namespace.as_str(), meta.name.as_str()), wanted))
    })
    .collect()
}
