//! The calibration samples of a pruning, and what a model says about them.

use std::ops::Range;
use std::path::Path;

use super::common::Common;
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::digest;
use crate::checkpoint::module::Target;
use crate::data::batch::Batch;
use crate::data::tokenizer::Tokenizer;
use crate::data::{calibration, documents};
use crate::error::{Error, Result};
use crate::model::adapters::Stack;
use crate::model::backward::Trained;
use crate::model::forward::DropoutKey;
use crate::model::memory::{Device, Part, Plan};
use crate::model::paper::{Noted, Paper};
use crate::model::recompute;
use crate::model::room::{Head, Keep, Room, RoomSize};
use crate::model::rope::Tables;
use crate::model::session::Session;
use crate::model::weights::Model;
use crate::ops::importance::Sample;
use crate::prune::observer::{Observer, Sums};
use crate::prune::scores::Importance;
use crate::tensor::Real;

/// Samples of a text, as one batch: micro-batches would change absolute values of summed gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// SHA-256 of the file.
    pub sha256: String,
    batch: Batch,
    longest: usize,
}

impl Calibration {
    /// `samples` windows of `tokens` tokens of the text or JSON lines in `file`, by `seed`.
    pub fn read(
        file: &Path,
        checkpoint: &Checkpoint,
        samples: usize,
        tokens: usize,
        seed: u64,
    ) -> Result<Calibration> {
        let config = checkpoint.config();
        config.check_length(tokens)?;
        let tokenizer = Tokenizer::load(checkpoint.dir(), config.vocab)?;
        let data = documents::load(&[file.to_path_buf()], &tokenizer, config.longest(), false)?;
        let windows = calibration::sample(&data.documents, samples, tokens, seed)?;
        Ok(Calibration::of(Batch::of(&windows), digest::sha256_file(file)?))
    }

    /// The documents of `batch`, of a file with this SHA-256.
    pub fn of(batch: Batch, sha256: String) -> Calibration {
        let longest = batch.bounds.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0) as usize;
        Calibration { sha256, batch, longest }
    }

    /// Samples.
    pub fn samples(&self) -> usize {
        self.batch.bounds.len().saturating_sub(1)
    }

    /// Tokens of all samples.
    pub fn tokens(&self) -> usize {
        self.batch.tokens()
    }

    fn room(&self, checkpoint: &Checkpoint, keep: Keep) -> Result<RoomSize> {
        Ok(RoomSize {
            tokens: self.tokens(),
            copies: 1,
            keep,
            table_rows: self.tables(checkpoint).rows(self.tokens()),
            ranks: [0; 7],
            dropout: false,
            dtype: checkpoint.scratch_dtype()?,
            head: Head::Loss(self.batch.rows.len()),
        })
    }

    fn tables(&self, checkpoint: &Checkpoint) -> Tables {
        Tables::new(checkpoint.config(), self.longest)
    }

    /// exp of the mean negative log-likelihood of every token of a sample but its first.
    pub fn perplexity<B: Backend, T: Real>(&self, backend: &B, checkpoint: &Checkpoint) -> Result<f64> {
        let model = Model::new(backend, checkpoint)?;
        let size = self.room(checkpoint, Keep::Output)?;
        let mut session = Session::<B, T>::new(backend, &model, self.tables(checkpoint), size)?;
        self.forward(&mut session, backend, &model, checkpoint, None)
    }

    /// Runs the batch through the model; with `gradient` the loss's gradient is left in the session's room.
    fn forward<B: Backend, T: Real>(
        &self,
        session: &mut Session<B, T>,
        backend: &B,
        model: &Model<B>,
        checkpoint: &Checkpoint,
        gradient: Option<f32>,
    ) -> Result<f64> {
        let input = session.documents(backend, self.batch.ids.clone(), &self.batch.bounds)?;
        let params = backend.alloc::<f32>("no adapter", 0)?;
        session.forward(model, backend, &input, Stack { params: &params, layouts: &[None] })?;
        let mut nll = vec![0.0; self.batch.rows.len()];
        let (rows, targets) = (&self.batch.rows, &self.batch.targets);
        model.loss(&mut nll, &mut session.room, backend, rows, targets, input.tokens(), gradient)?;
        let mean = nll.iter().map(|&x| f64::from(x)).sum::<f64>() / nll.len() as f64;
        if !mean.is_finite() {
            // If a weight is to blame, say which.
            checkpoint.check_finite()?;
            return Err(Error::Numeric(format!(
                "{}: the loss of the calibration samples is {mean}, expected a finite number",
                checkpoint.dir().display()
            )));
        }
        Ok(mean.exp())
    }

    /// Sums of gradient × weight over all linears of `layers`, and the samples' perplexity.
    pub fn gradients<'a, B: Backend, T: Real>(
        &self,
        backend: &'a B,
        checkpoint: &Checkpoint,
        importance: Importance,
        layers: Range<usize>,
        recomputed: usize,
    ) -> Result<(Observer<'a, B>, f64)> {
        let model = Model::new(backend, checkpoint)?;
        let size = self.room(checkpoint, Keep::Training { recomputed })?;
        let mut session = Session::<B, T>::new(backend, &model, self.tables(checkpoint), size)?;
        let sums = Sums::new::<T, _>(&mut Device(backend), backend, checkpoint.config(), importance.sums())?;
        let mut observer = Observer::new(backend, sums, self.parts(), importance, layers);
        let weight = (1.0 / self.batch.rows.len() as f64) as f32;
        let perplexity = self.forward(&mut session, backend, &model, checkpoint, Some(weight))?;
        let input = session.documents(backend, self.batch.ids.clone(), &self.batch.bounds)?;
        let params = backend.alloc::<f32>("no adapter", 0)?;
        let mut grads = backend.alloc::<f32>("no gradients", 0)?;
        let trained = Trained { layout: None, freeze_a: false };
        model.backward(
            &mut session.room,
            &mut grads,
            backend,
            &input,
            &params,
            trained,
            DropoutKey::NONE,
            &mut observer,
        )?;
        Ok((observer, perplexity))
    }

    /// Rows and supervised tokens of each sample.
    fn parts(&self) -> Vec<Sample> {
        self.batch
            .bounds
            .windows(2)
            .map(|w| Sample {
                rows: w[0] as usize..w[1] as usize,
                supervised: self.batch.rows.iter().filter(|r| (w[0]..w[1]).contains(r)).count(),
            })
            .collect()
    }
}

/// The memory of a pruning run: `rest`, and what the calibration pass needs; and how many layers that pass computes
/// again, as few as fit the limit. Fails with the plan's table where it does not fit.
pub fn plan<B: Backend, T: Real>(
    backend: &B,
    checkpoint: &Checkpoint,
    calibration: Option<&Calibration>,
    importance: Importance,
    rest: Plan,
    common: &Common,
) -> Result<(usize, Plan)> {
    let (config, limit) = (checkpoint.config(), common.memory_limit);
    let of = |keep: Keep| -> Result<Plan> {
        let mut paper = Paper::<B::Store>::new(rest.clone());
        if let Some(calibration) = calibration {
            paper.model(checkpoint)?;
            Room::<Noted<B::Store>, T>::new(
                &mut paper,
                backend,
                config,
                calibration.room(checkpoint, keep)?,
            )?;
            paper.plan.add(Part::Scratch, "kept by threads", backend.kept_bytes(config.head_dim) as u64);
        }
        if importance.needs_calibration() {
            Sums::<Noted<B::Store>>::new::<T, _>(&mut paper, backend, config, importance.sums())?;
        }
        if importance.needs_calibration() && backend.shares_memory() {
            let numbers = |m: Target| {
                let (o, i) = config.dims(m, 0);
                if m.prunes_rows() { o } else { i }
            };
            let layer: usize = Target::ALL.into_iter().map(numbers).sum();
            paper.plan.add(Part::Scratch, "scores of rows and columns", 8 * (config.layers * layer) as u64);
        }
        Ok(paper.plan)
    };
    let choice = if importance.needs_calibration() {
        recompute::choose(config.layers, None, limit, |recomputed| of(Keep::Training { recomputed }))?
    } else {
        let plan = of(Keep::Output)?;
        recompute::Choice { recomputed: 0, fits: limit.is_none_or(|l| plan.total() <= l), plan }
    };
    common.fit(&choice.plan)?;
    Ok((choice.recomputed, choice.plan))
}
