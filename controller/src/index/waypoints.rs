//! What is served to waypoints: of each Gateway the routes and policies of requests that are its own, beside what everyone has.

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_proto::{POLICY_TYPE_URL, ROUTE_TYPE_URL};
use culvert_xds::resources::{Resource, ResourceMap, ResourceSet};
use imbl::OrdMap;
use prost::Message;

use crate::translate::routes::Told;
use crate::translate::version;

/// What one Gateway's waypoint has that nobody else has. Maps that did not change are shared with the set before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Own {
    routes: Arc<ResourceMap>,
    policies: Arc<ResourceMap>,
    /// What they were made of: what is equal to that is not encoded again.
    told: Told,
}

/// By Gateway, `namespace/name`. One that is not here has nothing of its own.
pub type Owns = OrdMap<String, Arc<Own>>;

impl Own {
    /// The set for the waypoint: what everyone has, of the same generation, and its own.
    pub fn set(&self, everyone: &ResourceSet) -> ResourceSet {
        let mut set = everyone.clone();
        set.types.insert(ROUTE_TYPE_URL.to_owned(), Arc::clone(&self.routes));
        set.types.insert(POLICY_TYPE_URL.to_owned(), Arc::clone(&self.policies));
        set
    }

    /// How many routes and policies there are.
    pub fn counts(&self) -> (usize, usize) {
        (self.routes.len(), self.policies.len())
    }
}

/// Makes what Gateways have the same as what they are told. It costs what is told, and of what is the same no encoding.
pub(super) fn put(owns: &mut Owns, told: BTreeMap<String, Told>) {
    let gone: Vec<String> = owns.keys().filter(|gateway| !told.contains_key(*gateway)).cloned().collect();
    for gateway in gone {
        owns.remove(&gateway);
    }
    for (gateway, told) in told {
        let before = owns.get(&gateway).cloned().unwrap_or_default();
        if before.told == told && owns.contains_key(&gateway) {
            continue;
        }
        let own = Own {
            routes: map(&before.routes, &before.told.routes, &told.routes),
            policies: map(&before.policies, &before.told.policies, &told.policies),
            told,
        };
        owns.insert(gateway, Arc::new(own));
    }
}

fn map<T: Message + PartialEq>(
    served: &Arc<ResourceMap>,
    before: &BTreeMap<String, Arc<T>>,
    now: &BTreeMap<String, Arc<T>>,
) -> Arc<ResourceMap> {
    let mut served = Arc::clone(served);
    for name in before.keys().filter(|name| !now.contains_key(*name)) {
        Arc::make_mut(&mut served).remove(name.as_str());
    }
    for (name, message) in now {
        if before.get(name).is_none_or(|known| known != message) {
            let version = version::of_message(message.as_ref());
            let resource = Resource::new(version.as_str(), message.encode_to_vec());
            Arc::make_mut(&mut served).insert(name.as_str().into(), resource);
        }
    }
    served
}
