//! `search`: many fusions of the same adapters scored on tasks, and the best of them written, if it is good enough.
//!
//! The base is loaded once. Each candidate is fused as `fuse` does it, and its factors go to the device as its file would
//! hold them. A journal in the folder of unfinished work keeps every candidate's answers, so that a killed search goes on
//! behind those that it scored.

mod candidates;
mod ready;
mod scorer;
mod table;
mod work;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use self::candidates::{Candidate, WeightChoice};
use self::ready::Ready;
pub use self::table::{Kind, Rival, Row, Search, Table};
use super::admit::Admission;
use super::common::Common;
use super::evaluate::check_prompts;
use super::fuse::FuseOptions;
use crate::backend::Backend;
use crate::checkpoint::json;
use crate::checkpoint::output::{Begun, Output};
use crate::error::{Error, Result};
use crate::fuse::certificate::Certificate;
use crate::fuse::{Fusion, LoraCr};
use crate::model::memory::Plan;
use crate::tensor::Real;

/// The file in the output that holds the [`Search`].
pub const SEARCH: &str = "search.json";

/// What `search` is asked.
#[derive(Clone, Debug)]
pub struct SearchOptions {
    /// The adapters and all that fusions have in common; recipe, weights and outputs are the search's.
    pub fuse: FuseOptions,
    /// The methods.
    pub fusions: Vec<Fusion>,
    /// The resolutions before them.
    pub resolves: Vec<Option<LoraCr>>,
    /// The weights.
    pub weights: Vec<WeightChoice>,
    /// The most candidates that these may make.
    pub max_candidates: usize,
    /// The base's folder.
    pub model: PathBuf,
    /// The tasks that choose.
    pub tasks: Vec<PathBuf>,
    /// Held-out tasks.
    pub test: Vec<PathBuf>,
    /// Worked examples before each question.
    pub shots: usize,
    /// The folder of their `<subject>_dev.csv`.
    pub shots_from: Option<PathBuf>,
    /// The most tokens that go through the model together.
    pub batch_tokens: usize,
    /// What the best must be better than.
    pub required: Vec<Rival>,
    /// Up to which p of McNemar's test more right answers are better.
    pub level: f64,
    /// Where to write the best.
    pub out: PathBuf,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct SearchReport {
    /// The adapter's folder, where it was good enough.
    pub out: PathBuf,
    /// OUT was there already, under `--resume`: this is what its `search.json` says.
    pub already_finished: bool,
    /// The rows, and the best of them.
    #[serde(flatten)]
    pub search: Search,
    /// Whose adapters were given, how large they are, and which were left out.
    pub admission: Option<Admission>,
    /// Of the adapter, where one was written now.
    pub certificate: Option<Certificate>,
    /// What a user should know and what is no error.
    pub warnings: Vec<String>,
}

impl SearchReport {
    /// An error where nothing was good enough to be written.
    pub fn check(&self) -> Result<()> {
        match &self.search.refused[..] {
            [] => Ok(()),
            why => Err(Error::NotGoodEnough(format!("nothing was written: {}", why.join("; ")))),
        }
    }
}

/// Scores all candidates and writes the best. Where it is not good enough nothing is written, and the report says why.
pub fn run<B: Backend, T: Real>(
    backend: &B,
    options: &SearchOptions,
    common: &Common,
) -> Result<SearchReport> {
    let ready = Ready::new(options, common)?;
    if let Some(limit) = common.memory_limit {
        ready.memory::<B, T>(backend)?.fit(limit)?;
    }
    let fingerprint = ready.fingerprint::<T>(common)?;
    let mut output = match Output::begin(&options.out, "search", &fingerprint, common.output())? {
        Begun::Finished => return finished(&options.out),
        Begun::Work(output) => output,
    };
    let done = ready.search::<B, T>(backend, output.dir(), common).and_then(|(search, journal)| {
        let chosen = match search.refused.is_empty() {
            true => Some(ready.write(backend, output.dir(), &search, common)?),
            false => None,
        };
        journal.remove()?;
        Ok((search, chosen))
    });
    if matches!(done, Err(Error::Interrupted(_) | Error::Io { .. })) {
        output.keep();
    }
    let (search, certificate) = done?;
    match certificate {
        Some(_) => output.finish()?,
        None => output.discard(),
    }
    Ok(SearchReport {
        out: options.out.clone(),
        already_finished: false,
        search,
        certificate,
        warnings: ready.inputs.warnings.clone(),
        admission: Some(ready.admission),
    })
}

/// What the finished output `out` says.
fn finished(out: &Path) -> Result<SearchReport> {
    let path = out.join(SEARCH);
    let search = json::typed(&path, json::parse_format(&path, &json::read_bounded(&path)?, table::FORMAT)?)?;
    Ok(SearchReport {
        out: out.to_path_buf(),
        already_finished: true,
        search,
        admission: None,
        certificate: None,
        warnings: Vec::new(),
    })
}

/// What a search would do: how many candidates, and every buffer.
pub fn plan<B: Backend, T: Real>(
    backend: &B,
    options: &SearchOptions,
    common: &Common,
) -> Result<(String, Plan)> {
    let ready = Ready::new(options, common)?;
    let mut does = format!(
        "score the base, {} adapters and {} candidates ({} methods, {} resolutions) on {} items",
        ready.edges.len(),
        ready.candidates.len(),
        options.fusions.len(),
        options.resolves.len(),
        ready.questions.len()
    );
    if let Some(test) = &ready.test {
        does += &format!(", then the base, the adapters and the best candidate on {} others", test.len());
    }
    Ok((does, ready.memory::<B, T>(backend)?))
}

/// What has no meaning, before anything is read.
fn check(options: &SearchOptions) -> Result<()> {
    let usage = |why: String| Err(Error::Usage(why));
    if options.tasks.is_empty() {
        return usage("search needs --task, what the candidates are scored on".into());
    }
    if options.fusions.is_empty() || options.resolves.is_empty() || options.weights.is_empty() {
        return usage("search needs at least one of --methods, --resolve and --weights each".into());
    }
    if let Some(n) = (1..options.fusions.len()).find(|&n| options.fusions[..n].contains(&options.fusions[n]))
    {
        return usage(format!("--methods names {} twice", options.fusions[n].method));
    }
    if let Some(n) =
        (1..options.resolves.len()).find(|&n| options.resolves[..n].contains(&options.resolves[n]))
    {
        let word = options.resolves[n].map_or("none", |_| "lora-cr");
        return usage(format!("--resolve names {word} twice"));
    }
    if !(options.level > 0.0 && options.level <= 1.0) {
        return usage(format!("--level is {}, expected above 0 and at most 1", options.level));
    }
    check_prompts(options.shots, options.shots_from.as_deref(), options.batch_tokens)
}
