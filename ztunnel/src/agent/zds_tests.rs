//! The protocol's bounds (C64), in paused time over real sockets.

use std::sync::Arc;
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::seqpacket::{MAX_MESSAGE, SeqPacket, SeqPacketListener};
use culvert_proto::workload::zds::{Version, WorkloadInfo, ZdsHello};
use culvert_runtime::tasks::Tasks;
use prost::Message;
use tokio::time::Instant;

use super::metrics::AgentMetrics;
use super::{AddError, ZdsServer};

struct Agent {
    server: Arc<ZdsServer>,
    metrics: AgentMetrics,
    tasks: Tasks,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        let (tasks, metrics, dir) = (Tasks::new("zds"), AgentMetrics::unread(), tempfile::tempdir().unwrap());
        let server = ZdsServer::new(tasks.clone(), metrics.clone());
        let listener = SeqPacketListener::bind(dir.path().join("sock")).unwrap();
        tasks.spawn("accept", server.clone().serve(listener));
        Self { server, metrics, tasks, dir }
    }

    async fn connect(&self) -> SeqPacket {
        SeqPacket::connect(self.dir.path().join("sock")).await.unwrap()
    }

    async fn hello(&self) -> SeqPacket {
        let proxy = self.connect().await;
        let hello = ZdsHello { version: Version::V1.into() };
        proxy.send(&hello.encode_to_vec(), None).await.unwrap();
        proxy
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

/// C64: at most five connections a second are taken, also after a long time in which there were none.
#[tokio::test(start_paused = true)]
async fn connections_are_taken_at_a_pace() {
    let agent = Agent::start();
    for pause in [0, 3600] {
        tokio::time::sleep(Duration::from_secs(pause)).await;
        let begun = Instant::now();
        let mut proxies = Vec::new();
        for _ in 0..6 {
            proxies.push(agent.hello().await);
        }
        let mut taken = Vec::new();
        for proxy in &proxies {
            // The end of the snapshot.
            proxy.recv().await.unwrap().unwrap();
            taken.push(begun.elapsed());
        }
        for (first, sixth) in taken.iter().zip(taken.iter().skip(5)) {
            assert!(*sixth - *first >= Duration::from_secs(1), "{taken:?}");
        }
        assert!(taken[5] <= Duration::from_millis(1300), "{taken:?}");
    }
}

/// C64: who does not say hello, or does not answer, is given up after 5 s, and what was asked for fails.
#[tokio::test(start_paused = true)]
async fn who_does_not_answer_is_given_up_after_5_s() {
    let agent = Agent::start();
    let silent = agent.connect().await;
    let begun = Instant::now();
    assert!(silent.recv().await.unwrap().is_none());
    let waited = begun.elapsed();
    assert!((5.0..5.5).contains(&waited.as_secs_f64()), "{waited:?}");

    let deaf = agent.hello().await;
    deaf.recv().await.unwrap().unwrap();
    // It does not acknowledge the end of the snapshot, so it counts for nothing, but may be asked already.
    let netns = Arc::new(NetNs::current().unwrap());
    let begun = Instant::now();
    let error = agent.server.add("pod", WorkloadInfo::default(), netns).await.unwrap_err();
    assert!(matches!(error, AddError::Lost(_)), "{error}");
    let waited = begun.elapsed();
    assert!((4.5..5.5).contains(&waited.as_secs_f64()), "{waited:?}");
    assert!(deaf.recv().await.unwrap().is_none());
    assert_eq!(agent.metrics.connected.get(), 0);
    // The next one gets the pod with its snapshot.
    let next = agent.hello().await;
    let (_, descriptors) = next.recv().await.unwrap().unwrap();
    assert_eq!(descriptors.len(), 1);
}

/// C64: longer messages are refused by the sender, and end a connection on which they come. A pod whose names are so long fails by
/// itself.
#[tokio::test(start_paused = true)]
async fn messages_have_1024_bytes_at_most() {
    let agent = Agent::start();
    let proxy = agent.connect().await;
    let long = vec![8; MAX_MESSAGE + 1];
    assert!(proxy.send(&long, None).await.is_err());
    assert_eq!(MAX_MESSAGE, 1024);
    // By a socket that does not know the bound.
    let plain = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None).unwrap();
    let path = agent.dir.path().join("sock");
    plain.connect(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    plain.send(&long).unwrap();
    plain.set_nonblocking(true).unwrap();
    let begun = Instant::now();
    let mut buf = [std::mem::MaybeUninit::uninit(); 8];
    while plain.recv(&mut buf).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(4), "it is not ended at once");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
