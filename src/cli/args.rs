//! What was typed. The doc comments are the help texts.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::data::DataCommand;
use super::size::ByteSize;
use crate::checkpoint::module::Target;
use crate::fuse::options::{
    Coverage, DensityOf, DensityScope, Fedsa, Gate, Method, Restore, SharedRank, Side,
};
use crate::fuse::weights::Weights;
use crate::model::packing::PackWeights;
use crate::prune::groups::{Gqa, Reduce};
use crate::prune::scores::Importance;
use crate::stage::export::Format;
use crate::stage::measure::Of;
use crate::stage::search::{Rival, WeightChoice};

/// Prune a large model to an edge device's memory, train LoRA adapters there, recover them, resolve their conflicts,
/// fuse them, evaluate.
///
/// Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "anabranch", version, max_term_width = 110, propagate_version = true)]
pub struct Cli {
    /// Options of all commands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Args)]
pub struct Global {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Activations and matrix inputs; sums are always f32 or wider [default: bf16 on CUDA and on CPUs with AMX, f32 on others]
    #[arg(long, global = true, value_name = "PRECISION")]
    pub precision: Option<PrecisionArg>,
    /// CPU threads; results do not depend on it [default: all]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Hard cap on the memory a run allocates, e.g. 6GiB; a plan over it fails before any work
    #[arg(long, global = true, value_name = "SIZE")]
    pub memory_limit: Option<ByteSize>,
    /// Weights packed once for all products of train, eval, search, grams, run, demo and budget --measure on a CPU, rather
    /// than anew in each; results are the same. auto: where an eighth of --memory-limit stays free, or half of the memory
    #[arg(long, global = true, default_value = "auto", value_name = "auto|on|off")]
    pub pack_weights: PackWeights,
    /// Read weights into memory instead of mapping them (files that may be truncated meanwhile)
    #[arg(long, global = true)]
    pub no_mmap: bool,
    /// Everything random but the common A₀ (--init-seed)
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// The result as one JSON document on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Print the plan (what is read, written, how much memory, on which device) and do nothing
    #[arg(long, global = true)]
    pub dry_run: bool,
    /// Replace an existing output that this program made; anything else is never deleted
    #[arg(long, global = true)]
    pub force: bool,
    /// Go on from a leftover of the same command
    #[arg(long, global = true)]
    pub resume: bool,
    /// Less on stderr
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// More on stderr; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// Precision of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole flow on a built-in miniature: prune, train, recover, resolve, fuse, evaluate, report
    ///
    /// Example: anabranch demo --out demo
    Demo(DemoArgs),
    /// The whole flow on your own model, edges and data
    ///
    /// Example: anabranch run flow.toml
    Run(RunArgs),
    /// What a checkpoint, pruned model or adapter is, and which programs would load it
    ///
    /// Example: anabranch inspect models/llama-3-8b
    Inspect(InspectArgs),
    /// Parameters and bytes of a training run at each pruning ratio
    ///
    /// Example: anabranch budget --config llama-3-8b/config.json --ratio 0.4 --ratio 0.6 --memory 6GiB
    Budget(BudgetArgs),
    /// A smaller checkpoint: key/value-head groups and MLP channels removed by importance
    ///
    /// Example: anabranch prune --model llama-3-8b --ratio 0.6 --calibration calib.txt --out small
    Prune(PruneArgs),
    /// A LoRA adapter for a (pruned) model, trained on private data
    ///
    /// Example: anabranch train --model small --data hum.train.jsonl --steps 500 --out hum
    Train(TrainCommand),
    /// A pruned model's adapter at the full model's dimensions
    ///
    /// Example: anabranch recover --adapter hum --model llama-3-8b --out hum-full
    Recover(RecoverArgs),
    /// How adapters disagree, per module and layer, before anything is fused
    ///
    /// Example: anabranch conflict hum-full sc-full
    Conflict(ConflictArgs),
    /// One adapter, or a merged checkpoint, from several adapters
    ///
    /// Example: anabranch fuse hum-full sc-full --method fedavg --resolve lora-cr --out fused
    Fuse(FuseArgs),
    /// The best of many fusions on a task, written where it is good enough
    ///
    /// Every method with every resolution and all weights is fused, scored with the base loaded once, and compared item by
    /// item with the base and with the best one: McNemar's exact test, two-sided. Of those with as many right answers the
    /// simplest is taken: without a resolution before with one; uniform weights, those by samples, lists, then points of
    /// the grid from the most even; methods in a fixed order, fedavg and mean first.
    ///
    /// The accuracy that chose is optimistic, the more so the more candidates there were: --test takes items that chose
    /// nothing.
    ///
    /// Example: anabranch search hum-full sc-full --model llama-3-8b --task val.jsonl --methods fedavg,mean --resolve
    /// none,lora-cr --weights grid --require-better-than base --test test.jsonl --out best
    Search(SearchArgs),
    /// The parts of a fusion (fuse --layers A..B) put together
    ///
    /// Example: anabranch join part-0 part-1 part-2 --out fused
    Join(JoinArgs),
    /// Gram matrices of what a model's linears read, for the fusion methods that need them
    ///
    /// It runs where the data are, and what leaves is the folder: for each input of a linear the mean of x xᵀ over the
    /// tokens. That is not the data, but it is not nothing: whoever has the base can work out from the first layer's
    /// matrix which tokens occur in the data and how often, and the deeper ones tell about the contexts that they stand
    /// in; of fewer tokens than a matrix is wide, their inputs' whole span is in it. Share it as you would share word
    /// counts of the data.
    ///
    /// Example: anabranch grams --model small --adapter hum --data hum.train.jsonl --out hum-grams
    Grams(GramsArgs),
    /// Accuracy on multiple-choice tasks, or perplexity on a text
    ///
    /// Example: anabranch eval --model llama-3-8b --adapter fused --base --task hum_sc.jsonl
    Eval(EvalArgs),
    /// Logits [T, V] of one sequence as safetensors, for comparison with other software
    ///
    /// Example: anabranch logits --model llama-3-8b --ids 1,2,3 --out logits.safetensors
    Logits(LogitsArgs),
    /// Text from a prompt
    ///
    /// Example: anabranch generate --model llama-3-8b --adapter fused --prompt "Question: …"
    Generate(GenerateArgs),
    /// Data sets: MMLU for edges, questions that need two domains, tasks for other programs
    ///
    /// Example: anabranch data mmlu import mmlu/data --out mmlu
    Data {
        /// What to do
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Keys for signatures
    ///
    /// Example: anabranch keys new hum.key
    Keys {
        /// What to do
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// Sign a folder: manifest.json with the SHA-256 of every file, and manifest.sig
    ///
    /// Example: anabranch sign hum --key hum.key --run winter --round 3
    Sign(SignArgs),
    /// Check that a folder is what trusted keys signed
    ///
    /// FOLDER holds public keys: NAME.pub counts for everything, edges/NAME.pub for edges only, recoverers/NAME.pub for
    /// recoverers only.
    ///
    /// Example: anabranch verify hum --trusted keys --run winter --round 3
    Verify(VerifyArgs),
    /// An adapter in another format: a GGUF file for llama.cpp, or a folder in PEFT's own form
    ///
    /// Example: anabranch export fused --to gguf --model llama-3-8b --out fused.gguf
    Export(ExportArgs),
    /// report.html of a finished run: one file, no network
    ///
    /// Example: anabranch report runs/first
    Report(ReportArgs),
    /// Device, CPU features, memory and limits: what would be used, and why
    Doctor,
    /// Shell completions on stdout
    ///
    /// Example: anabranch completions bash > /etc/bash_completion.d/anabranch
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where to write [default: anabranch-demo, then anabranch-demo-2, …]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Joint adapters (the upper bound) of all three pairs, not of one
    #[arg(long)]
    pub full: bool,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The flow
    #[arg(value_name = "FLOW.toml")]
    pub flow: PathBuf,
}

/// `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A model's or adapter's folder
    pub path: PathBuf,
    /// Read every byte against the stored hashes
    #[arg(long)]
    pub verify: bool,
    /// The N largest singular values of each weight, by randomized search, or of each update of an adapter
    #[arg(long, value_name = "N")]
    pub spectrum: Option<NonZeroUsize>,
}

/// What decides a training run's shape.
#[derive(Clone, Debug, Args)]
pub struct ShapeArgs {
    /// LoRA rank R
    #[arg(long, default_value_t = 8, value_name = "R")]
    pub rank: usize,
    /// LoRA alpha; the update is alpha / R · B A
    #[arg(long, default_value_t = 16.0, value_name = "X")]
    pub alpha: f64,
    /// Linears that carry an adapter
    #[arg(long, value_delimiter = ',', default_value = "q,k,v,o,gate,up,down", value_name = "LIST")]
    pub targets: Vec<Target>,
    /// Rows of a batch
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub batch: usize,
    /// Batches of an optimizer step
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub grad_accum: usize,
    /// Tokens of a row, at most the model's positions
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub seq: usize,
    /// Layers computed again in the backward pass, all but the last at most [default: as few as the limit asks for]
    #[arg(long, value_name = "N")]
    pub recompute: Option<usize>,
}

/// `budget`.
#[derive(Debug, Args)]
pub struct BudgetArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR", required_unless_present = "config", conflicts_with = "config")]
    pub model: Option<PathBuf>,
    /// A config.json alone: no weights are needed
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Pruning ratios; several are several columns
    #[arg(long, value_name = "A")]
    pub ratio: Vec<f64>,
    /// The smallest ratio that trains within it
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Layers that are pruned, end exclusive, e.g. 4..30 [default: all]
    #[arg(long, value_name = "A..B")]
    pub layers: Option<LayerRange>,
    /// Kept MLP channels are rounded down to a multiple of K
    #[arg(long, default_value_t = 1, value_name = "K")]
    pub round_mlp: usize,
    /// Run one real step on this machine and put the measured peak beside the plan
    #[arg(long, requires = "model")]
    pub measure: bool,
    /// What --measure runs: train, prune or eval
    #[arg(long, default_value = "train", value_name = "STAGE")]
    pub of: Of,
    /// The training run's shape
    #[command(flatten)]
    pub shape: ShapeArgs,
}

/// `prune`.
#[derive(Clone, Debug, Args)]
pub struct PruneArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The part that is removed, between 0 and 1
    #[arg(long, value_name = "A", required_unless_present = "memory", conflicts_with = "memory")]
    pub ratio: Option<f64>,
    /// The edge's memory: the smallest ratio whose training plan fits
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How groups are chosen
    #[command(flatten)]
    pub how: PruneHow,
    /// The training run that must fit under --memory, stored with the result
    #[command(flatten)]
    pub shape: ShapeArgs,
}

/// How groups are chosen.
#[derive(Clone, Debug, Args)]
pub struct PruneHow {
    /// Text or JSONL whose loss tells what matters; needed for the Taylor scores only
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Calibration samples
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub samples: usize,
    /// Tokens of a sample
    #[arg(long, default_value_t = 64, value_name = "T")]
    pub sample_tokens: usize,
    /// taylor1, taylor2, taylor-mix, vector1, vector2, l1, l2 or random
    #[arg(long, default_value = "taylor1", value_name = "SCORE")]
    pub importance: Importance,
    /// Over a group's members: sum, mean, max or prod
    #[arg(long, default_value = "sum", value_name = "HOW")]
    pub reduce: Reduce,
    /// correct, or llm-pruner to add up query heads as LLM-Pruner does
    #[arg(long, default_value = "correct", value_name = "HOW")]
    pub gqa: Gqa,
    /// Layers that are pruned, end exclusive, e.g. 4..30 [default: all]
    #[arg(long, value_name = "A..B")]
    pub layers: Option<LayerRange>,
    /// Kept MLP channels are rounded down to a multiple of K
    #[arg(long, default_value_t = 1, value_name = "K")]
    pub round_mlp: usize,
}

/// `A..B`, end exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRange {
    /// First layer.
    pub start: usize,
    /// After the last layer.
    pub end: usize,
}

impl std::str::FromStr for LayerRange {
    type Err = String;

    fn from_str(s: &str) -> Result<LayerRange, String> {
        let parsed = s.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match parsed {
            Some((start, end)) if start < end => Ok(LayerRange { start, end }),
            _ => Err(format!("{s:?} is no range of layers like 4..30, end exclusive")),
        }
    }
}

/// `train`.
#[derive(Debug, Args)]
pub struct TrainCommand {
    /// The model's folder, pruned or not
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Training data: JSONL with text, prompt and completion, or messages; or plain text
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Store the data's fingerprint, keyed by this file so that it cannot be guessed
    #[arg(long, value_name = "KEYFILE")]
    pub data_fingerprint: Option<PathBuf>,
    /// Sign the adapter with this secret key
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// The run that it is signed for: what was signed for one is not taken for another
    #[arg(long, value_name = "NAME", requires = "key")]
    pub run: Option<String>,
    /// The round of the run
    #[arg(long, value_name = "N", requires = "key")]
    pub round: Option<u64>,
    /// The run's shape
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// How it learns
    #[command(flatten)]
    pub how: TrainHow,
}

/// How a training run learns.
#[derive(Clone, Debug, Args)]
pub struct TrainHow {
    /// Optimizer steps
    #[arg(long, conflicts_with = "epochs", value_name = "N")]
    pub steps: Option<usize>,
    /// Passes over the data [default: 1]
    #[arg(long, value_name = "X")]
    pub epochs: Option<f64>,
    /// Step size
    #[arg(long, default_value_t = 2e-4, value_name = "X")]
    pub lr: f64,
    /// After the warm-up: cosine, linear or constant
    #[arg(long, default_value = "cosine", value_name = "HOW")]
    pub schedule: String,
    /// Below 1 a fraction of the steps, else steps
    #[arg(long, default_value_t = 0.03, value_name = "X")]
    pub warmup: f64,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; 0 turns it off
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    pub max_grad_norm: f64,
    /// Dropout on the adapters' input
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    pub lora_dropout: f64,
    /// One document a row
    #[arg(long, overrides_with = "pack")]
    pub no_pack: bool,
    /// Several documents in one row, which do not see each other (the default)
    #[arg(long)]
    pub pack: bool,
    /// Rows in file order
    #[arg(long)]
    pub no_shuffle: bool,
    /// Seed of the common A₀, whatever --seed is
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub init_seed: u64,
    /// Go on from an adapter
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
    /// Train B alone (FFA-LoRA)
    #[arg(long)]
    pub freeze_a: bool,
    /// Validation data
    #[arg(long, value_name = "FILE")]
    pub val: Option<PathBuf>,
    /// Steps between validations
    #[arg(long, value_name = "N", requires = "val")]
    pub eval_every: Option<usize>,
    /// last, or best: the step with the least validation loss
    #[arg(long, default_value = "last", value_name = "WHICH")]
    pub keep: String,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub checkpoint_every: usize,
    /// Count and leave out bad lines instead of failing
    #[arg(long)]
    pub skip_bad: bool,
}

/// `keys`.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// A new ed25519 key in FILE, for its owner alone, and the public one in FILE.pub
    ///
    /// Example: anabranch keys new hum.key
    New {
        /// Where to write; nothing is ever replaced
        #[arg(value_name = "FILE")]
        path: PathBuf,
    },
}

/// The run and the round that a signature is for.
#[derive(Clone, Debug, Args)]
pub struct OccasionArgs {
    /// The run: what was signed for one is not taken for another
    #[arg(long, value_name = "NAME")]
    pub run: Option<String>,
    /// The round of the run
    #[arg(long, value_name = "N")]
    pub round: Option<u64>,
}

/// Whose folders are taken.
#[derive(Clone, Debug, Args)]
pub struct TrustArgs {
    /// Take only what these public keys signed; NAME.pub, edges/NAME.pub, recoverers/NAME.pub
    #[arg(long, value_name = "FOLDER")]
    pub trusted: Option<PathBuf>,
    /// Which run and round are expected
    #[command(flatten)]
    pub expected: OccasionArgs,
}

/// `sign`.
#[derive(Debug, Args)]
pub struct SignArgs {
    /// The folder
    pub dir: PathBuf,
    /// The secret key
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// What it is signed for
    #[command(flatten)]
    pub occasion: OccasionArgs,
}

/// `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The folder
    pub dir: PathBuf,
    /// The public keys that are trusted; NAME.pub, edges/NAME.pub, recoverers/NAME.pub
    #[arg(long, value_name = "FOLDER")]
    pub trusted: PathBuf,
    /// What it should be signed for
    #[command(flatten)]
    pub expected: OccasionArgs,
}

/// `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The adapter
    pub adapter: PathBuf,
    /// gguf: a file that llama.cpp loads; peft: a folder with a rank by module, as PEFT's patterns
    #[arg(long, value_name = "FORMAT")]
    pub to: Format,
    /// The model that the adapter is for; GGUF needs its head counts, where the adapter has no pruning.json
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// f32, bf16 or f16
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    pub dtype: String,
    /// Where to write
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
}

/// `recover`.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// The adapter, with its pruning.json
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// The full model, to check the adapter against
    #[arg(long, value_name = "BASE")]
    pub model: Option<PathBuf>,
    /// Sign the result with this secret key, for the run and round that the edge's signature names
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Whose adapters are taken
    #[command(flatten)]
    pub trust: TrustArgs,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// How conflicts are resolved.
#[derive(Clone, Debug, Args)]
pub struct ResolveArgs {
    /// Directions of the shared subspace: all, N, or energy:E
    #[arg(long, default_value = "all", value_name = "RANK")]
    pub shared_rank: SharedRank,
    /// Which space is shared: left (outputs), right (inputs) or both
    #[arg(long, default_value = "left", value_name = "SIDE")]
    pub side: Side,
    /// paper, or opposition to leave unrelated directions alone
    #[arg(long, default_value = "paper", value_name = "GATE")]
    pub gate: Gate,
    /// Give norms back: none, client or global
    #[arg(long, default_value = "none", value_name = "HOW")]
    pub restore: Restore,
    /// Modules that an adapter lacks: weights renormalised over those who have them
    #[arg(long)]
    pub allow_missing: bool,
}

/// `conflict`.
#[derive(Debug, Args)]
pub struct ConflictArgs {
    /// Two or more adapters
    #[arg(required = true, num_args = 1.., value_name = "ADAPTER")]
    pub adapters: Vec<PathBuf>,
    /// A page of drawings: by layer and module, by direction, adapter against adapter
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// How they would be resolved
    #[command(flatten)]
    pub resolve: ResolveArgs,
}

/// `fuse`.
#[derive(Debug, Args)]
pub struct FuseArgs {
    /// The adapters
    #[arg(required = true, num_args = 1.., value_name = "ADAPTER")]
    pub adapters: Vec<PathBuf>,
    /// The fused adapter's folder
    #[arg(long, value_name = "DIR", required_unless_present = "merged")]
    pub out: Option<PathBuf>,
    /// The base, for --merged
    #[arg(long, value_name = "BASE", requires = "merged")]
    pub model: Option<PathBuf>,
    /// A whole checkpoint with the update added, one rounding
    #[arg(long, value_name = "DIR", requires = "model")]
    pub merged: Option<PathBuf>,
    /// Only these layers, end exclusive, e.g. 0..16: a part, which join puts together with the others
    #[arg(long, value_name = "A..B", conflicts_with = "merged")]
    pub layers: Option<LayerRange>,
    /// What `anabranch grams` made of each adapter's data, in the adapters' order: for regmean and cat-merging
    #[arg(long, value_delimiter = ',', value_name = "DIR,…")]
    pub grams: Vec<PathBuf>,
    /// Whose adapters are taken
    #[command(flatten)]
    pub trust: TrustArgs,
    /// How they are fused
    #[command(flatten)]
    pub how: FuseHow,
}

/// `join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The parts, in any order
    #[arg(required = true, num_args = 1.., value_name = "PART")]
    pub parts: Vec<PathBuf>,
    /// The fused adapter's folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// How adapters are fused.
#[derive(Clone, Debug, Args)]
pub struct FuseHow {
    /// fedavg, mean, mean-svd, ffa, ffa-lsq, fedsa, fedex, task-arithmetic, knots-ties, tsv, iso-c, lora-lego,
    /// peft-linear, peft-cat or peft-svd; with --grams regmean or cat-merging; into --merged, or with --rank into
    /// --out, ties, dare or dare-ties
    ///
    /// Weights multiply the updates first and add up to 1 (but for task-arithmetic): with --lambda E, tsv, iso-c and
    /// cat-merging of E adapters have the size that their papers give them, a sum and not a mean.
    #[arg(long, value_name = "METHOD")]
    pub method: Method,
    /// none or lora-cr, before any method
    #[arg(long, default_value = "none", value_name = "HOW")]
    pub resolve: String,
    /// uniform, samples, or W1,W2,…
    #[arg(long, default_value = "uniform", value_name = "WEIGHTS")]
    pub weights: Weights,
    /// What else they are told
    #[command(flatten)]
    pub settings: FuseSettings,
}

/// What fusions are told besides method, resolution and weights.
#[derive(Clone, Debug, Args)]
pub struct FuseSettings {
    /// How conflicts are resolved
    #[command(flatten)]
    pub conflict: ResolveArgs,
    /// Rows that some edges pruned: zero, or present to divide by those who kept them
    #[arg(long, default_value = "zero", value_name = "HOW")]
    pub coverage: Coverage,
    /// Truncate to this rank by SVD, what is written into --merged too [default: exact]
    #[arg(long, value_name = "N")]
    pub rank: Option<usize>,
    /// Which FedSA: mean, client:J, sum or lsq
    #[arg(long, value_name = "WHICH")]
    pub fedsa: Option<Fedsa>,
    /// Factor of the result: task-arithmetic, ties, dare, dare-ties, knots-ties, tsv, iso-c, cat-merging
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    pub lambda: f64,
    /// The share of entries that ties and knots-ties keep of each update, the largest [default: 0.2]
    #[arg(long, value_name = "X")]
    pub density: Option<f64>,
    /// Of which entries: support, those that pruning left, or full [default: support]
    #[arg(long, value_name = "WHICH")]
    pub density_of: Option<DensityOf>,
    /// One threshold of ties for each module, or one for the model [default: module]
    #[arg(long, value_name = "SCOPE")]
    pub density_scope: Option<DensityScope>,
    /// Probability with which dare and dare-ties drop an entry [default: 0.9]
    #[arg(long, value_name = "X")]
    pub drop: Option<f64>,
    /// Clusters of lora-lego, the rank of its result [default: the largest rank]
    #[arg(long, value_name = "N")]
    pub clusters: Option<usize>,
    /// The most that the norm of an adapter's update may be
    #[arg(long, value_name = "X")]
    pub max_norm: Option<f64>,
    /// Leave out adapters whose update is far from the others', or above --max-norm
    #[arg(long)]
    pub reject_outliers: bool,
    /// f32, bf16 or f16
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    pub dtype: String,
    /// portable: right in every reader; or peft
    #[arg(long, default_value = "portable", value_name = "PROFILE")]
    pub profile: String,
}

/// `search`.
#[derive(Debug, Args)]
pub struct SearchArgs {
    /// The adapters
    #[arg(required = true, num_args = 1.., value_name = "ADAPTER")]
    pub adapters: Vec<PathBuf>,
    /// The base that they are for
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Multiple-choice tasks that choose, each counted by its size: MMLU CSV or JSONL
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub task: Vec<PathBuf>,
    /// Held-out tasks, on which the best candidate, the base and each adapter are evaluated in the end
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub test: Vec<PathBuf>,
    /// The best candidate's folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Methods of `fuse` whose result is an adapter; those on entries (ties, dare, dare-ties) need --rank
    ///
    /// Options that only some methods take go to those.
    #[arg(long, required = true, value_delimiter = ',', value_name = "A,B,…")]
    pub methods: Vec<Method>,
    /// none and lora-cr, before any method
    #[arg(long, default_value = "none", value_delimiter = ',', value_name = "A,B")]
    pub resolve: Vec<String>,
    /// grid (steps of 0.1 that add up to 1), uniform, samples, or W1,W2,…; may be given several times
    #[arg(long, default_value = "uniform", value_name = "WEIGHTS")]
    pub weights: Vec<WeightChoice>,
    /// Write nothing and fail unless the best is better than the base, or than the best adapter alone (best-edge)
    ///
    /// Better is: more right answers, and a p of McNemar's exact test of at most --level.
    #[arg(long, value_delimiter = ',', value_name = "base,best-edge")]
    pub require_better_than: Vec<Rival>,
    /// The largest p of McNemar's exact two-sided test with which --require-better-than calls more right answers better
    #[arg(long, default_value_t = 0.05, value_name = "P")]
    pub level: f64,
    /// The most candidates
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub max_candidates: usize,
    /// How items are put to the model
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// What `anabranch grams` made of each adapter's data, in the adapters' order: for regmean and cat-merging
    #[arg(long, value_delimiter = ',', value_name = "DIR,…")]
    pub grams: Vec<PathBuf>,
    /// Whose adapters are taken
    #[command(flatten)]
    pub trust: TrustArgs,
    /// What all candidates are told
    #[command(flatten)]
    pub settings: FuseSettings,
}

/// `grams`.
#[derive(Debug, Args)]
pub struct GramsArgs {
    /// The model's folder, pruned or not
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The adapter whose inputs are wanted: they are those of the model with it
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The data: JSONL with text, prompt and completion, or messages; or plain text
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The most tokens that are used, in whole documents drawn by --seed
    #[arg(long, default_value_t = 8192, value_name = "N")]
    pub tokens: usize,
    /// Tokens of a document, at most the model's positions
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub seq: usize,
    /// The most tokens that go through a layer together
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub batch_tokens: usize,
    /// Count and leave out bad lines instead of failing
    #[arg(long)]
    pub skip_bad: bool,
}

/// `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// An adapter, maybe with a name for its column; several are evaluated in one pass
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<String>,
    /// Multiple-choice tasks: MMLU CSV or JSONL
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present = "text")]
    pub task: Vec<PathBuf>,
    /// A text: mean negative log-likelihood and perplexity
    #[arg(long, value_name = "FILE", conflicts_with = "task")]
    pub text: Option<PathBuf>,
    /// The base as a column beside the adapters
    #[arg(long)]
    pub base: bool,
    /// How items are put to the model
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// One JSON line per item and column
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,
    /// A folder: report.json, predictions.jsonl, and results.json and samples in lm-evaluation-harness's shape
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Show one item: the question, and each column's probabilities of the options and what it writes by itself
    #[arg(long, value_name = "ID")]
    pub show: Option<String>,
    /// Tokens of a window of --text
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub seq: usize,
}

/// How items are put to a model.
#[derive(Clone, Debug, Args)]
pub struct PromptArgs {
    /// Solved examples before each question
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub shots: usize,
    /// Where they come from
    #[arg(long, value_name = "DIR", requires = "shots")]
    pub shots_from: Option<PathBuf>,
    /// The most tokens that go through the model together; of several adapters, up to four have as many each
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub batch_tokens: usize,
}

/// `logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// An adapter
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Token ids, as they stand
    #[arg(long, required = true, value_delimiter = ',', value_name = "1,2,3")]
    pub ids: Vec<u32>,
    /// Where to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// An adapter
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// What to go on from
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Tokens to write at most
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub max_tokens: usize,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    pub temperature: f64,
}

/// `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// A run's folder
    pub dir: PathBuf,
}
