//! Who a proxy is, where there is no Kubernetes to ask: each node has a token, and the controller a file of their hashes.
//!
//! The file is a JSON object, `{"<node>": "<hex sha256 of the token>"}`. It is written by whoever makes the nodes
//! (`culvert up`), and read again when it changes: a node that is added may connect without a restart.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use culvert_k8s_api::values::is_dns_subdomain;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// The name of a node, proven by its token.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub struct NodeName(Arc<str>);

/// Who a call is from, proven by its token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Where it runs.
    pub node: NodeName,
    /// What it may have.
    pub grant: Grant,
}

/// What a token is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Everything of its node: it is the node's proxy (D49).
    Node,
    /// The pod's own identity and nothing else.
    Own {
        /// Of the pod.
        namespace: String,
        /// Its service account.
        account: String,
        /// Its name, for logs.
        pod: String,
    },
}

/// Hashes of the nodes' tokens; clones share them.
#[derive(Clone)]
pub struct NodeTokens {
    path: Arc<Path>,
    known: Arc<ArcSwap<Vec<Entry>>>,
}

/// Why a token file was refused. The tokens known before stay.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// It cannot be read.
    #[error("{}: cannot be read: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
    /// It is too large.
    #[error("{}: is larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is not a JSON object of strings.
    #[error("{}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: serde_json::Error,
    },
    /// A key is no name of a node.
    #[error("{}: {node:?} is no name of a node", path.display())]
    Node {
        /// The file.
        path: PathBuf,
        /// The key.
        node: String,
    },
    /// A value is no hash.
    #[error("{}: the value of {node:?} is not the hex SHA-256 of a token", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Whose; the value itself is not repeated.
        node: String,
    },
    /// Two nodes have one token: neither could be told from the other.
    #[error("{}: {first:?} and {second:?} have the same token", path.display())]
    Shared {
        /// The file.
        path: PathBuf,
        /// One.
        first: String,
        /// The other.
        second: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    node: NodeName,
    hash: [u8; 32],
}

/// 10,000 nodes of 100 bytes each.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Longest token that is hashed at all: what a header may reasonably hold.
const MAX_TOKEN_BYTES: usize = 4096;

impl Caller {
    /// The proxy of a node.
    pub fn node(node: NodeName) -> Self {
        Self { node, grant: Grant::Node }
    }
}

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for NodeName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeTokens")
            .field("path", &self.path)
            .field("nodes", &self.known.load().len())
            .finish()
    }
}

impl NodeTokens {
    /// Reads the file.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub fn load(path: &Path) -> Result<Self, TokensError> {
        let known = read(path)?;
        Ok(Self { path: path.into(), known: Arc::new(ArcSwap::from_pointee(known)) })
    }

    /// Reads the file again. True if anything changed.
    ///
    /// # Errors
    /// If the file cannot be used; what was known before stays.
    pub fn reload(&self) -> Result<bool, TokensError> {
        let known = read(&self.path)?;
        let changed = **self.known.load() != known;
        if changed {
            self.known.store(Arc::new(known));
        }
        Ok(changed)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The node whose token this is. `bearer` is the token itself, without the word `Bearer`.
    ///
    /// Takes the same time whichever node it is, or none: the hash hides how far a guess agrees, and every entry is
    /// compared.
    pub fn authenticate(&self, bearer: &str) -> Option<NodeName> {
        if bearer.is_empty() || bearer.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let hash: [u8; 32] = Sha256::digest(bearer.as_bytes()).into();
        let known = self.known.load();
        let (mut found, mut at) = (Choice::from(0), 0_u64);
        for (entry, index) in known.iter().zip(0_u64..) {
            let equal = entry.hash.ct_eq(&hash);
            found |= equal;
            at.conditional_assign(&index, equal);
        }
        let index = usize::try_from(at).ok()?;
        bool::from(found).then(|| known[index].node.clone())
    }
}

fn read(path: &Path) -> Result<Vec<Entry>, TokensError> {
    let unreadable = |reason| TokensError::Read { path: path.to_owned(), reason };
    let mut text = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(TokensError::TooLarge { path: path.to_owned() });
    }
    let map: BTreeMap<String, String> = serde_json::from_slice(&text)
        .map_err(|reason| TokensError::Json { path: path.to_owned(), reason })?;
    let mut entries: Vec<Entry> = Vec::with_capacity(map.len());
    for (node, hex) in map {
        if !is_dns_subdomain(&node) {
            return Err(TokensError::Node { path: path.to_owned(), node });
        }
        let Some(hash) = parse_hash(&hex) else {
            return Err(TokensError::Hash { path: path.to_owned(), node });
        };
        if let Some(other) = entries.iter().find(|entry| entry.hash == hash) {
            let first = other.node.to_string();
            return Err(TokensError::Shared { path: path.to_owned(), first, second: node });
        }
        entries.push(Entry { node: NodeName(node.into()), hash });
    }
    Ok(entries)
}

fn parse_hash(hex: &str) -> Option<[u8; 32]> {
    let digits = hex.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn hex(token: &str) -> String {
        Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn file(dir: &tempfile::TempDir, nodes: &[(&str, &str)]) -> PathBuf {
        let path = dir.path().join("tokens.json");
        let map: BTreeMap<_, _> = nodes.iter().map(|(node, token)| (*node, hex(token))).collect();
        fs::write(&path, serde_json::to_vec(&map).unwrap()).unwrap();
        path
    }

    #[test]
    fn a_token_names_its_node_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = NodeTokens::load(&file(&dir, &[("a", "one"), ("b", "two"), ("c", "three")])).unwrap();
        for (token, node) in [("one", "a"), ("two", "b"), ("three", "c")] {
            assert_eq!(tokens.authenticate(token), Some(NodeName::from(node)));
        }
        for wrong in ["", "four", "one ", &hex("one"), &"x".repeat(5000)] {
            assert_eq!(tokens.authenticate(wrong), None);
        }
    }

    #[test]
    fn a_new_node_is_known_after_a_reload_and_a_bad_file_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, &[("a", "one")]);
        let tokens = NodeTokens::load(&path).unwrap();
        let shared = tokens.clone();
        assert!(!tokens.reload().unwrap());
        file(&dir, &[("a", "one"), ("b", "two")]);
        assert!(tokens.reload().unwrap());
        assert_eq!(shared.authenticate("two"), Some(NodeName::from("b")));
        fs::write(&path, "{").unwrap();
        assert!(matches!(tokens.reload(), Err(TokensError::Json { .. })));
        assert_eq!(shared.authenticate("two"), Some(NodeName::from("b")));
        file(&dir, &[("a", "one")]);
        tokens.reload().unwrap();
        assert_eq!(shared.authenticate("two"), None);
    }

    #[test]
    fn files_that_would_let_in_the_wrong_one_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(NodeTokens::load(&dir.path().join("no")), Err(TokensError::Read { .. })));
        let path = file(&dir, &[("a", "one"), ("b", "one")]);
        assert!(matches!(NodeTokens::load(&path), Err(TokensError::Shared { .. })));
        for (text, what) in [
            (r#"{"a":"00"}"#.to_owned(), "hash"),
            (format!(r#"{{"a":"{}"}}"#, "z".repeat(64)), "hash"),
            (format!(r#"{{"A/b":"{}"}}"#, "0".repeat(64)), "node"),
            ("[]".to_owned(), "json"),
            ("\"\"".to_owned(), "json"),
            (" ".repeat(2 << 20), "large"),
        ] {
            fs::write(&path, &text).unwrap();
            let error = NodeTokens::load(&path).unwrap_err();
            let kind = match error {
                TokensError::Hash { .. } => "hash",
                TokensError::Node { .. } => "node",
                TokensError::Json { .. } => "json",
                TokensError::TooLarge { .. } => "large",
                TokensError::Read { .. } | TokensError::Shared { .. } => "other",
            };
            assert_eq!(kind, what);
        }
    }
}
