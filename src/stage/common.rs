//! What every stage is told besides its own options.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::progress::Progress;
use crate::backend::{Backend, Scratch};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::output::OutputOptions;
use crate::checkpoint::weights::OpenOptions;
use crate::error::{Error, Result};
use crate::host::available_memory;
use crate::model::memory::Plan;
use crate::model::packing::{PackWeights, PackedWeights};
use crate::model::weights::Model;
use crate::tensor::Real;

/// The options that all commands share.
#[derive(Clone, Debug, Default)]
pub struct Common {
    /// Read weights into memory instead of mapping them.
    pub no_mmap: bool,
    /// The most bytes that a run may allocate.
    pub memory_limit: Option<u64>,
    /// Which weights are packed once for all products.
    pub pack_weights: PackWeights,
    /// Everything random but the common A₀.
    pub seed: u64,
    /// Replace an existing output that this program made.
    pub force: bool,
    /// Go on from a leftover of the same command.
    pub resume: bool,
    /// Set when the process is asked to stop.
    pub stop: Arc<AtomicBool>,
    /// Where progress is shown.
    pub progress: Progress,
}

impl Common {
    /// How weights are opened.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions { no_mmap: self.no_mmap }
    }

    /// Fails with the plan's table if it takes more than the limit.
    pub fn fit(&self, plan: &Plan) -> Result<()> {
        self.memory_limit.map_or(Ok(()), |limit| plan.fit(limit))
    }

    /// The plan of a run, which must [`fit`](Self::fit), with those of `packing` that are packed, and which they are.
    pub fn packing<T: Real>(
        &self,
        scratch: &impl Scratch,
        config: &ModelConfig,
        packing: PackedWeights,
        plan: Plan,
    ) -> Result<(Plan, PackedWeights)> {
        self.fit(&plan)?;
        let limit = self.pack_weights.limit(self.memory_limit, available_memory());
        self.pack_weights.choose::<T>(scratch, config, packing, limit, plan)
    }

    /// The model of `checkpoint`, with weights packed.
    pub fn model<B: Backend, T: Real>(
        &self,
        backend: &B,
        checkpoint: &Checkpoint,
        packing: PackedWeights,
    ) -> Result<Model<B>> {
        let mut model = Model::new(backend, checkpoint)?;
        if packing.passes() > 0 {
            let bar = self.progress.bar("pack weights", packing.products(&model.config).count() as u64);
            model.pack::<T>(backend, packing, || {
                bar.inc(1);
                self.check_stop("weights were being packed, nothing is lost")
            })?;
            bar.finish_and_clear();
        }
        Ok(model)
    }

    /// What to do about an output that is there.
    pub fn output(&self) -> OutputOptions {
        OutputOptions { force: self.force, resume: self.resume }
    }

    /// Whether the process was asked to stop.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Fails with [`Error::Interrupted`] if the process was asked to stop; `saved` says what is kept.
    pub fn check_stop(&self, saved: &str) -> Result<()> {
        if self.stopped() { Err(Error::Interrupted(saved.to_string())) } else { Ok(()) }
    }
}

/// What to say where a result is no number: which weight holds NaN or infinity, if one does, else the error itself.
pub fn blame(checkpoint: &Checkpoint) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Numeric(_) => checkpoint.check_finite().err().unwrap_or(error),
        other => other,
    }
}
