//! The certificate API (D07): who may have a certificate of whom.
//!
//! A proxy proves its node with a token, then names the workload it asks for. It gets a certificate only if a pod with that
//! identity runs on that node now (D49, D50; trap 15): a stolen node can be its own pods and nobody else.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_identity::ca_client::impersonated;
use culvert_identity::stub::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use culvert_model::Str;
use culvert_model::identity::Identity;
use culvert_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

use super::authority::{Authority, IssueError};
use super::request::MAX_REQUEST;
use crate::auth::{Caller, Grant, NodeName};

/// A request's PEM, its metadata and the framing around them.
const MAX_MESSAGE: usize = 2 * MAX_REQUEST;
/// Most nodes whose rate is remembered. Only authenticated nodes get here; a full bucket is dropped first.
const MAX_NODES: usize = 10_000;

/// Tells which node a caller proves to be.
#[tonic::async_trait]
pub trait NodeAuthenticator: Send + Sync + 'static {
    /// The node whose token the call carries, and what the token is good for there.
    ///
    /// # Errors
    /// A status whose text goes to the log; the caller learns only that it is not authenticated, or, if the code is
    /// `Unavailable`, that nobody could be asked.
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, Status>;
}

/// Tells who runs where.
pub trait NodeIdentities: Send + Sync + 'static {
    /// Whether a pod with this identity's namespace and service account runs on the node now, neither failed nor finished.
    fn runs_on(&self, node: &NodeName, identity: &Identity) -> bool;
}

/// Settings of the service.
#[derive(Debug, Clone, PartialEq)]
pub struct CaConfig {
    /// The only trust domain that is certified.
    pub trust_domain: Str,
    /// Lifetime for who asks for none. Default 24 h (D53).
    pub default_lifetime: Duration,
    /// Longest lifetime; a longer one that is asked for is cut. Default 90 days (D53).
    pub max_lifetime: Duration,
    /// Signatures at the same time. Default 4: one takes about 0.2 ms of CPU.
    pub concurrency: usize,
    /// Requests that may wait for one. Default 1024: at 0.2 ms each and 4 at a time, the last waits 50 ms.
    pub waiting: usize,
    /// Requests a node may make a second, on average. Default 50: 500 identities that live for 20 s.
    pub node_rate: f64,
    /// Requests a node may make at once. Default 500: a node full of pods that starts.
    pub node_burst: f64,
}

/// Counters of the service; clones share them.
#[derive(Debug, Clone, Default)]
pub struct CaMetrics {
    asked: Counter,
    issued: Counter,
    refused: Family<Refused, Counter>,
    /// Of the refused: who calls is not known.
    unauthenticated: Counter,
    /// Of the refused: what is to be signed cannot be read.
    unreadable: Counter,
}

/// The service. Make it with [`service`].
pub struct CaService {
    authority: Arc<Authority>,
    authenticator: Arc<dyn NodeAuthenticator>,
    identities: Arc<dyn NodeIdentities>,
    config: CaConfig,
    metrics: CaMetrics,
    admission: Semaphore,
    signing: Semaphore,
    buckets: Mutex<HashMap<NodeName, Bucket>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    reason: &'static str,
}

/// What is left of a node's burst.
struct Bucket {
    tokens: f64,
    at: Instant,
}

/// Why a caller got nothing. The text is for the log; [`Refusal::status`] is all that the caller sees (D51).
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("too many requests wait")]
    Busy,
    #[error("the node asks too often")]
    Rate,
    #[error("the caller is not authenticated: {0}")]
    Caller(String),
    #[error("the caller cannot be checked now: {0}")]
    Unchecked(String),
    #[error("the caller is {0}, which is no trusted proxy and may have its own identity only")]
    NotTrusted(String),
    #[error("the request names no identity to impersonate")]
    NoIdentity,
    #[error("the identity cannot be read: {0}")]
    Malformed(String),
    #[error("the identity is not of trust domain {0}")]
    TrustDomain(Str),
    #[error("no pod with that service account runs on the node")]
    NotOnNode,
    #[error(transparent)]
    Request(IssueError),
    #[error(transparent)]
    Internal(IssueError),
}

impl Default for CaConfig {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            default_lifetime: Duration::from_secs(24 * 60 * 60),
            max_lifetime: Duration::from_secs(90 * 24 * 60 * 60),
            concurrency: 4,
            waiting: 1024,
            node_rate: 50.0,
            node_burst: 500.0,
        }
    }
}

impl CaMetrics {
    /// Registers the counters.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "culvert_ca_certificates_issued",
            "Workload certificates signed",
            self.issued.clone(),
        );
        registry.register(
            "culvert_ca_requests_refused",
            "Certificate requests refused, by reason",
            self.refused.clone(),
        );
        // As dashboards of ambient know them (D78).
        let known = registry.sub_registry_with_prefix("citadel_server");
        known.register("csr_count", "Certificate requests received", self.asked.clone());
        known.register("success_cert_issuance_count", "Workload certificates signed", self.issued.clone());
        let help = "Certificate requests of callers who are not known";
        known.register("authentication_failure_count", help, self.unauthenticated.clone());
        known.register(
            "csr_parsing_err_count",
            "Certificate requests that cannot be read",
            self.unreadable.clone(),
        );
    }

    /// How many certificates were signed.
    #[must_use]
    pub fn issued(&self) -> u64 {
        self.issued.get()
    }

    /// How many requests were refused for this reason.
    #[must_use]
    pub fn refused(&self, reason: &'static str) -> u64 {
        self.refused.get_or_create(&Refused { reason }).get()
    }
}

/// The certificate API over an authority, ready for a tonic router.
pub fn service(
    authority: Arc<Authority>,
    authenticator: Arc<dyn NodeAuthenticator>,
    identities: Arc<dyn NodeIdentities>,
    config: CaConfig,
    metrics: CaMetrics,
) -> IstioCertificateServiceServer<CaService> {
    let service = CaService::new(authority, authenticator, identities, config, metrics);
    IstioCertificateServiceServer::new(service).max_decoding_message_size(MAX_MESSAGE)
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        self.metrics.asked.inc();
        let (mut node, asked) = (None, impersonated(message.metadata.as_ref()).map(clip));
        let outcome = self.decide(&metadata, &message, &mut node).await;
        outcome.map(Response::new).map_err(|refusal| {
            let node = node.as_ref().map_or("unknown", NodeName::as_str);
            let asked = asked.as_deref().unwrap_or("nobody");
            let reason = refusal.reason();
            self.metrics.refused.get_or_create(&Refused { reason }).inc();
            match refusal {
                Refusal::Caller(_) => _ = self.metrics.unauthenticated.inc(),
                Refusal::Request(_) => _ = self.metrics.unreadable.inc(),
                _ => {}
            }
            tracing::warn!(node, asked, reason, "refused a certificate: {refusal}");
            refusal.status()
        })
    }
}

impl CaService {
    pub(super) fn new(
        authority: Arc<Authority>,
        authenticator: Arc<dyn NodeAuthenticator>,
        identities: Arc<dyn NodeIdentities>,
        config: CaConfig,
        metrics: CaMetrics,
    ) -> Self {
        Self {
            authority,
            authenticator,
            identities,
            metrics,
            admission: Semaphore::new(config.waiting.max(1)),
            signing: Semaphore::new(config.concurrency.max(1)),
            buckets: Mutex::default(),
            config,
        }
    }

    /// `node` is filled in as soon as it is known.
    async fn decide(
        &self,
        metadata: &MetadataMap,
        message: &IstioCertificateRequest,
        node: &mut Option<NodeName>,
    ) -> Result<IstioCertificateResponse, Refusal> {
        let _admitted = self.admission.try_acquire().map_err(|_| Refusal::Busy)?;
        let caller =
            self.authenticator.authenticate(metadata).await.map_err(|status| match status.code() {
                Code::Unavailable => Refusal::Unchecked(status.message().to_owned()),
                _ => Refusal::Caller(status.message().to_owned()),
            })?;
        let Caller { node: named, grant } = caller;
        let caller = node.insert(named);
        self.take_token(caller)?;
        let identity = self.allowed(caller, &grant, message)?;
        let lifetime = self.lifetime(message.validity_duration);
        let _signing = self.signing.acquire().await.map_err(|_| Refusal::Busy)?;
        let issued =
            self.authority.issue(&message.csr, &identity, lifetime).map_err(|error| match error {
                IssueError::Request(_) => Refusal::Request(error),
                _ => Refusal::Internal(error),
            })?;
        self.metrics.issued.inc();
        tracing::info!(node = %caller, %identity, serial = issued.serial, ?lifetime, "signed a certificate");
        Ok(IstioCertificateResponse { cert_chain: issued.chain })
    }

    /// Whom the certificate is for, if this node may have it.
    fn allowed(
        &self,
        node: &NodeName,
        grant: &Grant,
        message: &IstioCertificateRequest,
    ) -> Result<Identity, Refusal> {
        let malformed =
            |error: culvert_model::identity::ParseIdentityError| Refusal::Malformed(error.to_string());
        let own = match grant {
            Grant::Node => None,
            Grant::Own { namespace, account, .. } => Some(
                Identity::new(self.config.trust_domain.clone(), namespace.as_str(), account.as_str())
                    .map_err(malformed)?,
            ),
        };
        let identity: Identity = match (impersonated(message.metadata.as_ref()), &own) {
            (Some(asked), _) => asked.parse().map_err(malformed)?,
            (None, Some(own)) => own.clone(),
            (None, None) => return Err(Refusal::NoIdentity),
        };
        if let Some(own) = own
            && identity != own
        {
            return Err(Refusal::NotTrusted(own.to_string()));
        }
        if *identity.trust_domain() != self.config.trust_domain {
            return Err(Refusal::TrustDomain(self.config.trust_domain.clone()));
        }
        if !self.identities.runs_on(node, &identity) {
            return Err(Refusal::NotOnNode);
        }
        Ok(identity)
    }

    fn lifetime(&self, asked_seconds: i64) -> Duration {
        let asked = match u64::try_from(asked_seconds) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds),
            _ => self.config.default_lifetime,
        };
        asked.min(self.config.max_lifetime)
    }

    fn take_token(&self, node: &NodeName) -> Result<(), Refusal> {
        let now = self.authority.clock().instant();
        let (rate, burst) = (self.config.node_rate, self.config.node_burst.max(1.0));
        let level = |bucket: &Bucket| {
            (bucket.tokens + rate * now.saturating_duration_since(bucket.at).as_secs_f64()).min(burst)
        };
        let mut buckets = self.buckets.lock();
        if buckets.len() >= MAX_NODES && !buckets.contains_key(node) {
            buckets.retain(|_, bucket| level(bucket) < burst);
            if buckets.len() >= MAX_NODES {
                return Err(Refusal::Busy);
            }
        }
        let bucket = buckets.entry(node.clone()).or_insert(Bucket { tokens: burst, at: now });
        *bucket = Bucket { tokens: level(bucket), at: now };
        if bucket.tokens < 1.0 {
            return Err(Refusal::Rate);
        }
        bucket.tokens -= 1.0;
        Ok(())
    }
}

impl Refusal {
    /// The metric's label.
    fn reason(&self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Rate => "rate",
            Self::Caller(_) => "caller",
            Self::Unchecked(_) => "unchecked",
            Self::NotTrusted(_) => "not_trusted",
            Self::NoIdentity => "no_identity",
            Self::Malformed(_) => "malformed_identity",
            Self::TrustDomain(_) => "trust_domain",
            Self::NotOnNode => "not_on_node",
            Self::Request(_) => "request",
            Self::Internal(_) => "internal",
        }
    }

    /// What the caller sees: nothing that would tell it which identities exist, or where.
    fn status(&self) -> Status {
        match self {
            Self::Busy | Self::Rate => Status::resource_exhausted("too many certificate requests"),
            Self::Caller(_) => Status::unauthenticated("request authenticate failure"),
            Self::Unchecked(_) => Status::unavailable("callers cannot be checked now"),
            Self::NotTrusted(_)
            | Self::NoIdentity
            | Self::Malformed(_)
            | Self::TrustDomain(_)
            | Self::NotOnNode => Status::unauthenticated("request impersonation authentication failure"),
            Self::Request(_) => Status::invalid_argument("certificate request refused"),
            Self::Internal(_) => Status::internal("certificate signing failed"),
        }
    }
}

/// What a caller sent may be long: a log shows its beginning.
fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}
