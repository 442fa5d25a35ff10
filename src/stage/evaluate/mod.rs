//! `eval`: accuracy on multiple-choice tasks, or how well a text is predicted, for several adapters at once.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::accuracy::{Accuracy, choose, weighted};
use self::items::{Items, Shots};
use self::score::{Columns, Extent};
use self::text::TextScore;
use self::write::Outputs;
use super::adapters::load_adapters;
use super::common::{Common, blame};
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::data::documents::Document;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::memory::Plan;
use crate::model::session::{self, Adapters};
use crate::model::weights::Model;
use crate::tensor::Real;

pub mod accuracy;
pub mod harness;
pub mod items;
pub mod score;
pub mod text;
pub mod write;

/// What is evaluated on what.
#[derive(Clone, Debug, Default)]
pub struct EvalOptions {
    /// The model's folder.
    pub model: PathBuf,
    /// Columns: an adapter's name in results, and its folder.
    pub adapters: Vec<(String, PathBuf)>,
    /// Whether the base is the first column; without adapters it is the only one anyway.
    pub base: bool,
    /// Multiple-choice tasks, or else `text`.
    pub tasks: Vec<PathBuf>,
    /// A text whose perplexity is asked for.
    pub text: Option<PathBuf>,
    /// Tokens of a window of the text.
    pub seq: usize,
    /// Worked examples before each question.
    pub shots: usize,
    /// The folder of their `<subject>_dev.csv`.
    pub shots_from: Option<PathBuf>,
    /// The most tokens that go through the model together, all columns counted.
    pub batch_tokens: usize,
    /// An item to show with its prompt and tokens.
    pub show: Option<String>,
    /// A file for one JSON line of each item and column.
    pub predictions: Option<PathBuf>,
    /// A folder for the report and the predictions.
    pub out: Option<PathBuf>,
}

/// The result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// The adapters' names; none is the base.
    pub columns: Vec<Option<String>>,
    /// One for each task file.
    pub tasks: Vec<TaskReport>,
    /// All tasks together by column, each counted by its size; empty for a text.
    pub overall: Vec<Accuracy>,
    /// Items that could not be scored.
    pub unfit: Vec<UnfitItem>,
    /// The text's score by column; empty for tasks.
    pub text: Vec<TextScore>,
    /// The item that was asked to be shown, once for each task that has it.
    pub shown: Vec<ShownItem>,
    /// Whether `--resume` found a finished output, whose results these are.
    pub already_finished: bool,
    /// One for each item and column.
    #[serde(skip)]
    pub predictions: Vec<Prediction>,
}

/// One task's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// The file's name without extension.
    pub name: String,
    /// Items in the file.
    pub items: usize,
    /// Those of them that could not be scored.
    pub unfit: usize,
    /// By column.
    pub columns: Vec<Accuracy>,
    /// By subject, where the task has several.
    pub subsets: Vec<SubsetReport>,
}

/// One subject's part of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubsetReport {
    /// The subject; empty for items without one.
    pub subject: String,
    /// By column.
    pub columns: Vec<Accuracy>,
}

/// An item that could not be scored, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnfitItem {
    /// Its task.
    pub task: String,
    /// Its id.
    pub id: String,
    /// What it needs and what there is.
    pub why: String,
}

/// One column's answer to one item: a line of `predictions.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Its task.
    pub task: String,
    /// The adapter's name; none is the base.
    pub adapter: Option<String>,
    /// Its id.
    pub id: String,
    /// The right option, from 0.
    pub gold: usize,
    /// The first likeliest option.
    pub predicted: usize,
    /// Of each option.
    pub logprobs: Vec<f64>,
}

/// One item in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShownItem {
    /// Its task.
    pub task: String,
    /// Its id.
    pub id: String,
    /// The text before the options.
    pub context: String,
    /// The context's tokens.
    pub context_ids: Vec<u32>,
    /// The options' texts.
    pub options: Vec<String>,
    /// The options' tokens.
    pub option_ids: Vec<Vec<u32>>,
    /// The right option, from 0.
    pub gold: usize,
    /// Log-probabilities by column and option.
    pub logprobs: Vec<Vec<f64>>,
}

/// Evaluates, and writes what the options name.
pub fn run<B: Backend, T: Real>(backend: &B, options: &EvalOptions, common: &Common) -> Result<EvalReport> {
    check(options)?;
    let Some(outputs) = Outputs::begin(options, T::DTYPE, common)? else {
        let finished = write::read(options.out.as_deref().unwrap_or(Path::new("")))?;
        return Ok(EvalReport { already_finished: true, ..finished });
    };
    let (report, items) = evaluate::<B, T>(backend, options, common)?;
    outputs.finish(&report, &items, options, T::DTYPE)?;
    Ok(report)
}

/// What the evaluation would hold in memory, from its files without the weights.
pub fn plan<B: Backend, T: Real>(backend: &B, options: &EvalOptions, common: &Common) -> Result<Plan> {
    check(options)?;
    let read = Read::new(backend, options, common)?;
    let copies = read.columns.len();
    let extent = match options.text {
        Some(_) => Some(text::extent(&text::batches(&read.windows, copies, options.batch_tokens), copies)),
        None => Extent::of(&score::batches(&read.items.trees, copies, options.batch_tokens), copies),
    };
    let Some(extent) = extent else { return Ok(Plan::default()) };
    let (config, layouts) = (read.checkpoint.config(), &read.adapters.layouts);
    let (tables, size) = extent.room(&read.checkpoint, layouts)?;
    session::plan::<B, T>(backend, config, layouts, &tables, size)
}

fn evaluate<B: Backend, T: Real>(
    backend: &B,
    options: &EvalOptions,
    common: &Common,
) -> Result<(EvalReport, Items)> {
    let Read { checkpoint, columns, windows, items, adapters } = Read::new(backend, options, common)?;
    let model = Model::new(backend, &checkpoint)?;
    let stacked = Columns { backend, checkpoint: &checkpoint, model: &model, adapters: &adapters };
    if options.text.is_some() {
        let text = stacked.text::<T>(&windows, options.batch_tokens, common).map_err(blame(&checkpoint))?;
        return Ok((EvalReport { columns, text, ..EvalReport::default() }, items));
    }
    let scores =
        stacked.score::<T>(&items.trees, options.batch_tokens, common).map_err(blame(&checkpoint))?;
    let report = report(columns, &items, &scores, options.show.as_deref());
    Ok((report, items))
}

/// All that is read before the weights, so that a mistake in it is said before they are touched.
struct Read<B: Backend> {
    checkpoint: Checkpoint,
    columns: Vec<Option<String>>,
    windows: Vec<Document>,
    items: Items,
    adapters: Adapters<B>,
}

impl<B: Backend> Read<B> {
    fn new(backend: &B, options: &EvalOptions, common: &Common) -> Result<Read<B>> {
        let checkpoint = Checkpoint::open(&options.model, common.open_options())?;
        let config = checkpoint.config();
        let tokenizer = Tokenizer::load(&options.model, config.vocab)?;
        let dirs: Vec<&PathBuf> = options.adapters.iter().map(|(_, dir)| dir).collect();
        let base = (options.base || dirs.is_empty()).then_some(None);
        let names = options.adapters.iter().map(|(name, _)| Some(name.clone()));
        let columns = base.into_iter().chain(names).collect();
        let windows = match &options.text {
            Some(path) => text::windows(path, &tokenizer, options.seq)?,
            None => Vec::new(),
        };
        let shots = options.shots_from.as_ref().map(|dir| Shots { dir, count: options.shots });
        let items = Items::load(&options.tasks, &tokenizer, shots, config.longest())?;
        let adapters = load_adapters(backend, &checkpoint, &dirs, options.base, common)?;
        Ok(Read { checkpoint, columns, windows, items, adapters })
    }
}

/// What has no meaning, before anything is read.
fn check(options: &EvalOptions) -> Result<()> {
    let usage = |why: String| Err(Error::Usage(why));
    if options.tasks.is_empty() == options.text.is_none() {
        return usage("eval needs either --task or --text".into());
    }
    let mut names = HashSet::new();
    if let Some((name, _)) = options.adapters.iter().find(|(name, _)| !names.insert(name)) {
        return usage(format!("two adapters are called {name}: name them, --adapter NAME=DIR"));
    }
    if options.base && options.adapters.iter().any(|(name, _)| name == "none") {
        return usage("no adapter beside the base is called none: name it, --adapter NAME=DIR".into());
    }
    if (options.shots > 0) != options.shots_from.is_some() {
        return usage("--shots N and --shots-from DIR go together".into());
    }
    let most = u32::MAX as usize / 2;
    if !(1..=most).contains(&options.batch_tokens) {
        return usage(format!("--batch-tokens is {}, expected 1 to {most}", options.batch_tokens));
    }
    Ok(())
}

/// Counts the answers. `scores` are by tree, column and option.
fn report(
    columns: Vec<Option<String>>,
    items: &Items,
    scores: &[Vec<Vec<f64>>],
    show: Option<&str>,
) -> EvalReport {
    let mut out = EvalReport { columns, unfit: items.unfit.clone(), ..EvalReport::default() };
    for (number, task) in items.tasks.iter().enumerate() {
        let own: Vec<usize> = (0..items.trees.len()).filter(|&n| items.places[n].0 == number).collect();
        let item = |n: usize| &task.items[items.places[n].1];
        let accuracy = |column: usize, of: &[usize]| {
            Accuracy::of(of.iter().map(|&n| {
                let (best, tied) = choose(&scores[n][column]);
                (best == item(n).gold, tied)
            }))
        };
        let by_column = |of: &[usize]| (0..out.columns.len()).map(|c| accuracy(c, of)).collect::<Vec<_>>();
        let subject = |n: usize| item(n).subject.clone().unwrap_or_default();
        let mut subjects: Vec<String> = own.iter().map(|&n| subject(n)).collect();
        subjects.sort_unstable();
        subjects.dedup();
        let subsets = match subjects.len() {
            0 | 1 => Vec::new(),
            _ => subjects
                .into_iter()
                .map(|s| {
                    let of: Vec<usize> = own.iter().copied().filter(|&n| subject(n) == s).collect();
                    SubsetReport { columns: by_column(&of), subject: s }
                })
                .collect(),
        };
        let report = TaskReport {
            name: task.name.clone(),
            items: task.items.len(),
            unfit: task.items.len() - own.len(),
            columns: by_column(&own),
            subsets,
        };
        for &n in &own {
            for (adapter, logprobs) in out.columns.iter().zip(&scores[n]) {
                out.predictions.push(Prediction {
                    task: task.name.clone(),
                    adapter: adapter.clone(),
                    id: item(n).id.clone(),
                    gold: item(n).gold,
                    predicted: choose(logprobs).0,
                    logprobs: logprobs.clone(),
                });
            }
            if show == Some(item(n).id.as_str()) {
                out.shown.push(items.shown(n, scores[n].clone()));
            }
        }
        out.tasks.push(report);
    }
    let all = |c: usize| out.tasks.iter().map(|t| t.columns[c]).collect::<Vec<_>>();
    out.overall = (0..out.columns.len()).map(|c| weighted(&all(c))).collect();
    out
}
