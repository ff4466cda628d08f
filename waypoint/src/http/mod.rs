//! Requests inside a tunnel: `serve -> head -> authorize -> route -> filters -> forward -> upstream`, one request after another
//! (HTTP/1) or many at once (HTTP/2).

pub mod authorize;
pub mod body;
mod deliver;
mod filters;
mod forward;
mod head;
mod pipeline;
pub mod respond;
pub mod retry;
pub mod route;
pub mod upstream;
mod watch;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::tasks::Tasks;
use http::Request;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::accept::Asked;
use crate::shared::{Shared, Worker};

/// Requests of one HTTP/2 connection at once.
const MAX_STREAMS: u32 = 200;
/// Longest head of a request, decoded.
const MAX_HEAD: usize = 64 << 10;
/// Streams that the peer reset before they were served; one more ends the connection (rapid reset, CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;
/// Streams reset here for the peer's errors in the life of a connection; one more ends it.
const MAX_ERROR_RESETS: usize = 1024;

/// What all requests of one tunnel share.
pub struct Served {
    /// The process's.
    pub shared: Arc<Shared>,
    /// The thread's.
    pub worker: Arc<Worker>,
    /// Who asked for what.
    pub asked: Asked,
    /// How the requests' IO is watched.
    pub watch: watch::Watch,
}

/// Runs HTTP/2's own tasks as those of a worker.
#[derive(Clone)]
pub struct Spawner(pub Tasks);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Spawner {
    fn execute(&self, task: F) {
        self.0.spawn("http/2 stream", task);
    }
}

/// Serves a tunnel's requests until it ends. A drain lets those that are being served finish, and tells the client to make no more.
pub async fn serve<IO>(shared: Arc<Shared>, worker: Arc<Worker>, asked: Asked, io: IO)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let drain = shared.drain.clone();
    let (io, watch) = watch::watched(io);
    let builder = builder(worker.tasks.clone());
    let peer = asked.peer.address;
    let served = Arc::new(Served { shared, worker, asked, watch });
    let service = service_fn(move |request: Request<Incoming>| {
        let served = served.clone();
        // Boxed: it is large, and a connection that is idle should not hold it.
        Box::pin(async move { Ok::<_, Infallible>(pipeline::handle(served, request).await) })
    });
    let mut connection = std::pin::pin!(builder.serve_connection_with_upgrades(TokioIo::new(io), service));
    let mut draining = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%peer, %error, "a connection inside a tunnel ended");
                }
                return;
            }
            _ = drain.started(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            () = drain.forced() => return,
        }
    }
}

fn builder(tasks: Tasks) -> auto::Builder<Spawner> {
    let mut builder = auto::Builder::new(Spawner(tasks));
    // Slow heads are cut by the watch, which can tell them from a connection that is only idle.
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD)
        .half_close(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(MAX_ERROR_RESETS)
        // What is read ahead of the application: 1 MiB for each connection.
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
        .max_send_buf_size(64 << 10)
        .keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}
