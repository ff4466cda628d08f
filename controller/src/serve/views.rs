//! Who is served what: everyone the same, and a waypoint its own routes and policies besides.

use std::collections::HashMap;
use std::sync::Arc;

use culvert_proto::GATEWAY_METADATA;
use culvert_proto::discovery::Node;
use culvert_xds::resources::ResourceSet;
use culvert_xds::server::{Peer, View};
use parking_lot::Mutex;
use prost_types::value::Kind;
use tokio::sync::watch;

use crate::index::Snapshot;

/// The `namespace/name` of the Gateway whose waypoint a node says it is; `None` if it says nothing of the kind.
///
/// Whether it is, is decided when the stream is admitted.
pub fn gateway_of(node: &Node) -> Option<&str> {
    let value = node.metadata.as_ref()?.fields.get(GATEWAY_METADATA)?;
    match value.kind.as_ref() {
        Some(Kind::StringValue(gateway)) => Some(gateway),
        // It says that it is one, and not which: none is of that name.
        _ => Some(""),
    }
}

/// The views of all streams; clones share them.
#[derive(Clone, Debug)]
pub struct Views {
    everyone: watch::Receiver<Arc<ResourceSet>>,
    state: Arc<Mutex<State>>,
}

/// Where what is served is published. Dropped, every stream ends.
#[derive(Debug)]
pub struct Publisher {
    everyone: watch::Sender<Arc<ResourceSet>>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    snapshot: Arc<Snapshot>,
    /// Of the Gateways that somebody is connected for: at most one a stream.
    gateways: HashMap<String, watch::Sender<Arc<ResourceSet>>>,
    /// Nothing is published any more.
    ended: bool,
}

impl Publisher {
    /// What is served from the beginning.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        let everyone = watch::Sender::new(Arc::clone(&snapshot.set));
        let state = State { snapshot, gateways: HashMap::new(), ended: false };
        Self { everyone, state: Arc::new(Mutex::new(state)) }
    }

    /// For the server.
    pub fn views(&self) -> Views {
        Views { everyone: self.everyone.subscribe(), state: Arc::clone(&self.state) }
    }

    /// Serves a new snapshot from now on. It costs a set for each Gateway that somebody listens for; the maps are shared.
    pub fn publish(&self, snapshot: &Arc<Snapshot>) {
        let mut state = self.state.lock();
        state.snapshot = Arc::clone(snapshot);
        self.everyone.send_replace(Arc::clone(&snapshot.set));
        state.gateways.retain(|gateway, sender| {
            let heard = sender.receiver_count() > 0;
            if heard {
                sender.send_replace(own_set(snapshot, gateway));
            }
            heard
        });
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        state.ended = true;
        state.gateways.clear();
    }
}

impl View for Views {
    fn resources(&self, _peer: &Peer, node: &Node) -> watch::Receiver<Arc<ResourceSet>> {
        let Some(gateway) = gateway_of(node) else { return self.everyone.clone() };
        let mut state = self.state.lock();
        if state.ended {
            return self.everyone.clone();
        }
        if let Some(sender) = state.gateways.get(gateway) {
            return sender.subscribe();
        }
        state.gateways.retain(|_, sender| sender.receiver_count() > 0);
        let (sender, receiver) = watch::channel(own_set(&state.snapshot, gateway));
        state.gateways.insert(gateway.to_owned(), sender);
        receiver
    }
}

fn own_set(snapshot: &Snapshot, gateway: &str) -> Arc<ResourceSet> {
    let own = snapshot.waypoints.get(gateway).cloned().unwrap_or_default();
    Arc::new(own.set(&snapshot.set))
}

#[cfg(test)]
#[path = "views_tests.rs"]
mod tests;
