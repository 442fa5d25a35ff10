//! `conflict`: how far the updates of several adapters disagree, and what LoRA-CR would do about it.

use std::collections::HashSet;
use std::path::PathBuf;

use rayon::prelude::*;

use super::common::Common;
use super::report::write_conflict;
use crate::backend::Backend;
use crate::checkpoint::output_file::{self, OutputFile};
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
    /// What the adapters are called in drawings; their folders' names where it is empty.
    pub names: Vec<String>,
    /// A page of drawings to write.
    pub html: Option<PathBuf>,
}

impl ConflictOptions {
    /// What the adapters are called: their folders' last names, or whole paths where two of those are equal.
    fn named(&self) -> Vec<String> {
        if !self.names.is_empty() {
            return self.names.clone();
        }
        let last = |p: &PathBuf| p.file_name().unwrap_or(p.as_os_str()).to_string_lossy().into_owned();
        let short: Vec<String> = self.adapters.iter().map(last).collect();
        let distinct: HashSet<&String> = short.iter().collect();
        if distinct.len() == short.len() {
            return short;
        }
        self.adapters.iter().map(|p| p.display().to_string()).collect()
    }
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
    if let Some(html) = &options.html {
        OutputFile::look_ahead(html, common.force, output_file::made_here)?;
    }
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
    let report = ConflictReport::new(options.adapters.len(), modules);
    if let Some(html) = &options.html {
        write_conflict(html, &report, &options.named(), common.force)?;
    }
    Ok(ConflictOutcome { report, warnings: inputs.warnings })
}
