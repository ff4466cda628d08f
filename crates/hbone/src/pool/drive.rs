//! A pooled connection's task: drive it, end it when it is idle, take it out of the table when it is gone.

use std::future::Future;
use std::hash::Hash;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep_until};

use super::Inner;
use crate::client::Driver;
use crate::error::LostCause;
use crate::link::Link;

/// Counts the connection out, also when the task is aborted or never run.
pub(super) struct Leave<K: Hash + Eq, E> {
    pub(super) inner: Weak<Inner<K, E>>,
    pub(super) key: K,
    pub(super) id: u64,
}

pub(super) async fn drive<IO, K, E>(driver: Driver<IO>, link: Arc<Link>, leave: Leave<K, E>)
where
    IO: AsyncRead + AsyncWrite + Unpin,
    K: Hash + Eq,
{
    let id = leave.id;
    let mut driver = pin!(driver);
    let ended = match until_idle(driver.as_mut(), &link, &leave).await {
        Some(ended) => ended,
        None => driver.await, // retired: with its last handle gone the connection closes itself
    };
    match ended {
        Ok(()) => tracing::debug!(connection = id, "tunnel connection closed"),
        Err(cause) => tracing::info!(connection = id, %cause, "tunnel connection lost"),
    }
}

/// Drives the connection until it ends, or until it was idle for the pool's time and has been retired (`None`).
async fn until_idle<K: Hash + Eq, E>(
    mut driver: std::pin::Pin<&mut impl Future<Output = Result<(), LostCause>>>,
    link: &Link,
    leave: &Leave<K, E>,
) -> Option<Result<(), LostCause>> {
    let timeout = leave.inner.upgrade()?.config.idle_timeout;
    loop {
        tokio::select! {
            ended = driver.as_mut() => return Some(ended),
            () = idle_for(link, timeout) => {}
        }
        let retired = leave.inner.upgrade()?.table.lock().retire_idle(&leave.key, leave.id);
        match retired {
            Some(connection) => drop(connection),
            // Taken out before (evicted, drained), or a stream has just begun.
            None if link.streams() == 0 => {}
            None => continue,
        }
        return None;
    }
}

/// Resolves when no stream has been open for `timeout`.
async fn idle_for(link: &Link, timeout: Duration) {
    loop {
        if link.streams() > 0 {
            link.idle.notified().await;
            continue;
        }
        let deadline = link.idle_since() + timeout;
        if Instant::now() >= deadline {
            return;
        }
        sleep_until(deadline).await;
    }
}

impl<K: Hash + Eq, E> Drop for Leave<K, E> {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade() {
            inner.table.lock().remove(&self.key, self.id);
            inner.counters.connections.fetch_sub(1, Ordering::AcqRel);
            inner.closed.notify_waiters();
        }
    }
}
