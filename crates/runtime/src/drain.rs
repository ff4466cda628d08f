//! Draining: tell everything under a scope to finish, wait, then force.
//!
//! ```text
//! Running --drain(deadline)--> Graceful --deadline--> Forced
//!    |                            ^ all watchers gone: drained
//!    +------------- now(), or the trigger is dropped --> Forced
//! ```
//! A scope (the process) may have child scopes (a pod): draining the parent drains the children, and a parent is not
//! drained before they are; draining a child leaves its siblings alone.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::select_all;
use tokio::sync::watch;

/// Starts a drain and waits for it. Dropping the trigger of a scope that still runs forces it: nobody is left to drain it.
#[derive(Debug)]
pub struct DrainTrigger {
    phase: watch::Sender<Phase>,
    scope: Weak<Scope>,
}

/// Held by everything that has to end before the scope counts as drained; a clone for each connection.
#[derive(Debug, Clone)]
pub struct DrainWatcher {
    scope: Arc<Scope>,
}

/// How a scope that started draining wants its connections to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Finish what is under way, take nothing new (GOAWAY).
    Graceful,
    /// End now.
    Immediate,
}

/// What became of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Drained {
    /// Every watcher was dropped within the deadline.
    Completely,
    /// The deadline came first and the rest was told to end at once.
    Forced {
        /// Watchers and child scopes that were still held when the force was ordered.
        left: usize,
    },
}

#[derive(Debug)]
struct Scope {
    phase: watch::Receiver<Phase>,
    parent: Option<DrainWatcher>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    Graceful,
    Forced,
}

/// A new outermost scope, usually the process.
#[must_use]
pub fn channel() -> (DrainTrigger, DrainWatcher) {
    scope(None)
}

fn scope(parent: Option<DrainWatcher>) -> (DrainTrigger, DrainWatcher) {
    let (sender, receiver) = watch::channel(Phase::Running);
    let scope = Arc::new(Scope { phase: receiver, parent });
    (DrainTrigger { phase: sender, scope: Arc::downgrade(&scope) }, DrainWatcher { scope })
}

/// A watcher of a scope that has ended: whoever holds it has to end at once.
#[must_use]
pub fn ended() -> DrainWatcher {
    let (trigger, watcher) = channel();
    trigger.now();
    watcher
}

impl DrainTrigger {
    /// Starts the drain and waits until every watcher is dropped; after `deadline` the rest is forced. May be called again,
    /// for example with a shorter deadline after the first call was cancelled.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        self.start();
        if tokio::time::timeout(deadline, self.phase.closed()).await.is_ok() {
            return Drained::Completely;
        }
        let left = self.scope.strong_count();
        self.now();
        if left == 0 { Drained::Completely } else { Drained::Forced { left } }
    }

    /// A watcher for something new under the scope, while anything under it is left. The trigger's owner hands these out, so
    /// that it need not hold a watcher itself and thereby keep the scope from ever being drained.
    #[must_use]
    pub fn watcher(&self) -> Option<DrainWatcher> {
        self.scope.upgrade().map(|scope| DrainWatcher { scope })
    }

    /// Starts the graceful drain without waiting.
    pub fn start(&self) {
        self.raise(Phase::Graceful);
    }

    /// Forces at once, without waiting.
    pub fn now(&self) {
        self.raise(Phase::Forced);
    }

    /// Resolves when every watcher is dropped, whether or not a drain was started.
    pub async fn closed(&self) {
        self.phase.closed().await;
    }

    fn raise(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let raised = *phase < to;
            *phase = to.max(*phase);
            raised
        });
    }
}

impl Drop for DrainTrigger {
    fn drop(&mut self) {
        self.now();
    }
}

impl DrainWatcher {
    /// A scope of its own below this one. Both see this scope's drain; only the child sees the returned trigger's.
    #[must_use]
    pub fn child(&self) -> (DrainTrigger, Self) {
        scope(Some(self.clone()))
    }

    /// Resolves when this scope, or one it lies in, starts to drain. Cancel safe.
    pub async fn started(&self) -> Mode {
        match self.reached(Phase::Graceful).await {
            Phase::Forced => Mode::Immediate,
            Phase::Running | Phase::Graceful => Mode::Graceful,
        }
    }

    /// Resolves when waiting is over: end now. Cancel safe.
    pub async fn forced(&self) {
        self.reached(Phase::Forced).await;
    }

    /// Whether a drain has started.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.phase() >= Phase::Graceful
    }

    fn scopes(&self) -> impl Iterator<Item = &Scope> {
        std::iter::successors(Some(&*self.scope), |scope| scope.parent.as_ref().map(|parent| &*parent.scope))
    }

    fn phase(&self) -> Phase {
        self.scopes().map(|scope| *scope.phase.borrow()).max().unwrap_or(Phase::Running)
    }

    async fn reached(&self, least: Phase) -> Phase {
        let waits = self.scopes().map(|scope| {
            let mut phase = scope.phase.clone();
            Box::pin(async move {
                // An error means the trigger is gone, and dropping it has set Forced.
                let _ = phase.wait_for(|phase| *phase >= least).await;
            })
        });
        select_all(waits).await;
        self.phase()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const DEADLINE: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn completes_when_the_last_watcher_is_dropped() {
        let (trigger, watcher) = channel();
        let second = watcher.clone();
        let connection = async move {
            assert_eq!(watcher.started().await, Mode::Graceful);
            drop(watcher);
            assert!(second.is_draining());
            drop(second);
        };
        let (outcome, ()) = tokio::join!(trigger.drain(DEADLINE), connection);
        assert_eq!(outcome, Drained::Completely);
    }

    /// Z08.
    #[tokio::test(start_paused = true)]
    async fn forces_after_the_deadline() {
        let (trigger, watcher) = channel();
        assert_eq!(watcher.forced().now_or_never(), None);
        assert_eq!(trigger.drain(DEADLINE).await, Drained::Forced { left: 1 });
        assert_eq!(watcher.forced().now_or_never(), Some(()));
        assert_eq!(watcher.started().await, Mode::Immediate);
        drop(watcher);
        assert_eq!(trigger.drain(DEADLINE).await, Drained::Completely);
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_drains_alone_and_with_its_parent() {
        let (process, watcher) = channel();
        let (pod_a, watch_a) = watcher.child();
        let (pod_b, watch_b) = watcher.child();

        pod_a.start();
        assert_eq!(watch_a.started().now_or_never(), Some(Mode::Graceful));
        assert_eq!(watch_b.started().now_or_never(), None);
        assert_eq!(watcher.started().now_or_never(), None);
        drop(watch_a);
        assert_eq!(pod_a.drain(DEADLINE).await, Drained::Completely);

        drop(watcher);
        assert_eq!(process.drain(DEADLINE).await, Drained::Forced { left: 1 }, "pod b holds the process");
        assert_eq!(watch_b.forced().now_or_never(), Some(()));
        drop(watch_b);
        assert_eq!(process.drain(DEADLINE).await, Drained::Completely);
        drop(pod_b);
    }

    #[tokio::test]
    async fn a_dropped_trigger_forces() {
        let (trigger, watcher) = channel();
        drop(trigger);
        assert_eq!(watcher.started().now_or_never(), Some(Mode::Immediate));
        assert_eq!(watcher.forced().now_or_never(), Some(()));
    }
}
