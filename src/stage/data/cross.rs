//! `data cross`: a set of questions that need two domains each, written by a model behind an endpoint.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::checkpoint::{digest, json, place};
use crate::data::cross::client::{Client, Limits};
use crate::data::cross::clock::{Clock, Wall};
use crate::data::cross::endpoint::{Endpoint, EndpointOptions};
use crate::data::cross::item::Item;
use crate::data::cross::ledger::Ledger;
use crate::data::cross::pairs::{self, Pair};
use crate::data::cross::pipeline::{self, Cause, Outcome, Pipeline};
use crate::data::cross::prompts::{Prompts, Stage};
use crate::data::cross::sources;
use crate::data::cross::{leak, schedule};
use crate::data::lines;
use crate::data::mmlu::cut;
use crate::error::{Error, Result};
use crate::stage::common::Common;

/// The file with everything about each item, which `data review` reads.
pub const ITEMS: &str = "items.jsonl";
/// The file with what was not accepted, and why.
pub const REJECTED: &str = "rejected.jsonl";
/// The file with the numbers.
pub const SUMMARY: &str = "summary.json";
const COMMAND: &str = "data cross";

/// What `data cross` is told.
#[derive(Clone, Debug)]
pub struct CrossOptions {
    /// Task files whose questions name one domain each.
    pub sources: Vec<PathBuf>,
    /// What edges are trained on: sources in it are left out.
    pub train: Vec<PathBuf>,
    /// Use them all the same.
    pub allow_leak: bool,
    /// Which domains meet; all with all if empty.
    pub pairs: Vec<[String; 2]>,
    /// Items of each pair.
    pub items: u64,
    /// Candidates of each pair that are tried at most.
    pub candidates: u64,
    /// Who is asked.
    pub endpoint: EndpointOptions,
    /// Requests at a time.
    pub concurrency: usize,
    /// What may be spent.
    pub limits: Limits,
    /// Whether questions that one domain suffices for are dropped, for two more requests each.
    pub single_domain_check: bool,
    /// Where answers are kept; `OUT.ledger.jsonl` if none.
    pub ledger: Option<PathBuf>,
    /// Where to write.
    pub out: PathBuf,
}

/// What came of it, the same however often the run was interrupted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// A part for each pair of domains.
    pub pairs: Vec<PairSummary>,
    /// What was found of the sources in training data.
    pub leak: Leak,
}

/// What came of one pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairSummary {
    /// The domains.
    pub domains: [String; 2],
    /// The task file.
    pub file: String,
    /// Items in it.
    pub items: u64,
    /// Items that were asked for.
    pub wanted: u64,
    /// Candidates that were tried.
    pub candidates: u64,
    /// Of them, those that cannot be merged.
    pub unmergeable: u64,
    /// Those whose answers were not what was asked for.
    pub malformed: u64,
    /// Those that the endpoint does not take.
    pub refused: u64,
    /// Those that one domain suffices for.
    pub single_domain: u64,
    /// Items whose question and options an earlier one of the pair has, but for white space, capitals and order.
    #[serde(default)]
    pub repeated: u64,
    /// How often A, B, C and D are right.
    pub answers: [u64; 4],
}

/// Sources that stand in the training data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Leak {
    /// Training files that were looked through.
    pub checked: usize,
    /// Whether these sources were used all the same.
    pub allowed: bool,
    /// `file:id` of each.
    pub sources: Vec<String>,
}

/// A finished run.
#[derive(Debug, Serialize)]
pub struct CrossReport {
    /// The folder.
    pub out: PathBuf,
    /// The ledger, whose answers are never paid for again.
    pub ledger: PathBuf,
    /// Nothing was done: the output was there.
    pub already_finished: bool,
    /// What came of it.
    #[serde(flatten)]
    pub summary: Summary,
    /// Requests of all runs with this ledger.
    pub requests: u64,
    /// Tokens of all runs with this ledger.
    pub tokens: u64,
    /// What the user should know of the result.
    pub warnings: Vec<String>,
}

/// A line of [`REJECTED`].
#[derive(Serialize)]
struct RejectedLine {
    id: String,
    sources: [String; 2],
    stage: Stage,
    why: String,
}

/// All that can be checked without asking anybody.
pub struct Prepared {
    options: CrossOptions,
    seed: u64,
    pairs: Vec<Pair>,
    leak: Leak,
    endpoint: Endpoint,
}

impl Prepared {
    /// Reads the sources, looks for them in the training data, checks the pairs and the endpoint's URL.
    pub fn new(options: CrossOptions, seed: u64) -> Result<Prepared> {
        if options.train.is_empty() && !options.allow_leak {
            return Err(Error::Usage(
                "without --train nothing tells which sources an edge is trained on: name its files, or give --allow-leak".into(),
            ));
        }
        let mut pools = sources::load(&options.sources)?;
        let leaked = leak::leaked(&pools, &options.train)?;
        let name = |&(p, s): &(usize, usize)| {
            let source = &pools[p].sources[s];
            format!("{}:{}", source.file, source.id)
        };
        let leak = Leak {
            checked: options.train.len(),
            allowed: options.allow_leak,
            sources: leaked.iter().map(name).collect(),
        };
        if !options.allow_leak {
            let leaked: HashSet<(usize, usize)> = leaked.into_iter().collect();
            for (p, pool) in pools.iter_mut().enumerate() {
                let mut at = 0..;
                pool.sources.retain(|_| at.next().is_some_and(|s| !leaked.contains(&(p, s))));
                let asked =
                    options.pairs.is_empty() || options.pairs.iter().flatten().any(|d| *d == pool.domain);
                if pool.sources.is_empty() && asked {
                    return Err(Error::Usage(format!(
                        "every source of {} stands in the training data: take a test split, or give --allow-leak",
                        pool.domain
                    )));
                }
            }
        }
        let pools: Vec<_> = pools.into_iter().map(Arc::new).collect();
        let pairs = pairs::pairs(&pools, &options.pairs, seed)?;
        let endpoint = Endpoint::new(&options.endpoint)?;
        Ok(Prepared { options, seed, pairs, leak, endpoint })
    }

    /// What would be done, in words.
    pub fn steps(&self) -> Vec<String> {
        let mut steps: Vec<String> = self.warnings().collect();
        let least = 3 + if self.options.single_domain_check { 2 } else { 0 };
        for pair in &self.pairs {
            let items = self.options.items.min(pair.len());
            steps.push(format!(
                "write {items} items of {} from {} x {} questions: at least {} requests",
                pair.domains().join(" and "),
                pair.pools[0].sources.len(),
                pair.pools[1].sources.len(),
                items * least
            ));
        }
        steps.push(format!(
            "ask {} at a time, answers to {}",
            self.options.concurrency,
            self.ledger().display()
        ));
        steps
    }

    /// What the user should know before anybody is asked.
    fn warnings(&self) -> impl Iterator<Item = String> {
        let leak = (!self.leak.sources.is_empty()).then(|| self.leak.told());
        self.endpoint.warnings().iter().cloned().chain(leak)
    }

    fn ledger(&self) -> PathBuf {
        self.options.ledger.clone().unwrap_or_else(|| place::beside(&self.options.out, ".ledger.jsonl"))
    }

    /// Everything that decides the result but the answers.
    fn fingerprint(&self) -> Result<String> {
        let o = &self.options;
        let hashes =
            o.sources.iter().chain(&o.train).map(|p| digest::sha256_file(p)).collect::<Result<Vec<_>>>()?;
        let decides = json!([
            hashes,
            o.sources.len(),
            o.allow_leak,
            o.pairs,
            o.items,
            o.candidates,
            o.endpoint.model,
            o.endpoint.temperature,
            o.endpoint.answer_tokens,
            o.single_domain_check,
            self.seed,
            Prompts::hash()
        ]);
        Ok(digest::sha256(decides.to_string().as_bytes()))
    }

    /// Asks until each pair has its items or no more candidates, and writes the folder.
    pub fn run(self, common: &Common) -> Result<CrossReport> {
        self.run_by(&Wall::default(), common)
    }

    /// As [`Prepared::run`], by this clock.
    pub fn run_by(self, clock: &dyn Clock, common: &Common) -> Result<CrossReport> {
        let ledger = self.ledger();
        let output = match Output::begin(&self.options.out, COMMAND, &self.fingerprint()?, common.output())? {
            Begun::Work(output) => output,
            Begun::Finished => {
                let path = self.options.out.join(SUMMARY);
                let summary = json::typed(&path, json::parse(&path, &json::read_bounded(&path)?)?)?;
                let (out, warnings) = (self.options.out, Vec::new());
                return Ok(CrossReport {
                    out,
                    ledger,
                    already_finished: true,
                    summary,
                    requests: 0,
                    tokens: 0,
                    warnings,
                });
            }
        };
        self.warnings().for_each(|warning| tracing::warn!("{warning}"));
        let prompts = Prompts::new()?;
        let client =
            Client::new(&self.endpoint, Ledger::open(&ledger)?, self.options.limits, clock, &common.stop);
        let pipeline = Pipeline {
            client: &client,
            prompts: &prompts,
            single_domain_check: self.options.single_domain_check,
        };
        let bar = common.progress.bar("items", self.options.items * self.pairs.len() as u64);
        let outcomes = schedule::run(
            &self.pairs,
            self.options.items,
            self.options.candidates,
            self.options.concurrency,
            |pair, k| pipeline.run(pair.candidate(k)),
            |outcome| {
                bar.inc(u64::from(matches!(outcome, Outcome::Accepted(_))));
                let (requests, tokens) = client.spent();
                bar.set_message(format!("{requests} requests, {tokens} tokens"));
            },
        );
        bar.finish_and_clear();
        // Answers are made durable, whatever the end.
        let (requests, tokens) = client.spent();
        client.finish()?;
        let summary = write(output.dir(), outcomes?, &self)?;
        let mut provenance = Provenance::new(COMMAND);
        provenance.seed = Some(self.seed);
        provenance.options.insert("model".into(), self.endpoint.model().into());
        provenance.options.insert("prompts_sha256".into(), Prompts::hash().into());
        provenance.options.insert("single_domain_check".into(), self.options.single_domain_check.into());
        provenance.seal(output.dir(), BTreeMap::new())?;
        output.finish()?;
        let mut warnings = Vec::new();
        for pair in summary.pairs.iter().filter(|p| p.repeated > 0) {
            warnings.push(format!(
                "{}: {} items ask what an earlier one asks, so that they are no independent ones: reject them in data review",
                pair.file, pair.repeated
            ));
        }
        for pair in summary.pairs.iter().filter(|p| p.items < p.wanted) {
            warnings.push(format!(
                "{} has {} items of {}: all of its {} candidates were tried",
                pair.file, pair.items, pair.wanted, pair.candidates
            ));
        }
        let out = self.options.out;
        Ok(CrossReport { out, ledger, already_finished: false, summary, requests, tokens, warnings })
    }
}

impl Leak {
    /// In words.
    fn told(&self) -> String {
        let first = self.sources.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        let more = if self.sources.len() > 5 { ", …" } else { "" };
        let what = if self.allowed { "used all the same, as --allow-leak says" } else { "left out" };
        format!("{} sources stand in the training data and are {what}: {first}{more}", self.sources.len())
    }
}

/// Writes the files of the folder `dir`.
fn write(dir: &Path, outcomes: Vec<BTreeMap<u64, Outcome>>, ready: &Prepared) -> Result<Summary> {
    let (mut all, mut rejected, mut summaries) = (Vec::new(), Vec::new(), Vec::new());
    for (pair, outcomes) in ready.pairs.iter().zip(outcomes) {
        let mut summary = PairSummary {
            domains: pair.domains().map(str::to_string),
            file: format!("{}.jsonl", pair.name()),
            items: 0,
            wanted: ready.options.items,
            candidates: outcomes.len() as u64,
            unmergeable: 0,
            malformed: 0,
            refused: 0,
            single_domain: 0,
            repeated: 0,
            answers: [0; 4],
        };
        let (first, mut asked) = (all.len(), HashSet::new());
        for (k, outcome) in outcomes {
            match outcome {
                Outcome::Accepted(candidate) => {
                    let item = candidate.item(pair, k, summary.items, ready.endpoint.model());
                    summary.items += 1;
                    summary.answers[item.written.answer] += 1;
                    summary.repeated +=
                        u64::from(!asked.insert(cut::key(&item.written.question, &item.written.choices)));
                    all.push(item);
                }
                Outcome::Rejected(r) => {
                    *match r.cause {
                        Cause::Unmergeable => &mut summary.unmergeable,
                        Cause::Malformed => &mut summary.malformed,
                        Cause::Refused => &mut summary.refused,
                        Cause::SingleDomain => &mut summary.single_domain,
                    } += 1;
                    let sources = pair.candidate(k).map(|s| format!("{}:{}", s.file, s.id));
                    rejected.push(RejectedLine {
                        id: pipeline::id(pair, k),
                        sources,
                        stage: r.stage,
                        why: r.why,
                    });
                }
            }
        }
        // A task file without items is none.
        if summary.items > 0 {
            lines::write(&dir.join(&summary.file), all[first..].iter().map(Item::task_line))?;
        }
        summaries.push(summary);
    }
    lines::write(&dir.join(ITEMS), &all)?;
    lines::write(&dir.join(REJECTED), &rejected)?;
    let summary = Summary { pairs: summaries, leak: ready.leak.clone() };
    digest::write_json(&dir.join(SUMMARY), &summary)?;
    Ok(summary)
}
