//! Pages of the mesh's own pods, by way of the API server: what a pod's address serves by the pod's proxy subresource, and what
//! listens on the pod's loopback by port-forwarding, which the node's kubelet does.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::jiff::fmt::rfc2822;
use kube::Api;
use kube::client::Body;
use serde_json::Value;

use super::connect::{Cluster, chain};

/// Pages asked for at the same time.
pub(crate) const AT_ONCE: usize = 8;
/// What a page may hold unless more is expected.
pub(crate) const SMALL_PAGE: usize = 4 << 20;
/// A configuration dump: 100,000 workloads of 1 KB each and what belongs to them.
pub(crate) const DUMP: usize = 256 << 20;
/// What is shown of an answer that is no page.
const MAX_WORDS: usize = 200;

/// A page, and when it was made by the clock of where it was made.
#[derive(Debug)]
pub(crate) struct Page {
    /// The body.
    pub body: Bytes,
    /// Its `date` header, which has whole seconds.
    pub date: Option<Timestamp>,
}

/// Where a page is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place<'a> {
    /// Namespace of the pod.
    pub namespace: &'a str,
    /// The pod.
    pub pod: &'a str,
    /// The port.
    pub port: u16,
}

/// Why there is no page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreached {
    /// Whoever asks may not ask.
    #[error("not permitted: {0}")]
    Forbidden(String),
    /// The pod's node does not forward ports.
    #[error("the node's kubelet does not answer: {0}")]
    Kubelet(String),
    /// Nothing answers there.
    #[error("{0}")]
    NoAnswer(String),
    /// An answer, but no page.
    #[error("it answered {status}: {words}")]
    NoPage {
        /// HTTP status.
        status: u16,
        /// The beginning of the body.
        words: String,
    },
    /// It took too long.
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
    /// More than can be taken.
    #[error("the page has more than {0} bytes")]
    TooLong(usize),
    /// Something else than expected.
    #[error("the page cannot be read: {0}")]
    Unreadable(String),
}

impl Page {
    /// As JSON.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, Unreached> {
        serde_json::from_slice(&self.body).map_err(|error| Unreached::Unreadable(error.to_string()))
    }
}

impl Cluster {
    /// A page that the pod serves at its address.
    ///
    /// # Errors
    /// See [`Unreached`]; an answer other than 200 is one.
    pub(crate) async fn served(&self, place: Place<'_>, path: &str) -> Result<Page, Unreached> {
        let Place { namespace, pod, port } = place;
        let url = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy{path}");
        let request =
            Request::get(url).body(Body::empty()).map_err(|error| Unreached::NoAnswer(error.to_string()))?;
        let exchange = async {
            let response =
                self.client.send(request).await.map_err(|error| Unreached::NoAnswer(chain(&error)))?;
            page(response, SMALL_PAGE).await
        };
        self.within(exchange).await
    }

    /// A page that the pod serves on its loopback, of at most `limit` bytes.
    ///
    /// # Errors
    /// See [`Unreached`]; an answer other than 200 is one.
    pub(crate) async fn forwarded(
        &self,
        place: Place<'_>,
        path: &str,
        limit: usize,
    ) -> Result<Page, Unreached> {
        let Place { namespace, pod, port } = place;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let exchange = async {
            let mut forwarder = pods.portforward(pod, &[port]).await.map_err(refused_forward)?;
            let lost = || Unreached::NoAnswer("the forwarded port was taken".to_owned());
            let stream = forwarder.take_stream(port).ok_or_else(lost)?;
            let broken = forwarder.take_error(port);
            let outcome = tokio::select! {
                biased;
                Some(error) = async { broken?.await } => Err(Unreached::NoAnswer(shortened(&error))),
                outcome = get(stream, path, limit) => outcome,
            };
            forwarder.abort();
            outcome
        };
        self.within(exchange).await
    }

    async fn within(
        &self,
        exchange: impl Future<Output = Result<Page, Unreached>>,
    ) -> Result<Page, Unreached> {
        tokio::time::timeout(self.patience, exchange).await.unwrap_or(Err(Unreached::Late(self.patience)))
    }
}

/// Does something for each, [`AT_ONCE`] at the same time, and gives the outcomes as they come.
pub(crate) fn each<I, F, T>(items: I, what: impl Fn(I::Item) -> F) -> impl Stream<Item = T>
where
    I: IntoIterator,
    F: Future<Output = T>,
{
    stream::iter(items.into_iter().map(what)).buffer_unordered(AT_ONCE)
}

fn refused_forward(error: kube::Error) -> Unreached {
    match error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            Unreached::Forbidden(status.message.clone())
        }
        kube::Error::Api(status) if is_kubelets(&status.message) => {
            Unreached::Kubelet(shortened(&status.message))
        }
        kube::Error::Api(status) => Unreached::NoAnswer(shortened(&status.message)),
        other => Unreached::NoAnswer(chain(&other)),
    }
}

/// The API server says so when it cannot connect to a kubelet.
fn is_kubelets(message: &str) -> bool {
    message.contains("error dialing backend") || message.contains(":10250")
}

/// One request over a connection that is already there.
async fn get<S>(stream: S, path: &str, limit: usize) -> Result<Page, Unreached>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let gone = |error: hyper::Error| Unreached::NoAnswer(chain(&error));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(gone)?;
    let request = Request::get(path).header("host", "localhost").header("connection", "close");
    let request =
        request.body(Empty::<Bytes>::new()).map_err(|error| Unreached::NoAnswer(error.to_string()))?;
    let answer = async { page(sender.send_request(request).await.map_err(gone)?, limit).await };
    // The connection carries the answer; when it ends first, what it carried is still to be read.
    let driven = async {
        let _ = connection.await;
        std::future::pending().await
    };
    tokio::select! {
        answer = answer => answer,
        never = driven => never,
    }
}

async fn page<B>(response: Response<B>, limit: usize) -> Result<Page, Unreached>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let status = response.status();
    let date =
        response.headers().get(http::header::DATE).and_then(|date| date.to_str().ok()).and_then(http_date);
    let collected = Limited::new(response.into_body(), limit).collect().await;
    let body = match collected {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => return Err(Unreached::TooLong(limit)),
        Err(error) => return Err(Unreached::NoAnswer(error.to_string())),
    };
    if status == StatusCode::OK {
        return Ok(Page { body, date });
    }
    Err(no_page(status.as_u16(), &String::from_utf8_lossy(&body)))
}

/// What an answer other than 200 means. The API server's own answers are a Status, or a sentence of its proxy; those of the mesh's
/// programs are neither.
fn no_page(status: u16, body: &str) -> Unreached {
    let of_api_server = serde_json::from_str::<Value>(body).ok().filter(|answer| answer["kind"] == "Status");
    let message = of_api_server.as_ref().and_then(|answer| answer["message"].as_str());
    match (status, message) {
        (401 | 403, Some(message)) => Unreached::Forbidden(shortened(message)),
        (_, Some(message)) => Unreached::NoAnswer(shortened(message)),
        (502..=504, None) if body.to_lowercase().starts_with("error trying to reach") => {
            Unreached::NoAnswer(shortened(body))
        }
        _ => Unreached::NoPage { status, words: shortened(body) },
    }
}

/// The time of a `date` header, such as `Mon, 30 Nov 2026 04:13:48 GMT`.
pub(crate) fn http_date(text: &str) -> Option<Timestamp> {
    let plain = text.trim().strip_suffix("GMT")?;
    let parsed = rfc2822::DateTimeParser::new().parse_timestamp(format!("{plain}+0000"));
    parsed.ok()
}

/// On one line, and not the whole of a page.
fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_WORDS) {
        Some((at, _)) => format!("{} ...", &line[..at]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn dates_of_http() {
        let date = http_date("Mon, 30 Nov 2026 04:13:48 GMT").unwrap();
        assert_eq!(date.to_string(), "2026-11-30T04:13:48Z");
        assert_eq!(http_date("yesterday"), None);
    }

    #[test]
    fn a_kubelet_that_is_away_is_told_from_a_pod_that_does_not_listen() {
        let status = |code, message: &str| {
            let status = serde_json::json!({"code": code, "message": message, "status": "Failure"});
            refused_forward(kube::Error::Api(serde_json::from_value(status).unwrap()))
        };
        let dial = "error dialing backend: dial tcp 198.18.0.12:10250: connect: connection refused";
        assert!(matches!(status(500, dial), Unreached::Kubelet(words) if words.contains("refused")));
        assert!(matches!(status(403, "pods/portforward is forbidden"), Unreached::Forbidden(_)));
        assert!(matches!(status(404, "pods \"x\" not found"), Unreached::NoAnswer(_)));
    }

    #[test]
    fn what_the_api_server_says_is_told_from_what_the_pod_says() {
        let status = r#"{"kind":"Status","apiVersion":"v1","message":"pods \"x\" is forbidden","code":403}"#;
        assert!(matches!(no_page(403, status), Unreached::Forbidden(words) if words.contains("forbidden")));
        let away = "Error trying to reach service: 'dial tcp 100.64.1.2:15014: connect: connection refused'";
        assert!(matches!(no_page(503, away), Unreached::NoAnswer(_)));
        assert!(matches!(no_page(503, "pending:\nthe proxy\n"), Unreached::NoPage { status: 503, .. }));
        assert!(matches!(no_page(403, "no"), Unreached::NoPage { .. }));
    }

    async fn answered(text: &'static str, limit: usize) -> Result<Page, Unreached> {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let serve = async {
            let mut head = [0; 1024];
            let read = far.read(&mut head).await.unwrap();
            assert!(head[..read].starts_with(b"GET /x HTTP/1.1\r\n"));
            far.write_all(text.as_bytes()).await.unwrap();
            drop(far);
        };
        tokio::join!(get(near, "/x", limit), serve).0
    }

    #[tokio::test]
    async fn a_page_comes_over_a_connection_that_ends_after_it() {
        let page = answered("HTTP/1.1 200 OK\r\ndate: Mon, 30 Nov 2026 04:13:48 GMT\r\n\r\n{\"a\":1}", 100)
            .await
            .unwrap();
        assert_eq!(page.json::<Value>().unwrap()["a"], 1);
        assert!(page.date.is_some());
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
        assert_eq!(&answered(chunked, 100).await.unwrap().body[..], b"{}");
    }

    #[tokio::test]
    async fn what_is_no_page_says_what_it_is() {
        let refused =
            answered("HTTP/1.1 400 Bad Request\r\ncontent-length: 4\r\n\r\nno\n\n", 100).await.unwrap_err();
        assert_eq!(refused, Unreached::NoPage { status: 400, words: "no".to_owned() });
        let long = answered("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlong", 3).await.unwrap_err();
        assert_eq!(long, Unreached::TooLong(3));
        assert!(matches!(answered("", 100).await.unwrap_err(), Unreached::NoAnswer(_)));
    }
}
