//! A semaphore whose waiters have priorities.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Who goes first (Z89). Within one priority, who came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Priority {
    /// A connection waits, or a certificate nears its end.
    Connection,
    /// A pod has come and has no certificate yet.
    Warmup,
    /// An ordinary renewal.
    Background,
}

/// A fixed number of slots. Waiters are bounded by their makers: one for each identity of a manager.
pub(super) struct Slots {
    state: Mutex<State>,
}

struct State {
    free: usize,
    next: u64,
    queue: BTreeMap<(Priority, u64), oneshot::Sender<Slot>>,
}

/// One slot, until dropped.
pub(super) struct Slot(Arc<Slots>);

/// Takes a waiter out of the queue if it gives up.
struct Place<'a> {
    slots: &'a Slots,
    key: (Priority, u64),
}

impl Slots {
    pub(super) fn new(free: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { free, next: 0, queue: BTreeMap::new() }) })
    }

    /// Waits for a slot. Safe to give up: a slot that arrives too late goes to the next.
    pub(super) async fn acquire(self: &Arc<Self>, priority: Priority) -> Slot {
        let (key, receiver) = {
            let mut state = self.state.lock();
            if state.free > 0 {
                state.free -= 1;
                return Slot(self.clone());
            }
            let (sender, receiver) = oneshot::channel();
            let key = (priority, state.next);
            state.next += 1;
            state.queue.insert(key, sender);
            (key, receiver)
        };
        let _place = Place { slots: self, key };
        receiver.await.expect("a sender leaves the queue only to send or when this future is dropped")
    }

    fn release(self: &Arc<Self>) {
        let next = {
            let mut state = self.state.lock();
            match state.queue.pop_first() {
                Some((_, sender)) => sender,
                None => {
                    state.free += 1;
                    return;
                }
            }
        };
        // A receiver that was dropped just now gives the slot back, and its drop releases it again.
        drop(next.send(Slot(self.clone())));
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.slots.state.lock().queue.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Poll;

    /// Polls once.
    macro_rules! poll {
        ($future:expr) => {
            std::future::poll_fn(|cx| Poll::Ready($future.as_mut().poll(cx))).await
        };
    }

    /// Z89.
    #[tokio::test]
    async fn priority_goes_before_age() {
        let slots = Slots::new(1);
        let held = slots.acquire(Priority::Background).await;
        let mut renewal = pin!(slots.acquire(Priority::Background));
        let mut warmup = pin!(slots.acquire(Priority::Warmup));
        let mut first = pin!(slots.acquire(Priority::Connection));
        let mut second = pin!(slots.acquire(Priority::Connection));
        assert!(poll!(renewal).is_pending() && poll!(warmup).is_pending());
        assert!(poll!(first).is_pending() && poll!(second).is_pending());
        drop(held);
        assert!(poll!(renewal).is_pending() && poll!(warmup).is_pending() && poll!(second).is_pending());
        let Poll::Ready(slot) = poll!(first) else { panic!("the first connection has it") };
        drop(slot);
        let Poll::Ready(slot) = poll!(second) else { panic!("the second connection has it") };
        drop(slot);
        let Poll::Ready(slot) = poll!(warmup) else { panic!("the warmup has it") };
        drop(slot);
        assert!(poll!(renewal).is_ready());
    }

    #[tokio::test]
    async fn who_gives_up_loses_no_slot() {
        let slots = Slots::new(1);
        let held = slots.acquire(Priority::Background).await;
        {
            let mut early = pin!(slots.acquire(Priority::Connection));
            assert!(poll!(early).is_pending());
        }
        assert!(slots.state.lock().queue.is_empty());
        let mut late = Box::pin(slots.acquire(Priority::Connection));
        assert!(poll!(late).is_pending());
        drop(held);
        // The slot is on its way to `late`, which goes away without taking it.
        drop(late);
        assert_eq!(slots.state.lock().free, 1);
    }
}
