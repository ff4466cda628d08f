use std::collections::HashSet;
use std::time::Instant;

use culvert_runtime::clock::Clock;
use tokio::time::{Instant as TokioInstant, advance, sleep};

use super::*;
use crate::ca_client::{CaError, Signing};
use crate::fixture::{TestCa, leaf_params, workload};

/// Wall time that follows tokio's paused time.
#[derive(Debug)]
struct TestClock {
    wall: SystemTime,
    begun: TokioInstant,
}

impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        self.wall + self.begun.elapsed()
    }

    fn instant(&self) -> Instant {
        TokioInstant::now().into_std()
    }

    fn sleep(&self, duration: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(sleep(duration))
    }
}

/// An authority whose mood a test sets.
struct FakeCa {
    ca: TestCa,
    clock: SharedClock,
    mood: Mutex<Mood>,
    /// When each call began, and for whom.
    calls: Mutex<Vec<(TokioInstant, Identity)>>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
}

#[derive(Clone)]
struct Mood {
    lifetime: Duration,
    backdate: Duration,
    takes: Duration,
    fails: bool,
    instead: Option<Identity>,
}

impl CaClient for FakeCa {
    fn sign<'a>(&'a self, csr: &'a str, identity: &'a Identity, _: Duration) -> Signing<'a> {
        Box::pin(async move {
            let mood = self.mood.lock().clone();
            self.calls.lock().push((TokioInstant::now(), identity.clone()));
            let busy = Busy::new(&self.at_once);
            self.most_at_once.fetch_max(self.at_once.load(Ordering::SeqCst), Ordering::SeqCst);
            sleep(mood.takes).await;
            drop(busy);
            if mood.fails {
                return Err(CaError::Unreachable("out to lunch".into()));
            }
            let mut params = leaf_params(&mood.instead.as_ref().unwrap_or(identity).to_string());
            params.not_before = (self.clock.now() - mood.backdate).into();
            params.not_after = (self.clock.now() + mood.lifetime).into();
            Ok(self.ca.answer(csr, &params))
        })
    }
}

struct Busy<'a>(&'a AtomicUsize);

impl<'a> Busy<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct World {
    ca: Arc<FakeCa>,
    clock: SharedClock,
    manager: Arc<CertificateManager>,
}

impl World {
    fn new(lifetime: Duration) -> Self {
        Self::with(lifetime, |_| {})
    }

    fn with(lifetime: Duration, edit: impl FnOnce(&mut ManagerConfig)) -> Self {
        // Whole seconds, so that a certificate's dates say exactly what the test meant.
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let clock: SharedClock = Arc::new(TestClock { wall, begun: TokioInstant::now() });
        let mood = Mood {
            lifetime,
            backdate: Duration::from_secs(1),
            takes: Duration::ZERO,
            fails: false,
            instead: None,
        };
        let ca = Arc::new(FakeCa {
            ca: TestCa::new("root"),
            clock: clock.clone(),
            mood: Mutex::new(mood),
            calls: Mutex::default(),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
        });
        let mut config = ManagerConfig { random: fastrand::Rng::with_seed(1), ..ManagerConfig::default() };
        edit(&mut config);
        let manager = Arc::new(CertificateManager::new(ca.clone(), config, clock.clone()));
        Self { ca, clock, manager }
    }

    fn mood(&self, edit: impl FnOnce(&mut Mood)) {
        edit(&mut self.ca.mood.lock());
    }

    fn calls(&self) -> usize {
        self.ca.calls.lock().len()
    }

    fn call_times(&self) -> Vec<TokioInstant> {
        self.ca.calls.lock().iter().map(|(at, _)| *at).collect()
    }
}

fn a() -> Identity {
    workload("a", "b")
}

const SHORT: Duration = Duration::from_secs(20);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Z85.
#[tokio::test(start_paused = true)]
async fn a_certificate_is_fetched_once_and_kept() {
    let world = World::new(DAY);
    world.mood(|mood| mood.takes = Duration::from_secs(1));
    let (identity, other) = (a(), a());
    let (first, second) = tokio::join!(world.manager.get(&identity), world.manager.get(&other));
    let third = world.manager.get(&a()).await.unwrap();
    let (first, second) = (first.unwrap(), second.unwrap());
    assert!(Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&first, &third));
    assert_eq!((world.calls(), first.generation(), first.identity()), (1, 1, &a()));
    assert_eq!(world.manager.counts(), FetchCounts { issued: 1, failed: 0 });
}

#[tokio::test(start_paused = true)]
async fn many_short_generations_without_a_gap() {
    let world = World::new(SHORT);
    world.manager.get(&a()).await.unwrap();
    let mut generations = HashSet::new();
    for _ in 0..1200 {
        advance(Duration::from_millis(100)).await;
        let certificate = world.manager.get(&a()).await.unwrap();
        assert!(!certificate.expired(world.clock.now()));
        generations.insert(certificate.generation());
    }
    // 120 s at one renewal each 9 to 11 s.
    assert!((10..=14).contains(&generations.len()), "{}", generations.len());
    for pair in world.call_times().windows(2) {
        let apart = (pair[1] - pair[0]).as_secs_f64();
        assert!((8.0..=11.5).contains(&apart), "{apart}");
    }
}

/// Z88.
#[tokio::test(start_paused = true)]
async fn renewal_comes_at_half_of_what_is_left_with_jitter() {
    let world = World::new(DAY);
    // Backdating must not bring the renewal forward.
    world.mood(|mood| mood.backdate = 10 * DAY);
    for n in 0..40 {
        world.manager.prefetch(&workload("a", &format!("b{n}"))).unwrap();
    }
    sleep(DAY * 9 / 20 - Duration::from_secs(2)).await;
    assert_eq!(world.calls(), 40);
    sleep(DAY / 10 + Duration::from_secs(4)).await;
    assert_eq!(world.calls(), 80);
    let times: Vec<_> = world.call_times()[40..].to_vec();
    assert!(times[39] - times[0] > DAY / 20, "renewals are spread");
}

/// Z88.
#[tokio::test(start_paused = true)]
async fn the_old_certificate_serves_until_it_expires_and_no_longer() {
    let world = World::new(SHORT);
    let mut updates = world.manager.subscribe(&a()).unwrap();
    let first = world.manager.get(&a()).await.unwrap();
    world.mood(|mood| mood.fails = true);
    updates.borrow_and_update();
    let until = first.not_after().duration_since(world.clock.now()).unwrap();
    sleep(until - Duration::from_millis(10)).await;
    assert!(Arc::ptr_eq(&world.manager.get(&a()).await.unwrap(), &first));
    assert_eq!(world.manager.list()[0].state, CertificateState::Available);
    assert!(world.manager.list()[0].last_error.as_deref().unwrap().contains("out to lunch"));
    // More than one attempt fitted between half of the lifetime and its end.
    assert!(world.calls() >= 4, "{}", world.calls());
    sleep(Duration::from_millis(11)).await;
    assert!(world.manager.current(&a()).is_none());
    assert!(updates.borrow_and_update().is_none());
    assert_eq!(world.manager.list()[0].state, CertificateState::Unavailable);
    let error = world.manager.get(&a()).await.unwrap_err();
    assert!(error.to_string().contains("out to lunch"), "{error}");
    // It recovers within the wait of one connection, whatever the backoff has grown to.
    sleep(Duration::from_secs(3600)).await;
    world.mood(|mood| mood.fails = false);
    let second = world.manager.get(&a()).await.unwrap();
    assert_eq!(second.generation(), 2);
    assert_eq!(updates.borrow_and_update().as_ref().unwrap().generation(), 2);
    assert_eq!(world.manager.list()[0].failures, 0);
}

/// Z89.
#[tokio::test(start_paused = true)]
async fn attempts_back_off_to_their_limit() {
    let world = World::new(DAY);
    world.mood(|mood| mood.fails = true);
    world.manager.prefetch(&a()).unwrap();
    sleep(Duration::from_secs(3000)).await;
    let times = world.call_times();
    let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    for (gap, ceiling) in
        gaps.iter().zip([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 150.0, 150.0, 150.0])
    {
        assert!(*gap >= ceiling / 2.0 && *gap <= ceiling + 0.01, "{gap} for {ceiling}");
    }
    assert!(gaps.len() >= 25 && gaps.iter().all(|gap| *gap <= 150.01), "{gaps:?}");
}

#[tokio::test(start_paused = true)]
async fn attempts_come_closer_as_the_end_does() {
    let world = World::new(Duration::from_secs(400));
    let first = world.manager.get(&a()).await.unwrap();
    let (end, zero) = (first.not_after().duration_since(world.clock.now()).unwrap(), TokioInstant::now());
    world.mood(|mood| mood.fails = true);
    sleep(end).await;
    let times: Vec<_> = world.call_times().iter().skip(1).map(|at| (*at - zero).as_secs_f64()).collect();
    for pair in times.windows(2) {
        let left = end.as_secs_f64() - pair[0];
        // tokio's timers end on whole milliseconds.
        assert!(pair[1] - pair[0] <= (left / 4.0).max(0.5) + 0.01, "{} with {left} left", pair[1] - pair[0]);
    }
    assert!(end.as_secs_f64() - times.last().unwrap() < 3.0, "tried until the end");
}

#[tokio::test(start_paused = true)]
async fn a_waiting_connection_is_told_why() {
    let world = World::new(DAY);
    world.mood(|mood| mood.fails = true);
    let begun = TokioInstant::now();
    let error = world.manager.get(&a()).await.unwrap_err();
    assert_eq!(begun.elapsed().as_secs(), 5);
    let CertificateError::Unavailable { waited, last, .. } = &error else { panic!("{error}") };
    assert_eq!((*waited, last.as_deref()), (Duration::from_secs(5), Some("out to lunch")));
    world.mood(|mood| (mood.fails, mood.takes) = (false, Duration::from_secs(60)));
    let other = world.manager.get(&workload("a", "slow")).await.unwrap_err();
    assert!(other.to_string().contains("has not answered"), "{other}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_authority_is_given_up_and_asked_again() {
    let world = World::new(DAY);
    world.mood(|mood| mood.takes = DAY);
    world.manager.prefetch(&a()).unwrap();
    sleep(Duration::from_secs(9)).await;
    world.mood(|mood| mood.takes = Duration::ZERO);
    sleep(Duration::from_secs(2)).await;
    assert_eq!((world.calls(), world.manager.counts().failed), (2, 1));
    assert!(world.manager.current(&a()).is_some());
}

/// Z89.
#[tokio::test(start_paused = true)]
async fn eight_at_once_and_connections_first() {
    let world = World::new(DAY);
    world.mood(|mood| mood.takes = Duration::from_secs(1));
    for n in 0..40 {
        world.manager.prefetch(&workload("a", &format!("b{n}"))).unwrap();
    }
    // The first eight are on their way; the last one in the queue is now waited for.
    sleep(Duration::from_millis(500)).await;
    let begun = TokioInstant::now();
    world.manager.get(&workload("a", "b39")).await.unwrap();
    assert!(begun.elapsed() <= Duration::from_millis(1600), "{:?}", begun.elapsed());
    // One that nobody had thought of waits for the next free slot, not for the 24 before it.
    world.manager.get(&workload("late", "comer")).await.unwrap();
    assert!(begun.elapsed() <= Duration::from_millis(3600), "{:?}", begun.elapsed());
    sleep(Duration::from_secs(10)).await;
    assert_eq!((world.calls(), world.ca.most_at_once.load(Ordering::SeqCst)), (41, 8));
}

/// Z90.
#[tokio::test(start_paused = true)]
async fn a_forgotten_identity_is_not_renewed() {
    let world = World::new(SHORT);
    let held = world.manager.get(&a()).await.unwrap();
    let mut updates = world.manager.subscribe(&a()).unwrap();
    world.manager.forget(&a());
    world.manager.forget(&a());
    assert!(world.manager.current(&a()).is_none() && world.manager.list().is_empty());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(world.calls(), 1);
    updates.borrow_and_update();
    assert!(updates.changed().await.is_err(), "the channel is closed");
    assert_eq!(held.generation(), 1);
    // A pod with it comes back.
    assert_eq!(world.manager.get(&a()).await.unwrap().generation(), 2);
}

#[tokio::test(start_paused = true)]
async fn forgetting_ends_a_wait_and_frees_its_slot() {
    let world = World::with(DAY, |config| config.concurrency = 1);
    world.mood(|mood| mood.takes = Duration::from_secs(3));
    let manager = world.manager.clone();
    let tasks = Tasks::new("test");
    let (sender, outcome) = tokio::sync::oneshot::channel();
    tasks.spawn("get", async move {
        let _ = sender.send(manager.get(&a()).await);
    });
    sleep(Duration::from_secs(1)).await;
    world.manager.forget(&a());
    assert_eq!(outcome.await.unwrap().unwrap_err(), CertificateError::Forgotten(Box::new(a())));
    world.manager.get(&workload("a", "next")).await.unwrap();
}

/// Z87.
#[tokio::test(start_paused = true)]
async fn what_was_not_asked_for_is_not_handed_out() {
    let world = World::new(DAY);
    world.mood(|mood| mood.instead = Some(workload("kube-system", "admin")));
    let error = world.manager.get(&a()).await.unwrap_err().to_string();
    assert!(error.contains("kube-system/sa/admin") && error.contains("asked for"), "{error}");
    assert!(world.manager.current(&a()).is_none());
}

#[tokio::test(start_paused = true)]
async fn the_table_has_a_bound() {
    let world = World::with(DAY, |config| config.max_identities = 2);
    world.manager.prefetch(&workload("a", "b0")).unwrap();
    world.manager.prefetch(&workload("a", "b1")).unwrap();
    world.manager.prefetch(&workload("a", "b1")).unwrap();
    let error = world.manager.prefetch(&workload("a", "b2")).unwrap_err();
    assert_eq!(error, CertificateError::TooMany { identity: Box::new(workload("a", "b2")), max: 2 });
    world.manager.forget(&workload("a", "b0"));
    world.manager.prefetch(&workload("a", "b2")).unwrap();
}

#[tokio::test(start_paused = true)]
async fn certificates_of_one_authority_share_their_roots() {
    let world = World::new(DAY);
    let one = world.manager.get(&workload("a", "b0")).await.unwrap();
    let two = world.manager.get(&workload("a", "b1")).await.unwrap();
    assert!(Arc::ptr_eq(one.roots(), two.roots()));
}

#[tokio::test(start_paused = true)]
async fn the_admin_page_has_a_line_for_each() {
    let world = World::new(DAY);
    world.manager.prefetch(&workload("z", "z")).unwrap();
    assert_eq!(world.manager.list()[0].state, CertificateState::Initializing);
    let certificate = world.manager.get(&a()).await.unwrap();
    let list = world.manager.list();
    assert_eq!(list.iter().map(|line| &line.identity).collect::<Vec<_>>(), [&a(), &workload("z", "z")]);
    assert_eq!(list[0].serial.as_deref(), Some(certificate.serial()));
    assert!(list[0].not_after.as_deref().unwrap().ends_with('Z'));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_manager_leaves_no_task() {
    let world = World::new(DAY);
    world.manager.get(&a()).await.unwrap();
    let tasks = world.manager.tasks.clone();
    drop(world);
    assert_eq!(tasks.wait(Duration::from_secs(1)).await, culvert_runtime::tasks::Waited::Finished);
}
