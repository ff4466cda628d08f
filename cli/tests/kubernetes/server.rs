//! An API server that is a table: paths and what they answer, and what pods serve behind it, by proxy and by forwarded port.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use culvert_runtime::tasks::Tasks;
use futures_util::{SinkExt, StreamExt};
use http::header::{
    CONNECTION, CONTENT_TYPE, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE,
};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

type Answer = Response<Full<Bytes>>;

/// What is served, and what was asked.
#[derive(Debug, Default)]
pub struct Table {
    /// By path without query: status and body.
    pub pages: BTreeMap<String, (u16, Value)>,
    /// By pod and path: what a forwarded port serves.
    pub forwarded: BTreeMap<(String, String), Value>,
    /// What the API server says instead of forwarding ports of a pod.
    pub unforwarded: BTreeMap<String, String>,
    /// What was changed: method, path with query, body.
    pub changes: Vec<(String, String, Value)>,
}

pub struct Server {
    dir: tempfile::TempDir,
    tasks: Tasks,
    table: Arc<Mutex<Table>>,
}

impl Server {
    /// Serves on loopback; a kubeconfig leads there.
    pub async fn start(table: Table) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = port.local_addr().unwrap();
        let server = Self {
            dir: tempfile::tempdir().unwrap(),
            tasks: Tasks::new("api server"),
            table: Arc::new(Mutex::new(table)),
        };
        std::fs::write(server.kubeconfig(), kubeconfig(&format!("http://{address}"))).unwrap();
        let (tasks, table) = (server.tasks.clone(), server.table.clone());
        server.tasks.spawn("accept", async move {
            while let Ok((stream, _)) = port.accept().await {
                let (more, table) = (tasks.clone(), table.clone());
                tasks.spawn("connection", async move {
                    let service = service_fn(move |request| answer(request, table.clone(), more.clone()));
                    let serving = hyper::server::conn::http1::Builder::new();
                    let _ = serving.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
                });
            }
        });
        server
    }

    pub fn change(&self, change: impl FnOnce(&mut Table)) {
        change(&mut self.table.lock().unwrap());
    }

    pub fn changes(&self) -> Vec<(String, String, Value)> {
        self.table.lock().unwrap().changes.clone()
    }

    fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Runs `culvert` about this cluster.
    pub async fn run(&self, args: &[&str]) -> Output {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_culvert"));
        command.args(args).arg("--kubeconfig").arg(self.kubeconfig());
        command.env_remove("CULVERT_STATE").env_remove("KUBECONFIG").stdin(Stdio::null());
        command.output().await.unwrap()
    }

    /// The same, with what it printed as JSON.
    pub async fn json(&self, args: &[&str]) -> (i32, Value) {
        let output = self.run(&[args, &["-o", "json"]].concat()).await;
        let printed = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        let value = serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}{said}"));
        (output.status.code().unwrap(), value)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

pub fn kubeconfig(server: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
    })
    .to_string()
}

async fn answer(
    request: Request<Incoming>,
    table: Arc<Mutex<Table>>,
    tasks: Tasks,
) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    if path.ends_with("/portforward") {
        return Ok(forward(request, &table, &tasks));
    }
    let with_query = request.uri().to_string();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let sent: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut table = table.lock().unwrap();
    if method != Method::GET {
        table.changes.push((method.to_string(), with_query.clone(), sent.clone()));
    }
    Ok(match table.pages.get(&path) {
        Some((status, page)) => shown(*status, &selected(page, &with_query)),
        // What is changed is as it was sent.
        None if method == Method::PATCH || method == Method::POST => shown(200, &sent),
        None => shown(404, &status(404, &format!("{path} not found"))),
    })
}

/// Of a list, what a selector `app=NAME` leaves.
fn selected(page: &Value, path: &str) -> Value {
    let mut page = page.clone();
    let app =
        path.split_once("labelSelector=app%3D").map(|(_, rest)| rest.split('&').next().unwrap().to_owned());
    if let (Some(app), Some(items)) = (app, page.get_mut("items").and_then(Value::as_array_mut)) {
        items.retain(|item| item["metadata"]["labels"]["app"] == app.as_str());
    }
    page
}

pub fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": "", "code": code})
}

fn shown(status: u16, page: &Value) -> Answer {
    let text = page.as_str().map_or_else(|| page.to_string(), str::to_owned);
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response.headers_mut().insert(CONTENT_TYPE, "application/json".parse().unwrap());
    response
}

/// The kubelet's part: one port, of which the pod answers one request.
fn forward(mut request: Request<Incoming>, table: &Arc<Mutex<Table>>, tasks: &Tasks) -> Answer {
    let pod = request.uri().path().rsplit('/').nth(1).unwrap().to_owned();
    if let Some(why) = table.lock().unwrap().unforwarded.get(&pod) {
        return shown(500, &status(500, why));
    }
    let port: u16 = request.uri().query().unwrap().rsplit('=').next().unwrap().parse().unwrap();
    let headers = upgrade(request.headers());
    let pages = table.clone();
    let upgraded = hyper::upgrade::on(&mut request);
    tasks.spawn("forward", async move {
        let io = TokioIo::new(upgraded.await.unwrap());
        let mut stream = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
        for channel in [0, 1] {
            let [low, high] = port.to_le_bytes();
            stream.send(Message::binary(vec![channel, low, high])).await.unwrap();
        }
        let mut asked = String::new();
        while let Some(Ok(message)) = stream.next().await {
            let Message::Binary(bytes) = message else { continue };
            asked += &String::from_utf8_lossy(&bytes[1..]);
            if asked.ends_with("\r\n\r\n") {
                break;
            }
        }
        let path = asked.split_whitespace().nth(1).unwrap().to_owned();
        let page = pages.lock().unwrap().forwarded.get(&(pod, path)).cloned();
        let (line, body) = match page {
            Some(page) => ("200 OK", page.to_string()),
            None => ("404 Not Found", "no such page\n".to_owned()),
        };
        let text =
            format!("HTTP/1.1 {line}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
        let framed = [&[0], text.as_bytes()].concat();
        let _ = stream.send(Message::binary(framed)).await;
        let _ = stream.close(None).await;
    });
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = headers;
    response
}

fn upgrade(asked: &HeaderMap) -> HeaderMap {
    let key = derive_accept_key(asked[SEC_WEBSOCKET_KEY].as_bytes());
    let protocols = asked[SEC_WEBSOCKET_PROTOCOL].to_str().unwrap();
    let protocol = protocols.split(',').map(str::trim).find(|it| it.starts_with("v4")).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, "Upgrade".parse().unwrap());
    headers.insert(UPGRADE, "websocket".parse().unwrap());
    headers.insert(SEC_WEBSOCKET_ACCEPT, key.parse().unwrap());
    headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol.parse().unwrap());
    headers
}
