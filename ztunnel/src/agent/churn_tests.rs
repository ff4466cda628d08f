//! Ten thousand pods come, go, and come again with another uid, through plan, enroller and protocol; afterwards nothing is left of
//! them: no descriptor, no rule, no report, no entry in any table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::redirect::{Established, RedirectConfig, RedirectError, Verdict};
use culvert_net::seqpacket::{SeqPacket, SeqPacketListener};
use culvert_proto::workload::zds::workload_request::Payload;
use culvert_proto::workload::zds::{
    Ack, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response,
};
use culvert_runtime::tasks::{Tasks, Waited};
use parking_lot::Mutex;
use prost::Message;

use super::attest::{Found, Rules};
use super::enrol::Enroller;
use super::report::Reports;
use super::source::View;
use super::{Desired, ZdsServer};

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

    fn remove(&self, _: &NetNs) -> Result<(), RedirectError> {
        Ok(())
    }
}

async fn proxy(agent: SeqPacket, pods: Arc<Mutex<BTreeSet<String>>>) {
    let hello = ZdsHello { version: Version::V1.into() };
    agent.send(&hello.encode_to_vec(), None).await.unwrap();
    while let Ok(Some((bytes, fds))) = agent.recv().await {
        match WorkloadRequest::decode(bytes.as_slice()).unwrap().payload.unwrap() {
            Payload::Add(add) => {
                assert_eq!(fds.len(), 1);
                assert!(pods.lock().insert(add.uid));
            }
            Payload::Del(del) => assert!(pods.lock().remove(&del.uid)),
            Payload::SnapshotSent(_) => {}
            Payload::Keep(keep) => panic!("kept {}", keep.uid),
        }
        let ack = WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack::default())) };
        agent.send(&ack.encode_to_vec(), None).await.unwrap();
    }
}

fn pod(dir: &Path, round: usize, index: usize, again: bool) -> Desired {
    let uid = format!("{round}-{index}-{again}");
    let netns = dir.join(&uid);
    symlink("/proc/self/ns/net", &netns).unwrap();
    Desired {
        uid,
        // The same name and address as the pod before it.
        name: format!("p{index}"),
        namespace: "n".into(),
        service_account: "sa".into(),
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
    let tasks = Tasks::new("churn");
    let zds = ZdsServer::new(tasks.clone());
    let listener = SeqPacketListener::bind(dir.path().join("sock")).unwrap();
    tasks.spawn("accept", zds.clone().serve(listener));
    let served = Arc::new(Mutex::new(BTreeSet::new()));
    let connection = SeqPacket::connect(dir.path().join("sock")).await.unwrap();
    tasks.spawn("proxy", proxy(connection, served.clone()));
    let mut sessions = zds.sessions();
    sessions.wait_for(|it| it.connected == 1).await.unwrap();
    let running = tasks.len();

    let rules = Fake::default();
    let mut enroller = Enroller::new(rules.clone(), zds.clone(), Reports::open(dir.path()).unwrap());
    let view = |desired| View { desired, others: Vec::new(), complete: true };
    let reports = || fs::read_dir(dir.path().join("redirection")).unwrap().count();
    for round in 0..ROUNDS {
        for again in [false, true] {
            let pods: Vec<Desired> = (0..AT_ONCE).map(|i| pod(&namespaces, round, i, again)).collect();
            enroller.pass(&view(pods.clone())).await;
            assert_eq!((served.lock().len(), reports()), (AT_ONCE, AT_ONCE));
            // Half of them go first, and what stays is left alone.
            let (gone, stays) = pods.split_at(AT_ONCE / 2);
            gone.iter().for_each(|pod| fs::remove_file(&pod.netns).unwrap());
            enroller.pass(&view(stays.to_vec())).await;
            assert_eq!((served.lock().len(), reports()), (AT_ONCE / 2, AT_ONCE / 2));
            stays.iter().for_each(|pod| fs::remove_file(&pod.netns).unwrap());
            // The last go in the pass in which the next ones come with their addresses.
        }
    }
    enroller.pass(&view(Vec::new())).await;

    {
        let inner = rules.inner.lock();
        assert_eq!(inner.installs, 2 * ROUNDS * AT_ONCE, "each once, and no other time");
        assert!(inner.installed.is_empty());
        let open = inner.namespaces.iter().filter(|it| it.strong_count() > 0).count();
        assert_eq!(open, 0, "descriptors are held");
    }
    assert_eq!(enroller.sizes(), [0, 0, 0]);
    assert_eq!((zds.len(), served.lock().len(), reports(), tasks.len()), (0, 0, 0, running));
    tasks.abort_all();
    assert_eq!(tasks.wait(Duration::from_secs(5)).await, Waited::Finished);
    assert_eq!(tasks.panics(), 0);
}
