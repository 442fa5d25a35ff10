//! A few modules from the updates as read to the fused updates: Grams, conflict resolution, method.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::conflict::{Score, scores};
use crate::fuse::factors::Batch;
use crate::fuse::ffa::check_frozen;
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::{LoraCr, Resolution};
use crate::fuse::method::{Fused, Fusion};
use crate::fuse::options::Method;
use crate::fuse::stacks::Stacks;

/// What is done to every module.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// `--resolve lora-cr` and its options, where it was asked for.
    pub resolve: Option<LoraCr>,
    /// The method and its options.
    #[serde(flatten)]
    pub fusion: Fusion,
}

/// One module's way to the updates that are fused.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Of the updates as read.
    pub grams: Grams,
    /// What resolution made of them.
    pub resolution: Option<Resolution>,
    /// c̄ of the updates as read, compared as resolution does, or by default where there was none.
    pub before: Score,
    /// c̄ of the resolved updates.
    pub after: Option<Score>,
    /// The resolved updates and their Grams; none where they are those read.
    pub made: Option<(Batch, Grams)>,
}

impl Resolved {
    /// The updates that are fused, and their Grams: the resolved ones, or those `read`.
    pub fn updates<'a>(&'a self, read: &'a Batch) -> (&'a Batch, &'a Grams) {
        self.made.as_ref().map_or((read, &self.grams), |(batch, grams)| (batch, grams))
    }
}

/// One module's way through a recipe.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was fused.
    pub resolved: Resolved,
    /// The result.
    pub fused: Fused,
}

impl Recipe {
    /// Resolves and fuses each batch.
    ///
    /// Refuses what [`Fusion::rank_of`] and [`Recipe::resolved`] do.
    pub fn run<B: Backend>(&self, backend: &B, batches: &[Batch], as_adapter: bool) -> Result<Vec<Outcome>> {
        for batch in batches {
            self.fusion.rank_of(&batch.frame, as_adapter)?;
        }
        let resolved = self.resolved(backend, batches)?;
        // Gathered before the first error is looked for, so that it is always the same one.
        let fused: Vec<_> = resolved
            .par_iter()
            .zip(batches)
            .map(|(resolved, read)| {
                let (batch, grams) = resolved.updates(read);
                self.fusion.fuse_with(batch, Some(grams), as_adapter)
            })
            .collect();
        let one = |(resolved, fused): (Resolved, Result<Fused>)| Ok(Outcome { resolved, fused: fused? });
        resolved.into_iter().zip(fused).map(one).collect()
    }

    /// Resolves each batch.
    ///
    /// Refuses, where the method would use it, a declared frozen A that is not common.
    pub fn resolved<B: Backend>(&self, backend: &B, batches: &[Batch]) -> Result<Vec<Resolved>> {
        for batch in batches {
            if batch.frame.frozen && matches!(self.fusion.method, Method::Ffa | Method::FfaLsq) {
                check_frozen(batch)?;
            }
        }
        let stacks = Stacks::new(backend, batches.iter().collect())?;
        let grams = stacks.grams()?;
        let Some(options) = &self.resolve else {
            let before = scores(backend, &grams, &LoraCr::default())?;
            let one = |(grams, before)| Resolved { grams, resolution: None, before, after: None, made: None };
            return Ok(grams.into_iter().zip(before).map(one).collect());
        };
        let modules: Vec<(&Grams, &[f64])> =
            grams.iter().zip(batches).map(|(g, b)| (g, &b.frame.weights[..])).collect();
        let resolutions = options.resolve(backend, &modules)?;
        let resolved: Vec<Grams> = resolutions.iter().zip(&grams).map(|(r, g)| r.grams(g)).collect();
        let after = scores(backend, &resolved, options)?;
        let batches = stacks.resolved(&resolutions)?.into_iter().zip(resolved);
        let one = |(((grams, resolution), after), made): (((Grams, Resolution), Score), (Batch, Grams))| {
            let before = Score::of(&resolution.directions);
            Resolved { grams, resolution: Some(resolution), before, after: Some(after), made: Some(made) }
        };
        Ok(grams.into_iter().zip(resolutions).zip(after).zip(batches).map(one).collect())
    }
}
