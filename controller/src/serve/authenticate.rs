//! Node tokens, as the xDS server and the certificate authority ask for them.

use culvert_proto::discovery::Node;
use culvert_xds::server::{Authenticator, Peer};
use prost_types::value::Kind;
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::auth::{NodeName, NodeTokens};
use crate::ca::NodeAuthenticator;

/// Key in the metadata of an xDS node: the node it says it is on.
const NODE_NAME: &str = "NODE_NAME";

/// The node whose token a call carries.
#[derive(Clone, Debug)]
pub struct Tokens(pub NodeTokens);

impl Tokens {
    #[allow(clippy::result_large_err, reason = "tonic's own error type, on a cold path")]
    fn node(&self, metadata: &MetadataMap) -> Result<NodeName, Status> {
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let Some((scheme, token)) = header.and_then(|header| header.split_once(' ')) else {
            return Err(Status::unauthenticated("no bearer token"));
        };
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Status::unauthenticated("no bearer token"));
        }
        self.0.authenticate(token.trim()).ok_or_else(|| Status::unauthenticated("the token is no node's"))
    }
}

impl NodeAuthenticator for Tokens {
    fn authenticate(&self, metadata: &MetadataMap) -> Result<NodeName, Status> {
        self.node(metadata)
    }
}

impl Authenticator for Tokens {
    /// The node a proxy says it is on must be the one whose token it has: a token of one node is no window to another.
    fn authenticate(&self, metadata: &MetadataMap, node: Option<&Node>) -> Result<Peer, Status> {
        let proven = self.node(metadata)?;
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

    #[test]
    fn a_token_and_a_claim_must_agree() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = tokens(&dir);
        let mut metadata = MetadataMap::new();
        let ask = |metadata: &MetadataMap, node: Option<&Node>| {
            Authenticator::authenticate(&tokens, metadata, node)
                .map(|peer| peer.name)
                .map_err(|status| status.code())
        };
        assert_eq!(ask(&metadata, None), Err(Code::Unauthenticated));
        for wrong in ["Bearer other", "Basic secret", "secret", "Bearer "] {
            metadata.insert("authorization", wrong.parse().unwrap());
            assert_eq!(ask(&metadata, None), Err(Code::Unauthenticated), "{wrong}");
        }
        metadata.insert("authorization", "Bearer secret".parse().unwrap());
        assert_eq!(ask(&metadata, None), Ok("node-a".to_owned()));
        assert_eq!(ask(&metadata, Some(&says("node-a"))), Ok("node-a".to_owned()));
        assert_eq!(ask(&metadata, Some(&says("node-b"))), Err(Code::PermissionDenied));
        assert_eq!(ask(&metadata, Some(&Node::default())), Err(Code::PermissionDenied));
    }
}
