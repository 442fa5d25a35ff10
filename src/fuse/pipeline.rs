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

/// One module's way through a recipe.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of the updates as read.
    pub grams: Grams,
    /// What resolution made of them.
    pub resolution: Option<Resolution>,
    /// c̄ of the updates as read, compared as resolution does, or by default where there was none.
    pub before: Score,
    /// c̄ of the resolved updates.
    pub after: Option<Score>,
    /// The result.
    pub fused: Fused,
}

impl Recipe {
    /// Resolves and fuses each batch.
    ///
    /// Refuses what [`Fusion::rank_of`] does and, where the method would use it, a declared frozen A that is not common.
    pub fn run<B: Backend>(&self, backend: &B, batches: &[Batch], as_adapter: bool) -> Result<Vec<Outcome>> {
        for batch in batches {
            self.fusion.rank_of(&batch.frame, as_adapter)?;
            if batch.frame.frozen && matches!(self.fusion.method, Method::Ffa | Method::FfaLsq) {
                check_frozen(batch)?;
            }
        }
        let stacks = Stacks::new(backend, batches.iter().collect())?;
        let grams = stacks.grams()?;
        let Some(options) = &self.resolve else {
            let before = scores(backend, &grams, &LoraCr::default())?;
            let fused = self.fuse(batches, &grams, as_adapter)?;
            let one =
                |((grams, before), fused)| Outcome { grams, resolution: None, before, after: None, fused };
            return Ok(grams.into_iter().zip(before).zip(fused).map(one).collect());
        };
        let modules: Vec<(&Grams, &[f64])> =
            grams.iter().zip(batches).map(|(g, b)| (g, &b.frame.weights[..])).collect();
        let resolutions = options.resolve(backend, &modules)?;
        let resolved: Vec<Grams> = resolutions.iter().zip(&grams).map(|(r, g)| r.grams(g)).collect();
        let after = scores(backend, &resolved, options)?;
        let fused = self.fuse(&stacks.resolved(&resolutions)?, &resolved, as_adapter)?;
        let one = |(((grams, resolution), after), fused): (((Grams, Resolution), Score), Fused)| {
            let before = Score::of(&resolution.directions);
            Outcome { grams, resolution: Some(resolution), before, after: Some(after), fused }
        };
        Ok(grams.into_iter().zip(resolutions).zip(after).zip(fused).map(one).collect())
    }

    fn fuse(&self, batches: &[Batch], grams: &[Grams], as_adapter: bool) -> Result<Vec<Fused>> {
        // Gathered before the first error is looked for, so that it is always the same one.
        let fused: Vec<_> = (batches, grams)
            .into_par_iter()
            .map(|(batch, grams)| self.fusion.fuse_with(batch, Some(grams), as_adapter))
            .collect();
        fused.into_iter().collect()
    }
}
