//! Bearer tokens, as the xDS server and the certificate authority ask for them.

use std::sync::Arc;

use culvert_proto::discovery::Node;
use culvert_xds::server::{Admission, Peer};
use prost_types::value::Kind;
use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::instances::World;
use super::views::gateway_of;
use crate::auth::{Caller, NodeTokens};
use crate::ca::NodeAuthenticator;
use crate::index::Snapshot;

/// Key in the metadata of an xDS node: the node it says it is on.
const NODE_NAME: &str = "NODE_NAME";

/// The node whose token a call carries, where there is no Kubernetes to ask.
#[derive(Clone, Debug)]
pub struct Tokens(pub NodeTokens);

/// Who may have an xDS stream: the proxy of a node that the authenticator vouches for, and the waypoint of a Gateway.
#[derive(Clone)]
pub struct Streams {
    /// Knows tokens.
    pub authenticator: Arc<dyn NodeAuthenticator>,
    /// What is.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Istio's class of waypoints is ours too.
    pub compat: bool,
}

/// The token of a call's `authorization: Bearer` header.
#[allow(clippy::result_large_err, reason = "tonic's own error type, on a cold path")]
pub(crate) fn bearer(metadata: &MetadataMap) -> Result<&str, Status> {
    let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
    let Some((scheme, token)) = header.and_then(|header| header.split_once(' ')) else {
        return Err(Status::unauthenticated("no bearer token"));
    };
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Status::unauthenticated("no bearer token"));
    }
    Ok(token.trim())
}

#[tonic::async_trait]
impl NodeAuthenticator for Tokens {
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let node = self.0.authenticate(bearer(metadata)?);
        node.map(Caller::node).ok_or_else(|| Status::unauthenticated("the token is no node's"))
    }
}

#[tonic::async_trait]
impl Admission for Streams {
    /// The node a proxy says it is on must be the one whose token it has: a token of one node is no window to another. A pod that is
    /// no trusted proxy gets a stream only as the waypoint of a Gateway, and so does a proxy that says it is one: then an instance of
    /// that Gateway has to be on the node. What a refused caller learns is as little as the certificate API tells (D51); the log has
    /// the rest.
    async fn admit(&self, metadata: &MetadataMap, node: Option<&Node>) -> Result<Peer, Status> {
        let caller = self.authenticator.authenticate(metadata).await.map_err(|status| {
            tracing::warn!("refused an xDS stream: {}", status.message());
            match status.code() {
                tonic::Code::Unavailable => Status::unavailable("callers cannot be checked now"),
                _ => Status::unauthenticated("request authenticate failure"),
            }
        })?;
        let said = node.map(|node| gateway_of(node).map(str::to_owned));
        let world = Arc::clone(&self.snapshots.borrow().world);
        let world = World { objects: &world, compat: self.compat };
        if let Err(why) = world.admits(&caller, said.as_ref().map(Option::as_deref)) {
            tracing::warn!(node = %caller.node, grant = ?caller.grant, ?said, "refused an xDS stream: {why}");
            return Err(Status::permission_denied("the token is no proxy's"));
        }
        let proven = caller.node;
        if let Some(node) = node {
            let fields = node.metadata.as_ref().map(|metadata| &metadata.fields);
            let said = fields.and_then(|fields| fields.get(NODE_NAME)).and_then(|value| value.kind.as_ref());
            match said {
                Some(Kind::StringValue(said)) if said == proven.as_str() => {}
                Some(Kind::StringValue(said)) => {
                    tracing::warn!(node = %proven, said, "a proxy says it is on another node than its token is of");
                    return Err(Status::permission_denied("the token is another node's"));
                }
                _ => return Err(Status::permission_denied("the node's metadata has no NODE_NAME")),
            }
        }
        Ok(Peer { name: proven.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use prost_types::{Struct, Value};
    use sha2::{Digest, Sha256};
    use tonic::Code;

    use super::*;

    fn tokens(dir: &tempfile::TempDir) -> Tokens {
        let hash: String = Sha256::digest(b"secret").iter().map(|byte| format!("{byte:02x}")).collect();
        let path = dir.path().join("tokens.json");
        std::fs::write(&path, format!(r#"{{"node-a":"{hash}"}}"#)).unwrap();
        Tokens(NodeTokens::load(&path).unwrap())
    }

    fn says(name: &str) -> Node {
        let value = Value { kind: Some(Kind::StringValue(name.to_owned())) };
        Node { metadata: Some(Struct { fields: [(NODE_NAME.to_owned(), value)].into() }), ..Node::default() }
    }

    /// D15.
    #[tokio::test]
    async fn a_token_and_a_claim_must_agree() {
        let dir = tempfile::tempdir().unwrap();
        let (_sender, snapshots) = watch::channel(Arc::default());
        let streams = Streams { authenticator: Arc::new(tokens(&dir)), snapshots, compat: false };
        let mut metadata = MetadataMap::new();
        let ask = async |metadata: &MetadataMap, node: Option<&Node>| {
            Admission::admit(&streams, metadata, node)
                .await
                .map(|peer| peer.name)
                .map_err(|status| status.code())
        };
        assert_eq!(ask(&metadata, None).await, Err(Code::Unauthenticated));
        for wrong in ["Bearer other", "Basic secret", "secret", "Bearer "] {
            metadata.insert("authorization", wrong.parse().unwrap());
            assert_eq!(ask(&metadata, None).await, Err(Code::Unauthenticated), "{wrong}");
        }
        metadata.insert("authorization", "Bearer secret".parse().unwrap());
        assert_eq!(ask(&metadata, None).await, Ok("node-a".to_owned()));
        assert_eq!(ask(&metadata, Some(&says("node-a"))).await, Ok("node-a".to_owned()));
        assert_eq!(ask(&metadata, Some(&says("node-b"))).await, Err(Code::PermissionDenied));
        assert_eq!(ask(&metadata, Some(&Node::default())).await, Err(Code::PermissionDenied));
    }
}
