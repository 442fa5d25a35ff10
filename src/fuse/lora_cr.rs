//! LoRA-CR: conflict resolution of several updates in their shared singular subspace, from the factors alone.
//!
//! `D_i^CR = U diag(γᵢ) Uᵀ Dᵢ` with U the left singular vectors of `[D₁ … D_E]`. It changes `Bᵢ` to
//! `[B₁ … B_E] basis diag(γᵢ) coordsᵢ` and leaves `Aᵢ` as it is; the right side is the same on the transposes.

use faer::Mat;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::fuse::algebra::product;
use crate::fuse::gate::{Direction, directions};
use crate::fuse::grams::Grams;
use crate::fuse::options::{Gate, Restore, SharedRank, Side};
use crate::fuse::subspace::Subspace;

/// The largest factor that `--restore` applies.
const RESTORE_CAP: f64 = 4.0;

/// The options of LoRA-CR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoraCr {
    /// How many directions the shared subspace has.
    pub shared_rank: SharedRank,
    /// Output space, input space or both.
    pub side: Side,
    /// How much of a direction an update keeps.
    pub gate: Gate,
    /// Whether norms are given back.
    pub restore: Restore,
}

/// What LoRA-CR does to the updates of one module.
#[derive(Clone, Debug)]
pub struct Resolution {
    /// `[P, P]`: the resolved `[B₁ … B_E]` is the old one times this; none where B stays.
    pub left: Option<Mat<f64>>,
    /// `[P, P]`: the resolved `[A₁; …; A_E]` is this times the old one; none where A stays.
    pub right: Option<Mat<f64>>,
    /// The directions compared on the first side.
    pub directions: Vec<Direction>,
    /// The energy of all updates that lies in the kept directions of the first side.
    pub subspace_energy: f64,
}

impl LoraCr {
    /// Resolves the updates with these Grams; `weights` are the fusion's, used by `--restore global`.
    pub fn resolve(&self, grams: &Grams, weights: &[f64]) -> Result<Resolution> {
        let first = match self.side {
            Side::Left | Side::Both => self.one_side(grams)?,
            Side::Right => self.one_side(&grams.transposed())?,
        };
        let (left, right) = match self.side {
            Side::Left => (first.map, None),
            Side::Right => (None, first.map.map(|w| w.transpose().to_owned())),
            Side::Both => {
                let halfway = grams.mapped(first.map.as_ref().map(Mat::as_ref), None);
                let second = self.one_side(&halfway.transposed())?;
                (first.map, second.map.map(|w| w.transpose().to_owned()))
            }
        };
        let mut resolution =
            Resolution { left, right, directions: first.directions, subspace_energy: first.subspace_energy };
        self.restore(&mut resolution, grams, weights);
        Ok(resolution)
    }

    /// The left side: the directions, and the map of B; no map where every update is zero.
    fn one_side(&self, grams: &Grams) -> Result<OneSide> {
        let subspace = Subspace::of(grams, self.shared_rank)?;
        let directions = directions(&subspace, grams, self.gate);
        let map = (!directions.is_empty()).then(|| {
            let mut gated = subspace.coords.clone();
            for e in 0..grams.edges() {
                for p in grams.block(e) {
                    for (k, d) in directions.iter().enumerate() {
                        gated[(k, p)] *= d.gamma[e];
                    }
                }
            }
            product(subspace.basis.as_ref(), gated.as_ref())
        });
        Ok(OneSide { map, directions, subspace_energy: subspace.energy_kept() })
    }

    /// Scales the resolved updates as `--restore` says.
    fn restore(&self, resolution: &mut Resolution, grams: &Grams, weights: &[f64]) {
        if self.restore == Restore::None || (resolution.left.is_none() && resolution.right.is_none()) {
            return;
        }
        let before = grams.products();
        let after = resolution.grams(grams).products();
        let edges = grams.edges();
        let mixed = |m: &Mat<f64>| {
            (0..edges)
                .map(|i| (0..edges).map(|j| weights[i] * weights[j] * m[(i, j)]).sum::<f64>())
                .sum::<f64>()
        };
        let factors: Vec<f64> = match self.restore {
            Restore::None => vec![1.0; edges],
            Restore::Client => (0..edges).map(|e| restored(before[(e, e)], after[(e, e)])).collect(),
            Restore::Global => vec![restored(mixed(&before), mixed(&after)); edges],
        };
        for (e, factor) in factors.into_iter().enumerate() {
            for p in grams.block(e) {
                if let Some(w) = &mut resolution.left {
                    w.col_as_slice_mut(p).iter_mut().for_each(|x| *x *= factor);
                } else if let Some(w) = &mut resolution.right {
                    (0..w.ncols()).for_each(|j| w[(p, j)] *= factor);
                }
            }
        }
    }
}

/// `√(before / after)` of two squared norms, at most [`RESTORE_CAP`]; 1 over an update of norm 0.
fn restored(before: f64, after: f64) -> f64 {
    if after > 0.0 { (before.max(0.0) / after).sqrt().min(RESTORE_CAP) } else { 1.0 }
}

/// One side's resolution.
struct OneSide {
    map: Option<Mat<f64>>,
    directions: Vec<Direction>,
    subspace_energy: f64,
}

impl Resolution {
    /// The Grams of the resolved updates, from those of the updates.
    pub fn grams(&self, grams: &Grams) -> Grams {
        grams.mapped(self.left.as_ref().map(Mat::as_ref), self.right.as_ref().map(Mat::as_ref))
    }
}
