//! What every stage is told besides its own options.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::progress::Progress;
use crate::backend::{Backend, Pass, Scratch};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::Target;
use crate::checkpoint::output::OutputOptions;
use crate::checkpoint::weights::OpenOptions;
use crate::error::{Error, Result};
use crate::host::available_memory;
use crate::model::memory::Plan;
use crate::model::packing::PackWeights;
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

    /// The plan of a run of these passes with the weights that it packs, and whose they are. By default the whole plan fits the
    /// memory limit or, where there is none, half of the memory that is free; and in any case what is free.
    pub fn packing<T: Real>(
        &self,
        scratch: &impl Scratch,
        config: &ModelConfig,
        passes: &'static [Pass],
        plan: Plan,
    ) -> Result<(Plan, &'static [Pass])> {
        let limit = match (self.pack_weights, available_memory()) {
            (PackWeights::Auto, Some(free)) => Some(self.memory_limit.unwrap_or(free / 2).min(free)),
            _ => self.memory_limit,
        };
        self.pack_weights.choose::<T>(scratch, config, passes, limit, plan)
    }

    /// The model of `checkpoint`, its weights packed for `passes`.
    pub fn model<B: Backend, T: Real>(
        &self,
        backend: &B,
        checkpoint: &Checkpoint,
        passes: &[Pass],
    ) -> Result<Model<B>> {
        let mut model = Model::new(backend, checkpoint)?;
        if !passes.is_empty() {
            let bar =
                self.progress.bar("pack weights", Target::ALL.len() as u64 * model.layers.len() as u64 + 1);
            model.pack::<T>(backend, passes, || {
                bar.inc(1);
                self.check_stop("nothing was changed")
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
