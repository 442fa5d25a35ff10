//! Which candidate is worked on next: many at once, and the same set as one at a time.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::pairs::Pair;
use super::pipeline::Outcome;
use crate::error::{Error, Result};

/// How far one pair of domains is.
#[derive(Debug, Default)]
struct Progress {
    /// The first candidate that nobody took.
    next: u64,
    working: u64,
    accepted: u64,
    outcomes: BTreeMap<u64, Outcome>,
}

#[derive(Debug)]
struct State {
    pairs: Vec<Progress>,
    error: Option<Error>,
    panicked: bool,
}

/// Tells the others when the worker that holds it panics: its candidate never comes to an end that they could wait for.
struct Alarm<'a>(&'a Mutex<State>, &'a Condvar);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(self.0).panicked = true;
            self.1.notify_all();
        }
    }
}

/// Takes candidates of each pair in order until `wanted` are accepted or `most` were tried, on `threads` threads; gives
/// what came of each by its number, pair by pair.
///
/// A candidate is taken only while those accepted and those being worked on are fewer than wanted. So no more than
/// wanted are ever accepted, all of them lie before the first that nobody took, and they are the first that pass,
/// whatever the threads. `done` is told of each outcome. A panic in either ends the others too, and then this thread.
pub fn run(
    pairs: &[Pair],
    wanted: u64,
    most: u64,
    threads: usize,
    work: impl Fn(&Pair, u64) -> Result<Outcome> + Sync,
    done: impl Fn(&Outcome) + Sync,
) -> Result<Vec<BTreeMap<u64, Outcome>>> {
    let begun = pairs.iter().map(|_| Progress::default()).collect();
    let state = Mutex::new(State { pairs: begun, error: None, panicked: false });
    let changed = Condvar::new();
    let worker = || {
        let _alarm = Alarm(&state, &changed);
        while let Some((n, k)) = take(&state, &changed, pairs, wanted, most) {
            let result = work(&pairs[n], k);
            if let Ok(outcome) = &result {
                done(outcome);
            }
            let mut state = lock(&state);
            let progress = &mut state.pairs[n];
            progress.working -= 1;
            match result {
                Ok(outcome) => {
                    progress.accepted += u64::from(matches!(outcome, Outcome::Accepted(_)));
                    progress.outcomes.insert(k, outcome);
                }
                // An error makes the others end too, maybe before it is here itself.
                Err(e) => {
                    if matches!(state.error, None | Some(Error::Interrupted(_))) {
                        state.error = Some(e);
                    }
                }
            }
            changed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(worker);
        }
    });
    let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match state.error {
        Some(e) => Err(e),
        None => Ok(state.pairs.into_iter().map(|p| p.outcomes).collect()),
    }
}

/// The next candidate, waited for as long as one may come; none when all is done, or an error or a panic ends it.
fn take(
    state: &Mutex<State>,
    changed: &Condvar,
    pairs: &[Pair],
    wanted: u64,
    most: u64,
) -> Option<(usize, u64)> {
    let mut state = lock(state);
    loop {
        if state.error.is_some() || state.panicked {
            return None;
        }
        let mut open = false;
        for (n, (progress, pair)) in state.pairs.iter_mut().zip(pairs).enumerate() {
            let left = progress.next < most.min(pair.len());
            if left && progress.accepted + progress.working < wanted {
                progress.next += 1;
                progress.working += 1;
                return Some((n, progress.next - 1));
            }
            open |= left && progress.working > 0;
        }
        if !open {
            return None;
        }
        state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::super::pipeline::{Cause, Rejection};
    use super::super::prompts::Stage;
    use super::super::sources::tests::pool;
    use super::*;
    use crate::random::Philox;

    fn rejected() -> Outcome {
        Outcome::Rejected(Rejection { stage: Stage::Question, cause: Cause::Malformed, why: String::new() })
    }

    /// Accepts by candidate alone, after times that are all different.
    fn work(pair: &Pair, k: u64) -> Result<Outcome> {
        let random = Philox::new(1, pair.len());
        std::thread::sleep(Duration::from_micros(random.below(2 * k, 300) as u64));
        Ok(if random.below(2 * k + 1, 3) > 0 { Outcome::Accepted(Box::default()) } else { rejected() })
    }

    #[test]
    fn the_first_that_pass_whatever_the_threads() {
        let pools = [pool("a", 12), pool("b", 9), pool("c", 3)].map(Arc::new);
        let pairs = super::super::pairs::pairs(&pools, &[], 0).unwrap();
        let tried = AtomicU64::new(0);
        let done = |_: &Outcome| {
            tried.fetch_add(1, Ordering::Relaxed);
        };
        let one = run(&pairs, 20, 1000, 1, work, done).unwrap();
        for threads in [2, 7, 64] {
            tried.store(0, Ordering::Relaxed);
            assert_eq!(run(&pairs, 20, 1000, threads, work, done).unwrap(), one, "{threads}");
            assert_eq!(tried.load(Ordering::Relaxed), one.iter().map(|o| o.len() as u64).sum::<u64>());
        }
        let accepted =
            |o: &BTreeMap<u64, Outcome>| o.values().filter(|o| matches!(o, Outcome::Accepted(_))).count();
        assert_eq!((accepted(&one[0]), accepted(&one[1])), (20, 20));
        // 27 candidates of the last pair, of which some pass: all were tried, or 20 accepted.
        assert!(accepted(&one[2]) == 20 || one[2].len() == 27);
        assert_eq!(run(&pairs, 20, 5, 3, work, done).unwrap()[0].len(), 5);
        assert!(run(&pairs, 0, 5, 3, work, done).unwrap().iter().all(BTreeMap::is_empty));
    }

    #[test]
    fn an_error_ends_it_and_is_the_one_told() {
        let pools = [pool("a", 12), pool("b", 9)].map(Arc::new);
        let pairs = super::super::pairs::pairs(&pools, &[], 0).unwrap();
        let calls = AtomicU64::new(0);
        let failing = |pair: &Pair, k: u64| {
            calls.fetch_add(1, Ordering::Relaxed);
            if k == 10 { Err(Error::Endpoint("no".into())) } else { work(pair, k) }
        };
        let err = run(&pairs, 100, 1000, 4, failing, |_| {}).unwrap_err().to_string();
        assert_eq!(err, "no");
        assert!(calls.load(Ordering::Relaxed) < 100);
    }

    #[test]
    fn a_panic_ends_it_and_is_not_waited_for() {
        let pools = [pool("a", 12), pool("b", 9)].map(Arc::new);
        let pairs = super::super::pairs::pairs(&pools, &[], 0).unwrap();
        let panicking = |pair: &Pair, k: u64| {
            assert_ne!(k, 10, "the panic that this test is about");
            work(pair, k)
        };
        // The candidate that panicked is one of the hundred for ever: without an alarm the others wait for it.
        std::panic::catch_unwind(|| run(&pairs, 100, 1000, 4, panicking, |_| {})).unwrap_err();
    }
}
