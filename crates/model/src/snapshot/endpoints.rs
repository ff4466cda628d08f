//! The endpoints of one service: in order for whoever walks them, by index for whoever draws one (Z68).

use std::sync::Arc;

use imbl::Vector;

use crate::workload::Workload;

/// The workloads that are endpoints of one service, ordered by uid.
#[derive(Clone, Debug, Default)]
pub(super) struct EndpointIndex {
    by_uid: Vector<Arc<Workload>>,
    /// No endpoint has more. It is not lowered when one leaves: a draw then only takes a little longer.
    max_capacity: u32,
}

/// The endpoints of a service, ordered by uid: an iterator over them, and each by its index.
#[derive(Clone, Debug)]
pub struct Endpoints<'a> {
    all: All<'a>,
    next: usize,
    max_capacity: u32,
}

#[derive(Clone, Copy, Debug)]
enum All<'a> {
    Index(&'a Vector<Arc<Workload>>),
    Slice(&'a [Arc<Workload>]),
}

impl EndpointIndex {
    /// Adds it, or replaces the one of its uid, in O(log n).
    pub fn insert(&mut self, workload: Arc<Workload>) {
        self.max_capacity = self.max_capacity.max(workload.capacity);
        match self.position(&workload.uid) {
            Ok(at) => {
                self.by_uid.set(at, workload);
            }
            Err(at) => self.by_uid.insert(at, workload),
        }
    }

    /// Takes out the one of this uid, in O(log n).
    pub fn remove(&mut self, uid: &str) {
        if let Ok(at) = self.position(uid) {
            self.by_uid.remove(at);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.by_uid.is_empty()
    }

    pub fn endpoints(&self) -> Endpoints<'_> {
        Endpoints { all: All::Index(&self.by_uid), next: 0, max_capacity: self.max_capacity }
    }

    fn position(&self, uid: &str) -> Result<usize, usize> {
        self.by_uid.binary_search_by(|workload| (*workload.uid).cmp(uid))
    }
}

impl<'a> Endpoints<'a> {
    /// How many there are, those that the iterator has passed included.
    pub fn total(&self) -> usize {
        match self.all {
            All::Index(all) => all.len(),
            All::Slice(all) => all.len(),
        }
    }

    /// The one at an index below [`total`](Self::total), wherever the iterator is; O(log n).
    pub fn at(&self, index: usize) -> Option<&'a Arc<Workload>> {
        match self.all {
            All::Index(all) => all.get(index),
            All::Slice(all) => all.get(index),
        }
    }

    /// No endpoint has a larger capacity; the largest may be smaller.
    pub fn max_capacity(&self) -> u32 {
        self.max_capacity
    }
}

/// Some workloads, in the order given.
impl<'a> From<&'a [Arc<Workload>]> for Endpoints<'a> {
    fn from(all: &'a [Arc<Workload>]) -> Self {
        let max_capacity = all.iter().map(|workload| workload.capacity).max().unwrap_or_default();
        Self { all: All::Slice(all), next: 0, max_capacity }
    }
}

impl<'a> Iterator for Endpoints<'a> {
    type Item = &'a Arc<Workload>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.at(self.next)?;
        self.next += 1;
        Some(found)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.total() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Endpoints<'_> {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::wire;
    use culvert_proto::workload as proto;

    fn workload(number: u16, capacity: u32) -> Arc<Workload> {
        let uid = format!("{number:05}");
        let namespace = "n".to_owned();
        let message = proto::Workload { uid, namespace, capacity: Some(capacity), ..Default::default() };
        Arc::new(wire::workload::decode(message).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        /// Z68: an ordered map with indices, through more changes than one chunk holds.
        #[test]
        fn as_an_ordered_map(changes in prop::collection::vec((0_u16..200, 0_u32..9, prop::bool::weighted(0.6)), 0..600)) {
            let mut index = EndpointIndex::default();
            let mut model = BTreeMap::new();
            for (number, capacity, add) in changes {
                let one = workload(number, capacity);
                if add {
                    model.insert(one.uid.clone(), one.clone());
                    index.insert(one);
                } else {
                    model.remove(&one.uid);
                    index.remove(&one.uid);
                }
            }
            let endpoints = index.endpoints();
            prop_assert_eq!((endpoints.total(), index.is_empty()), (model.len(), model.is_empty()));
            prop_assert!(model.values().all(|one| one.capacity <= endpoints.max_capacity()));
            for (at, one) in model.values().enumerate() {
                prop_assert_eq!(endpoints.at(at), Some(one));
            }
            prop_assert_eq!(endpoints.at(model.len()), None);
            prop_assert!(endpoints.eq(model.values()));
        }
    }
}
