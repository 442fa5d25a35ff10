//! The updates of a module side by side, before and after LoRA-CR: Grams on the device, or the factors themselves where
//! the Grams would be the larger.

use faer::{Mat, MatRef};

use crate::algebra::Spread;
use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::conflict::{Score, scores};
use crate::fuse::direction::Direction;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::{LoraCr, Resolution};
use crate::fuse::stacks::Stacks;
use crate::fuse::wide;

/// What is known of the updates of one module.
#[derive(Clone, Debug)]
pub struct Compared {
    /// `⟨Dᵢ, Dⱼ⟩`, `[E, E]`.
    pub products: Mat<f64>,
    /// c̄, the updates compared as resolution does, or by default where there was none.
    pub score: Score,
    /// What LoRA-CR made of them, where it was asked for.
    pub resolved: Option<Resolved>,
    /// The Grams of the updates as read; none where no update is to be fused, or where they were not formed.
    pub grams: Option<Grams>,
}

/// The resolved updates of one module.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The directions compared on the first side.
    pub directions: Vec<Direction>,
    /// The energy of all updates that lies in the kept directions of the first side.
    pub subspace_energy: f64,
    /// `⟨Dᵢ, Dⱼ⟩` of the resolved updates, `[E, E]`.
    pub products: Mat<f64>,
    /// c̄ of the resolved updates, their subspace computed anew.
    pub score: Score,
    /// The factors as LoRA-CR left them; none where they were not asked for.
    pub batch: Option<Batch>,
    /// Their Grams; none where no update is to be fused, or where they were not formed.
    pub grams: Option<Grams>,
    /// The resolved factors as maps of those before; none where they are no maps.
    pub(super) maps: Option<Maps>,
}

/// New factors `[B₁ … B_E] left` and `right [A₁; …; A_E]`; a factor without a map is the old one.
#[derive(Clone, Debug)]
pub struct Maps {
    /// `[P, K]`.
    pub left: Option<Mat<f64>>,
    /// `[K, P]`.
    pub right: Option<Mat<f64>>,
}

impl Compared {
    /// The Grams of the updates that are fused, where they were formed.
    pub fn fused_grams(&self) -> Option<&Grams> {
        self.resolved.as_ref().map_or(self.grams.as_ref(), |r| r.grams.as_ref())
    }

    /// What resolution did to the factors, where it is a map of them.
    pub(super) fn resolution(&self) -> Option<&Maps> {
        self.resolved.as_ref()?.maps.as_ref()
    }

    /// The updates that are fused: the resolved ones, or those `read`.
    pub fn updates<'a>(&'a self, read: &'a Batch) -> &'a Batch {
        self.resolved.as_ref().and_then(|r| r.batch.as_ref()).unwrap_or(read)
    }

    /// The resolved factors, where they are no maps of those before.
    pub(super) fn resolved_factors(&self) -> Option<&Factors> {
        let resolved = self.resolved.as_ref().filter(|r| r.maps.is_none())?;
        resolved.batch.as_ref().map(|batch| &batch.stack)
    }

    /// `Bᵀ [B₁ …]` and `A [A₁; …]ᵀ` of a B and an A with the resolved factors, from those with the factors before;
    /// none where nothing was resolved, or not by maps.
    pub(super) fn with_resolved(
        &self,
        gb: &Mat<f64>,
        ga: &Mat<f64>,
        spread: Spread,
    ) -> Option<(Mat<f64>, Mat<f64>)> {
        let maps = self.resolution()?;
        let one = |old: &Mat<f64>, map: Option<MatRef<'_, f64>>| match map {
            Some(w) => spread.product(old.as_ref(), w),
            None => old.clone(),
        };
        let left = one(gb, maps.left.as_ref().map(Mat::as_ref));
        Some((left, one(ga, maps.right.as_ref().map(|w| w.transpose()))))
    }
}

/// What a comparison leaves beside scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing.
    Scores,
    /// What is known of the updates that are fused where their Grams are formed; else what makes their factors of those
    /// read, or the factors themselves where they are no maps.
    Maps,
    /// The Grams of the updates as read and as they are fused, where they are formed; else their factors.
    Grams,
    /// The factors of the updates that are fused too.
    Factors,
}

/// Compares the updates of each module and, where `resolve` is given, resolves their conflicts.
pub fn compare<B: Backend>(
    backend: &B,
    batches: &[Batch],
    resolve: Option<&LoraCr>,
    wanted: Wanted,
) -> Result<Vec<Compared>> {
    let options = resolve.copied().unwrap_or_default();
    let (large, small): (Vec<&Batch>, Vec<&Batch>) =
        batches.iter().partition(|batch| wide::is_wide(&batch.frame, options.side));
    let mut large = large.into_iter().map(|batch| match resolve {
        None => wide::compare(batch, &options),
        Some(options) => wide::resolve(batch, options, wanted),
    });
    let mut small = device(backend, small, resolve, wanted)?.into_iter();
    let next = |batch: &Batch| match wide::is_wide(&batch.frame, options.side) {
        true => large.next().transpose(),
        false => Ok(small.next()),
    };
    Ok(batches.iter().map(next).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// By way of the Grams, on the device.
fn device<B: Backend>(
    backend: &B,
    batches: Vec<&Batch>,
    resolve: Option<&LoraCr>,
    wanted: Wanted,
) -> Result<Vec<Compared>> {
    let with_grams = wanted != Wanted::Scores;
    if batches.is_empty() {
        return Ok(Vec::new());
    }
    let stacks = Stacks::new(backend, batches.clone())?;
    let grams = stacks.grams()?;
    let Some(options) = resolve else {
        let scores = scores(backend, &grams, &LoraCr::default())?;
        let one = |(grams, score): (Grams, Score)| Compared {
            products: grams.products(),
            score,
            resolved: None,
            grams: with_grams.then_some(grams),
        };
        return Ok(grams.into_iter().zip(scores).map(one).collect());
    };
    let modules: Vec<(&Grams, &[f64])> =
        grams.iter().zip(&batches).map(|(g, b)| (g, &b.frame.weights[..])).collect();
    let resolutions = options.resolve(backend, &modules)?;
    let resolved: Vec<Grams> = resolutions.iter().zip(&grams).map(|(r, g)| r.grams(g)).collect();
    let after = scores(backend, &resolved, options)?;
    let changed = match wanted == Wanted::Factors {
        true => stacks.resolved(&resolutions)?.into_iter().map(Some).collect(),
        false => vec![None; batches.len()],
    };
    let both = grams.into_iter().zip(resolved);
    let found = resolutions.into_iter().zip(after).zip(changed);
    let one =
        |((before, after), ((resolution, score), batch)): ((Grams, Grams), ((Resolution, Score), _))| {
            let Resolution { left, right, directions, subspace_energy } = resolution;
            Compared {
                products: before.products(),
                score: Score::of(&directions),
                resolved: Some(Resolved {
                    directions,
                    subspace_energy,
                    products: after.products(),
                    score,
                    batch,
                    grams: with_grams.then_some(after),
                    maps: Some(Maps { left, right }),
                }),
                grams: with_grams.then_some(before),
            }
        };
    Ok(both.zip(found).map(one).collect())
}
