//! Applications, and the node tunnel in front of one.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use culvert_hbone::config::ServerConfig;
use culvert_hbone::copy::{IdleLimits, copy_bidirectional};
use culvert_hbone::io::TunnelIo;
use culvert_hbone::server::Server;
use culvert_identity::tls::server_config;
use culvert_identity::verify::TrustDomains;
use culvert_model::Str;
use culvert_model::identity::Identity;
use culvert_runtime::tasks::Tasks;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::soon;
use crate::http::Spawner;
use crate::http::body::{self, Body};
use crate::tests::authority::Authority;

/// An application that says its name and what it was asked.
pub struct App {
    pub address: SocketAddr,
    pub connections: Arc<AtomicUsize>,
    pub requests: Arc<AtomicUsize>,
}

impl App {
    /// On an address of its own, so that each is another pod.
    pub async fn start(tasks: &Tasks, name: &'static str, ip: &str) -> Self {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let (connections, requests) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let app = Self { address: listener.local_addr().unwrap(), connections, requests };
        let (connections, requests, owner) = (app.connections.clone(), app.requests.clone(), tasks.clone());
        tasks.spawn(name, async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let (requests, tasks) = (requests.clone(), owner.clone());
                owner.spawn("app connection", async move {
                    let service = service_fn(move |request| {
                        let number = requests.fetch_add(1, Ordering::Relaxed);
                        async move { Ok::<_, Infallible>(answer(name, number, request).await) }
                    });
                    let builder = auto::Builder::new(Spawner(tasks));
                    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
                });
            }
        });
        app
    }

    pub fn served(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

/// `x-fail: N` fails the first N requests, `x-stall` never answers, `/upgrade` changes to an echo.
async fn answer(name: &'static str, number: usize, mut request: Request<Incoming>) -> Response<Body> {
    let header = |name: &str| request.headers().get(name).and_then(|it| it.to_str().ok()).map(str::to_owned);
    if header("x-stall").is_some() {
        std::future::pending::<()>().await;
    }
    let fails = header("x-fail").and_then(|it| it.parse::<usize>().ok()).unwrap_or(0);
    if request.uri().path() == "/upgrade" {
        let upgrade = hyper::upgrade::on(&mut request);
        Tasks::new("upgraded app").spawn("echo", async move {
            let Ok(upgraded) = upgrade.await else { return };
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
        let mut response = Response::new(body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert("connection", "upgrade".parse().unwrap());
        response.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        return response;
    }
    if request.uri().path() == "/stream" {
        return streamed(request);
    }
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(|it| it.to_bytes()).unwrap_or_default();
    let host = parts.headers.get("host").and_then(|it| it.to_str().ok()).map(str::to_owned);
    let host = host.or_else(|| parts.uri.authority().map(ToString::to_string)).unwrap_or_default();
    let path = parts.uri.path_and_query().map_or("/", |it| it.as_str());
    let said = format!(
        "{name} {:?} {} {host}{path} {}",
        parts.version,
        parts.method,
        String::from_utf8_lossy(&body)
    );
    let mut response = Response::new(body::text(said));
    for (name, value) in &parts.headers {
        response.headers_mut().append(name_of(name), value.clone());
    }
    response.headers_mut().insert("x-app", name.parse().unwrap());
    if number < fails {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

/// The request's frames as they come, trailers too; `x-break` breaks off after the first, `x-hang` then waits for ever.
fn streamed(request: Request<Incoming>) -> Response<Body> {
    let broken = request.headers().contains_key("x-break");
    let hangs = request.headers().contains_key("x-hang");
    let frames =
        futures_util::stream::unfold((request.into_body(), 0), move |(mut body, number)| async move {
            if number == 1 && hangs {
                std::future::pending::<()>().await;
            }
            if number == 1 && broken {
                return Some((Err("broken off".into()), (body, 2)));
            }
            let frame = body.frame().await?;
            Some((frame.map_err(Into::into), (body, number + 1)))
        });
    Response::new(StreamBody::new(frames).boxed_unsync())
}

/// A request's header as the response's, so that tests see what came.
fn name_of(name: &http::HeaderName) -> http::HeaderName {
    format!("seen-{name}").parse().unwrap()
}

/// A node tunnel at `ip`:15008 that is `identity` and connects to the port asked for.
pub async fn node_tunnel(tasks: &Tasks, authority: &Arc<Authority>, ip: &str, identity: &Identity) {
    let listener = TcpListener::bind((ip, 15008)).await.unwrap();
    let trust = Arc::new(TrustDomains::new("cluster.local", std::iter::empty::<Str>()));
    let tls = server_config(&authority.certificate(identity), &trust);
    let owner = tasks.clone();
    tasks.spawn("node tunnel", async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, tasks) = (TlsAcceptor::from(tls.clone()), owner.clone());
            owner.spawn("node tunnel connection", async move {
                let Ok(tls) = acceptor.accept(stream).await else { return };
                let Ok(mut connection) = Server::handshake(tls, &ServerConfig::default()).await else {
                    return;
                };
                while let Some(Ok(incoming)) = connection.accept().await {
                    tasks.spawn("node tunnel stream", async move {
                        let Ok(upstream) = TcpStream::connect(&incoming.authority).await else {
                            let _ = incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new());
                            return;
                        };
                        let Ok(tunnel) = incoming.accept(HeaderMap::new()) else { return };
                        copy_bidirectional(
                            upstream,
                            tunnel,
                            IdleLimits::default(),
                            (),
                            std::future::pending::<()>(),
                        )
                        .await;
                    });
                }
            });
        }
    });
}

/// What clients send.
pub type Sent = Body;

pub fn sent(bytes: impl Into<Bytes>) -> Sent {
    body::text(bytes)
}

/// An HTTP/1 client in a tunnel.
pub async fn http1(tasks: &Tasks, io: TunnelIo) -> http1::SendRequest<Sent> {
    let (sender, connection) = soon(http1::handshake(TokioIo::new(io))).await.unwrap();
    tasks.spawn("http/1", async move {
        let _ = connection.with_upgrades().await;
    });
    sender
}

/// An HTTP/2 client in a tunnel.
pub async fn http2(tasks: &Tasks, io: TunnelIo) -> http2::SendRequest<Sent> {
    let (sender, connection) =
        soon(http2::handshake(Spawner(tasks.clone()), TokioIo::new(io))).await.unwrap();
    tasks.spawn("http/2", async move {
        let _ = connection.await;
    });
    sender
}

pub fn get(path: &str) -> Request<Sent> {
    Request::builder().uri(path).header("host", "web").body(body::empty()).unwrap()
}

/// A response, read whole.
#[derive(Debug)]
pub struct Got {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: String,
}

impl Got {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

pub async fn read(response: Response<Incoming>) -> Got {
    let (parts, body) = response.into_parts();
    let body = soon(body.collect()).await.unwrap().to_bytes();
    let body = String::from_utf8(body.to_vec()).unwrap();
    Got { status: parts.status.as_u16(), headers: parts.headers, body }
}

/// Sends on HTTP/1.
pub async fn ask(client: &mut http1::SendRequest<Sent>, request: Request<Sent>) -> Got {
    soon(client.ready()).await.unwrap();
    read(soon(client.send_request(request)).await.unwrap()).await
}
