//! How many connections are served at once, and how they are shared out: no pod takes the places of another.
//!
//! A pod has a bound of its own below the process's. Above four fifths of the process's bound a pod is given a place only while it
//! has fewer than its share of the last fifth. So however many connections the others have, a pod with fewer than
//! `max / 5 / pods` gets its next one: at the last moment at which a pod beyond its share was served, the last fifth was free,
//! and since then nobody took more of it than their share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::observe::limits::Limit;

/// Descriptors that are not for connections: sockets of pods (nine each), tunnels, admin, control plane.
const KEPT: u64 = 1024;
/// Sockets of one connection at most: one to each side.
const SOCKETS: u64 = 2;

/// The places of the process.
#[derive(Debug)]
pub struct Places {
    max: usize,
    pod_max: usize,
    taken: AtomicUsize,
    pods: AtomicUsize,
}

/// The places of one pod.
#[derive(Debug)]
pub struct PodPlaces {
    all: Arc<Places>,
    taken: AtomicUsize,
}

/// One connection's place, given back on drop.
#[derive(Debug)]
#[must_use = "the place is free again once this is dropped"]
pub struct Place(Arc<PodPlaces>);

/// No place is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The pod has as many as one pod may have.
    #[error("the pod has {0} connections, which is all that one may have")]
    Pod(usize),
    /// The process has nearly as many as it may have, and the pod its share of the rest.
    #[error("the proxy is nearly full, and the pod has its share of {0} connections")]
    Share(usize),
    /// The process has as many as it may have.
    #[error("the proxy has {0} connections, which is all that it may have")]
    Process(usize),
}

impl Places {
    /// At most `max`, and as many as `descriptors` hold; at most `pod_max` a pod, and half of all.
    pub fn new(max: usize, pod_max: usize, descriptors: u64) -> Arc<Self> {
        let held = usize::try_from(descriptors.saturating_sub(KEPT) / SOCKETS).unwrap_or(usize::MAX);
        let max = max.min(held).max(SOCKETS as usize);
        Arc::new(Self {
            max,
            pod_max: pod_max.clamp(1, max / 2),
            taken: AtomicUsize::new(0),
            pods: AtomicUsize::new(0),
        })
    }

    /// The places of one more pod.
    pub fn pod(self: &Arc<Self>) -> Arc<PodPlaces> {
        self.pods.fetch_add(1, Ordering::Relaxed);
        Arc::new(PodPlaces { all: self.clone(), taken: AtomicUsize::new(0) })
    }

    /// Places taken, and how many there are.
    pub fn used(&self) -> (usize, usize) {
        (self.taken.load(Ordering::Relaxed), self.max)
    }

    /// What every pod may have, even if the others took all they could get.
    fn share(&self) -> usize {
        (self.max - self.common()) / self.pods.load(Ordering::Relaxed).max(1)
    }

    /// Up to here places are given to whoever comes.
    fn common(&self) -> usize {
        self.max - self.max / 5
    }
}

impl PodPlaces {
    /// A place for a connection of the pod. Two that come at once for the last one may both be refused.
    ///
    /// # Errors
    /// Whose bound is reached.
    pub fn take(self: &Arc<Self>) -> Result<Place, Full> {
        let all = &self.all;
        let pod = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
        let process = all.taken.fetch_add(1, Ordering::Relaxed) + 1;
        let place = Place(self.clone());
        if pod > all.pod_max {
            return Err(Full::Pod(all.pod_max));
        }
        if process > all.max {
            return Err(Full::Process(all.max));
        }
        let share = all.share();
        if process > all.common() && pod > share {
            return Err(Full::Share(share));
        }
        Ok(place)
    }

    /// Places taken, and how many there are.
    pub fn used(&self) -> (usize, usize) {
        (self.taken.load(Ordering::Relaxed), self.all.pod_max)
    }
}

impl Drop for PodPlaces {
    fn drop(&mut self) {
        self.all.pods.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.all.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Full {
    /// Which of the documented bounds it is.
    pub fn limit(self) -> Limit {
        match self {
            Self::Pod(_) => Limit::PodConnections,
            Self::Share(_) => Limit::PodShare,
            Self::Process(_) => Limit::Connections,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(pod: &Arc<PodPlaces>) -> (Vec<Place>, Full) {
        let mut places = Vec::new();
        loop {
            match pod.take() {
                Ok(place) => places.push(place),
                Err(full) => return (places, full),
            }
        }
    }

    #[test]
    fn a_pod_has_its_own_bound() {
        let all = Places::new(1000, 200, u64::MAX);
        let (pod, other) = (all.pod(), all.pod());
        let (places, full) = fill(&pod);
        assert_eq!((places.len(), full, full.limit()), (200, Full::Pod(200), Limit::PodConnections));
        assert!(other.take().is_ok());
        assert_eq!((all.used(), pod.used()), ((200, 1000), (200, 200)));
        drop(places);
        assert_eq!((all.used().0, pod.used().0), (0, 0));
        assert!(pod.take().is_ok());
    }

    #[test]
    fn a_full_proxy_refuses() {
        let all = Places::new(10, 5, u64::MAX);
        let pods: Vec<_> = (0..2).map(|_| all.pod()).collect();
        let (first, full) = fill(&pods[0]);
        assert_eq!((first.len(), full), (5, Full::Pod(5)));
        let (second, full) = fill(&pods[1]);
        assert_eq!((second.len(), full), (3, Full::Share(1)), "the last fifth is for who has less");
        let late: Vec<_> = (0..3).map(|_| all.pod()).collect();
        assert_eq!(late[0].take().unwrap_err(), Full::Share(0), "more pods than places in the last fifth");
        assert_eq!(late[0].take().unwrap_err().limit(), Limit::PodShare);
        drop((first, second));
    }

    /// The bounds follow from the descriptors where these are few, and a pod's is below the process's in any case.
    #[test]
    fn bounds_fit_the_descriptors() {
        for (max, pod_max, descriptors, expected) in [
            (200_000, 50_000, 1 << 20, (200_000, 50_000)),
            (200_000, 50_000, 65_536, (32_256, 16_128)),
            (200_000, 50_000, 100, (2, 1)),
            (100, 100, u64::MAX, (100, 50)),
            (0, 0, u64::MAX, (2, 1)),
        ] {
            let all = Places::new(max, pod_max, descriptors);
            assert_eq!((all.used().1, all.pod().used().1), expected, "{max} {pod_max} {descriptors}");
        }
    }

    proptest! {
        /// Z117 differs: whatever the others do, and in whatever order, a pod below its share gets a place.
        #[test]
        fn nobody_starves(steps in prop::collection::vec((0_usize..4, any::<bool>()), 0..400)) {
            let all = Places::new(40, 20, u64::MAX);
            let pods: Vec<_> = (0..4).map(|_| all.pod()).collect();
            let mut held: Vec<Vec<Place>> = pods.iter().map(|_| Vec::new()).collect();
            for (pod, takes) in steps {
                if takes {
                    held[pod].extend(pods[pod].take());
                } else {
                    held[pod].pop();
                }
                for (pod, held) in pods.iter().zip(&held) {
                    if held.len() < 40 / 5 / 4 {
                        prop_assert!(pod.take().is_ok(), "{} of {:?}", held.len(), all.used());
                    }
                }
            }
        }
    }
}
