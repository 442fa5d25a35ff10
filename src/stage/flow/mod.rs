//! The whole flow: prune, train, recover, fuse and evaluate, for every edge, fusion and task of a [`Flow`].
//!
//! The output folder holds a folder a stage, `ledger.json`, `results.json` and `report.html`. A stage whose inputs are
//! those of the last run is kept; one whose inputs changed is done again, and what depends on it.

mod ledger;
pub mod results;
mod stages;

use std::path::PathBuf;

pub use ledger::LEDGER;
pub use stages::run;

use super::fuse::FuseOptions;
use super::prune::PruneOptions;
use super::train::TrainOptions;

/// What a flow does.
#[derive(Clone, Debug)]
pub struct Flow {
    /// The full model's folder.
    pub base: PathBuf,
    /// The working folder.
    pub output: PathBuf,
    /// Everything random but A₀.
    pub seed: u64,
    /// Pruning ratios of the edges that name none; several make a sweep.
    pub ratios: Vec<f64>,
    /// Which sets of edges get an adapter trained on their pooled data.
    pub joint: Joint,
    /// Options of every pruning; model, out and amount are filled in.
    pub prune: PruneOptions,
    /// Options of every training; model, data and out are filled in.
    pub train: TrainOptions,
    /// The edges.
    pub edges: Vec<Edge>,
    /// The fusions, each of a set of edges.
    pub fusions: Vec<Fusion>,
    /// The tasks.
    pub tasks: Vec<Task>,
}

/// Which fused sets also get a joint adapter, the upper bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joint {
    /// None.
    None,
    /// The first set.
    First,
    /// Every set.
    All,
}

/// A device with private data.
#[derive(Clone, Debug, PartialEq)]
pub struct Edge {
    /// Names its folders and columns.
    pub name: String,
    /// Training data.
    pub data: Vec<PathBuf>,
    /// Validation data.
    pub val: Option<PathBuf>,
    /// How small its model must be; none takes the flow's ratios.
    pub target: Option<Target>,
}

/// How small a model must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The part that is removed.
    Ratio(f64),
    /// The memory that training must fit in.
    Memory(u64),
}

/// One fusion of one set of edges.
#[derive(Clone, Debug)]
pub struct Fusion {
    /// Ascending places in [`Flow::edges`].
    pub edges: Vec<usize>,
    /// Names its folder and column.
    pub name: String,
    /// Options; adapters and out are filled in.
    pub options: FuseOptions,
}

/// A multiple-choice task.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Its name in results.
    pub name: String,
    /// CSV or JSONL.
    pub file: PathBuf,
    /// The edges whose knowledge it asks for: it is evaluated for the base, each of them alone, and every fusion that
    /// contains all of them.
    pub edges: Vec<usize>,
    /// Whether fused adapters are evaluated on it.
    pub fusions: bool,
    /// Whether the pruned models are evaluated on it, without adapters.
    pub pruned: bool,
}
