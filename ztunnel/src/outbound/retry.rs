//! One connection, several endpoints: who fails is not asked again, and the client hears what the last one said.

use std::time::Duration;

use culvert_model::Str;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::observe::flow::Failure;

/// Endpoints tried before the client is told: a connection must not wait for a whole service to time out.
pub const MAX_ATTEMPTS: usize = 3;
/// Nobody is tried any more after this: with what one try may take (10 s to connect, 10 s to shake hands, 15 s for an answer) a
/// client hears after 50 s at the latest. One endpoint that swallows packets leaves room for a second try.
pub const LAST_START: Duration = Duration::from_secs(15);

/// How one try ended without a hop.
#[derive(Debug)]
pub enum Missed {
    /// Nobody is left to try, or the destination may not be reached at all.
    Undecided(Failure),
    /// This workload failed before it was sent anything, and another of its service might do.
    Endpoint {
        /// The workload.
        uid: Str,
        /// What it said.
        failure: Failure,
    },
    /// Trying again could not help, or would do the same work twice.
    Last(Failure),
}

/// What can be tried.
pub trait Attempt {
    /// What a try that succeeds gives.
    type Hop;

    /// Tries whatever is decided on when none of `failed` may be chosen.
    fn attempt(&mut self, failed: &[Str]) -> impl Future<Output = Result<Self::Hop, Missed>> + Send;
}

/// Tries until one endpoint answers, at most [`MAX_ATTEMPTS`] times and not after [`LAST_START`] (Z45 differs: there the first failure is the last).
///
/// # Errors
/// What the endpoint that was tried last said. That there is no other one is said only if none was tried.
pub async fn until_open<A: Attempt>(attempts: &mut A) -> Result<A::Hop, Failure> {
    let mut failed: SmallVec<[Str; MAX_ATTEMPTS]> = SmallVec::new();
    let mut last = None;
    let begun = Instant::now();
    loop {
        match attempts.attempt(&failed).await {
            Ok(hop) => return Ok(hop),
            Err(Missed::Last(failure)) => return Err(failure),
            // Every endpoint there is has been tried: what the last one said is more than "there is none".
            Err(Missed::Undecided(failure)) => return Err(last.unwrap_or(failure)),
            Err(Missed::Endpoint { uid, failure }) => {
                let late = begun.elapsed() > LAST_START;
                if late || failed.len() + 1 >= MAX_ATTEMPTS || failed.contains(&uid) {
                    return Err(failure);
                }
                tracing::debug!(endpoint = %uid, %failure, "trying another endpoint");
                failed.push(uid);
                last = Some(failure);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use culvert_model::outcome::Reason;

    use super::*;

    /// Plays tries that were written down, and notes what each was told to avoid.
    struct Script {
        outcomes: VecDeque<Result<u8, Missed>>,
        /// How long each try takes.
        takes: Duration,
        avoided: Vec<Vec<String>>,
    }

    impl Attempt for Script {
        type Hop = u8;

        async fn attempt(&mut self, failed: &[Str]) -> Result<u8, Missed> {
            tokio::time::sleep(self.takes).await;
            self.avoided.push(failed.iter().map(ToString::to_string).collect());
            self.outcomes.pop_front().expect("tried more often than it may be")
        }
    }

    fn failure(detail: &str) -> Failure {
        Failure::new(Reason::ConnectionRefused, detail)
    }

    fn endpoint(uid: &str) -> Result<u8, Missed> {
        Err(Missed::Endpoint { uid: uid.into(), failure: failure(uid) })
    }

    async fn run(outcomes: Vec<Result<u8, Missed>>) -> (Result<u8, String>, Vec<Vec<String>>) {
        run_slowly(Duration::ZERO, outcomes).await
    }

    async fn run_slowly(
        takes: Duration,
        outcomes: Vec<Result<u8, Missed>>,
    ) -> (Result<u8, String>, Vec<Vec<String>>) {
        let mut script = Script { outcomes: outcomes.into(), takes, avoided: Vec::new() };
        let outcome = until_open(&mut script).await.map_err(|f| f.detail);
        assert!(script.outcomes.is_empty(), "stopped too early");
        (outcome, script.avoided)
    }

    /// Z45 differs: a failed connect is tried on another endpoint, never on one that failed.
    #[tokio::test]
    async fn another_endpoint_is_tried() {
        let (outcome, avoided) = run(vec![endpoint("a"), endpoint("b"), Ok(7)]).await;
        assert_eq!(outcome, Ok(7));
        assert_eq!(avoided, [vec![], vec!["a".to_owned()], vec!["a".into(), "b".into()]]);
    }

    /// The bound: three endpoints, then the client hears of the third.
    #[tokio::test]
    async fn three_are_enough() {
        let (outcome, avoided) = run(vec![endpoint("a"), endpoint("b"), endpoint("c")]).await;
        assert_eq!(outcome, Err("c".into()));
        assert_eq!(avoided.len(), MAX_ATTEMPTS);
    }

    /// The other bound: after two endpoints that swallow packets a third is not waited for.
    #[tokio::test(start_paused = true)]
    async fn not_for_ever() {
        let slow = Duration::from_secs(10);
        assert_eq!(run_slowly(slow, vec![endpoint("a"), Ok(7)]).await.0, Ok(7));
        assert_eq!(run_slowly(slow, vec![endpoint("a"), endpoint("b")]).await.0, Err("b".into()));
    }

    /// Z35: "none is left" is the answer only where none was tried.
    #[tokio::test]
    async fn the_last_word_is_an_endpoints() {
        let nobody = || Err(Missed::Undecided(failure("nobody")));
        assert_eq!(run(vec![nobody()]).await.0, Err("nobody".into()));
        assert_eq!(run(vec![endpoint("a"), nobody()]).await.0, Err("a".into()));
    }

    /// What may have been acted on is not done twice, and one that is chosen again although it failed ends the loop.
    #[tokio::test]
    async fn what_ends_it_at_once() {
        let refused = || Err(Missed::Last(failure("its policy refused us")));
        assert_eq!(run(vec![refused()]).await.0, Err("its policy refused us".into()));
        assert_eq!(run(vec![endpoint("a"), refused()]).await.0, Err("its policy refused us".into()));
        assert_eq!(run(vec![endpoint("a"), endpoint("a")]).await.0, Err("a".into()));
    }
}
