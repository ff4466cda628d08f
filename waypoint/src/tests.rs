//! The waypoint as it runs: real TLS over loopback, HBONE on both sides, applications that answer.

mod apps;
mod authority;
mod bodies;
mod filters;
mod policies;
mod requests;
mod streams;
mod world;

use std::time::Duration;

/// Long enough for a loaded machine; nothing waits for it to pass.
const SOON: Duration = Duration::from_secs(30);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("it happens soon")
}
