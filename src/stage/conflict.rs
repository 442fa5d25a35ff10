//! `conflict`: how far the updates of several adapters disagree, and what LoRA-CR would do about it.

use std::path::PathBuf;

use super::common::Common;
use super::modules::in_order;
use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::conflict::{ConflictReport, module_conflicts};
use crate::fuse::inputs::Inputs;
use crate::fuse::{Frame, LoraCr};

/// What `conflict` is asked.
#[derive(Clone, Debug)]
pub struct ConflictOptions {
    /// The adapters' folders.
    pub adapters: Vec<PathBuf>,
    /// How updates are compared and resolved.
    pub resolve: LoraCr,
    /// Compare, in each module, those who have it.
    pub allow_missing: bool,
}

/// The report, and warnings for a user.
#[derive(Clone, Debug)]
pub struct ConflictOutcome {
    /// Scores by module, by layer and in all.
    pub report: ConflictReport,
    /// What a user should know and what is no error.
    pub warnings: Vec<String>,
}

/// Compares the adapters, in memory of a few modules.
pub fn run<B: Backend>(backend: &B, options: &ConflictOptions, common: &Common) -> Result<ConflictOutcome> {
    let inputs = Inputs::open(&options.adapters, options.allow_missing, common.open_options())?;
    let frames: Vec<Frame> = inputs.modules.iter().map(|&module| inputs.frame(module)).collect();
    let bar = common.progress.bar("conflict", frames.len() as u64);
    let mut modules = Vec::with_capacity(frames.len());
    let one = |frames: &[Frame]| module_conflicts(backend, &inputs.batches(frames)?, &options.resolve);
    in_order(
        backend,
        &frames,
        |_| 0,
        (common, "nothing was written"),
        one,
        |done| {
            bar.inc(done.len() as u64);
            modules.extend(done);
            true
        },
    )?;
    bar.finish_and_clear();
    Ok(ConflictOutcome {
        report: ConflictReport::new(options.adapters.len(), modules),
        warnings: inputs.warnings,
    })
}
