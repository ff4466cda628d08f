//! Ten thousand pods come, go, and come again with another uid and the same address, through plan, enroller, protocol and the proxy's own
//! registry, which opens every socket; afterwards nothing is left of them: no descriptor, socket, task, rule, report, nor entry in any
//! table. Only the rules are a fake, and the pods share one namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::redirect::{Established, RedirectConfig, RedirectError, Verdict};
use culvert_net::seqpacket::SeqPacketListener;
use culvert_runtime::tasks::{Tasks, Waited};
use parking_lot::Mutex;

use super::attest::{Found, Rules};
use super::enrol::Enroller;
use super::metrics::AgentMetrics;
use super::report::Reports;
use super::source::View;
use super::{Desired, ZdsServer};
use crate::authority::Authority;
use crate::pod_tests::shared;
use crate::pods::{Pods, run_zds};

/// Pods at once, each with a descriptor in the agent.
const AT_ONCE: usize = 200;
const ROUNDS: usize = 50;

/// Rules that exist only here.
#[derive(Clone, Debug, Default)]
struct Fake {
    inner: Arc<Mutex<FakeInner>>,
}

#[derive(Debug, Default)]
struct FakeInner {
    installed: BTreeMap<String, RedirectConfig>,
    namespaces: Vec<Weak<NetNs>>,
    installs: usize,
    probed: BTreeSet<SocketAddr>,
}

impl Rules for Fake {
    fn verify(&self, _: &NetNs, _: &RedirectConfig) -> Result<Verdict, RedirectError> {
        Ok(Verdict::Missing)
    }

    fn install(
        &self,
        uid: &str,
        netns: &Arc<NetNs>,
        rules: &RedirectConfig,
        _: Option<Established>,
    ) -> Result<(), RedirectError> {
        let mut inner = self.inner.lock();
        inner.installs += 1;
        inner.namespaces.push(Arc::downgrade(netns));
        inner.installed.insert(uid.to_owned(), rules.clone());
        Ok(())
    }

    fn check(&self, uid: &str, _: bool) -> Found {
        assert!(self.inner.lock().installed.contains_key(uid), "{uid} is looked after, but has no rules");
        Found::Intact
    }

    fn release(&self, uid: &str) {
        assert!(self.inner.lock().installed.remove(uid).is_some(), "{uid} is released twice");
    }

    fn allow_probes(&self, targets: &BTreeSet<SocketAddr>, _: bool) -> anyhow::Result<()> {
        self.inner.lock().probed.clone_from(targets);
        Ok(())
    }

    fn probed(&self) -> BTreeSet<SocketAddr> {
        self.inner.lock().probed.clone()
    }

    fn remove(&self, _: &NetNs) -> Result<(), RedirectError> {
        Ok(())
    }
}

/// Listeners and datagram sockets of a namespace, closed ones that linger included.
fn sockets(netns: &NetNs) -> usize {
    let count = |kind: &str| {
        let table = fs::read_to_string(format!("/proc/thread-self/net/{kind}")).unwrap_or_default();
        table.lines().skip(1).count()
    };
    netns.run(|| Ok(["tcp", "tcp6", "udp", "udp6"].map(count).iter().sum())).unwrap()
}

/// Exactly so many; a socket that a worker is closing may still be listed.
async fn settles(netns: &NetNs, expected: usize) {
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while sockets(netns) != expected {
        assert!(std::time::Instant::now() < deadline, "{} sockets, not {expected}", sockets(netns));
        tokio::task::yield_now().await;
    }
}

fn address(index: usize) -> SocketAddr {
    let host = u16::try_from(index).unwrap().to_be_bytes();
    SocketAddr::from(([100, 64, host[0], host[1]], 8080))
}

fn pod(dir: &Path, shared: &NetNs, round: usize, index: usize, again: bool) -> Desired {
    let uid = format!("{round}-{index}-{again}");
    let netns = dir.join(&uid);
    symlink(format!("/proc/self/fd/{}", shared.as_fd().as_raw_fd()), &netns).unwrap();
    Desired {
        uid,
        // The same name and address as the pod before it.
        name: format!("p{index}"),
        namespace: "n".into(),
        service_account: "sa".into(),
        native_tunnel: false,
        netns,
        rules: RedirectConfig::default(),
        problem: None,
    }
}

#[tokio::test]
async fn ten_thousand_pods_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let namespaces = dir.path().join("netns");
    fs::create_dir(&namespaces).unwrap();
    culvert_net::socket::raise_nofile_limit().unwrap();
    let netns = Arc::new(NetNs::create().unwrap());
    netns.run(|| std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status()).unwrap();
    let tasks = Tasks::new("churn");
    let zds = ZdsServer::new(tasks.clone(), AgentMetrics::unread());
    let listener = SeqPacketListener::bind(dir.path().join("sock")).unwrap();
    tasks.spawn("accept", zds.clone().serve(listener));
    let (proxy, _drain) = shared(&Authority::new(), None);
    let served = Pods::new(proxy.clone());
    let (socket, followed) = (dir.path().join("sock"), served.clone());
    tasks.spawn("proxy", async move { drop(run_zds(&socket, followed).await) });
    let mut sessions = zds.sessions();
    sessions.wait_for(|it| it.connected == 1).await.unwrap();
    let before = (tasks.len(), Arc::strong_count(&proxy), sockets(&netns));

    let rules = Fake::default();
    let metrics = AgentMetrics::unread();
    let mut enroller =
        Enroller::new(rules.clone(), zds.clone(), Reports::open(dir.path()).unwrap(), metrics.clone());
    let view = |desired: &[(usize, Desired)]| View {
        probed: desired.iter().map(|(i, pod)| (pod.uid.clone(), BTreeSet::from([address(*i)]))).collect(),
        desired: desired.iter().map(|(_, pod)| pod.clone()).collect(),
        complete: true,
        ..View::default()
    };
    let reports = || fs::read_dir(dir.path().join("redirection")).unwrap().count();
    let probed = || rules.inner.lock().probed.len();
    let mut each = 0;
    for round in 0..ROUNDS {
        for again in [false, true] {
            let pods: Vec<(usize, Desired)> =
                (0..AT_ONCE).map(|i| (i, pod(&namespaces, &netns, round, i, again))).collect();
            enroller.pass(&view(&pods)).await;
            assert_eq!((served.all().len(), reports(), probed()), (AT_ONCE, AT_ONCE, AT_ONCE));
            if each == 0 {
                each = (sockets(&netns) - before.2) / AT_ONCE;
                assert!(each >= 5, "{each} sockets a pod");
            }
            // Half of them go first, and what stays is left alone.
            let (gone, stays) = pods.split_at(AT_ONCE / 2);
            gone.iter().for_each(|(_, pod)| fs::remove_file(&pod.netns).unwrap());
            enroller.pass(&view(stays)).await;
            assert_eq!((served.all().len(), reports(), probed()), (AT_ONCE / 2, AT_ONCE / 2, AT_ONCE / 2));
            settles(&netns, before.2 + each * AT_ONCE / 2).await;
            stays.iter().for_each(|(_, pod)| fs::remove_file(&pod.netns).unwrap());
            // The last go in the pass in which the next ones come with their addresses.
        }
    }
    enroller.pass(&view(&[])).await;

    {
        let inner = rules.inner.lock();
        assert_eq!(inner.installs, 2 * ROUNDS * AT_ONCE, "each once, and no other time");
        assert!(inner.installed.is_empty() && inner.probed.is_empty());
        let open = inner.namespaces.iter().filter(|it| it.strong_count() > 0).count();
        assert_eq!(open, 0, "descriptors are held");
    }
    let counted = &proxy.observer.metrics;
    assert_eq!((counted.pods_started.get(), counted.pods_stopped.get()), (20_000, 20_000));
    assert_eq!((counted.active_pods.get(), counted.pending_pods.get()), (0, 0));
    assert_eq!(enroller.sizes(), [0, 0, 0, 0]);
    assert_eq!((zds.len(), served.all().len(), reports()), (0, 0, 0));
    // A task that was stopped may still be at its last step.
    while Arc::strong_count(&proxy) > before.1 {
        tokio::task::yield_now().await;
    }
    settles(&netns, before.2).await;
    assert_eq!((tasks.len(), Arc::strong_count(&proxy)), (before.0, before.1));
    tasks.abort_all();
    assert_eq!(tasks.wait(Duration::from_secs(5)).await, Waited::Finished);
    assert_eq!(tasks.panics(), 0);
}
