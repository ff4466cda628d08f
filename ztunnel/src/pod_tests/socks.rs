//! SOCKS5 in a pod (Z01).

use std::sync::atomic::Ordering;

use super::*;
use crate::observe::limits::Limit;

const WEB: &str = "shop/web.shop.svc.cluster.local";

/// A service `web` of one plain endpoint, 127.0.0.9:8080, and everything else is 127.0.0.9 too.
struct Socks {
    world: World,
    app: TcpListener,
    dns: crate::dns::fake::Fake,
    dns_tasks: Tasks,
}

impl Socks {
    fn new() -> Self {
        let (authority, netns, dns_tasks) = (Authority::new(), namespace(), Tasks::new("dns"));
        let dns = fake_in(&netns, &dns_tasks, one);
        let (shared, drain) = shared_by(authority.clone(), Some(dns.address), &["--socks5".to_owned()]);
        let endpoint = serve(workload("shop", "web", &["127.0.0.9"]), WEB, &[(80, 8080)]);
        let endpoint = Workload { tunnel_protocol: TunnelProtocol::None, ..endpoint };
        shared.state.commit(snapshot([cart(), endpoint], [service(WEB, &["198.18.128.9"])]));
        let pod = Pod::start(shared, info("cart"), netns.clone()).unwrap();
        let world = World { authority, netns, pod, tasks: Tasks::new("test"), _drain: drain };
        let app = world.listen("127.0.0.9:8080");
        Self { world, app, dns, dns_tasks }
    }

    /// What a request is answered, and the connection.
    async fn ask(&self, host: &[u8], port: u16) -> (u8, TcpStream) {
        let mut stream = self.world.dial(None, "127.0.0.1:15080").await;
        let request = [&[5, 1, 0, 5, 1, 0], host, &port.to_be_bytes()].concat();
        stream.write_all(&request).await.unwrap();
        let mut answer = [0; 12];
        soon(stream.read_exact(&mut answer)).await.unwrap();
        assert_eq!((&answer[..3], &answer[4..]), (&[5, 0, 5][..], &[0, 1, 0, 0, 0, 0, 0, 0][..]));
        (answer[3], stream)
    }

    async fn end(self) {
        self.dns_tasks.abort_all();
        self.world.end().await;
    }
}

fn name(name: &str) -> Vec<u8> {
    [&[3, name.len() as u8], name.as_bytes()].concat()
}

/// Z01: by address, by a name of the mesh with and without search domains, and by a name that only the upstream knows.
#[tokio::test]
async fn by_address_and_by_name() {
    let socks = Socks::new();
    for (host, port, asked) in [
        (vec![1, 198, 18, 128, 9], 80, 0),
        (name("198.18.128.9"), 80, 0),
        (name("web.shop.svc.cluster.local"), 80, 0),
        (name("web.shop"), 80, 0),
        (name("web"), 80, 0),
        (name("www.example"), 8080, 1),
    ] {
        let ((reply, mut near), far) =
            soon(async { tokio::join!(socks.ask(&host, port), socks.app.accept()) }).await;
        assert_eq!(reply, 0, "{host:?}");
        let (mut far, _) = far.unwrap();
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        let mut heard = String::new();
        soon(far.read_to_string(&mut heard)).await.unwrap();
        assert_eq!(heard, "question");
        far.write_all(b"answer").await.unwrap();
        drop(far);
        heard.clear();
        soon(near.read_to_string(&mut heard)).await.unwrap();
        assert_eq!(heard, "answer");
        assert_eq!(socks.dns.asked.load(Ordering::Relaxed), asked, "{host:?}");
    }
    socks.end().await;
}

/// A destination that cannot be reached is said by the code for it, and the connection ends in an orderly way.
#[tokio::test]
async fn what_cannot_be_reached() {
    let socks = Socks::new();
    for (host, port, expected) in
        [(vec![1, 127, 0, 0, 9], 81, 5), (vec![1, 127, 0, 0, 9], 15008, 2), (name("web"), 81, 1)]
    {
        let (reply, mut stream) = soon(socks.ask(&host, port)).await;
        assert_eq!(reply, expected, "{host:?} {port}");
        assert_eq!(soon(stream.read(&mut [0])).await.unwrap(), 0);
    }
    socks.end().await;
}

/// Who asks for nothing is reset after 10 s.
#[tokio::test]
async fn a_greeting_has_its_time() {
    let socks = Socks::new();
    let mut silent = socks.world.dial(None, "127.0.0.1:15080").await;
    silent.write_all(&[5, 1]).await.unwrap();
    soon(async {
        while socks.world.pod.places.used().0 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    assert!(silent.read_u8().await.is_err());
    assert!(begun.elapsed() <= Duration::from_secs(11), "{:?}", begun.elapsed());
    assert_eq!(socks.world.pod.shared.observer.metrics.limits.times(Limit::HandshakeTime), 1);
    socks.end().await;
}
