//! `eval`: accuracy on multiple-choice tasks, or how well a text is predicted, for several adapters at once.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::accuracy::{Accuracy, choose, weighted};
use self::items::{Items, Shots};
use self::letters::Letters;
use self::paired::Paired;
use self::score::{Columns, Extent};
use self::text::TextScore;
use self::write::Outputs;
use super::adapters::load_adapters;
use super::common::{Common, blame};
use super::generate::Decoder;
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::data::documents::Document;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::memory::Plan;
use crate::model::packing::PackedWeights;
use crate::model::session::{self, Adapters};
use crate::tensor::Real;

pub mod accuracy;
pub mod harness;
pub mod items;
pub mod letters;
pub mod paired;
pub mod score;
mod show;
pub mod text;
pub mod write;

/// The most columns of which any two are compared; of more, each is compared with the first.
const ALL_PAIRS: usize = 32;

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
    /// The most tokens of each column that go through the model together; more than four columns share the room of four.
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
    /// Any two columns over all tasks together; of more than 32 columns each with the first.
    #[serde(default)]
    pub pairs: Vec<PairReport>,
    /// How often each option is answered in all tasks together.
    #[serde(default)]
    pub letters: Letters,
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
    /// Any two columns, as over all tasks.
    #[serde(default)]
    pub pairs: Vec<PairReport>,
    /// How often each option is answered.
    #[serde(default)]
    pub letters: Letters,
    /// By subject, where the task has several.
    pub subsets: Vec<SubsetReport>,
}

/// Two columns compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairReport {
    /// The first's name; none is the base.
    pub first: Option<String>,
    /// The second's name.
    pub second: Option<String>,
    /// Their answers to the same items.
    #[serde(flatten)]
    pub paired: Paired,
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
    /// By column: of each option among the options, `exp(lᵢ) / Σ exp(lⱼ)`.
    #[serde(default)]
    pub probabilities: Vec<Vec<f64>>,
    /// By column: the first likeliest option.
    #[serde(default)]
    pub predicted: Vec<usize>,
    /// By column: the text that follows the context where each token is the likeliest.
    #[serde(default)]
    pub greedy: Vec<String>,
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
    let (config, plan) = (read.checkpoint.config(), read.plan::<T>(backend, options)?);
    Ok(common.packing::<T>(backend, config, PackedWeights::INFERENCE, plan)?.0)
}

fn evaluate<B: Backend, T: Real>(
    backend: &B,
    options: &EvalOptions,
    common: &Common,
) -> Result<(EvalReport, Items)> {
    let read = Read::new(backend, options, common)?;
    let (config, plan) = (read.checkpoint.config(), read.plan::<T>(backend, options)?);
    let (_, packed) = common.packing::<T>(backend, config, PackedWeights::INFERENCE, plan)?;
    let Read { checkpoint, tokenizer, columns, windows, items, adapters } = read;
    let model = common.model::<B, T>(backend, &checkpoint, packed)?;
    let stacked = Columns { backend, checkpoint: &checkpoint, model: &model, adapters: &adapters };
    if options.text.is_some() {
        let text = stacked.text::<T>(&windows, options.batch_tokens, common).map_err(blame(&checkpoint))?;
        return Ok((EvalReport { columns, text, ..EvalReport::default() }, items));
    }
    let shown = options.show.as_ref().map_or_else(Vec::new, |id| items.named(id));
    let contexts: Vec<&[u32]> = shown.iter().map(|&n| items.context(n)).collect();
    let greedy = stacked.greedy::<T>(&contexts, &tokenizer, common).map_err(blame(&checkpoint))?;
    let scores =
        stacked.score::<T>(&items.trees, options.batch_tokens, common).map_err(blame(&checkpoint))?;
    let mut report = report(columns, &items, &scores);
    report.shown =
        shown.iter().zip(greedy).map(|(&n, greedy)| items.shown(n, scores[n].clone(), greedy)).collect();
    Ok((report, items))
}

/// All that is read before the weights, so that a mistake in it is said before they are touched.
struct Read<B: Backend> {
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
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
        if let Some(id) = &options.show {
            items.check_shown(id)?;
        }
        let adapters = load_adapters(backend, &checkpoint, &dirs, options.base, common)?;
        Ok(Read { checkpoint, tokenizer, columns, windows, items, adapters })
    }

    /// What evaluating it holds in memory: the larger of scoring everything and of writing what is shown, which comes
    /// before it.
    fn plan<T: Real>(&self, backend: &B, options: &EvalOptions) -> Result<Plan> {
        let mut plan = self.scoring::<T>(backend, options)?;
        for n in options.show.iter().flat_map(|id| self.items.named(id)) {
            let tokens = show::tokens(self.items.context(n), self.checkpoint.config());
            let shown = Decoder::<B, T>::plan(backend, &self.adapters, &self.checkpoint, tokens)?;
            if shown.total() > plan.total() {
                plan = shown;
            }
        }
        Ok(plan)
    }

    fn scoring<T: Real>(&self, backend: &B, options: &EvalOptions) -> Result<Plan> {
        let copies = self.columns.len();
        let extent = match options.text {
            Some(_) => {
                Some(text::extent(&text::batches(&self.windows, copies, options.batch_tokens), copies))
            }
            None => {
                let (trees, config) = (&self.items.trees, self.checkpoint.config());
                let batches = score::batches(trees, copies, options.batch_tokens, config);
                Extent::of(trees, &batches, copies)
            }
        };
        let Some(extent) = extent else { return Ok(Plan::default()) };
        let (tables, size) = extent.room(&self.checkpoint, copies, self.adapters.ranks())?;
        session::plan::<B, T>(backend, &self.checkpoint, &self.adapters.layouts, &tables, size)
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
    if let (Some(id), Some(_)) = (&options.show, &options.text) {
        return usage(format!("--show {id} shows an item of a --task, a --text has none"));
    }
    if options.base && options.adapters.iter().any(|(name, _)| name == "none") {
        return usage("no adapter beside the base is called none: name it, --adapter NAME=DIR".into());
    }
    check_prompts(options.shots, options.shots_from.as_deref(), options.batch_tokens)
}

/// What has no meaning in how items are put to a model.
pub(super) fn check_prompts(shots: usize, shots_from: Option<&Path>, batch_tokens: usize) -> Result<()> {
    let usage = |why: String| Err(Error::Usage(why));
    if (shots > 0) != shots_from.is_some() {
        return usage("--shots N and --shots-from DIR go together".into());
    }
    // Rows of all columns are counted in 32 bits.
    let most = u32::MAX as usize / 8;
    if !(1..=most).contains(&batch_tokens) {
        return usage(format!("--batch-tokens is {batch_tokens}, expected 1 to {most}"));
    }
    Ok(())
}

/// Counts the answers. `scores` are by tree, column and option.
fn report(columns: Vec<Option<String>>, items: &Items, scores: &[Vec<Vec<f64>>]) -> EvalReport {
    let mut out = EvalReport { columns, unfit: items.unfit.clone(), ..EvalReport::default() };
    let answers: Vec<Vec<(usize, bool)>> =
        scores.iter().map(|columns| columns.iter().map(|logprobs| choose(logprobs)).collect()).collect();
    let predicted: Vec<Vec<usize>> =
        answers.iter().map(|columns| columns.iter().map(|answer| answer.0).collect()).collect();
    let letters = |of: &[usize]| {
        Letters::count(out.columns.len(), of.iter().map(|&n| (items.item(n).gold, &predicted[n][..])))
    };
    let right: Vec<Vec<bool>> = (0..out.columns.len())
        .map(|c| (0..answers.len()).map(|n| answers[n][c].0 == items.item(n).gold).collect())
        .collect();
    for (number, task) in items.tasks.iter().enumerate() {
        let own: Vec<usize> = (0..items.trees.len()).filter(|&n| items.places[n].0 == number).collect();
        let accuracy = |column: usize, of: &[usize]| {
            Accuracy::of(of.iter().map(|&n| (right[column][n], answers[n][column].1)))
        };
        let by_column = |of: &[usize]| (0..out.columns.len()).map(|c| accuracy(c, of)).collect::<Vec<_>>();
        let subject = |n: usize| items.item(n).subject.clone().unwrap_or_default();
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
            pairs: pairs(&out.columns, &right, &own),
            letters: letters(&own),
            subsets,
        };
        for &n in &own {
            for (c, (adapter, logprobs)) in out.columns.iter().zip(&scores[n]).enumerate() {
                out.predictions.push(Prediction {
                    task: task.name.clone(),
                    adapter: adapter.clone(),
                    id: items.item(n).id.clone(),
                    gold: items.item(n).gold,
                    predicted: predicted[n][c],
                    logprobs: logprobs.clone(),
                });
            }
        }
        out.tasks.push(report);
    }
    let every: Vec<usize> = (0..items.trees.len()).collect();
    (out.pairs, out.letters) = (pairs(&out.columns, &right, &every), letters(&every));
    let all = |c: usize| out.tasks.iter().map(|t| t.columns[c]).collect::<Vec<_>>();
    out.overall = (0..out.columns.len()).map(|c| weighted(&all(c))).collect();
    out
}

/// Any two columns on the trees `of`; of more than [`ALL_PAIRS`] columns each with the first. `right` is by column and
/// tree.
fn pairs(columns: &[Option<String>], right: &[Vec<bool>], of: &[usize]) -> Vec<PairReport> {
    let own: Vec<Vec<bool>> = right.iter().map(|all| of.iter().map(|&n| all[n]).collect()).collect();
    let firsts = if columns.len() > ALL_PAIRS { 1 } else { columns.len() };
    let both = (0..firsts).flat_map(|first| (first + 1..columns.len()).map(move |second| (first, second)));
    both.map(|(first, second)| PairReport {
        first: columns[first].clone(),
        second: columns[second].clone(),
        paired: Paired::of(&own[first], &own[second]),
    })
    .collect()
}
