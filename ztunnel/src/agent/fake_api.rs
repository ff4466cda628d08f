//! An API server of few words for tests: it remembers what it was asked, answers as it is told, and shows watches what it is given.

use std::sync::Arc;

use culvert_runtime::tasks::Tasks;
use kube::{Client, Config};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub method: String,
    /// Without the query.
    pub path: String,
    pub query: String,
    pub body: String,
}

impl Asked {
    pub fn is_watch(&self) -> bool {
        self.query.contains("watch=true")
    }
}

type Answer = dyn Fn(&Asked) -> (u16, Value) + Send + Sync;

/// Ends when dropped.
pub struct FakeApi {
    pub client: Client,
    pub url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    shown: broadcast::Sender<(String, Value)>,
    tasks: Tasks,
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

impl FakeApi {
    /// Watches are accepted and show nothing by themselves, all else is answered by `answer`.
    pub async fn start(answer: impl Fn(&Asked) -> (u16, Value) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let client = Client::try_from(Config::new(url.parse().unwrap())).unwrap();
        let (shown, _) = broadcast::channel(64);
        let (tasks, asked) = (Tasks::new("fake API server"), Arc::new(Mutex::default()));
        let server = Server { answer: Arc::new(answer), asked: Arc::clone(&asked), shown: shown.clone() };
        let of_connections = tasks.clone();
        tasks.spawn("accept", async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                of_connections.spawn("connection", async move { drop(server.serve(stream).await) });
            }
        });
        Self { client, url, asked, shown, tasks }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().clone()
    }

    /// Shows an event to whoever watches the path.
    pub fn show(&self, path: &str, kind: &str, object: &Value) {
        self.shown.send((path.to_owned(), json!({"type": kind, "object": object}))).unwrap();
    }

    /// Until it was asked something like this.
    pub async fn until(&self, condition: impl Fn(&Asked) -> bool) {
        while !self.asked().iter().any(&condition) {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }
}

/// How the API server refuses.
pub fn refusal(code: u16) -> (u16, Value) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "No", "code": code});
    (code, status)
}

/// An empty list.
pub fn list(items: &[Value]) -> (u16, Value) {
    (200, json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}))
}

#[derive(Clone)]
struct Server {
    answer: Arc<Answer>,
    asked: Arc<Mutex<Vec<Asked>>>,
    shown: broadcast::Sender<(String, Value)>,
}

impl Server {
    async fn serve(self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut buffer = Vec::new();
        loop {
            let Some(asked) = read(&mut stream, &mut buffer).await? else { return Ok(()) };
            let mut events = self.shown.subscribe();
            self.asked.lock().push(asked.clone());
            if asked.is_watch() {
                let head =
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
                stream.write_all(head.as_bytes()).await?;
                while let Ok((path, event)) = events.recv().await {
                    if path == asked.path {
                        let line = format!("{event}\n");
                        stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await?;
                    }
                }
                return Ok(());
            }
            let (code, body) = (self.answer)(&asked);
            let body = body.to_string();
            let head = format!(
                "HTTP/1.1 {code} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(format!("{head}{body}").as_bytes()).await?;
        }
    }
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<Option<Asked>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|it| it == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
            });
            let whole = end + 4 + length.unwrap_or_default();
            if buffer.len() >= whole {
                let body = String::from_utf8_lossy(&buffer[end + 4..whole]).into_owned();
                buffer.drain(..whole);
                let mut words = head.split(' ');
                let (method, target) = (words.next().unwrap(), words.next().unwrap());
                let (path, query) = target.split_once('?').unwrap_or((target, ""));
                let text = str::to_owned;
                return Ok(Some(Asked { method: text(method), path: text(path), query: text(query), body }));
            }
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}
