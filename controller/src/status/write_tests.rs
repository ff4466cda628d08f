//! The task that writes: while it leads, and no faster than it may.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::drain;
use culvert_runtime::tasks::Tasks;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::engine::{Object, Outcome, Said, Write};
use super::follow::{Message, Watches, Watching};
use super::write::{PACE, Statuses, Writer};
use super::{Condition, Counters, Desired, Publisher, StatusKind, Target, Wanted, contribution, kinds};

const KINDS: &[StatusKind] = &[kinds::AUTHORIZATION_POLICY];

/// Writes, each with its time; all of them are taken.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<(Instant, Write)>>>);

impl Statuses for Written {
    async fn apply(&self, write: &Write, _: &[&'static str]) -> Outcome {
        self.0.lock().push((Instant::now(), write.clone()));
        let object = Object { status: write.body.status.clone().into(), ..object() };
        Outcome::Written(Box::new(object))
    }
}

/// A watch that lists `count` objects and then is silent; how often it began.
#[derive(Clone, Default)]
struct Listing {
    count: usize,
    begun: Arc<Mutex<Vec<mpsc::Sender<Message>>>>,
}

impl Watches for Listing {
    fn begin(&self, kinds: &BTreeSet<StatusKind>, _: &[&'static str]) -> Watching {
        let (sender, messages) = mpsc::channel(1_000);
        for kind in kinds {
            let say = |said| sender.try_send((*kind, said)).unwrap();
            say(Said::Served("v1"));
            say(Said::Init);
            for index in 0..self.count {
                say(Said::Listed(("shop".to_owned(), format!("n{index}")), Box::new(object())));
            }
            say(Said::Done);
        }
        self.begun.lock().push(sender);
        Watching { messages, tasks: Vec::new() }
    }
}

fn object() -> Object {
    Object {
        uid: "u".to_owned(),
        generation: Some(1),
        version: "1".to_owned(),
        status: Value::Null,
        owned: Default::default(),
        whole: false,
    }
}

struct Rig {
    written: Written,
    listing: Listing,
    publisher: Publisher,
    leading: watch::Sender<bool>,
    _drain: drain::DrainTrigger,
    tasks: Tasks,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

impl Rig {
    fn new(count: usize) -> Self {
        let (publisher, contribution) = contribution("culvert-test", None, KINDS);
        let (written, listing) = (Written::default(), Listing { count, ..Listing::default() });
        let (trigger, drain) = drain::channel();
        let (leading, leads) = watch::channel(false);
        let tasks = Tasks::new("test");
        let writer = Writer::new(written.clone(), vec![contribution], Counters::default());
        tasks.spawn("status", writer.run(listing.clone(), leads, drain));
        Self { written, listing, publisher, leading, _drain: trigger, tasks }
    }

    fn wants(&self, count: usize, message: &str) {
        let wanted = |index| {
            let target = Target::new(kinds::AUTHORIZATION_POLICY, "shop", format!("n{index}"));
            (
                target,
                Wanted::of("u", Some(1)).condition(Condition::new("Accepted", true, "Accepted", message)),
            )
        };
        self.publisher.publish((0..count).map(wanted).collect::<Desired>());
    }

    fn writes(&self) -> usize {
        self.written.0.lock().len()
    }
}

/// D47, D69: only the leader writes, and one that leads no more stops to watch too.
#[tokio::test(start_paused = true)]
async fn only_the_leader_writes() {
    let rig = Rig::new(3);
    rig.wants(3, "one");
    sleep(Duration::from_secs(60)).await;
    assert_eq!((rig.writes(), rig.listing.begun.lock().len()), (0, 0), "it does not lead");
    rig.leading.send_replace(true);
    sleep(Duration::from_secs(60)).await;
    assert_eq!((rig.writes(), rig.listing.begun.lock().len()), (3, 1));
    rig.leading.send_replace(false);
    sleep(Duration::from_secs(60)).await;
    assert!(rig.listing.begun.lock()[0].is_closed(), "nobody listens to the watch any more");
    rig.wants(3, "two");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.writes(), 3, "it leads no more");
    rig.leading.send_replace(true);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(
        (rig.writes(), rig.listing.begun.lock().len()),
        (6, 2),
        "it looks again, and writes what is wanted now"
    );
}

#[tokio::test(start_paused = true)]
async fn writes_are_paced_and_the_latest_counts() {
    let rig = Rig::new(200);
    rig.leading.send_replace(true);
    rig.wants(200, "first");
    sleep(PACE * 50).await;
    let early = rig.writes();
    assert!((40..=60).contains(&early), "{early}");
    rig.wants(200, "second");
    sleep(PACE * 1_000).await;
    let written = rig.written.0.lock();
    assert!(written.windows(2).all(|pair| pair[1].0 - pair[0].0 >= PACE), "no faster than it may");
    assert_eq!(written.len(), 200 + early, "what was not written of the first never is");
    for (_, write) in &written[early..] {
        assert_eq!(write.body.status["conditions"][0]["message"], "second");
    }
}
