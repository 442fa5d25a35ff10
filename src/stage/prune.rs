//! `prune`: a smaller checkpoint, from the scores of its key/value heads and MLP channels.

use std::ops::Range;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;

use super::budget;
use super::calibrate::{self, Calibration};
use super::common::Common;
use crate::backend::Backend;
use crate::checkpoint::checkpoint::{Checkpoint, tensors};
use crate::checkpoint::config::{Family, ModelConfig};
use crate::checkpoint::digest;
use crate::checkpoint::module::Target;
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::checkpoint::pruning::{KeptLayer, Pruning, TrainingPlan};
use crate::error::{Error, Result};
use crate::model::memory::{Part, Plan};
use crate::model::recompute::Choice;
use crate::model::shape::TrainingShape;
use crate::prune::groups::{Gqa, GroupScores, Grouping, Reduce};
use crate::prune::magnitude::magnitude;
use crate::prune::scores::Importance;
use crate::prune::select::{Cut, select};
use crate::prune::write::{largest_copy, write_pruned};
use crate::tensor::{DType, Real};

/// How much is pruned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// This part, between 0 and 1.
    Ratio(f64),
    /// The smallest part, in steps of 0.01, whose training plan fits this many bytes of an edge.
    Memory(u64),
}

/// What is pruned, by how much, and how groups are chosen.
#[derive(Clone, Debug)]
pub struct PruneOptions {
    /// The model's folder.
    pub model: PathBuf,
    /// Where to write.
    pub out: PathBuf,
    /// How much.
    pub amount: Amount,
    /// Text or JSON lines; needed for the scores that need gradients.
    pub calibration: Option<PathBuf>,
    /// Calibration samples.
    pub samples: usize,
    /// Tokens of a sample.
    pub sample_tokens: usize,
    /// How weights are scored.
    pub importance: Importance,
    /// Over a group's members.
    pub reduce: Reduce,
    /// Which query heads are counted to which key/value head.
    pub gqa: Gqa,
    /// The layers that are pruned, all if none; end exclusive.
    pub layers: Option<Range<usize>>,
    /// Kept MLP channels are rounded down to a multiple of this.
    pub round_mlp: usize,
    /// The training run that must fit, where the amount is a memory.
    pub shape: TrainingShape,
}

/// What pruning did.
#[derive(Clone, Debug, Serialize)]
pub struct PruneReport {
    /// Where the pruned model lies.
    pub out: PathBuf,
    /// The ratio asked for, or chosen for the memory given.
    pub ratio: f64,
    /// `model_type` of the pruned model.
    pub model_type: &'static str,
    /// Whether transformers can load it.
    pub transformers_loads: bool,
    /// How weights were scored.
    pub importance: Importance,
    /// Over a group's members.
    pub reduce: Reduce,
    /// Which query heads were counted to which key/value head.
    pub gqa: Gqa,
    /// Query heads, key/value heads and MLP channels of a pruned layer: those of the full model.
    pub sizes_before: [usize; 3],
    /// Those that it keeps.
    pub sizes_after: [usize; 3],
    /// Parameters of the full model.
    pub parameters_before: u64,
    /// Parameters of the pruned model.
    pub parameters_after: u64,
    /// Calibration samples, 0 without a calibration text.
    pub samples: usize,
    /// Their tokens.
    pub sample_tokens: usize,
    /// Of the calibration samples under the full model.
    pub perplexity_before: Option<f64>,
    /// Of the same samples under the pruned model.
    pub perplexity_after: Option<f64>,
    /// The bf16 CUDA training plan of the pruned model, where the ratio was chosen for a memory.
    pub training: Option<Training>,
    /// This run's own memory plan.
    pub plan: Plan,
    /// The output was there already.
    pub already_finished: bool,
}

/// The training that the ratio was chosen for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Training {
    /// The edge's memory in bytes.
    pub memory: u64,
    /// Bytes of the plan.
    pub total: u64,
    /// Layers that it computes again.
    pub recomputed: usize,
}

/// A run that is ready: model and calibration text read, memory planned, nothing written yet.
pub struct Prepared {
    options: PruneOptions,
    checkpoint: Checkpoint,
    cut: Cut,
    pruned: ModelConfig,
    training: Option<(u64, Choice)>,
    calibration: Option<Calibration>,
    recomputed: usize,
    /// All buffers.
    pub plan: Plan,
}

impl Prepared {
    /// Reads the model and the calibration text and plans the memory, on `backend`'s terms.
    pub fn new<B: Backend, T: Real>(backend: &B, options: PruneOptions, common: &Common) -> Result<Prepared> {
        let checkpoint = Checkpoint::open(&options.model, common.open_options())?;
        let config = checkpoint.config();
        if checkpoint.pruning().is_some() || config.family == Family::PerLayer {
            return Err(Error::file(
                &options.model,
                "is pruned already: prune the full model by a larger ratio, so that adapters can be recovered to it",
            ));
        }
        if options.importance.needs_calibration() && options.calibration.is_none() {
            return Err(Error::Usage(format!(
                "--importance {} needs a text: give --calibration FILE, or take l1, l2 or random",
                options.importance
            )));
        }
        let cut = |ratio| Cut { ratio, layers: options.layers.clone(), round_mlp: options.round_mlp };
        let (cut, pruned, training) = match options.amount {
            Amount::Ratio(ratio) => (cut(ratio), cut(ratio).apply(config)?, None),
            Amount::Memory(memory) => {
                let (ratio, pruned, choice) = budget::required(config, &cut(0.5), &options.shape, memory)?;
                (cut(ratio), pruned, Some((memory, choice)))
            }
        };
        let calibration = match &options.calibration {
            Some(file) => Some(Calibration::read(
                file,
                &checkpoint,
                options.samples,
                options.sample_tokens,
                common.seed,
            )?),
            None => None,
        };
        let mut writing = Plan::default();
        if backend.shares_memory() {
            writing.add(Part::Data, "a tensor being written", largest_copy(&checkpoint, &pruned)?);
            if common.no_mmap {
                writing.add(Part::Weights, "weights read into memory", checkpoint.weights().total_bytes());
            }
        }
        let (recomputed, plan) = calibrate::plan::<B, T>(
            backend,
            &checkpoint,
            calibration.as_ref(),
            options.importance,
            writing,
            common,
        )?;
        Ok(Prepared { checkpoint, cut, pruned, training, calibration, recomputed, plan, options })
    }

    /// Scores, selects and writes the pruned model.
    pub fn run<B: Backend, T: Real>(self, backend: &B, common: &Common) -> Result<PruneReport> {
        let mut report = self.report();
        let output = match Output::begin(
            &self.options.out,
            "prune",
            &self.fingerprint(T::DTYPE, common)?,
            common.output(),
        )? {
            Begun::Finished => {
                report.already_finished = true;
                return Ok(report);
            }
            Begun::Work(output) => output,
        };
        let (scores, before) = self.scores::<B, T>(backend, common)?;
        let pruning = self.pruning(&scores, common.seed)?;
        let bar = common.progress.bar("prune", tensors(&self.pruned).len() as u64);
        let hashes = write_pruned(output.dir(), &self.checkpoint, &self.pruned, &pruning, || {
            bar.inc(1);
            common.check_stop("nothing is kept, start again")
        })?;
        bar.finish_and_clear();
        let written = Checkpoint::open(output.dir(), common.open_options())?;
        report.perplexity_before = before;
        if let Some(calibration) = &self.calibration {
            report.perplexity_after = Some(calibration.perplexity::<B, T>(backend, &written)?);
        }
        let mut provenance = Provenance::new("prune");
        provenance.base_fingerprint = Some(self.checkpoint.fingerprint()?.to_string());
        provenance.model_fingerprint = Some(written.fingerprint()?.to_string());
        provenance.seed = Some(common.seed);
        provenance.options = self.options_json().as_object().cloned().unwrap_or_default();
        provenance.seal(output.dir(), hashes)?;
        drop(written);
        output.finish()?;
        Ok(report)
    }

    /// The scores of each layer's groups (none for a layer that is not pruned), and the calibration samples' perplexity
    /// under the full model.
    fn scores<B: Backend, T: Real>(
        &self,
        backend: &B,
        common: &Common,
    ) -> Result<(Vec<Option<GroupScores>>, Option<f64>)> {
        let config = self.checkpoint.config();
        let importance = self.options.importance;
        let mut before = None;
        let mut observed = None;
        if let Some(calibration) = &self.calibration {
            before = Some(if importance.needs_calibration() {
                let layers = self.options.layers.clone().unwrap_or(0..config.layers);
                let (observer, perplexity) = calibration.gradients::<B, T>(
                    backend,
                    &self.checkpoint,
                    importance,
                    layers,
                    self.recomputed,
                )?;
                observed = Some(observer);
                perplexity
            } else {
                calibration.perplexity::<B, T>(backend, &self.checkpoint)?
            });
        }
        let grouping = Grouping {
            reduce: self.options.reduce,
            gqa: self.options.gqa,
            by_structure: importance.by_structure(),
        };
        let mut all = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            common.check_stop("nothing is kept, start again")?;
            if !self.cut.prunes(layer) {
                all.push(None);
                continue;
            }
            let sizes = config.layer_sizes(layer);
            let members = match (importance.power(), &mut observed) {
                (Some(power), _) => Some(self.magnitudes(layer, power)?),
                (None, Some(observer)) => Some(observer.take(layer).ok_or_else(|| {
                    Error::Numeric(format!("layer {layer}: the backward pass gave no scores"))
                })?),
                (None, None) => None,
            };
            all.push(Some(match members {
                Some(members) => GroupScores::new(&members, sizes, config.head_dim, grouping)?,
                None => GroupScores::random(common.seed, layer, sizes),
            }));
        }
        Ok((all, before))
    }

    fn magnitudes(&self, layer: usize, power: u32) -> Result<[Vec<f64>; 7]> {
        let mut members: [Vec<f64>; 7] = Default::default();
        for m in self.checkpoint.config().modules_of(layer) {
            let t = self.checkpoint.weights().tensor(&m.weight())?;
            members[m.target as usize] = magnitude(&t, m.target.prunes_rows(), power)?;
        }
        Ok(members)
    }

    /// `pruning.json`: what each layer keeps.
    fn pruning(&self, scores: &[Option<GroupScores>], seed: u64) -> Result<Pruning> {
        let mut layers = Vec::with_capacity(scores.len());
        for (l, scores) in scores.iter().enumerate() {
            let sizes = self.pruned.layer_sizes(l);
            layers.push(match scores {
                Some(scores) => select(scores, sizes, l)?,
                None => KeptLayer { kv_heads: (0..sizes.kv_heads).collect(), mlp: (0..sizes.mlp).collect() },
            });
        }
        let o = &self.options;
        let mut pruning = Pruning::new(self.checkpoint.base_model()?, self.cut.ratio, seed, layers);
        pruning.importance = o.importance.name().into();
        pruning.reduce = o.reduce.name().into();
        pruning.gqa = o.gqa.name().into();
        pruning.calibration_sha256 = self.calibration.as_ref().map(|c| c.sha256.clone());
        pruning.training_plan = self.training.as_ref().map(|(_, choice)| TrainingPlan {
            batch: o.shape.batch,
            seq: o.shape.seq,
            rank: o.shape.rank,
            targets: o.shape.targets.iter().map(|t: &Target| t.short().to_string()).collect(),
            precision: Some("bf16".into()),
            recompute: choice.recomputed,
        });
        Ok(pruning)
    }

    fn report(&self) -> PruneReport {
        let layer = self.options.layers.as_ref().map_or(0, |r| r.start);
        let sizes = |c: &ModelConfig| {
            let s = c.layer_sizes(layer);
            [s.heads, s.kv_heads, s.mlp]
        };
        let full = self.checkpoint.config();
        PruneReport {
            out: self.options.out.clone(),
            ratio: self.cut.ratio,
            model_type: self.pruned.family.model_type(),
            transformers_loads: self.pruned.family != Family::PerLayer,
            importance: self.options.importance,
            reduce: self.options.reduce,
            gqa: self.options.gqa,
            sizes_before: sizes(full),
            sizes_after: sizes(&self.pruned),
            parameters_before: full.parameters(),
            parameters_after: self.pruned.parameters(),
            samples: self.calibration.as_ref().map_or(0, Calibration::samples),
            sample_tokens: self.calibration.as_ref().map_or(0, Calibration::tokens),
            perplexity_before: None,
            perplexity_after: None,
            training: self.training.as_ref().map(|(memory, choice)| Training {
                memory: *memory,
                total: choice.plan.total(),
                recomputed: choice.recomputed,
            }),
            plan: self.plan.clone(),
            already_finished: false,
        }
    }

    /// The options that change the result, without paths.
    fn options_json(&self) -> serde_json::Value {
        let o = &self.options;
        let amount = match o.amount {
            Amount::Ratio(_) => None,
            Amount::Memory(memory) => Some(json!({"memory": memory, "shape": o.shape})),
        };
        json!({
            "ratio": self.cut.ratio, "chosen_for": amount, "importance": o.importance, "reduce": o.reduce,
            "gqa": o.gqa, "samples": o.samples, "sample_tokens": o.sample_tokens,
            "layers": o.layers.as_ref().map(|r| [r.start, r.end]), "round_mlp": o.round_mlp,
        })
    }

    /// What `--resume` compares: all that changes the bytes of the result.
    fn fingerprint(&self, dtype: DType, common: &Common) -> Result<String> {
        let text = json!({
            "options": self.options_json(), "seed": common.seed, "precision": dtype.name(),
            "model": self.checkpoint.fingerprint()?,
            "config": digest::sha256_file(&self.checkpoint.dir().join("config.json"))?,
            "calibration": self.calibration.as_ref().map(|c| &c.sha256),
        });
        Ok(digest::sha256(text.to_string().as_bytes()))
    }
}
