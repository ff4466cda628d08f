use culvert_runtime::drain::{self, DrainTrigger};
use culvert_runtime::tasks::Tasks;
use parking_lot::Mutex;

use super::*;

/// A lease in memory that refuses writes of an old version, as the API server does.
#[derive(Default)]
struct Fake {
    record: Mutex<Option<Record>>,
    away: Mutex<Vec<String>>,
}

/// The fake as one candidate reaches it.
struct Link(Arc<Fake>, &'static str);

impl Link {
    fn reachable(&self) -> Result<(), String> {
        if self.0.away.lock().iter().any(|name| name == self.1) { Err("cut off".to_owned()) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl Leases for Link {
    async fn get(&self) -> Result<Option<Record>, String> {
        self.reachable()?;
        Ok(self.0.record.lock().clone())
    }

    async fn put(&self, record: &Record, _taken: bool) -> Result<Written, String> {
        tokio::task::yield_now().await;
        self.reachable()?;
        let mut current = self.0.record.lock();
        let version = current.as_ref().map(|it| it.version.clone()).unwrap_or_default();
        if version != record.version {
            return Ok(Written::Conflict);
        }
        let next = version.parse::<u64>().unwrap_or(0) + 1;
        let record = Record { version: next.to_string(), ..record.clone() };
        *current = Some(record.clone());
        Ok(Written::Done(record))
    }
}

struct Candidate {
    leading: watch::Receiver<bool>,
    stop: DrainTrigger,
}

fn candidate(fake: &Arc<Fake>, name: &'static str, tasks: &Tasks) -> Candidate {
    let election = Election::new(Link(fake.clone(), name), name);
    let (stop, drain) = drain::channel();
    let leading = election.leading();
    tasks.spawn("election", election.run(drain));
    Candidate { leading, stop }
}

async fn leads(candidate: &mut Candidate, expected: bool) -> Duration {
    let begun = Instant::now();
    candidate.leading.wait_for(|leads| *leads == expected).await.unwrap();
    begun.elapsed()
}

/// D68, D69: one lease for all that only one may do.
#[tokio::test(start_paused = true)]
async fn one_of_many_leads_and_the_next_follows_at_once_when_it_stops() {
    let (fake, tasks) = (Arc::new(Fake::default()), Tasks::new("test"));
    let mut all: Vec<_> = ["a", "b", "c"].map(|name| candidate(&fake, name, &tasks)).into();
    sleep(Duration::from_secs(60)).await;
    let now: Vec<bool> = all.iter().map(|it| *it.leading.borrow()).collect();
    assert_eq!(now.iter().filter(|leads| **leads).count(), 1, "{now:?}");
    let first = now.iter().position(|leads| *leads).unwrap();
    all.remove(first).stop.start();
    sleep(RETRY + Duration::from_secs(1)).await;
    assert_eq!(all.iter().filter(|it| *it.leading.borrow()).count(), 1);
    assert_eq!(fake.record.lock().as_ref().unwrap().transitions, 1);
    drop(all);
    tasks.abort_all();
}

/// A leader that is cut off steps down before another one takes over: never two.
#[tokio::test(start_paused = true)]
async fn a_leader_that_is_cut_off_is_none_before_there_is_another() {
    let (fake, tasks) = (Arc::new(Fake::default()), Tasks::new("test"));
    let mut a = candidate(&fake, "a", &tasks);
    leads(&mut a, true).await;
    let mut b = candidate(&fake, "b", &tasks);
    sleep(Duration::from_secs(33)).await;
    assert!(!*b.leading.borrow());
    fake.away.lock().push("a".to_owned());
    let down = leads(&mut a, false).await;
    assert!(down <= GIVE_UP, "{down:?}");
    assert!(!*b.leading.borrow());
    let up = leads(&mut b, true).await;
    assert!(up > Duration::from_secs(1) && down + up <= LEASE + 2 * RETRY, "{down:?} {up:?}");
    // Back again, it sees that it lost.
    fake.away.lock().clear();
    sleep(Duration::from_secs(60)).await;
    assert_eq!((*a.leading.borrow(), *b.leading.borrow()), (false, true));
    tasks.abort_all();
}

/// One failure is not the end: the lease is longer than that.
#[tokio::test(start_paused = true)]
async fn a_short_silence_changes_nothing() {
    let (fake, tasks) = (Arc::new(Fake::default()), Tasks::new("test"));
    let mut a = candidate(&fake, "a", &tasks);
    leads(&mut a, true).await;
    let b = candidate(&fake, "b", &tasks);
    sleep(Duration::from_secs(21)).await;
    a.leading.mark_unchanged();
    for _ in 0..10 {
        fake.away.lock().push("a".to_owned());
        sleep(Duration::from_secs(4)).await;
        fake.away.lock().clear();
        sleep(Duration::from_secs(6)).await;
    }
    assert!(!a.leading.has_changed().unwrap() && *a.leading.borrow() && !*b.leading.borrow());
    tasks.abort_all();
}

#[test]
fn what_is_written_is_what_is_read() {
    let record = Record { holder: "me".into(), transitions: 3, version: "7".into(), duration: LEASE };
    let lease = written(Lease::default(), &record, true);
    assert!(lease.spec.as_ref().unwrap().acquire_time.is_some());
    assert_eq!(read(lease), record);
    let endless = LeaseSpec { lease_duration_seconds: Some(i32::MAX), ..LeaseSpec::default() };
    let lease = Lease { spec: Some(endless), ..Lease::default() };
    assert_eq!(read(lease).duration, Duration::from_secs(60));
}
