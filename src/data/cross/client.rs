//! Requests to an endpoint: answered from the ledger, within a budget, sent again where waiting helps.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::clock::Clock;
use super::endpoint::{Endpoint, Failure};
use super::ledger::{Answer, Ledger};
use super::prompts::Stage;
use crate::checkpoint::digest;
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// The longest pause between two tries, where the endpoint names none.
const LONGEST: Duration = Duration::from_secs(60);
/// The shortest, whatever it names.
const SHORTEST: Duration = Duration::from_millis(500);
/// How often what is no answer is taken before the run ends.
const GARBAGE: u32 = 4;
/// A wait is looked up from in steps of this.
const STEP: Duration = Duration::from_millis(100);

/// What may be spent, and how long is waited.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests, those in the ledger included.
    pub requests: Option<u64>,
    /// Tokens of prompts and answers, those in the ledger included.
    pub tokens: Option<u64>,
    /// How long one request may be tried.
    pub patience: Duration,
}

/// A place to ask from many threads.
pub struct Client<'a> {
    endpoint: &'a Endpoint,
    ledger: Mutex<Ledger>,
    limits: Limits,
    clock: &'a dyn Clock,
    /// The process is asked to stop.
    stop: &'a AtomicBool,
    /// A request failed for good: nothing more is sent.
    halted: AtomicBool,
    /// Whether the endpoint has ever answered this run.
    answered: AtomicBool,
    /// Before this time, in nanoseconds of the clock, the endpoint wants nobody's requests.
    crowded_until: AtomicU64,
    requests: AtomicU64,
    tokens: AtomicU64,
}

/// An answer and the hash of what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// SHA-256 of the request.
    pub prompt_sha256: String,
    /// What came.
    pub answer: Answer,
}

impl<'a> Client<'a> {
    /// Asks `endpoint` for what `ledger` does not hold.
    pub fn new(
        endpoint: &'a Endpoint,
        ledger: Ledger,
        limits: Limits,
        clock: &'a dyn Clock,
        stop: &'a AtomicBool,
    ) -> Client<'a> {
        let (requests, tokens) = ledger.spent();
        Client {
            endpoint,
            ledger: Mutex::new(ledger),
            limits,
            clock,
            stop,
            halted: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            crowded_until: AtomicU64::new(0),
            requests: AtomicU64::new(requests),
            tokens: AtomicU64::new(tokens),
        }
    }

    /// The next message after `messages`, from the ledger or from the endpoint, and then in the ledger.
    ///
    /// An error ends the run: no other thread sends anything after it.
    pub fn ask(&self, stage: Stage, messages: &[String]) -> Result<Reply> {
        let request = self.endpoint.request(messages);
        let prompt_sha256 = digest::sha256(&request);
        if let Some(answer) = self.ledger().get(&prompt_sha256).cloned() {
            return Ok(Reply { prompt_sha256, answer });
        }
        let asked = self.send(&request, &prompt_sha256).and_then(|(requests, answer)| {
            if let Answer::Said { tokens, .. } = &answer {
                let more = |n: u64| Some(n.saturating_add(*tokens));
                // It always takes the new sum.
                let _ = self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
            }
            self.ledger().record(&prompt_sha256, stage, self.endpoint.model(), requests, answer)
        });
        match asked {
            Ok(answer) => Ok(Reply { prompt_sha256, answer }),
            Err(e) => {
                self.halted.store(true, Ordering::Relaxed);
                Err(e)
            }
        }
    }

    /// Requests and tokens, those in the ledger included.
    pub fn spent(&self) -> (u64, u64) {
        (self.requests.load(Ordering::Relaxed), self.tokens.load(Ordering::Relaxed))
    }

    /// The ledger, all of it durable.
    pub fn finish(self) -> Result<Ledger> {
        let mut ledger = self.ledger.into_inner().unwrap_or_else(PoisonError::into_inner);
        ledger.sync()?;
        Ok(ledger)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many requests it took, and the answer.
    fn send(&self, request: &[u8], prompt_sha256: &str) -> Result<(u64, Answer)> {
        let begun = self.clock.now();
        let (mut sent, mut garbage) = (0, 0);
        loop {
            self.wait_until(Duration::from_nanos(self.crowded_until.load(Ordering::Relaxed)))?;
            self.spend()?;
            sent += 1;
            let (why, after) = match self.endpoint.exchange(request) {
                Ok(answer) => {
                    self.answered.store(true, Ordering::Relaxed);
                    return Ok((sent, answer));
                }
                Err(Failure::Request(why)) => return Ok((sent, Answer::Refused(why))),
                Err(Failure::Fatal(why)) => return Err(Error::Endpoint(why)),
                Err(Failure::Absent(why)) if !self.answered.load(Ordering::Relaxed) => {
                    return Err(Error::Endpoint(why));
                }
                Err(Failure::Absent(why)) => (why, None),
                Err(Failure::Garbage(why)) => {
                    garbage += 1;
                    if garbage == GARBAGE {
                        return Err(Error::Endpoint(format!("{why}; {GARBAGE} times")));
                    }
                    (why, None)
                }
                Err(Failure::Later { why, after, crowded }) => {
                    if crowded {
                        let pause = after.map_or_else(|| pause(sent, prompt_sha256), |a| a.max(SHORTEST));
                        let until = self.clock.now().saturating_add(pause).as_nanos();
                        let until = u64::try_from(until).unwrap_or(u64::MAX);
                        self.crowded_until.fetch_max(until, Ordering::Relaxed);
                    }
                    (why, after)
                }
            };
            let pause = after.map_or_else(|| pause(sent, prompt_sha256), |a| a.max(SHORTEST));
            let now = self.clock.now();
            if now.saturating_sub(begun).saturating_add(pause) > self.limits.patience {
                let times = if sent == 1 { "1 try".to_string() } else { format!("{sent} tries") };
                let asks = after.map_or(String::new(), |a| format!(" and asks to wait {} s", a.as_secs()));
                return Err(Error::Endpoint(format!(
                    "{why}{asks}; given up after {times} in {} s, as --patience {} says; what was answered is kept, and the same command goes on",
                    now.saturating_sub(begun).as_secs(),
                    self.limits.patience.as_secs()
                )));
            }
            tracing::info!("{why}; again in {:.1} s", pause.as_secs_f64());
            self.wait_until(now + pause)?;
        }
    }

    /// Waits for the time `until`, and fails if the run is at an end by then.
    fn wait_until(&self, until: Duration) -> Result<()> {
        loop {
            let stop = self.stop.load(Ordering::Relaxed);
            if stop && !self.halted.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "waiting for the answers under way; Ctrl-C again gives them up, paid for as they are"
                );
            }
            if stop || self.halted.load(Ordering::Relaxed) {
                return Err(Error::Interrupted(
                    "what was answered is in the ledger, and the same command goes on".into(),
                ));
            }
            match until.checked_sub(self.clock.now()) {
                Some(left) if !left.is_zero() => self.clock.sleep(left.min(STEP)),
                _ => return Ok(()),
            }
        }
    }

    /// Takes one request out of the budget.
    fn spend(&self) -> Result<()> {
        let over = |what: &str, most: u64, spent: u64| {
            Error::Endpoint(format!(
                "--max-{what} {most} is used up ({spent} {what}); what was answered is kept, and the same command with a larger one goes on"
            ))
        };
        let tokens = self.tokens.load(Ordering::Relaxed);
        if let Some(most) = self.limits.tokens.filter(|most| tokens >= *most) {
            return Err(over("tokens", most, tokens));
        }
        let taken = self.requests.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            self.limits.requests.is_none_or(|most| n < most).then_some(n.saturating_add(1))
        });
        taken.map(drop).map_err(|n| over("requests", self.limits.requests.unwrap_or_default(), n))
    }
}

/// The pause after the `sent`-th try: doubled from one second up to [`LONGEST`], times 0.5 to 1.5 by what is asked, so
/// that those who were refused together do not come back together.
fn pause(sent: u64, prompt_sha256: &str) -> Duration {
    let whole = Duration::from_secs(1 << (sent - 1).min(10)).min(LONGEST);
    let index = prompt_sha256.get(..8).and_then(|s| u64::from_str_radix(s, 16).ok()).unwrap_or_default();
    let random = Philox::new(0, Purpose::Backoff.stream(index));
    whole.mul_f32(0.5 + random.uniform(sent))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::cross::clock::Wall;
    use crate::data::cross::endpoint::EndpointOptions;

    #[test]
    fn a_ledger_of_any_numbers_uses_the_budget_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(&dir.path().join("l.jsonl")).unwrap();
        let said = Answer::Said { content: "x".into(), reasoning: None, finish: None, tokens: u64::MAX };
        for hash in ["a", "b"] {
            ledger.record(hash, Stage::Question, "m", u64::MAX, said.clone()).unwrap();
        }
        assert_eq!(ledger.spent(), (u64::MAX, u64::MAX));
        let endpoint = Endpoint::new(&EndpointOptions {
            base_url: "http://localhost:1/v1".into(),
            model: "m".into(),
            ca: None,
            key_env: "ANABRANCH_TEST_NO_KEY".into(),
            temperature: None,
            answer_tokens: None,
            timeout: Duration::from_secs(1),
            connections: 1,
        })
        .unwrap();
        let (clock, stop) = (Wall::default(), AtomicBool::new(false));
        let mut limits = Limits { requests: None, tokens: None, patience: Duration::ZERO };
        let client = Client::new(&endpoint, ledger, limits, &clock, &stop);
        client.spend().unwrap();
        assert_eq!(client.spent(), (u64::MAX, u64::MAX));
        limits.tokens = Some(u64::MAX - 1);
        let client = Client::new(&endpoint, client.finish().unwrap(), limits, &clock, &stop);
        assert!(client.spend().unwrap_err().to_string().contains("--max-tokens"));
    }

    #[test]
    fn pauses_grow_up_to_a_minute_and_differ() {
        let hashes = ["00000001aa", "fffffff1aa"];
        for sent in 1..40 {
            let whole = (1u64 << (sent - 1).min(6)).min(60) as f32;
            let pauses = hashes.map(|h| pause(sent, h).as_secs_f32());
            assert!(pauses.iter().all(|p| (0.5 * whole..1.5 * whole).contains(p)), "{sent}: {pauses:?}");
            assert_ne!(pauses[0], pauses[1]);
        }
    }
}
