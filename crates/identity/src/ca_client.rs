//! The client of a certificate authority that speaks the certificate API (D07).

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use culvert_model::identity::Identity;
use culvert_proto::ca::IstioCertificateRequest;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::metadata::{Ascii, MetadataKey, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::certificate::MAX_CHAIN;
use crate::control::{ConnectError, connect_error};
use crate::stub::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::token::{TokenError, TokenFile};

/// Key of the metadata field that names whom the certificate is for (Z87).
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// Header that names the cluster whose identities are asked for.
pub const CLUSTER_ID_HEADER: &str = "clusterid";

/// What an authority returns: PEM texts, the leaf first, the roots last. Nothing in it has been checked.
pub type SignedChain = Vec<String>;

/// A signature on its way.
pub type Signing<'a> = Pin<Box<dyn Future<Output = Result<SignedChain, CaError>> + Send + 'a>>;

/// Something that signs certificate requests.
pub trait CaClient: Send + Sync + 'static {
    /// Asks for a certificate of `identity` over the key in `csr` (PEM), valid for `lifetime`; the authority may shorten it.
    fn sign<'a>(&'a self, csr: &'a str, identity: &'a Identity, lifetime: Duration) -> Signing<'a>;
}

/// An authority behind a gRPC channel, such as [`crate::control::control_channel`] gives.
#[derive(Debug)]
pub struct GrpcCaClient {
    client: IstioCertificateServiceClient<Channel>,
    token: TokenFile,
    cluster_id: MetadataValue<Ascii>,
    headers: Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>,
}

/// Why there is no certificate. Texts are for logs and hold no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaError {
    /// No TCP connection to the authority.
    #[error("{0}")]
    Unreachable(String),
    /// No TLS connection: the authority's certificate, our roots, or the file that holds them.
    #[error("{0}")]
    Tls(String),
    /// No token to show.
    #[error("{0}")]
    Token(String),
    /// The authority does not believe our token, or that the identity has a pod on our node; it does not say which (D51).
    #[error("the authority refused: unauthenticated: {0}")]
    Unauthenticated(String),
    /// The authority knows us and says no.
    #[error("the authority refused: permission denied: {0}")]
    PermissionDenied(String),
    /// No answer in time.
    #[error("the authority did not answer within {0:?}")]
    TimedOut(Duration),
    /// Any other status.
    #[error("the authority answered {code:?}: {message}")]
    Status {
        /// gRPC status code.
        code: Code,
        /// Its text, shortened.
        message: String,
    },
}

impl GrpcCaClient {
    /// A client on `channel` that shows `token` and names the cluster. Bytes of `cluster_id` that cannot stand in a header
    /// make it empty, which means the authority's own cluster.
    pub fn new(channel: Channel, token: TokenFile, cluster_id: &str) -> Self {
        let client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_CHAIN);
        let cluster_id =
            MetadataValue::try_from(cluster_id).unwrap_or_else(|_| MetadataValue::from_static(""));
        Self { client, token, cluster_id, headers: Vec::new() }
    }

    /// Sends these with each request too; one with the name of a header of ours replaces it (Z118).
    #[must_use]
    pub fn with_headers(
        mut self,
        headers: impl IntoIterator<Item = (MetadataKey<Ascii>, MetadataValue<Ascii>)>,
    ) -> Self {
        self.headers.extend(headers);
        self
    }

    async fn create(
        &self,
        csr: &str,
        identity: &Identity,
        lifetime: Duration,
    ) -> Result<SignedChain, CaError> {
        let mut request = Request::new(IstioCertificateRequest {
            csr: csr.to_owned(),
            validity_duration: i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonating(identity)),
        });
        request.metadata_mut().insert("authorization", self.token.authorization()?);
        request.metadata_mut().insert(CLUSTER_ID_HEADER, self.cluster_id.clone());
        for (name, value) in &self.headers {
            request.metadata_mut().insert(name.clone(), value.clone());
        }
        let answer = self.client.clone().create_certificate(request).await?;
        Ok(answer.into_inner().cert_chain)
    }
}

impl CaClient for GrpcCaClient {
    fn sign<'a>(&'a self, csr: &'a str, identity: &'a Identity, lifetime: Duration) -> Signing<'a> {
        Box::pin(self.create(csr, identity, lifetime))
    }
}

impl From<TokenError> for CaError {
    fn from(error: TokenError) -> Self {
        Self::Token(error.to_string())
    }
}

impl From<Status> for CaError {
    fn from(status: Status) -> Self {
        if let Some(cause) = connect_error(&status) {
            return match cause {
                ConnectError::Unreachable { .. } | ConnectError::TimedOut { .. } => {
                    Self::Unreachable(cause.to_string())
                }
                ConnectError::Tls { .. } | ConnectError::ReadRoots { .. } | ConnectError::Roots { .. } => {
                    Self::Tls(cause.to_string())
                }
            };
        }
        // The message is the authority's: it is bounded before it reaches a log.
        let message: String = status.message().chars().take(256).collect();
        match status.code() {
            Code::Unauthenticated => Self::Unauthenticated(message),
            Code::PermissionDenied => Self::PermissionDenied(message),
            code => Self::Status { code, message },
        }
    }
}

/// The metadata that names whom a certificate is for.
#[must_use]
pub fn impersonating(identity: &Identity) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(identity.to_string())) };
    Struct { fields: BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), value)]) }
}

/// The name in a request's metadata, if it has one that is text.
#[must_use]
pub fn impersonated(metadata: Option<&Struct>) -> Option<&str> {
    match metadata?.fields.get(IMPERSONATED_IDENTITY)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
#[path = "ca_client_tests.rs"]
mod tests;
