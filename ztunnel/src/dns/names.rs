//! Names that stand for an address (Z42): looked up when a connection needs one, kept while their answer is good.
//!
//! One table for the process. A connection to a name that nobody has asked about waits for the answer; those that come
//! meanwhile wait for the same one.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use culvert_model::Str;
use culvert_model::dns::QueryFamily;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Names kept, each family for itself (Z42). An entry has about 300 bytes with a few addresses, so 1.2 MB at worst.
pub const MAX_NAMES: usize = 4096;
/// When the table is full and every entry is still good, so many of them make room at once: a sweep costs a walk over the
/// table, and so does not happen for every name.
const SWEEP: usize = 256;
/// An answer is used at least so long, whatever its TTL: names with a TTL of 0 are not asked for at every connection.
const MIN_TTL: Duration = Duration::from_secs(1);
/// ... and at most so long, so that a mistake in somebody's zone ends.
const MAX_TTL: Duration = Duration::from_secs(300);
/// A failure is remembered so long: a name that does not resolve is not asked for at every connection.
const NEGATIVE_TTL: Duration = Duration::from_secs(3);

/// What a server said about a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The addresses; none if the name has none of the family.
    pub addresses: Vec<IpAddr>,
    /// How long they may be used.
    pub ttl: Duration,
}

/// Why a name has no address. Remembered for a few seconds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// The name does not exist, or has no address of the family.
    #[error("{0} has no address")]
    NoAddress(Str),
    /// No server answered, or one said that it failed.
    #[error("{0} cannot be looked up: {1}")]
    Failed(Str, String),
}

/// The table.
#[derive(Debug, Default)]
pub struct Names {
    table: Mutex<HashMap<(Str, QueryFamily), Arc<Slot>>>,
    /// How often it was full since somebody asked.
    sweeps: AtomicU64,
}

/// One name's place. The inner lock is held while the name is being asked for: who waits for it finds the answer.
#[derive(Debug, Default)]
struct Slot {
    known: tokio::sync::Mutex<Option<Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    outcome: Result<Arc<[IpAddr]>, LookupError>,
    until: Instant,
}

impl Names {
    /// The addresses of `name`, never none. `ask` is called if no good answer is at hand; if its future is dropped, the next
    /// who waits asks again.
    ///
    /// # Errors
    /// [`LookupError`], from now or from a few seconds ago.
    pub async fn addresses<F>(
        &self,
        name: Str,
        family: QueryFamily,
        ask: impl FnOnce() -> F,
    ) -> Result<Arc<[IpAddr]>, LookupError>
    where
        F: Future<Output = Result<Answer, String>>,
    {
        let slot = self.slot(&name, family);
        let mut known = slot.known.lock().await;
        if let Some(known) = known.as_ref().filter(|known| Instant::now() < known.until) {
            return known.outcome.clone();
        }
        let (outcome, ttl) = match ask().await {
            Ok(answer) if answer.addresses.is_empty() => (Err(LookupError::NoAddress(name)), NEGATIVE_TTL),
            Ok(answer) => (Ok(answer.addresses.into()), answer.ttl.clamp(MIN_TTL, MAX_TTL)),
            Err(error) => (Err(LookupError::Failed(name, error)), NEGATIVE_TTL),
        };
        *known = Some(Known { outcome: outcome.clone(), until: Instant::now() + ttl });
        outcome
    }

    /// How many names are kept.
    pub fn len(&self) -> usize {
        self.table.lock().len()
    }

    /// True when none is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How often the table was full since this was asked last.
    pub fn take_sweeps(&self) -> u64 {
        self.sweeps.swap(0, Ordering::Relaxed)
    }

    fn slot(&self, name: &Str, family: QueryFamily) -> Arc<Slot> {
        let mut table = self.table.lock();
        if let Some(slot) = table.get(&(name.clone(), family)) {
            return slot.clone();
        }
        if table.len() >= MAX_NAMES {
            self.sweeps.fetch_add(1, Ordering::Relaxed);
            sweep(&mut table);
        }
        table.entry((name.clone(), family)).or_default().clone()
    }
}

/// Makes room: what is no longer good goes, and if nothing is, those that would end soonest. One that is being asked for
/// may go too: who waits for it keeps it, and another who comes asks for himself.
fn sweep(table: &mut HashMap<(Str, QueryFamily), Arc<Slot>>) {
    let now = Instant::now();
    let until = |slot: &Slot| match slot.known.try_lock() {
        Ok(known) => known.as_ref().map_or(now, |known| known.until),
        Err(_) => now + MAX_TTL,
    };
    table.retain(|_, slot| until(slot) > now);
    if table.len() < MAX_NAMES {
        return;
    }
    let mut soonest: Vec<_> = table.iter().map(|(key, slot)| (until(slot), key.clone())).collect();
    soonest.sort_unstable_by_key(|(until, _)| *until);
    for (_, key) in soonest.into_iter().take(SWEEP) {
        table.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::future::join_all;
    use tokio::time::{advance, sleep};

    use super::*;

    const V4: QueryFamily = QueryFamily::V4;

    fn answer(address: &str, seconds: u64) -> Result<Answer, String> {
        Ok(Answer { addresses: vec![address.parse().unwrap()], ttl: Duration::from_secs(seconds) })
    }

    /// Asks, counting.
    async fn ask(
        names: &Names,
        name: &str,
        asked: &Cell<u32>,
        said: Result<Answer, String>,
    ) -> Result<String, LookupError> {
        let looked_up = names.addresses(name.into(), V4, || async {
            asked.set(asked.get() + 1);
            said
        });
        looked_up.await.map(|addresses| addresses[0].to_string())
    }

    /// Z42: an answer is good for its TTL, within bounds.
    #[tokio::test(start_paused = true)]
    async fn an_answer_lives_as_long_as_it_may() {
        for (ttl, lives) in [(30, 30), (0, 1), (86_400, 300)] {
            let (names, asked) = (Names::default(), Cell::new(0));
            assert_eq!(
                ask(&names, "a.example", &asked, answer("192.0.2.1", ttl)).await.unwrap(),
                "192.0.2.1"
            );
            advance(Duration::from_millis(lives * 1000 - 1)).await;
            assert_eq!(
                ask(&names, "a.example", &asked, answer("192.0.2.2", ttl)).await.unwrap(),
                "192.0.2.1"
            );
            assert_eq!(asked.get(), 1);
            advance(Duration::from_millis(2)).await;
            assert_eq!(
                ask(&names, "a.example", &asked, answer("192.0.2.2", ttl)).await.unwrap(),
                "192.0.2.2"
            );
            assert_eq!(asked.get(), 2);
        }
    }

    /// What failed, or has no address, is not asked for again at once, and is after a few seconds.
    #[tokio::test(start_paused = true)]
    async fn failures_are_remembered_for_a_moment() {
        let nothing = Ok(Answer { addresses: vec![], ttl: Duration::from_secs(600) });
        for (said, expected) in [
            (nothing, LookupError::NoAddress("a.example".into())),
            (Err("no server".to_owned()), LookupError::Failed("a.example".into(), "no server".into())),
        ] {
            let (names, asked) = (Names::default(), Cell::new(0));
            assert_eq!(ask(&names, "a.example", &asked, said).await, Err(expected.clone()));
            assert_eq!(ask(&names, "a.example", &asked, answer("192.0.2.1", 30)).await, Err(expected));
            assert_eq!(asked.get(), 1);
            advance(NEGATIVE_TTL).await;
            assert!(ask(&names, "a.example", &asked, answer("192.0.2.1", 30)).await.is_ok());
        }
    }

    /// A hundred connections to one name are one question; another name's is not held up by it.
    #[tokio::test(start_paused = true)]
    async fn one_question_at_a_time() {
        let (names, asked) = (Names::default(), Cell::new(0));
        let slow = || {
            names.addresses(Str::from("slow.example"), V4, || async {
                asked.set(asked.get() + 1);
                sleep(Duration::from_secs(2)).await;
                answer("192.0.2.1", 30)
            })
        };
        let other = Cell::new(0);
        let (all, ()) = tokio::join!(join_all((0..100).map(|_| slow())), async {
            let start = Instant::now();
            ask(&names, "other.example", &other, answer("192.0.2.9", 30)).await.unwrap();
            assert_eq!(start.elapsed(), Duration::ZERO);
        });
        assert!(all.iter().all(|one| one.as_ref().unwrap()[0].to_string() == "192.0.2.1"));
        assert_eq!((asked.get(), other.get()), (1, 1));
    }

    /// A client that leaves while it asks for everybody leaves the question to the next.
    #[tokio::test(start_paused = true)]
    async fn one_that_leaves_is_replaced() {
        let (names, asked) = (Names::default(), Cell::new(0));
        let leaver =
            names.addresses(Str::from("a.example"), V4, std::future::pending::<Result<Answer, String>>);
        let (left, found) = tokio::join!(
            tokio::time::timeout(Duration::from_secs(1), leaver),
            ask(&names, "a.example", &asked, answer("192.0.2.1", 30)),
        );
        assert!(left.is_err());
        assert_eq!(found.unwrap(), "192.0.2.1");
    }

    /// Z42: 4096 names, however many are asked for; the newest is always among them, and families are apart.
    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded() {
        let (names, asked) = (Names::default(), Cell::new(0));
        for n in 0..3 * MAX_NAMES {
            ask(&names, &format!("n{n}.example"), &asked, answer("192.0.2.1", 30)).await.unwrap();
            assert!(names.len() <= MAX_NAMES, "{} names", names.len());
        }
        let before = asked.get();
        let newest = format!("n{}.example", 3 * MAX_NAMES - 1);
        ask(&names, &newest, &asked, answer("192.0.2.1", 30)).await.unwrap();
        assert_eq!(asked.get(), before, "the newest is kept");
        assert!(names.take_sweeps() > 0, "it was full");
        assert_eq!(names.take_sweeps(), 0);
        let v6 =
            names.addresses(newest.as_str().into(), QueryFamily::V6, || async { answer("2001:db8::1", 30) });
        assert_eq!(v6.await.unwrap()[0].to_string(), "2001:db8::1");
        advance(MAX_TTL).await;
        for n in 0..MAX_NAMES / 2 {
            ask(&names, &format!("m{n}.example"), &asked, answer("192.0.2.1", 30)).await.unwrap();
        }
        assert!(names.len() < MAX_NAMES, "what is over makes room for all that comes");
    }
}
