//! The mesh's root in Secrets (D52).
//!
//! `cacerts` is what a person plugs in and wins; `culvert-ca-secret` is what the first replica makes if there is neither. Both
//! are read again when they change. Roots that are no longer in either stay trusted, in `culvert-retired-roots`, until a
//! person deletes that Secret: workloads hold certificates under them for a while yet.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use culvert_identity::bundle::{BundleError, TrustBundle};
use culvert_runtime::clock::SharedClock;
use culvert_runtime::drain::DrainWatcher;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;

use crate::ca::{Authority, IssueError, Material};

/// Plugged in by a person.
pub const PLUGGED: &str = "cacerts";
/// Made by us.
pub const OWN: &str = "culvert-ca-secret";
/// Roots that were in force, and are trusted still.
pub const RETIRED: &str = "culvert-retired-roots";
/// All of them.
pub const NAMES: [&str; 3] = [PLUGGED, OWN, RETIRED];

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const ROOTS: &str = "root-cert.pem";
const CHAIN: &str = "cert-chain.pem";
/// One look at all of them.
const PATIENCE: Duration = Duration::from_secs(10);
/// They are looked at this often even if no watch says anything.
const LOOK: Duration = Duration::from_secs(60);
/// After a look that failed.
const RETRY: Duration = Duration::from_secs(5);
/// Attempts at the start: each sees what another replica wrote in the one before.
const ATTEMPTS: usize = 5;

/// What a Secret holds.
pub type Data = BTreeMap<String, Vec<u8>>;

/// The Secrets of a namespace, as far as they are needed here.
#[tonic::async_trait]
pub trait Secrets: Send + Sync + 'static {
    /// # Errors
    /// In words, if there is no answer.
    async fn get(&self, name: &str) -> Result<Option<Data>, String>;

    /// Makes it. False if it is there already; then nothing was changed.
    ///
    /// # Errors
    /// In words, if there is no answer.
    async fn create(&self, name: &str, data: &Data) -> Result<bool, String>;

    /// Makes it, or sets these keys of it.
    ///
    /// # Errors
    /// In words, if there is no answer.
    async fn set(&self, name: &str, data: &Data) -> Result<(), String>;
}

/// Why there is no root to sign with. No Secret was changed.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The API server did not answer.
    #[error("Secret {name}: {reason}")]
    Api {
        /// Which.
        name: &'static str,
        /// Why.
        reason: String,
    },
    /// It lacks something, or holds what is no text.
    #[error("Secret {name}: {key} is missing or no text")]
    Key {
        /// Which.
        name: &'static str,
        /// Of its data.
        key: &'static str,
    },
    /// It cannot be used. It is never replaced: that would cut every workload off.
    #[error("Secret {name}: {reason}")]
    Unusable {
        /// Which.
        name: &'static str,
        /// Why.
        reason: String,
    },
    /// Its roots cannot be read.
    #[error("Secret {name}: {reason}")]
    Roots {
        /// Which.
        name: &'static str,
        /// Why.
        reason: BundleError,
    },
    /// A new root could not be made.
    #[error("cannot make a root: {0}")]
    Make(#[from] IssueError),
    /// It comes and goes.
    #[error("Secret {OWN} was neither there nor could it be made")]
    Unsettled,
}

/// Keeps an authority as the Secrets say.
pub struct Roots<S> {
    secrets: S,
    authority: Arc<Authority>,
    source: &'static str,
    /// Roots of [`PLUGGED`] and [`OWN`] when last seen.
    active: Vec<String>,
    /// Roots that were active, are no longer, and are not in [`RETIRED`] yet.
    unsaved: Vec<String>,
    failing: bool,
    /// 1 while a Secret cannot be used and what was good before stays in force.
    problem: Gauge,
}

/// What the Secrets say.
struct Seen {
    source: &'static str,
    material: Material,
    active: Vec<String>,
    retired: Vec<String>,
}

/// The Secrets of one namespace.
pub struct KubeSecrets(Api<Secret>);

impl<S: Secrets> Roots<S> {
    /// Reads the Secrets, and makes [`OWN`] if there is nothing to sign with. Several replicas may do so at once: one of them
    /// makes it, the others take what it made.
    ///
    /// # Errors
    /// [`RootError`] names the Secret; one that is there and no good is never replaced.
    pub async fn open(secrets: S, clock: SharedClock) -> Result<Self, RootError> {
        for _ in 0..ATTEMPTS {
            if let Some(seen) = look(&secrets).await? {
                let unusable = |reason| RootError::Unusable { name: seen.source, reason };
                let material = with_roots(&seen.material, seen.active.iter().chain(&seen.retired));
                let authority = Arc::new(Authority::new(material, clock).map_err(unusable)?);
                let problem = Gauge::default();
                let (source, active) = (seen.source, seen.active);
                return Ok(Self {
                    secrets,
                    authority,
                    source,
                    active,
                    unsaved: Vec::new(),
                    failing: false,
                    problem,
                });
            }
            let made = Material::make(clock.now())?;
            if create(&secrets, &made).await? {
                tracing::info!(secret = OWN, "made a new root certificate");
            }
        }
        Err(RootError::Unsettled)
    }

    /// What signs.
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.clone()
    }

    /// For the metrics page.
    pub fn problem(&self) -> Gauge {
        self.problem.clone()
    }

    /// Takes over what the Secrets say now. The leader keeps what is no longer in them.
    ///
    /// # Errors
    /// [`RootError`]; what was good before stays in force.
    pub async fn refresh(&mut self, leads: bool) -> Result<(), RootError> {
        let Some(seen) = look(&self.secrets).await? else {
            // Deleted. What every workload trusts is put back, if it was ours to make.
            if self.source == OWN && create(&self.secrets, &self.authority.material()).await? {
                tracing::warn!(secret = OWN, "was deleted: put back as it was");
            }
            return Err(RootError::Key { name: self.source, key: CERTIFICATE });
        };
        let known = |root: &String| seen.active.contains(root) || seen.retired.contains(root);
        let mut unsaved = std::mem::take(&mut self.unsaved);
        unsaved.extend(self.active.iter().cloned());
        unsaved.retain(|root| !known(root));
        unsaved.sort();
        unsaved.dedup();
        self.unsaved = unsaved;
        let all = seen.active.iter().chain(&seen.retired).chain(&self.unsaved);
        let material = with_roots(&seen.material, all);
        let before = self.authority.material();
        let name = seen.source;
        let changed =
            self.authority.replace(material).map_err(|reason| RootError::Unusable { name, reason })?;
        if changed {
            let signs = self.authority.material().certificate != before.certificate;
            tracing::info!(
                secret = name,
                new_signer = signs,
                roots = seen.active.len() + seen.retired.len() + self.unsaved.len(),
                retired = seen.retired.len() + self.unsaved.len(),
                "the root certificates changed"
            );
        }
        (self.source, self.active) = (seen.source, seen.active);
        if leads && !self.unsaved.is_empty() {
            let all: String = seen.retired.iter().chain(&self.unsaved).cloned().collect();
            let data = Data::from([(ROOTS.to_owned(), all.into_bytes())]);
            let failed = |reason| RootError::Api { name: RETIRED, reason };
            self.secrets.set(RETIRED, &data).await.map_err(failed)?;
            tracing::info!(
                secret = RETIRED,
                "keeps the roots that were in force; delete it when no certificate is under them"
            );
            self.unsaved.clear();
        }
        Ok(())
    }

    /// Follows the Secrets until `drain` starts. `changed` says that one of them may have changed.
    pub async fn run(
        mut self,
        mut changed: watch::Receiver<u64>,
        mut leading: watch::Receiver<bool>,
        drain: DrainWatcher,
    ) {
        loop {
            let leads = *leading.borrow_and_update();
            let outcome = timeout(PATIENCE, self.refresh(leads)).await;
            let outcome = outcome
                .unwrap_or(Err(RootError::Api { name: self.source, reason: "no answer in time".into() }));
            self.problem.set(i64::from(outcome.is_err()));
            match &outcome {
                Err(error) if !self.failing => {
                    tracing::error!(%error, "the root stays as it was");
                }
                Ok(()) if self.failing => tracing::info!("the root's Secrets are good again"),
                _ => {}
            }
            self.failing = outcome.is_err();
            let pause = if self.failing { RETRY } else { LOOK };
            tokio::select! {
                _ = drain.started() => return,
                Ok(()) = changed.changed() => {}
                Ok(()) = leading.changed() => {}
                () = sleep(pause) => {}
            }
        }
    }
}

async fn create(secrets: &impl Secrets, material: &Material) -> Result<bool, RootError> {
    let data = Data::from([
        (CERTIFICATE.to_owned(), material.certificate.clone().into_bytes()),
        (KEY.to_owned(), material.key.clone().into_bytes()),
    ]);
    secrets.create(OWN, &data).await.map_err(|reason| RootError::Api { name: OWN, reason })
}

/// None if there is nothing to sign with.
async fn look(secrets: &impl Secrets) -> Result<Option<Seen>, RootError> {
    let mut found = Vec::with_capacity(NAMES.len());
    for name in NAMES {
        found.push(secrets.get(name).await.map_err(|reason| RootError::Api { name, reason })?);
    }
    let [plugged, own, retired] = &found[..] else { return Ok(None) };
    let retired = match retired {
        Some(data) => roots(RETIRED, &text(RETIRED, data, ROOTS)?)?,
        None => Vec::new(),
    };
    let own_root = match own {
        Some(data) => roots(OWN, &text(OWN, data, CERTIFICATE)?)?,
        None => Vec::new(),
    };
    let (source, data) = match (plugged, own) {
        (Some(data), _) => (PLUGGED, data),
        (None, Some(data)) => (OWN, data),
        (None, None) => return Ok(None),
    };
    let certificate = text(source, data, CERTIFICATE)?;
    let (mut active, intermediates) = if source == PLUGGED {
        let chain = data.contains_key(CHAIN).then(|| text(source, data, CHAIN)).transpose()?;
        (roots(source, &text(source, data, ROOTS)?)?, chain.unwrap_or_default())
    } else {
        (Vec::new(), String::new())
    };
    active.extend(own_root.into_iter().filter(|root| !active.contains(root)).collect::<Vec<_>>());
    let material =
        Material { key: text(source, data, KEY)?, certificate, intermediates, roots: String::new() };
    Ok(Some(Seen { source, material, active, retired }))
}

fn with_roots<'a>(material: &Material, roots: impl Iterator<Item = &'a String>) -> Material {
    Material { roots: roots.cloned().collect(), ..material.clone() }
}

fn text(name: &'static str, data: &Data, key: &'static str) -> Result<String, RootError> {
    let bytes = data.get(key).ok_or(RootError::Key { name, key })?;
    String::from_utf8(bytes.clone()).map_err(|_| RootError::Key { name, key })
}

/// Each root by itself, in one form of PEM.
fn roots(name: &'static str, pem: &str) -> Result<Vec<String>, RootError> {
    let bundle = TrustBundle::from_pem(pem.as_bytes()).map_err(|reason| RootError::Roots { name, reason })?;
    Ok(bundle.roots().iter().map(crate::ca::authority::to_pem).collect())
}

impl KubeSecrets {
    /// Of this namespace.
    pub fn new(client: kube::Client, namespace: &str) -> Self {
        Self(Api::namespaced(client, namespace))
    }

    /// Counts changes of the Secrets that matter here, until `drain` starts. Each is watched by its name, so that no right to
    /// read others is needed.
    pub async fn follow(self, changed: watch::Sender<u64>, drain: DrainWatcher) {
        let streams = NAMES.map(|name| {
            let one = watcher::Config::default().fields(&format!("metadata.name={name}"));
            Box::pin(watcher(self.0.clone(), one).default_backoff())
        });
        let [plugged, own, retired] = streams;
        let mut events = plugged.merge(own).merge(retired);
        loop {
            let event = tokio::select! {
                _ = drain.started() => return,
                event = events.next() => event,
            };
            match event {
                Some(Ok(_)) => changed.send_modify(|count| *count += 1),
                Some(Err(error)) => tracing::warn!(%error, "the root's Secrets cannot be watched"),
                None => return,
            }
        }
    }
}

#[tonic::async_trait]
impl Secrets for KubeSecrets {
    async fn get(&self, name: &str) -> Result<Option<Data>, String> {
        let secret = self.0.get_opt(name).await.map_err(|error| error.to_string())?;
        let data = secret.map(|secret| secret.data.unwrap_or_default());
        Ok(data.map(|data| data.into_iter().map(|(key, value)| (key, value.0)).collect()))
    }

    async fn create(&self, name: &str, data: &Data) -> Result<bool, String> {
        let params = PostParams { field_manager: Some("culvert".into()), ..PostParams::default() };
        match self.0.create(&params, &secret(name, data)).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn set(&self, name: &str, data: &Data) -> Result<(), String> {
        let mut wanted = serde_json::to_value(secret(name, data)).map_err(|error| error.to_string())?;
        wanted["apiVersion"] = "v1".into();
        wanted["kind"] = "Secret".into();
        let params = PatchParams::apply("culvert").force();
        self.0.patch(name, &params, &Patch::Apply(&wanted)).await.map(drop).map_err(|error| error.to_string())
    }
}

fn secret(name: &str, data: &Data) -> Secret {
    let labels = BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "culvert".to_owned())]);
    Secret {
        metadata: ObjectMeta { name: Some(name.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        data: Some(data.iter().map(|(key, value)| (key.clone(), ByteString(value.clone()))).collect()),
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    }
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
