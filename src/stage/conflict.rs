//! `conflict`: how far the updates of several adapters disagree, and what LoRA-CR would do about it.

use std::path::PathBuf;

use rayon::prelude::*;

use super::common::Common;
use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::LoraCr;
use crate::fuse::conflict::{ConflictReport, module_conflicts};
use crate::fuse::inputs::Inputs;

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
    let bar = common.progress.bar("conflict", inputs.modules.len() as u64);
    let mut modules = Vec::with_capacity(inputs.modules.len());
    for chunk in inputs.modules.chunks(2 * rayon::current_num_threads()) {
        common.check_stop("nothing was written")?;
        // Gathered before the first error is looked for, so that it is always the same one.
        let read: Vec<_> = chunk.par_iter().map(|&module| inputs.batch(inputs.frame(module))).collect();
        let batches = read.into_iter().collect::<Result<Vec<_>>>()?;
        modules.extend(module_conflicts(backend, &batches, &options.resolve)?);
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(ConflictOutcome {
        report: ConflictReport::new(options.adapters.len(), modules),
        warnings: inputs.warnings,
    })
}
