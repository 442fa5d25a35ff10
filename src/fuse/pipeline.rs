//! A few modules from the updates as read to the fused updates: conflict resolution, method.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::fuse::compare::{Compared, Wanted, compare};
use crate::fuse::elementwise::Elementwise;
use crate::fuse::factors::Batch;
use crate::fuse::ffa::check_frozen;
use crate::fuse::linear::Made;
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
    pub made: Made,
    /// What was done, where a method has several forms: `fedavg`, `ffa_ref(0)`, `fedsa_client:1`, …
    pub variant: String,
    /// The share of the energy that truncation kept; 1 without.
    pub energy_kept: f64,
    /// What the result approximates, of methods that work on entries.
    pub entries: Option<Elementwise>,
}

impl Recipe {
    /// Resolves and fuses each batch.
    ///
    /// Refuses what [`Fusion::rank_of`] and [`Recipe::compare`] do.
    pub fn run<B: Backend>(&self, backend: &B, batches: &[Batch], as_adapter: bool) -> Result<Vec<Outcome>> {
        for batch in batches {
            self.fusion.rank_of(&batch.frame, as_adapter)?;
        }
        // What is linear is made of the updates as read, and of no resolved ones.
        let linear = self.fusion.is_linear();
        let wanted = match (linear, self.fusion.needs_grams()) {
            (true, false) => Wanted::Maps,
            (true, true) => Wanted::Grams,
            (false, _) => Wanted::Factors,
        };
        let compared = self.compare_for(backend, batches, wanted)?;
        // Gathered before the first error is looked for, so that it is always the same one.
        let one = |(read, compared): (&Batch, Compared)| {
            let by_maps = compared.resolved.is_none() || compared.resolution().is_some();
            let known = compared.grams.is_some() || wanted == Wanted::Maps && by_maps;
            match linear && known {
                true => self.linear(read, compared),
                false => self.whole(read, compared, as_adapter),
            }
        };
        let fused: Vec<_> = batches.par_iter().zip(compared).map(one).collect();
        fused.into_iter().collect()
    }

    /// The result as it follows from Grams.
    fn linear(&self, read: &Batch, mut compared: Compared) -> Result<Outcome> {
        let mut updates = read.clone();
        // An A that was changed is no longer the frozen one.
        updates.frame.frozen &= compared.resolution().is_none_or(|maps| maps.right.is_none());
        let rank = updates.frame.rank();
        let (Made::Pair(pair), ..) = self.fusion.make(&updates, &updates, compared.fused_grams(), rank)?
        else {
            let why = format!("{}: --method {} is not linear", read.frame.module, self.fusion.method);
            return Err(Error::Op { op: "fuse", why });
        };
        let made = Made::Pair(pair.after(compared.resolution()));
        if let Some(resolved) = &mut compared.resolved {
            resolved.grams = None;
        }
        let variant = self.fusion.variant(&updates.frame)?;
        Ok(Outcome { compared, made, variant, energy_kept: 1.0, entries: None })
    }

    /// The result from the factors of the updates.
    fn whole(&self, read: &Batch, mut compared: Compared, as_adapter: bool) -> Result<Outcome> {
        let (updates, grams) = (compared.updates(read), compared.fused_grams());
        let Fused { factors, variant, energy_kept, entries } =
            self.fusion.fuse_with(updates, grams, as_adapter)?;
        compared.grams = None;
        if let Some(resolved) = &mut compared.resolved
            && resolved.maps.is_some()
        {
            // What the certificate asks of them the maps say.
            (resolved.batch, resolved.grams) = (None, None);
        }
        Ok(Outcome { compared, made: Made::Factors(factors), variant, energy_kept, entries })
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
