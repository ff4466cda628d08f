//! What a server serves: a generation of everything, immutable and shared by all streams.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::sync::Arc;

use bytes::Bytes;
use imbl::OrdMap;

/// Everything of one generation. Publish the next one through a `watch` channel; maps that did not change are shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceSet {
    /// Grows with every published change.
    pub generation: u64,
    /// Resources by type URL. A type that is not here has no resources.
    pub types: BTreeMap<String, Arc<ResourceMap>>,
}

/// The resources of one type by name. A persistent map: the next generation shares all but the changed branches, and finding
/// out how two generations differ skips what they share, so a change among 100,000 costs each stream what the change is
/// worth.
pub type ResourceMap = OrdMap<Arc<str>, Resource>;

/// One resource; cloning it copies no bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Not empty; equal versions mean equal bodies. A function of the content, not a counter, so that a restarted server
    /// resends nothing (D13).
    pub version: Arc<str>,
    /// The encoded message.
    pub body: Bytes,
}

impl Resource {
    /// A resource with a version of the caller's making.
    pub fn new(version: impl Into<Arc<str>>, body: impl Into<Bytes>) -> Self {
        Self { version: version.into(), body: body.into() }
    }

    /// A resource whose version is a 64-bit hash (SipHash with a fixed key) of its body. By chance two bodies of one name
    /// share it once in 2^64; bodies are the server's own, so nobody can aim for that.
    pub fn hashed(body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let mut hasher = DefaultHasher::new();
        hasher.write(&body);
        Self { version: format!("{:016x}", hasher.finish()).into(), body }
    }
}

impl ResourceSet {
    /// The resources of a type, an empty map if there are none.
    #[must_use]
    pub fn of_type(&self, type_url: &str) -> Arc<ResourceMap> {
        self.types.get(type_url).cloned().unwrap_or_default()
    }
}
