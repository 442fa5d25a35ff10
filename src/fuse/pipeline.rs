//! A few modules from the updates as read to the fused updates: conflict resolution, method.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::compare::{Compared, Wanted, compare};
use crate::fuse::factors::Batch;
use crate::fuse::ffa::check_frozen;
use crate::fuse::lora_cr::LoraCr;
use crate::fuse::method::{Fused, Fusion};
use crate::fuse::options::Method;

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
    /// The updates as read, and as resolution left them.
    pub compared: Compared,
    /// The result.
    pub fused: Fused,
}

impl Recipe {
    /// Resolves and fuses each batch.
    ///
    /// Refuses what [`Fusion::rank_of`] and [`Recipe::compare`] do.
    pub fn run<B: Backend>(&self, backend: &B, batches: &[Batch], as_adapter: bool) -> Result<Vec<Outcome>> {
        for batch in batches {
            self.fusion.rank_of(&batch.frame, as_adapter)?;
        }
        let maps = self.fusion.by_maps();
        let wanted = if maps { Wanted::Grams } else { Wanted::Factors };
        let compared = self.compare_for(backend, batches, wanted)?;
        // Gathered before the first error is looked for, so that it is always the same one.
        let one = |(read, mut compared): (&Batch, Compared)| {
            let (updates, grams) = (compared.updates(read), compared.fused_grams());
            let resolution = compared.resolution().filter(|_| maps);
            let fused = self.fusion.fuse_with(updates, grams, resolution, as_adapter)?;
            if let Some(resolved) = &mut compared.resolved
                && resolved.maps.is_some()
            {
                // What the certificate asks of them the maps say.
                resolved.batch = None;
                resolved.grams = None;
            }
            if fused.maps.is_none() {
                compared.grams = None;
            }
            Ok(Outcome { compared, fused })
        };
        let fused: Vec<_> = batches.par_iter().zip(compared).map(one).collect();
        fused.into_iter().collect()
    }

    /// Compares the updates of each batch, and resolves them where that was asked for.
    ///
    /// Refuses, where the method would use it, a declared frozen A that is not common.
    pub fn compare<B: Backend>(&self, backend: &B, batches: &[Batch]) -> Result<Vec<Compared>> {
        self.compare_for(backend, batches, Wanted::Factors)
    }

    fn compare_for<B: Backend>(
        &self,
        backend: &B,
        batches: &[Batch],
        wanted: Wanted,
    ) -> Result<Vec<Compared>> {
        for batch in batches {
            if batch.frame.frozen && matches!(self.fusion.method, Method::Ffa | Method::FfaLsq) {
                check_frozen(batch)?;
            }
        }
        compare(backend, batches, self.resolve.as_ref(), wanted)
    }
}
