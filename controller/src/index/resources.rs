//! A snapshot as the xDS server serves it.

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_xds::resources::{Resource, ResourceMap, ResourceSet};
use prost::Message;

use super::{Snapshot, Versioned};

/// The set for a snapshot. A type in which nothing changed since `before` is shared with it, and so is each body.
pub(super) fn set(snapshot: &Snapshot, before: &ResourceSet) -> ResourceSet {
    let types = [
        (ADDRESS_TYPE_URL, map(&snapshot.addresses, &before.of_type(ADDRESS_TYPE_URL))),
        (AUTHORIZATION_TYPE_URL, map(&snapshot.policies, &before.of_type(AUTHORIZATION_TYPE_URL))),
    ];
    ResourceSet {
        generation: snapshot.generation,
        types: types.into_iter().map(|(name, map)| (name.to_owned(), map)).collect(),
    }
}

fn map<T: Message>(messages: &BTreeMap<String, Versioned<T>>, before: &Arc<ResourceMap>) -> Arc<ResourceMap> {
    let same = messages.len() == before.len()
        && messages.iter().zip(before.iter()).all(|((name, message), (known, resource))| {
            **name == **known && *message.version == *resource.version
        });
    if same {
        return Arc::clone(before);
    }
    let resource = |(name, message): (&String, &Versioned<T>)| {
        let resource = match before.get(name.as_str()) {
            Some(known) if *known.version == *message.version => known.clone(),
            _ => Resource::new(message.version.as_str(), message.message.encode_to_vec()),
        };
        (Arc::from(name.as_str()), resource)
    };
    Arc::new(messages.iter().map(resource).collect())
}
