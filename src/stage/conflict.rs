//! `conflict`: how far the updates of several adapters disagree, and what LoRA-CR would do about it.

use std::path::PathBuf;

use rayon::prelude::*;

use super::common::Common;
use crate::error::Result;
use crate::fuse::conflict::{ConflictReport, module_conflict};
use crate::fuse::inputs::Inputs;
use crate::fuse::{Grams, LoraCr};

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

/// Compares the adapters module by module, in memory of one module a thread.
pub fn run(options: &ConflictOptions, common: &Common) -> Result<ConflictOutcome> {
    let inputs = Inputs::open(&options.adapters, options.allow_missing, common.open_options())?;
    let bar = common.progress.bar("conflict", inputs.modules.len() as u64);
    let modules: Vec<_> = inputs
        .modules
        .par_iter()
        .map(|&module| {
            common.check_stop("nothing was written")?;
            let batch = inputs.batch(inputs.frame(module))?;
            let grams = Grams::of(&batch);
            let resolution = options.resolve.resolve(&grams, &batch.frame.weights)?;
            let one = module_conflict(&batch, &grams, &options.resolve, &resolution);
            bar.inc(1);
            one
        })
        .collect();
    bar.finish_and_clear();
    // Gathered before the first error is looked for, so that it is always the same one.
    let modules = modules.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(ConflictOutcome {
        report: ConflictReport::new(options.adapters.len(), modules),
        warnings: inputs.warnings,
    })
}
