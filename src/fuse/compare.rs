//! The updates of a module side by side, before and after LoRA-CR: Grams on the device, or the factors themselves where
//! the Grams would be the larger.

use faer::{Mat, MatRef};

use crate::algebra::product;
use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::conflict::{Score, scores};
use crate::fuse::direction::Direction;
use crate::fuse::factors::Batch;
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::{LoraCr, Resolution};
use crate::fuse::measure::along;
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
    /// The Grams of the updates that are to be fused, resolved or as read; none where no update is to be fused, or where
    /// they were not formed.
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
    /// The factors as LoRA-CR left them; none where only scores were asked for.
    pub batch: Option<Batch>,
    /// The resolved factors as maps of those before; none where they are no maps.
    pub(super) maps: Option<Maps>,
}

/// `[B₁ … B_E] left` and `right [A₁; …; A_E]` are the resolved factors; none where they are the old ones.
#[derive(Clone, Debug)]
pub(super) struct Maps {
    pub left: Option<Mat<f64>>,
    pub right: Option<Mat<f64>>,
}

impl Compared {
    /// The updates that are fused: the resolved ones, or those `read`.
    pub fn updates<'a>(&'a self, read: &'a Batch) -> &'a Batch {
        self.resolved.as_ref().and_then(|r| r.batch.as_ref()).unwrap_or(read)
    }

    /// `⟨got, Dₑ⟩` of the resolved updates, from `gb = Bᵀ [B₁ …]` and `ga = A [A₁; …]ᵀ` with the factors before,
    /// and got's own factors; none where nothing was resolved.
    pub(super) fn along_resolved(
        &self,
        inputs: &Batch,
        (bt, a): (MatRef<'_, f64>, MatRef<'_, f64>),
        gb: &Mat<f64>,
        ga: &Mat<f64>,
    ) -> Option<Vec<f64>> {
        let resolved = self.resolved.as_ref()?;
        let one = |old: &Mat<f64>, map: Option<MatRef<'_, f64>>| match map {
            Some(w) => product(old.as_ref(), w),
            None => old.clone(),
        };
        let (gb, ga) = match (&resolved.maps, &resolved.batch) {
            (Some(maps), _) => (
                one(gb, maps.left.as_ref().map(Mat::as_ref)),
                one(ga, maps.right.as_ref().map(|w| w.transpose())),
            ),
            (None, Some(batch)) => (product(bt, batch.stack.b()), product(a, batch.stack.a().transpose())),
            (None, None) => return None,
        };
        Some(along(inputs, gb.as_ref(), ga.as_ref()))
    }
}

/// Compares the updates of each module and, where `resolve` is given, resolves their conflicts; `factors` asks for the
/// resolved ones too.
pub fn compare<B: Backend>(
    backend: &B,
    batches: &[Batch],
    resolve: Option<&LoraCr>,
    factors: bool,
) -> Result<Vec<Compared>> {
    let options = resolve.copied().unwrap_or_default();
    let (large, small): (Vec<&Batch>, Vec<&Batch>) =
        batches.iter().partition(|batch| wide::is_wide(&batch.frame, options.side));
    let mut large = large.into_iter().map(|batch| match resolve {
        None => wide::compare(batch, &options),
        Some(options) => wide::resolve(batch, options, factors),
    });
    let mut small = device(backend, small, resolve, factors)?.into_iter();
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
    factors: bool,
) -> Result<Vec<Compared>> {
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
            grams: factors.then_some(grams),
        };
        return Ok(grams.into_iter().zip(scores).map(one).collect());
    };
    let modules: Vec<(&Grams, &[f64])> =
        grams.iter().zip(&batches).map(|(g, b)| (g, &b.frame.weights[..])).collect();
    let resolutions = options.resolve(backend, &modules)?;
    let resolved: Vec<Grams> = resolutions.iter().zip(&grams).map(|(r, g)| r.grams(g)).collect();
    let after = scores(backend, &resolved, options)?;
    let changed = match factors {
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
                    maps: Some(Maps { left, right }),
                }),
                grams: factors.then_some(after),
            }
        };
    Ok(both.zip(found).map(one).collect())
}
