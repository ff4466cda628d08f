//! What `culvert status` asks the controller: how far each connected proxy is, and what is not in force as it was written.
//!
//! `/debug/index` says all of it too, beside everything else: in a mesh of thousands of pods that is megabytes.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use culvert_runtime::admin::{AdminServer, json};
use culvert_runtime::tasks::Tasks;
use culvert_xds::server::ClientStatus;
use parking_lot::Mutex;
use serde_json::{Map, Value, json as value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use super::admin::Xds;
use crate::index::Snapshot;

/// Generations whose time is remembered, 24 bytes each. A proxy that is further behind counts as behind since the oldest of them.
const REMEMBERED: usize = 1024;

/// When each of the last generations was published.
#[derive(Debug, Default)]
struct History(VecDeque<(u64, SystemTime)>);

/// Adds the pages to those of the metrics port. A task of `tasks` notes when generations are published.
pub fn pages(
    server: AdminServer,
    snapshots: &watch::Receiver<Arc<Snapshot>>,
    xds: Arc<OnceLock<Xds>>,
    tasks: &Tasks,
) -> AdminServer {
    let history = Arc::new(Mutex::new(History::default()));
    history.lock().published(snapshots.borrow().generation, SystemTime::now());
    let (mut news, noted) = (snapshots.clone(), history.clone());
    tasks.spawn("generations", async move {
        while news.changed().await.is_ok() {
            let generation = news.borrow_and_update().generation;
            noted.lock().published(generation, SystemTime::now());
        }
    });
    let (current, refused) = (snapshots.clone(), snapshots.clone());
    server
        .route("GET", "/debug/proxies", "how far each connected proxy is, and since when", move |_| {
            let generation = current.borrow().generation;
            // Nobody is connected before the port is open.
            let clients = xds.get().map(Xds::clients).unwrap_or_default();
            std::future::ready(json(&proxies(generation, &history.lock(), &clients)))
        })
        .route("GET", "/debug/policies", "what became of each policy", move |_| {
            let snapshot = Arc::clone(&refused.borrow());
            std::future::ready(json(&value!({ "policies": snapshot.translation.policy_status })))
        })
}

impl History {
    /// Notes a generation; one that is known keeps its time.
    fn published(&mut self, generation: u64, at: SystemTime) {
        if self.0.back().is_some_and(|(last, _)| *last >= generation) {
            return;
        }
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back((generation, at));
    }

    /// Since when whoever has `acked` lacks something; `None` if that is the newest.
    fn behind_since(&self, acked: u64) -> Option<SystemTime> {
        self.0.iter().find(|(generation, _)| *generation > acked).map(|(_, at)| *at)
    }
}

fn proxies(generation: u64, history: &History, clients: &[ClientStatus]) -> Value {
    let published = history.0.back().map(|(_, at)| text(*at));
    value!({
        "version": env!("CARGO_PKG_VERSION"),
        "generation": generation,
        "published": published,
        "proxies": clients.iter().map(|client| proxy(history, client)).collect::<Vec<_>>(),
    })
}

fn proxy(history: &History, client: &ClientStatus) -> Value {
    let types: Map<String, Value> = client
        .types
        .iter()
        .map(|(url, status)| {
            // Nothing answered yet: it lacks everything, since it is here.
            let behind = match status.acked_generation {
                Some(acked) => history.behind_since(acked).map(|since| since.max(client.connected)),
                None => Some(client.connected),
            };
            let shown = value!({
                "ackedGeneration": status.acked_generation,
                "behindSince": behind.map(text),
                "sent": status.sent,
                "nacked": status.nacked,
                "lastNack": status.last_nack,
            });
            // `type.googleapis.com/istio.workload.Address` is `Address`, as Istio's tools write it.
            (url.rsplit('.').next().unwrap_or(url).to_owned(), shown)
        })
        .collect();
    let (namespace, pod) = pod(&client.node_id);
    value!({
        "node": client.peer.name,
        "namespace": namespace,
        "pod": pod,
        "version": client.version,
        "generations": client.generations,
        "connected": text(client.connected),
        "types": types,
    })
}

/// The pod in a node id such as `ztunnel~10.0.0.1~NAME.NAMESPACE~DOMAIN` (Z94): its namespace and name, both empty if it names none. A
/// namespace holds no dot, a pod's name may.
fn pod(node_id: &str) -> (&str, &str) {
    let named = node_id.split('~').nth(2).and_then(|pod| pod.rsplit_once('.'));
    named.map_or(("", ""), |(name, namespace)| (namespace, name))
}

fn text(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use culvert_xds::server::Peer;
    use culvert_xds::stream::TypeStatus;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn behind_is_counted_from_the_first_generation_that_is_lacking() {
        let mut history = History::default();
        for (generation, seconds) in [(5, 100), (7, 200), (7, 250), (9, 300)] {
            history.published(generation, at(seconds));
        }
        assert_eq!(history.behind_since(9), None);
        assert_eq!(history.behind_since(8), Some(at(300)));
        assert_eq!(history.behind_since(5), Some(at(200)));
        assert_eq!(history.behind_since(1), Some(at(100)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut history = History::default();
        for generation in 0..5_000 {
            history.published(generation, at(generation));
        }
        assert_eq!(history.0.len(), REMEMBERED);
        assert_eq!(history.behind_since(0), Some(at(5_000 - REMEMBERED as u64)));
    }

    /// K15.
    #[test]
    fn a_proxy_that_is_behind_says_since_when() {
        let mut history = History::default();
        history.published(5, at(100));
        history.published(6, at(200));
        let status = |acked, nack: Option<&str>| TypeStatus {
            acked_generation: acked,
            sent: 2,
            nacked: u64::from(nack.is_some()),
            last_nack: nack.map(str::to_owned),
        };
        let client = ClientStatus {
            node_id: "ztunnel~10.0.0.1~zt.1.culvert-system~culvert-system.svc.cluster.local".to_owned(),
            peer: Peer { name: "node-a".to_owned() },
            version: "1.2.3".to_owned(),
            generations: true,
            connected: at(150),
            types: BTreeMap::from([
                ("type.googleapis.com/istio.workload.Address".to_owned(), status(Some(6), None)),
                ("type.googleapis.com/istio.security.Authorization".to_owned(), status(Some(5), Some("no"))),
                ("t.Other".to_owned(), status(None, None)),
            ]),
        };
        let page = proxies(6, &history, &[client]);
        assert_eq!(page["generation"], 6);
        let proxy = &page["proxies"][0];
        assert_eq!(
            (&proxy["node"], &proxy["namespace"], &proxy["pod"], &proxy["version"]),
            (&value!("node-a"), &value!("culvert-system"), &value!("zt.1"), &value!("1.2.3"))
        );
        assert!(proxy["types"]["Address"]["behindSince"].is_null());
        assert_eq!(proxy["types"]["Authorization"]["behindSince"], "1970-01-01T00:03:20Z");
        assert_eq!(proxy["types"]["Authorization"]["lastNack"], "no");
        assert_eq!(proxy["types"]["Other"]["behindSince"], "1970-01-01T00:02:30Z");
    }
}
