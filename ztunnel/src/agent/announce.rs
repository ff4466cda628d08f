//! What the CNI plugin asks, over a Unix socket (C16, C17): one request a connection, answered when the pod is enrolled or never will be.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use culvert_runtime::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::enrol::Enroller;
use super::metrics::AgentMetrics;
use super::plan::Enrolled;
use super::source::{Announced, Source, View};
use crate::agent::attest::Rules;
use crate::cni::{AddRequest, ENROL, MAX_REQUEST, PATH};

/// Pods of one node whose sandboxes are made at once, at most: kubelet starts tens. Beyond, the plugin is told to come again.
const WAITING: usize = 256;
/// A request comes in one piece.
const READ: Duration = Duration::from_secs(5);
/// A pod that may start waits so long for its report to be written: when it is ready, peers know that it speaks HBONE, and before that some
/// would speak plaintext to it. An API server that is slow is waited for; one that is away keeps nobody from starting, and tells no peer
/// of the pod either.
const REPORT: Duration = Duration::from_secs(10);

/// A pod that may not start yet.
#[derive(Debug)]
pub struct Waiter {
    pod: Announced,
    since: Instant,
    answer: oneshot::Sender<Result<(), String>>,
}

/// The pods that wait.
#[derive(Debug)]
pub struct Waiters {
    arrivals: mpsc::Receiver<Waiter>,
    waiting: Vec<Waiter>,
    host_proc: PathBuf,
}

impl Waiters {
    /// Listens; only the node's root may connect. `host_proc` is where the node's proc file system is.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(
        socket: &Path,
        host_proc: &Path,
        tasks: &Tasks,
        metrics: &AgentMetrics,
    ) -> io::Result<Self> {
        if let Some(dir) = socket.parent() {
            std::fs::create_dir_all(dir)?;
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let (queue, arrivals) = mpsc::channel(WAITING);
        tasks.spawn("plugin accept", accept(listener, queue, tasks.clone(), metrics.clone()));
        Ok(Self { arrivals, waiting: Vec::new(), host_proc: host_proc.to_owned() })
    }

    /// Nobody ever asks.
    pub fn none() -> Self {
        Self { arrivals: mpsc::channel(1).1, waiting: Vec::new(), host_proc: PathBuf::new() }
    }

    /// Resolves when a pod arrived.
    pub async fn arrival(&mut self) {
        if self.waiting.len() >= WAITING {
            return std::future::pending().await;
        }
        match self.arrivals.recv().await {
            Some(waiter) => self.admit(waiter),
            None => std::future::pending().await,
        }
    }

    fn admit(&mut self, mut waiter: Waiter) {
        waiter.pod.netns = as_seen_here(waiter.pod.netns, &self.host_proc);
        self.waiting.push(waiter);
    }

    /// Before a pass: what was announced is taken in.
    pub fn announce(&mut self, source: &mut Source) {
        while self.waiting.len() < WAITING
            && let Ok(waiter) = self.arrivals.try_recv()
        {
            self.admit(waiter);
        }
        for waiter in &self.waiting {
            source.announce(&waiter.pod);
        }
    }

    /// After a pass over `view`: whoever may start is told, and whoever waited too long that it may not.
    pub fn answer<R: Rules>(&mut self, source: &mut Source, view: &View, enroller: &Enroller<R>) {
        for waiter in std::mem::take(&mut self.waiting) {
            let waited = waiter.since.elapsed();
            let verdict = match source.announce(&waiter.pod) {
                None => Err("no such pod of this node is known to the API server"),
                Some(uid) => may_start(&uid, &waiter.pod.netns, view, enroller.progress(&uid))
                    .and_then(|()| is_reported(waited, enroller.reports().is_said(&uid))),
            };
            match verdict {
                Err(_) if waited < ENROL => self.waiting.push(waiter),
                // Who has hung up is not told.
                verdict => drop(waiter.answer.send(verdict.map_err(str::to_owned))),
            }
        }
    }
}

/// Some runtimes name a pod's namespace by a process in it, on the node.
fn as_seen_here(netns: PathBuf, host_proc: &Path) -> PathBuf {
    match netns.strip_prefix("/proc") {
        Ok(of_process) => host_proc.join(of_process),
        Err(_) => netns,
    }
}

/// Whether a pod may start after a pass over `view`. Only one that the pass itself found to stay outside may without rules: another
/// may have become known after it, or not have been found by it.
fn may_start(uid: &str, netns: &Path, view: &View, progress: Option<&Enrolled>) -> Result<(), &'static str> {
    match progress {
        None if view.others.iter().any(|other| other.uid == uid) => Ok(()),
        None => Err("whether it is to be enrolled is not known yet"),
        Some(it) if !it.rules_installed => Err("its rules cannot be written"),
        Some(it) if it.pod.netns != netns => Err("it has another namespace"),
        Some(it) if !it.acknowledged => Err("no proxy has acknowledged it"),
        Some(_) => Ok(()),
    }
}

fn is_reported(waited: Duration, said: bool) -> Result<(), &'static str> {
    if said || waited >= REPORT { Ok(()) } else { Err("its report is not written yet") }
}

async fn accept(listener: UnixListener, queue: mpsc::Sender<Waiter>, tasks: Tasks, metrics: AgentMetrics) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if tasks.len() < 4 * WAITING => {
                let (queue, metrics) = (queue.clone(), metrics.clone());
                tasks.spawn("plugin request", async move {
                    if let Err(error) = serve(stream, &queue, &metrics).await {
                        tracing::debug!(%error, "the CNI plugin hung up");
                    }
                });
            }
            Ok(_) => tracing::warn!("too many requests of the CNI plugin at once"),
            Err(error) => {
                tracing::warn!(%error, "the CNI plugin cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(
    mut stream: UnixStream,
    queue: &mpsc::Sender<Waiter>,
    metrics: &AgentMetrics,
) -> io::Result<()> {
    let read = tokio::time::timeout(READ, read(&mut stream)).await;
    let (code, text) = match read.map_err(io::Error::from).flatten() {
        Err(error) => (400, error.to_string()),
        Ok(request) => match enrolled(request, queue).await {
            Ok(()) => (200, String::new()),
            Err(why) => (503, why),
        },
    };
    metrics.plugin_answered(code);
    let length = text.len();
    let answer = format!("HTTP/1.1 {code} \r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{text}");
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

async fn enrolled(request: AddRequest, queue: &mpsc::Sender<Waiter>) -> Result<(), String> {
    let name = format!("{}/{}", request.pod_namespace, request.pod_name);
    let pod = Announced {
        key: (request.pod_namespace, request.pod_name),
        uid: request.pod_uid,
        netns: request.netns,
        ips: request.ips,
    };
    let (answer, answered) = oneshot::channel();
    let waiter = Waiter { pod, since: Instant::now(), answer };
    queue.try_send(waiter).map_err(|_| "too many pods start at once".to_owned())?;
    let outcome = answered.await.unwrap_or_else(|_| Err("the agent ends".to_owned()));
    if let Err(why) = &outcome {
        tracing::warn!(pod = name, why, "a pod may not start");
    }
    outcome
}

/// The part of HTTP/1.1 that the plugin speaks: one `POST` with a length.
async fn read(stream: &mut UnixStream) -> io::Result<AddRequest> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut buffer = Vec::new();
    let mut taken = stream.take(MAX_REQUEST as u64);
    loop {
        if let Some(end) = buffer.windows(4).position(|it| it == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
            if !head.starts_with(&format!("post {PATH} ")) {
                return Err(bad("only POST /cmdadd is known"));
            }
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
            let length = length.ok_or_else(|| bad("a length is missing"))?;
            if let Some(body) = buffer.get(end + 4..end.saturating_add(4).saturating_add(length)) {
                return serde_json::from_slice(body).map_err(io::Error::from);
            }
        }
        if taken.read_buf(&mut buffer).await? == 0 {
            return Err(bad("the request is cut off or too long"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::source::Other;
    use super::*;

    async fn post(socket: &Path, text: String) -> String {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn request() -> String {
        let body = r#"{"Netns":"/run/netns/x","PodName":"a","PodNamespace":"shop","IPs":["100.64.1.2"]}"#;
        format!("POST /cmdadd HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    /// C17: nothing known is not the same as known to stay outside.
    #[test]
    fn a_pod_that_the_pass_did_not_see_may_not_start() {
        let netns = Path::new("/run/netns/x");
        let mut view = View { complete: true, ..View::default() };
        assert!(may_start("a", netns, &view, None).is_err());
        view.others.push(Other { uid: "a".into(), netns: netns.into(), excluded: false });
        assert_eq!(may_start("a", netns, &view, None), Ok(()));
        assert!(may_start("b", netns, &view, None).is_err());
    }

    /// C31: peers know of it before it is ready, as far as that does not depend on an API server that is away.
    #[test]
    fn a_pod_waits_for_its_report_but_not_for_ever() {
        assert_eq!(is_reported(Duration::ZERO, true), Ok(()));
        assert!(is_reported(REPORT / 2, false).is_err());
        assert_eq!(is_reported(REPORT, false), Ok(()));
    }

    /// C16: a runtime without mounted namespaces.
    #[test]
    fn a_namespace_named_by_a_process_is_looked_up_in_the_nodes_proc() {
        let seen = |path: &str| as_seen_here(path.into(), Path::new("/host/proc"));
        assert_eq!(seen("/proc/42/ns/net"), Path::new("/host/proc/42/ns/net"));
        assert_eq!(seen("/var/run/netns/cni-1"), Path::new("/var/run/netns/cni-1"));
    }

    /// C16, C17, C22.
    #[tokio::test]
    async fn the_plugin_hears_what_becomes_of_the_pod() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/s");
        let tasks = Tasks::new("test");
        let mut waiters =
            Waiters::listen(&socket, Path::new("/host/proc"), &tasks, &AgentMetrics::unread()).unwrap();
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for (verdict, code) in [(Ok(()), "200"), (Err("no proxy".to_owned()), "503")] {
            let asked = post(&socket, request());
            let answered = async {
                waiters.arrival().await;
                let waiter = waiters.waiting.pop().unwrap();
                assert_eq!(waiter.pod.key, ("shop".to_owned(), "a".to_owned()));
                waiter.answer.send(verdict).unwrap();
            };
            let (answer, ()) = tokio::join!(asked, answered);
            assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
        }
        for wrong in [
            "GET / HTTP/1.1\r\n\r\n",
            "POST /cmdadd HTTP/1.1\r\n\r\n",
            "POST /cmdadd HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
        ] {
            assert!(post(&socket, wrong.to_owned()).await.starts_with("HTTP/1.1 400 "), "{wrong:?}");
        }
        tasks.abort_all();
    }
}
