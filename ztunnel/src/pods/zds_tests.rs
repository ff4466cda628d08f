//! What an agent may not say (C70), and pods that are tried again (C69).

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::seqpacket::{SeqPacket, SeqPacketListener};
use culvert_proto::workload::zds::workload_request::Payload;
use culvert_proto::workload::zds::{
    AddWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    workload_response,
};
use culvert_runtime::tasks::Tasks;
use prost::Message;

use super::{PodInfo, Pods, ZdsError, run_zds};
use crate::authority::Authority;
use crate::pod_tests::shared;

fn request(payload: Payload) -> Vec<u8> {
    WorkloadRequest { payload: Some(payload) }.encode_to_vec()
}

fn add() -> Vec<u8> {
    let workload_info = Some(WorkloadInfo {
        name: "cart".into(),
        namespace: "shop".into(),
        service_account: "cart".into(),
        native_tunnel: false,
    });
    request(Payload::Add(AddWorkload { uid: "pod".into(), workload_info }))
}

/// C70: each of these ends the proxy's session with an error after which the process ends; none changes anything before.
#[tokio::test]
async fn what_breaks_the_protocol_ends_the_proxy() {
    let netns = NetNs::create().unwrap();
    let snapshot = request(Payload::SnapshotSent(SnapshotSent {}));
    let keep = request(Payload::Keep(KeepWorkload { uid: "pod".into() }));
    // A message, and whether a namespace comes with it.
    type Messages = Vec<(Vec<u8>, bool)>;
    let cases: [(&str, Messages); 5] = [
        ("cannot be decoded", vec![(vec![0xff; 9], false)]),
        ("empty or of a kind", vec![(vec![0x38, 1], false)]),
        ("without exactly one namespace", vec![(add(), false)]),
        ("after the snapshot", vec![(snapshot.clone(), false), (keep, false)]),
        ("cannot be decoded", vec![(snapshot, false), (vec![0x0a, 0x7f, 1], true)]),
    ];
    for (expected, messages) in cases {
        let (shared, _drain) = shared(&Authority::new(), None);
        let pods = Pods::new(shared);
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let listener = SeqPacketListener::bind(&socket).unwrap();
        let agent = async {
            let proxy = listener.accept().await.unwrap();
            proxy.recv().await.unwrap().unwrap();
            for (message, with_namespace) in &messages {
                proxy.send(message, with_namespace.then(|| netns.as_fd())).await.unwrap();
                // An acknowledgement, or the end.
                let _ = proxy.recv().await;
            }
        };
        let (ended, ()) = tokio::join!(run_zds(&socket, pods.clone()), agent);
        let error = ended.unwrap_err();
        assert!(matches!(&error, ZdsError::Protocol(why) if why.contains(expected)), "{error}");
        assert!(pods.all().is_empty());
    }
}

async fn acknowledged(agent: &SeqPacket) -> String {
    let (bytes, _) = agent.recv().await.unwrap().unwrap();
    match WorkloadResponse::decode(bytes.as_slice()).unwrap().payload.unwrap() {
        workload_response::Payload::Ack(ack) => ack.error,
    }
}

/// C69: a pod that cannot be served is refused to the agent and tried again after 5 s, and after 5 s more; until then the proxy is not
/// ready.
#[tokio::test(start_paused = true)]
async fn a_pod_that_cannot_be_served_is_tried_again_every_5_s() {
    let (shared, _drain) = shared(&Authority::new(), None);
    let pods = Pods::new(shared.clone());
    let tasks = Tasks::new("test");
    let dir = tempfile::tempdir().unwrap();
    let listener = SeqPacketListener::bind(dir.path().join("sock")).unwrap();
    let (path, followed) = (dir.path().join("sock"), pods.clone());
    tasks.spawn("zds", async move { drop(run_zds(&path, followed).await) });
    tasks.spawn("retry", pods.clone().retry_pending());
    let agent = listener.accept().await.unwrap();
    agent.recv().await.unwrap().unwrap();

    let netns = NetNs::create().unwrap();
    let taken = netns.run(|| std::net::TcpListener::bind("0.0.0.0:15008")).unwrap();
    agent.send(&add(), Some(netns.as_fd())).await.unwrap();
    let refused = tokio::time::Instant::now();
    assert!(acknowledged(&agent).await.to_lowercase().contains("in use"));
    agent.send(&request(Payload::SnapshotSent(SnapshotSent {})), None).await.unwrap();
    assert_eq!(acknowledged(&agent).await, "");
    let pending = || shared.readiness.pending();
    // Two tries fail: the port is free only after the second.
    for second in 1..=11 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(pending(), ["pods that cannot be served yet"], "{second}");
        assert!(pods.all().is_empty());
    }
    drop(taken);
    shared.readiness.ready().await;
    let waited = refused.elapsed();
    assert!((14.5..15.5).contains(&waited.as_secs_f64()), "{waited:?}");
    assert_eq!(pods.all().len(), 1);
    tasks.abort_all();
}

/// C64, C68: a pod with another namespace is acknowledged at once, though a connection of the old one goes on until its drain ends.
#[tokio::test]
async fn a_pod_that_is_replaced_drains_beside_the_rest() {
    let (shared, _drain) = shared(&Authority::new(), None);
    let pods = Pods::new(shared.clone());
    let info = PodInfo {
        name: "cart".into(),
        namespace: "shop".into(),
        service_account: "cart".into(),
        native_tunnel: false,
    };
    let [first, second] = std::array::from_fn(|_| {
        let netns = NetNs::create().unwrap();
        netns.run(|| std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status()).unwrap();
        Arc::new(netns)
    });
    pods.add("pod", info.clone(), first.clone()).await.unwrap();
    let old = pods.get("pod").unwrap();
    // Something of it goes on.
    let open = old.watcher();
    let begun = std::time::Instant::now();
    pods.add("pod", info, second).await.unwrap();
    assert!(begun.elapsed() < shared.config.drain_deadline() / 2, "{:?}", begun.elapsed());
    assert!(!Arc::ptr_eq(&old, &pods.get("pod").unwrap()));
    // It drains: it takes nothing new, and has not been cut.
    tokio::time::timeout(Duration::from_secs(5), open.started()).await.unwrap();
    assert!(begun.elapsed() < shared.config.drain_deadline());
}

/// Z54: a pod that ends tunnels itself has its inbound ports for itself, as our agent says or, beside another agent, the control plane;
/// what it sends is still the proxy's.
#[tokio::test]
async fn a_pod_that_ends_tunnels_itself_is_not_terminated() {
    use crate::world::{snapshot, workload};
    let (shared, _drain) = shared(&Authority::new(), None);
    let pods = Pods::new(shared.clone());
    let info = |native_tunnel| PodInfo {
        name: "cart".into(),
        namespace: "shop".into(),
        service_account: "cart".into(),
        native_tunnel,
    };
    let listens =
        |netns: &NetNs, port: u16| netns.run(|| std::net::TcpListener::bind(("0.0.0.0", port))).is_err();
    let netns = Arc::new(NetNs::create().unwrap());
    let own = netns.run(|| std::net::TcpListener::bind("0.0.0.0:15008")).unwrap();
    assert!(pods.add("said", info(false), netns.clone()).await.is_err());
    pods.add("said", info(true), netns.clone()).await.unwrap();
    let uid = pods.get("said").unwrap().workload_uid.clone();
    assert!(shared.local.only(&uid).is_none(), "it is not handed streams past its own tunnel");
    assert!(listens(&netns, 15001) && !listens(&netns, 15006));
    // It does so no more.
    drop(own);
    pods.add("said", info(false), netns.clone()).await.unwrap();
    assert!(listens(&netns, 15001) && listens(&netns, 15006) && listens(&netns, 15008));

    let native = culvert_model::workload::Workload {
        native_tunnel: true,
        ..workload("shop", "cart", &["100.64.1.9"])
    };
    shared.state.commit(snapshot([native], []));
    let netns = Arc::new(NetNs::create().unwrap());
    pods.add("known", info(false), netns.clone()).await.unwrap();
    assert!(listens(&netns, 15001) && !listens(&netns, 15006) && !listens(&netns, 15008));
}
