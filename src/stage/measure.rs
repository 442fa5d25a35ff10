//! `budget --measure`: one real step on this machine, and its peak of anonymous memory beside the plan.

use std::path::Path;
use std::str::FromStr;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::calibrate::{self, Calibration};
use super::common::Common;
use super::metrics::anonymous_bytes;
use super::peak::{GpuMemory, Peak};
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::data::batch::Batch;
use crate::data::documents::Document;
use crate::error::{Error, Result};
use crate::model::adapters::Stack;
use crate::model::forward::DropoutKey;
use crate::model::memory::{Part, Plan};
use crate::model::packing::PackedWeights;
use crate::model::paper::{Noted, Paper};
use crate::model::recompute;
use crate::model::room::{Head, Keep, Room, RoomSize};
use crate::model::rope::Tables;
use crate::model::session::Session;
use crate::model::shape::TrainingShape;
use crate::model::trainer::{Buffers, Trainer};
use crate::ops::adamw::Hyper;
use crate::prune::scores::Importance;
use crate::random::{Philox, Purpose};
use crate::tensor::Real;

/// What is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    /// An optimizer step.
    #[default]
    Train,
    /// The calibration pass with its scores.
    Prune,
    /// The forward pass of a batch and the log-probabilities of four options a row.
    Eval,
}

impl FromStr for Of {
    type Err = Error;

    fn from_str(s: &str) -> Result<Of> {
        match s {
            "train" => Ok(Of::Train),
            "prune" => Ok(Of::Prune),
            "eval" => Ok(Of::Eval),
            _ => Err(Error::Usage(format!("--of is {s:?}, expected train, prune or eval"))),
        }
    }
}

/// A plan for this machine and what a step really took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// What was run.
    pub of: Of,
    /// Every buffer, and what the program held before the first.
    pub plan: Plan,
    /// Bytes of the plan.
    pub planned: u64,
    /// The most anonymous memory that the process had, or on a device with memory of its own what was taken there; none
    /// where nobody says.
    pub peak: Option<u64>,
    /// What was seen on a device with memory of its own.
    pub device: Option<OnDevice>,
    /// Time of the step.
    pub seconds: f64,
}

/// A device's memory around a step, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OnDevice {
    /// Free before the model was loaded, as the driver says.
    pub free_before: u64,
    /// Free after the step, its buffers still held.
    pub free_after: u64,
    /// What the management library counted for this process before the model was loaded: the context.
    pub process_before: Option<u64>,
    /// The most that it counted until after the step, context included.
    pub process_peak: Option<u64>,
}

/// The sizes of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepSize {
    /// Of `train`, and the batch of `eval`.
    pub shape: TrainingShape,
    /// Calibration samples of `prune`.
    pub samples: usize,
    /// Tokens of a sample.
    pub sample_tokens: usize,
}

/// Runs one step of `of` on random tokens with the model in the folder `dir` and samples the memory meanwhile.
///
/// Mapped weights are left out of plan and peak. Fails where the plan is larger than the memory limit.
pub fn measure<B: Backend, T: Real>(
    backend: &B,
    dir: &Path,
    of: Of,
    size: &StepSize,
    common: &Common,
) -> Result<Measured> {
    let mut plan = Plan::default();
    let free_before = backend.device_free()?;
    let (before, sampled) = match free_before {
        None => (anonymous_bytes(), Peak::start(anonymous_bytes)),
        Some(_) => {
            let gpu = GpuMemory::open();
            let before = gpu.as_ref().and_then(GpuMemory::of_process);
            (before, Peak::start(move || gpu.as_ref().and_then(GpuMemory::of_process)))
        }
    };
    let held = if free_before.is_some() { "the context" } else { "the program" };
    plan.add(Part::Driver, held, before.unwrap_or(0));
    let checkpoint = Checkpoint::open(dir, common.open_options())?;
    size.shape.check(checkpoint.config())?;
    if common.no_mmap && backend.shares_memory() {
        plan.add(Part::Weights, "weights read into memory", checkpoint.weights().total_bytes());
    }
    let (plan, seconds, free_after) = match of {
        Of::Train => train::<B, T>(backend, &checkpoint, &size.shape, plan, common)?,
        Of::Prune => prune::<B, T>(backend, &checkpoint, size, plan, common)?,
        Of::Eval => eval::<B, T>(backend, &checkpoint, &size.shape, plan, common)?,
    };
    let sampled = sampled.and_then(Peak::finish);
    let device = free_before.zip(free_after).map(|(free_before, free_after)| OnDevice {
        free_before,
        free_after,
        process_before: before,
        process_peak: sampled,
    });
    // The arena is made before the step and held after it, so what is then missing is the most that was taken.
    let taken = |d: OnDevice| d.free_before.saturating_sub(d.free_after).saturating_add(before.unwrap_or(0));
    let peak = device.map_or(sampled, |d| Some(taken(d)));
    Ok(Measured { of, planned: plan.total(), plan, peak, device, seconds })
}

/// A plan, the step's time, and what is free on the device after it.
type Step = (Plan, f64, Option<u64>);

/// `rows` documents of `tokens` random tokens.
pub(super) fn random_batch(rows: usize, tokens: usize, vocab: usize, seed: u64) -> Batch {
    let numbers = Philox::new(seed, Purpose::Test.stream(0));
    let id = |i: usize| numbers.below(i as u64, vocab) as u32;
    let documents: Vec<Document> = (0..rows)
        .map(|r| Document::supervised_from((r * tokens..(r + 1) * tokens).map(id).collect(), 1))
        .collect();
    Batch::of(&documents)
}

fn train<B: Backend, T: Real>(
    backend: &B,
    checkpoint: &Checkpoint,
    shape: &TrainingShape,
    rest: Plan,
    common: &Common,
) -> Result<Step> {
    let config = checkpoint.config();
    let dtype = checkpoint.scratch_dtype()?;
    let layout = shape.layout(config);
    let of = |recomputed| {
        let mut paper = Paper::<B::Store>::new(rest.clone());
        paper.model(checkpoint)?;
        let room = shape.room(config, dtype, recomputed);
        Buffers::<Noted<B::Store>, T>::new(&mut paper, backend, config, &layout, shape.freeze_a, room)?;
        paper.plan.add(Part::Scratch, "kept by threads", backend.kept_bytes(config.head_dim) as u64);
        Ok(paper.plan)
    };
    let choice = recompute::choose(config.layers, shape.recompute, common.memory_limit, of)?;
    let (plan, packed) = common.packing::<T>(backend, config, PackedWeights::TRAINING, choice.plan)?;
    let model = common.model::<B, T>(backend, checkpoint, packed)?;
    let tables = Tables::new(config, shape.seq);
    let room = shape.room(config, dtype, choice.recomputed);
    let mut trainer: Trainer<'_, B, T> = Trainer::new(backend, &model, layout, shape.freeze_a, tables, room)?;
    let batch = random_batch(shape.batch, shape.seq, config.vocab, common.seed);
    let hyper = Hyper { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_norm: 1.0 };
    let p = if shape.dropout { 0.1 } else { 0.0 };
    let start = Instant::now();
    trainer.step(&[batch], hyper, DropoutKey { p, seed: common.seed, step: 0 }, 1)?;
    Ok((plan, start.elapsed().as_secs_f64(), backend.device_free()?))
}

fn prune<B: Backend, T: Real>(
    backend: &B,
    checkpoint: &Checkpoint,
    size: &StepSize,
    rest: Plan,
    common: &Common,
) -> Result<Step> {
    let config = checkpoint.config();
    config.check_length(size.sample_tokens)?;
    let batch = random_batch(size.samples, size.sample_tokens, config.vocab, common.seed);
    let calibration = Calibration::of(batch, String::new());
    let importance = Importance::Taylor1;
    let given = Some(&calibration);
    let (recomputed, plan) = calibrate::plan::<B, T>(backend, checkpoint, given, importance, rest, common)?;
    let start = Instant::now();
    calibration.gradients::<B, T>(backend, checkpoint, importance, 0..config.layers, recomputed)?;
    // The arena of the pass stays until another takes its place.
    Ok((plan, start.elapsed().as_secs_f64(), backend.device_free()?))
}

fn eval<B: Backend, T: Real>(
    backend: &B,
    checkpoint: &Checkpoint,
    shape: &TrainingShape,
    rest: Plan,
    common: &Common,
) -> Result<Step> {
    const OPTIONS: usize = 4;
    let config = checkpoint.config();
    let tables = Tables::new(config, shape.seq);
    let size = RoomSize {
        tokens: shape.tokens(),
        copies: 1,
        keep: Keep::Output,
        table_rows: tables.rows(shape.tokens()),
        ranks: [0; 7],
        dropout: false,
        dtype: checkpoint.scratch_dtype()?,
        head: Head::Choice(OPTIONS * shape.batch),
    };
    let mut paper = Paper::<B::Store>::new(rest);
    paper.model(checkpoint)?;
    Room::<Noted<B::Store>, T>::new(&mut paper, backend, config, size)?;
    paper.plan.add(Part::Scratch, "kept by threads", backend.kept_bytes(config.head_dim) as u64);
    let (plan, packed) = common.packing::<T>(backend, config, PackedWeights::INFERENCE, paper.plan)?;
    let model = common.model::<B, T>(backend, checkpoint, packed)?;
    let mut session = Session::<B, T>::new(backend, &model, tables, size)?;
    let Batch { ids, bounds, .. } = random_batch(shape.batch, shape.seq, config.vocab, common.seed);
    // The last token of each document, against the first tokens of the vocabulary.
    let last = bounds.iter().skip(1).map(|b| b - 1);
    let last: Vec<u32> = last.collect();
    let rows: Vec<u32> = (0..last.len() as u32).flat_map(|row| [row; OPTIONS]).collect();
    let options: Vec<u32> = (0..rows.len()).map(|i| (i % OPTIONS % config.vocab) as u32).collect();
    let start = Instant::now();
    let mut input = session.documents(backend, ids, &bounds)?;
    input.asked = Some(last);
    let params = backend.alloc::<f32>("no adapter", 0)?;
    session.forward(&model, backend, &input, Stack { params: &params, layouts: &[None] })?;
    let mut out = vec![0.0; rows.len()];
    model.choices(&mut out, &mut session.room, backend, &rows, &options, input.rows())?;
    Ok((plan, start.elapsed().as_secs_f64(), backend.device_free()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::checkpoint::tests::write;
    use crate::cpu::Cpu;
    use crate::tensor::DType;

    #[test]
    fn a_step_of_each_is_run_and_its_memory_seen() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), serde_json::json!({}), DType::F32, 1 << 30, "");
        let size = StepSize {
            shape: TrainingShape { batch: 2, seq: 8, rank: 2, ..TrainingShape::default() },
            samples: 3,
            sample_tokens: 5,
        };
        let cpu = Cpu::new(1).unwrap();
        for of in ["train", "prune", "eval"] {
            let m = measure::<_, f32>(&cpu, dir.path(), of.parse().unwrap(), &size, &Common::default())
                .unwrap_or_else(|e| panic!("{of}: {e}"));
            assert_eq!(m.planned, m.plan.total());
            assert!(m.peak.unwrap() > 0 && m.seconds > 0.0);
            let tight = Common { memory_limit: Some(1), ..Common::default() };
            let err = measure::<_, f32>(&cpu, dir.path(), of.parse().unwrap(), &size, &tight).unwrap_err();
            assert!(matches!(err, Error::Memory(_)), "{of}: {err}");
        }
        assert!("all".parse::<Of>().is_err());
    }
}
