//! Client and server together over gRPC on an in-memory transport.

mod world;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use culvert_proto::discovery::{DeltaDiscoveryRequest, Node};
use culvert_runtime::backoff::Bounds;
use culvert_runtime::drain;
use culvert_runtime::tasks::{Tasks, Waited};
use culvert_xds::client::{AdsClient, ClientConfig, Disconnect, Event};
use culvert_xds::service::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use world::{A, B, Counts, Host, LONG, Program, channel, eventually, set};

#[tokio::test]
async fn full_sync_delta_and_status() {
    let mut host = Host::new(set(1, &[("x", "1"), ("y", "1")], &[("p", "1")]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &[("x", "1"), ("y", "1")]).await;
    assert_eq!((program.commits, program.received), (1, 3), "both types in one commit");
    assert_eq!(program.committed[B].len(), 1);
    assert!(program.counts.bytes.load(Ordering::SeqCst) > 0);

    host.sets.send_replace(set(2, &[("x", "2")], &[("p", "1")]));
    program.until_committed(A, &[("x", "2")]).await;
    assert_eq!((program.commits, program.received), (2, 4));

    let server = host.server().clone();
    eventually("both types acknowledged", || {
        server.clients().iter().any(|client| {
            client.types.len() == 2 && client.types.values().all(|status| status.acked_generation == Some(2))
        })
    })
    .await;
    let clients = server.clients();
    assert_eq!(
        (clients[0].node_id.as_str(), clients[0].peer.name.as_str(), clients[0].generations),
        ("node-1", "node-1", true)
    );
    let json = serde_json::to_value(&clients).unwrap();
    assert_eq!(json[0]["types"][A]["acked_generation"], 2);
    program.stop().await;
    eventually("the stream is gone", || server.clients().is_empty()).await;
    drop(server);
    host.stop().await;
}

/// Z98: a message over the bound is not taken into memory; what is held stays, and the next one that fits is applied.
#[tokio::test]
async fn a_message_over_the_bound_changes_nothing() {
    assert_eq!(culvert_xds::client::MAX_MESSAGE_BYTES, 200 << 20);
    let mut host = Host::new(set(1, &[("x", "1")], &[("p", "1")]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &[("x", "1")]).await;
    let fits = "y".repeat((1 << 20) - 1_000);
    host.sets.send_replace(set(2, &[("x", &fits)], &[("p", "1")]));
    program.until_committed(A, &[("x", &fits)]).await;

    host.sets.send_replace(set(3, &[("x", &"z".repeat(1 << 20))], &[("p", "1")]));
    let reason = program.until_disconnected().await;
    let over =
        |reason: &Disconnect| matches!(reason, Disconnect::Stream { code: tonic::Code::OutOfRange, .. });
    assert!(over(&reason), "{reason:?}");
    assert_eq!(program.committed[A]["x"], fits);

    host.sets.send_replace(set(4, &[("x", "4")], &[("p", "1")]));
    program.until_committed(A, &[("x", "4")]).await;
    program.stop().await;
    host.stop().await;
}

/// Z96, R02.
#[tokio::test]
async fn a_restarted_server_with_the_same_content_sends_no_resources() {
    let mut host = Host::new(set(9, &[("x", "1"), ("y", "1")], &[("p", "1")]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(B, &[("p", "1")]).await;
    let server = host.server().clone();
    eventually("acknowledged", || {
        server.clients()[0].types.values().all(|status| status.acked_generation == Some(9))
    })
    .await;
    drop(server);
    let before = host.counts.resources.load(Ordering::SeqCst);

    host.stop().await;
    program.until_disconnected().await;
    assert_eq!(program.committed[A].len(), 2, "what is known stays in force");
    host.sets.send_replace(set(1, &[("x", "1"), ("y", "1")], &[("p", "1")]));
    host.start();
    let commits = program.commits;
    while program.commits == commits {
        program.step().await;
    }
    assert_eq!(host.counts.resources.load(Ordering::SeqCst), before, "nothing was sent again");
    assert_eq!(program.received, 3);

    // What changed while nobody was connected comes as a delta, deletions included.
    host.stop().await;
    program.until_disconnected().await;
    host.sets.send_replace(set(2, &[("x", "2")], &[("p", "1")]));
    host.start();
    program.until_committed(A, &[("x", "2")]).await;
    assert_eq!(program.received, 4);
    assert!(program.counts.disconnects.load(Ordering::SeqCst) >= 2);
    program.stop().await;
    host.stop().await;
}

/// R01, R02, U35: the request that names all of a large mesh is longer than gRPC's usual 4 MiB, is taken, and spares sending
/// the mesh again.
#[tokio::test]
async fn a_large_mesh_is_not_sent_again_after_a_reconnection() {
    let names: Vec<_> = (0..60_000)
        .map(|index| format!("Kubernetes//Pod/some-namespace/some-deployment-7d9f8b6c5-{index:06}"))
        .collect();
    let mut pairs: Vec<_> = names.iter().map(|name| (name.as_str(), "1")).collect();
    let mut host = Host::new(set(1, &[], &[]));
    host.stop().await;
    host.limits.stream.push_bytes = 1 << 20;
    host.sets.send_replace(set(1, &pairs, &[("p", "1")]));
    host.start();
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &pairs).await;
    let before = host.counts.resources.load(Ordering::SeqCst);

    host.stop().await;
    program.until_disconnected().await;
    pairs[7].1 = "2";
    host.sets.send_replace(set(2, &pairs, &[("p", "1")]));
    host.start();
    program.until_committed(A, &pairs).await;
    assert_eq!(host.counts.resources.load(Ordering::SeqCst) - before, 1, "what changed, and nothing else");
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn a_nack_names_the_bad_one_and_is_not_a_loop() {
    let mut host = Host::new(set(1, &[("good", "1"), ("wrong", "bad")], &[]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &[("good", "1")]).await;
    let server = host.server().clone();
    eventually("the refusal is on record", || {
        server.clients()[0].types.get(A).and_then(|status| status.last_nack.as_deref())
            == Some("wrong: does not decode")
    })
    .await;
    // Mended, it is sent; the good one is not sent again, nor was the bad one.
    host.sets.send_replace(set(2, &[("good", "1"), ("wrong", "right")], &[]));
    program.until_committed(A, &[("good", "1"), ("wrong", "right")]).await;
    assert_eq!(host.counts.resources.load(Ordering::SeqCst), 3);
    assert_eq!(server.clients()[0].types[A].nacked, 1);
    drop(server);
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn a_large_push_comes_in_parts_and_is_committed_once() {
    let names: Vec<_> = (0..200).map(|index| format!("resource-{index:03}")).collect();
    let pairs: Vec<_> = names.iter().map(|name| (name.as_str(), "some content")).collect();
    let mut host = Host::new(set(1, &pairs, &[("p", "1")]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &pairs).await;
    assert_eq!(program.commits, 1);
    assert!(host.counts.pushes.load(Ordering::SeqCst) > 10, "1,000 bytes a part");
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn strangers_and_too_many_are_refused() {
    let mut host = Host::new(set(1, &[], &[]));
    let mut stranger = Program::start(&host, "node-2");
    let reason = stranger.until_disconnected().await;
    assert!(matches!(&reason, Disconnect::Stream { code: tonic::Code::PermissionDenied, .. }), "{reason}");
    stranger.stop().await;

    let mut streams = Vec::new();
    let mut codes = Vec::new();
    for _ in 0..3 {
        let mut client = AggregatedDiscoveryServiceClient::new(channel(host.listener.clone()).await.unwrap());
        let (requests, body) = mpsc::channel::<DeltaDiscoveryRequest>(1);
        let mut request = tonic::Request::new(ReceiverStream::new(body));
        request.metadata_mut().insert("authorization", "Bearer node-1".parse().unwrap());
        match client.delta_aggregated_resources(request).await {
            Ok(stream) => streams.push((requests, stream)),
            Err(status) => codes.push(status.code()),
        }
    }
    assert_eq!((streams.len(), codes), (2, vec![tonic::Code::ResourceExhausted]));

    let mut client = AggregatedDiscoveryServiceClient::new(channel(host.listener.clone()).await.unwrap());
    let none = tokio_stream::empty::<DeltaDiscoveryRequest>();
    assert_eq!(
        client.delta_aggregated_resources(none).await.unwrap_err().code(),
        tonic::Code::Unauthenticated
    );
    drop((streams, client));
    host.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_answers_loses_its_stream() {
    let mut host = Host::new(set(1, &[("x", "1")], &[]));
    let mut program = Program::start(&host, "node-1");
    let mut unanswered = Vec::new();
    let reason = loop {
        match tokio::time::timeout(2 * host.limits.answer, program.events.recv()).await.unwrap().unwrap() {
            Event::Delivery(_, responder) => unanswered.push(responder),
            Event::Disconnected { reason } => break reason,
            Event::Connected => {}
        }
    };
    assert!(matches!(&reason, Disconnect::Stream { code: tonic::Code::DeadlineExceeded, .. }), "{reason}");
    drop(unanswered);
    program.stop().await;
    host.stop().await;
}

/// D16: a stream is ended for its age, and the next one is sent nothing that the client has.
#[tokio::test(start_paused = true)]
async fn a_stream_ends_at_its_age_and_the_next_brings_nothing_again() {
    let mut host = Host::new(set(1, &[("x", "1")], &[]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &[("x", "1")]).await;
    let (age, began) = (host.limits.max_age, tokio::time::Instant::now());
    loop {
        match tokio::time::timeout(2 * age, program.events.recv()).await.unwrap().unwrap() {
            Event::Disconnected { reason } => {
                break assert!(matches!(reason, Disconnect::Complete), "{reason}");
            }
            Event::Delivery(delivery, responder) => program.deliver(delivery, responder),
            Event::Connected => {}
        }
    }
    let lived = began.elapsed();
    assert!(lived > age.mul_f64(0.89) && lived < age.mul_f64(1.11), "{lived:?}");
    host.sets.send_replace(set(2, &[("x", "1"), ("y", "2")], &[]));
    program.until_committed(A, &[("x", "1"), ("y", "2")]).await;
    assert_eq!(program.received, 2, "x came once");
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn a_dropped_responder_refuses() {
    let mut host = Host::new(set(1, &[("x", "1")], &[]));
    let mut program = Program::start(&host, "node-1");
    loop {
        match program.event().await {
            Event::Delivery(delivery, responder) if delivery.type_url == A => break drop(responder),
            _ => {}
        }
    }
    let server = host.server().clone();
    eventually("the refusal arrived", || {
        server.clients()[0].types.get(A).is_some_and(|status| status.nacked == 1)
    })
    .await;
    drop(server);
    program.stop().await;
    host.stop().await;
}

/// Z98.
/// Random changes and restarts, with the client at work all the time: in the end it has what is published.
#[tokio::test]
async fn churn_converges() {
    let names: Vec<_> = (0..30).map(|index| format!("name-{index}")).collect();
    for seed in 0..10 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut host = Host::new(set(1, &[], &[]));
        let mut program = Program::start(&host, "node-1");
        let mut last = (Vec::new(), Vec::new());
        for generation in 2..40 {
            let mut contents = || -> Vec<(&str, &str)> {
                let mut pair = |name| random.bool().then(|| (name, ["1", "2", "3"][random.usize(0..3)]));
                names.iter().filter_map(|name| pair(name.as_str())).collect()
            };
            last = (contents(), contents());
            host.sets.send_replace(set(generation, &last.0, &last.1));
            if random.u8(0..8) == 0 {
                host.stop().await;
                host.start();
            }
            for _ in 0..random.usize(0..4) {
                let _ = tokio::time::timeout(Duration::from_millis(1), program.step()).await;
            }
        }
        program.until_committed(A, &last.0).await;
        program.until_committed(B, &last.1).await;
        program.stop().await;
        host.stop().await;
    }
}

#[tokio::test]
async fn credentials_that_cannot_be_read_are_a_reason() {
    let mut host = Host::new(set(1, &[], &[]));
    let config = ClientConfig {
        connect: host.connect(),
        credentials: Arc::new(|| Err("no such token".into())),
        node: Node::default(),
        subscriptions: Vec::new(),
        backoff: Bounds::doubling(Duration::from_millis(1), Duration::from_millis(5)),
        random: fastrand::Rng::with_seed(1),
        max_message_bytes: 1 << 20,
        observer: Arc::new(Counts::default()),
    };
    let (sink, mut events) = mpsc::channel(1);
    let (_drain, watcher) = drain::channel();
    let tasks = Tasks::new("client");
    tasks.spawn("ads", AdsClient::new(config).run(sink, watcher));
    let Some(Event::Disconnected { reason }) = events.recv().await else { panic!("an event") };
    assert!(matches!(&reason, Disconnect::Credentials(text) if text == "no such token"), "{reason}");
    drop(events);
    tasks.close();
    assert_eq!(tasks.wait(LONG).await, Waited::Finished, "without a listener it ends");
    host.stop().await;
}
