//! A client of the controller that keeps a record: what came, what went, and when it connected again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use culvert_e2e::apiserver::CONTROLLER_NAME;
use culvert_identity::control::{ControlEndpoint, control_channel};
use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_runtime::drain::{self, DrainTrigger};
use culvert_runtime::tasks::Tasks;
use culvert_xds::Generation;
use culvert_xds::client::{
    AdsClient, BACKOFF, ClientConfig, Event, MAX_MESSAGE_BYTES, Unobserved, bearer_token_file,
};
use culvert_xds::state::Subscription;
use parking_lot::Mutex;
use prost_types::Value;
use prost_types::value::Kind;
use tokio::sync::mpsc;

/// What is known, and what has happened since it was last looked.
#[derive(Debug, Default)]
pub struct Record {
    /// Versions by name.
    pub known: BTreeMap<String, String>,
    /// Names that came, or came in another version, each with the generation that brought it.
    pub came: Vec<(String, u64)>,
    /// Names that went, likewise.
    pub went: Vec<(String, u64)>,
    /// Connections so far.
    pub connections: usize,
}

pub struct Recorder {
    record: Arc<Mutex<Record>>,
    _drain: DrainTrigger,
}

impl Record {
    /// Whether it came.
    pub fn has(&self, name: &str) -> bool {
        self.came.iter().any(|(it, _)| it == name)
    }

    /// The generation in which it first came or went.
    pub fn first(&self, name: &str) -> Option<u64> {
        self.came.iter().chain(&self.went).filter(|(it, _)| it == name).map(|(_, number)| *number).min()
    }
}

impl Recorder {
    /// Says it is the proxy of `node`, whose token it must be.
    pub fn start(tasks: &Tasks, port: u16, node: &str, token: &Path, roots: &Path) -> Result<Self> {
        let endpoint = ControlEndpoint::new(format!("https://127.0.0.1:{port}"), CONTROLLER_NAME, roots);
        let channel = control_channel(endpoint)?;
        let mut id = culvert_xds::node_with_generations("recorder");
        let name = Value { kind: Some(Kind::StringValue(node.to_owned())) };
        id.metadata.get_or_insert_default().fields.insert("NODE_NAME".to_owned(), name);
        let types = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL];
        let client = AdsClient::new(ClientConfig {
            connect: Arc::new(move || {
                let channel = channel.clone();
                Box::pin(async move { Ok(channel) })
            }),
            credentials: bearer_token_file(token.to_owned()),
            node: id,
            subscriptions: types.map(|it| Subscription { type_url: it.into(), names: Vec::new() }).into(),
            backoff: BACKOFF,
            random: fastrand::Rng::new(),
            max_message_bytes: MAX_MESSAGE_BYTES,
            observer: Arc::new(Unobserved),
        });
        // One delivery of each type.
        let (sink, mut events) = mpsc::channel(2);
        let (trigger, watcher) = drain::channel();
        tasks.spawn("recorder's client", client.run(sink, watcher));
        let record = Arc::new(Mutex::new(Record::default()));
        let write = record.clone();
        tasks.spawn("recorder", async move {
            while let Some(event) = events.recv().await {
                match event {
                    Event::Connected => write.lock().connections += 1,
                    Event::Disconnected { .. } => {}
                    Event::Delivery(delivery, responder) => {
                        let Generation::Ours { number, .. } = delivery.generation else { return };
                        let mut record = write.lock();
                        for resource in delivery.added {
                            record.known.insert(resource.name.to_string(), resource.version);
                            record.came.push((resource.name.to_string(), number));
                        }
                        for name in delivery.removed {
                            record.known.remove(&name);
                            record.went.push((name, number));
                        }
                        responder.ack();
                    }
                }
            }
        });
        Ok(Self { record, _drain: trigger })
    }

    /// Looks at the record.
    pub fn look<T>(&self, at: impl FnOnce(&Record) -> T) -> T {
        at(&self.record.lock())
    }

    /// The names that came and went since this was last asked.
    pub fn since(&self) -> (Vec<String>, Vec<String>) {
        let mut record = self.record.lock();
        let names = |these: Vec<(String, u64)>| these.into_iter().map(|(name, _)| name).collect();
        (names(std::mem::take(&mut record.came)), names(std::mem::take(&mut record.went)))
    }
}
