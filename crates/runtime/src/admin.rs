//! The small HTTP/1 servers of a process: admin on loopback, metrics, readiness.
//!
//! Bounds: [`MAX_CONNECTIONS`] connections (more wait in the listen queue), [`MAX_HEAD_BYTES`] of request head within
//! [`HEAD_TIMEOUT`], [`MAX_BODY_BYTES`] of request body within the same, and [`MAX_CONNECTION_AGE`] for a connection in all, so
//! that clients that stall cannot hold the connections for ever.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue, ORIGIN};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};

use crate::drain::DrainWatcher;
use crate::metrics::{self, Metrics};
use crate::readiness::Readiness;
use crate::tasks::Tasks;
use crate::telemetry::FilterHandle;

/// Connections served at once.
pub const MAX_CONNECTIONS: usize = 64;
/// Request line and headers.
pub const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Request body.
pub const MAX_BODY_BYTES: usize = 64 * 1024;
/// From accept, or the end of the request before, to the end of the head; and from there to the end of the body.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is cut at this age, whatever it is doing.
pub const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);
/// Pause after a failed accept (descriptors ran out), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a handler answers.
pub type AdminResponse = Response<Full<Bytes>>;

type Handler = Arc<dyn Fn(AdminRequest) -> Pin<Box<dyn Future<Output = AdminResponse> + Send>> + Send + Sync>;

/// A request as a handler gets it, its body read.
#[derive(Debug)]
pub struct AdminRequest {
    /// The method.
    pub method: Method,
    /// The path that was routed.
    pub path: String,
    /// Query parameters in order, `+` and percent signs decoded.
    pub query: Vec<(String, String)>,
    /// Headers.
    pub headers: HeaderMap,
    /// Body, at most [`MAX_BODY_BYTES`].
    pub body: Bytes,
}

/// A table of routes, then a server.
#[derive(Clone, Default)]
pub struct AdminServer {
    routes: BTreeMap<&'static str, Route>,
}

#[derive(Clone)]
struct Route {
    help: &'static str,
    handlers: BTreeMap<&'static str, Handler>,
}

impl AdminRequest {
    /// The first query parameter of this name.
    #[must_use]
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl AdminServer {
    /// A server that knows only its index page, `/`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a handler. `help` is its line on the index page; the first one given for a path is shown.
    #[must_use]
    pub fn route<H, F>(
        mut self,
        method: &'static str,
        path: &'static str,
        help: &'static str,
        handler: H,
    ) -> Self
    where
        H: Fn(AdminRequest) -> F + Send + Sync + 'static,
        F: Future<Output = AdminResponse> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |request| Box::pin(handler(request)));
        let route = self.routes.entry(path).or_insert_with(|| Route { help, handlers: BTreeMap::new() });
        route.handlers.insert(method, handler);
        self
    }

    /// `GET /healthz/ready`: 200, or 500 with the list of what is pending (Z06).
    #[must_use]
    pub fn readiness(self, readiness: Readiness) -> Self {
        self.route("GET", "/healthz/ready", "whether this process is ready, or what is pending", move |_| {
            let pending = readiness.described();
            let response = if pending.is_empty() {
                text(StatusCode::OK, "ready\n")
            } else {
                text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    format!("not ready, pending:\n{}\n", pending.join("\n")),
                )
            };
            std::future::ready(response)
        })
    }

    /// `GET /metrics` and `GET /stats/prometheus`: metrics as OpenMetrics text.
    #[must_use]
    pub fn metrics(mut self, metrics: &Metrics) -> Self {
        for path in ["/metrics", "/stats/prometheus"] {
            let metrics = metrics.clone();
            self = self.route("GET", path, "metrics, OpenMetrics text", move |_| {
                let mut response = Response::new(Full::from(metrics.encode()));
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE));
                std::future::ready(response)
            });
        }
        self
    }

    /// `GET /logging` shows the log filter, `POST /logging?level=debug` (or `info,culvert_xds=trace`) changes it, and
    /// `POST /logging?reset` puts back the one that the program was started with (Z109, Z113).
    #[must_use]
    pub fn logging(self, filter: &FilterHandle) -> Self {
        let help = "log filter; POST with ?level= changes it, such as debug or info,culvert_xds=trace; ?reset undoes that";
        let (shown, changed) = (filter.clone(), filter.clone());
        self.route("GET", "/logging", help, move |_| {
            std::future::ready(text(StatusCode::OK, format!("{}\n", shown.get())))
        })
        .route("POST", "/logging", help, move |request| {
            let reset = request.query("reset").map(|_| changed.reset());
            let response = match reset.or_else(|| request.query("level").map(|level| changed.set(level))) {
                None => text(StatusCode::BAD_REQUEST, "want ?level=FILTER or ?reset\n"),
                Some(Err(error)) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
                Some(Ok(())) => text(StatusCode::OK, format!("{}\n", changed.get())),
            };
            std::future::ready(response)
        })
    }

    /// `POST /quitquitquit` asks the program to drain and end (Z07).
    #[must_use]
    pub fn quit(self, quit: Arc<Notify>) -> Self {
        self.route("POST", "/quitquitquit", "drain, then end", move |_| {
            // Keeps one permit, so that a request before anyone waits is not lost.
            quit.notify_one();
            std::future::ready(text(StatusCode::OK, "draining\n"))
        })
    }

    /// Serves until the drain starts, then lets open requests finish until it is forced.
    ///
    /// # Errors
    /// If the listener cannot be used with tokio. Failures of single connections are not errors.
    pub async fn serve(self, listener: std::net::TcpListener, drain: DrainWatcher) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let server = Arc::new(self);
        let tasks = Tasks::new("admin");
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accept = async {
                // A place is taken before the accept, so the rest waits in the kernel's listen queue.
                let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
                listener.accept().await.map(|accepted| (accepted, place))
            };
            let accepted = tokio::select! {
                _ = drain.started() => break,
                accepted = accept => accepted,
            };
            match accepted {
                Ok(((stream, peer), place)) => {
                    let (server, drain) = (server.clone(), drain.clone());
                    tasks.spawn("connection", async move {
                        server.connection(stream, peer, drain).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "admin accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        tasks.close();
        tokio::select! {
            _ = tasks.wait(MAX_CONNECTION_AGE) => {}
            () = drain.forced() => tasks.abort_all(),
        }
        Ok(())
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, drain: DrainWatcher) {
        let service = service_fn(move |request| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = async {
            tokio::select! {
                result = connection.as_mut() => return result,
                _ = drain.started() => connection.as_mut().graceful_shutdown(),
            }
            connection.as_mut().await
        };
        match tokio::time::timeout(MAX_CONNECTION_AGE, ended).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%peer, %error, "admin connection failed"),
            Err(_) => tracing::debug!(%peer, "admin connection is too old"),
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> AdminResponse {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let Some(route) = self.routes.get(path) else {
            return match path {
                "/" if head.method == Method::GET => {
                    respond(StatusCode::OK, "text/html; charset=utf-8", self.index().into())
                }
                _ => text(StatusCode::NOT_FOUND, "no such page; / lists them\n"),
            };
        };
        // HEAD is GET whose body hyper leaves out.
        let method = if head.method == Method::HEAD { "GET" } else { head.method.as_str() };
        let Some(handler) = route.handlers.get(method) else {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
            let allowed: Vec<_> = route.handlers.keys().copied().collect();
            if let Ok(allowed) = HeaderValue::from_str(&allowed.join(", ")) {
                response.headers_mut().insert(ALLOW, allowed);
            }
            return response;
        };
        if method != "GET" && head.headers.contains_key(ORIGIN) {
            // A page in a browser on this machine can reach loopback; it has no business changing anything.
            return text(StatusCode::FORBIDDEN, "not for browsers\n");
        }
        let too_long =
            || text(StatusCode::PAYLOAD_TOO_LARGE, format!("body is longer than {MAX_BODY_BYTES} bytes\n"));
        if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
            return too_long();
        }
        let body =
            match tokio::time::timeout(HEAD_TIMEOUT, Limited::new(body, MAX_BODY_BYTES).collect()).await {
                Ok(Ok(body)) => body.to_bytes(),
                Ok(Err(error)) if error.is::<LengthLimitError>() => return too_long(),
                Ok(Err(error)) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
                Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "body came too slowly\n"),
            };
        let query = head.uri.query().map(parse_query).unwrap_or_default();
        let path = path.to_owned();
        handler(AdminRequest { method: head.method, path, query, headers: head.headers, body }).await
    }

    /// Pages in HTML; what only changes something is no link.
    fn index(&self) -> String {
        let mut page = String::from("<!doctype html><title>admin</title><table>\n");
        for (path, route) in &self.routes {
            let methods: Vec<_> = route.handlers.keys().copied().collect();
            let name = if route.handlers.contains_key("GET") {
                format!("<a href=\"{path}\">{path}</a>")
            } else {
                (*path).to_owned()
            };
            // Writing to a String cannot fail.
            let _ = writeln!(page, "<tr><td>{name}<td>{}<td>{}", methods.join(", "), html(route.help));
        }
        page.push_str("</table>\n");
        page
    }
}

fn html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A plain text answer.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> AdminResponse {
    respond(status, "text/plain; charset=utf-8", body.into())
}

/// A JSON answer, indented for people.
pub fn json(value: &impl serde::Serialize) -> AdminResponse {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => respond(StatusCode::OK, "application/json", body.into()),
        Err(error) => {
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot be written as JSON: {error}\n"))
        }
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> AdminResponse {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn parse_query(query: &str) -> Vec<(String, String)> {
    let pair = |part: &str| {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        (decode(key), decode(value))
    };
    query.split('&').filter(|part| !part.is_empty()).map(pair).collect()
}

/// Percent decoding; a percent sign that is not followed by two hex digits stands for itself.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        let escaped =
            tail.get(..2).filter(|_| first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => bytes.push(if first == b'+' { b' ' } else { first }),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
#[path = "admin_tests.rs"]
mod tests;
