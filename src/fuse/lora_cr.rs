//! LoRA-CR: conflict resolution of several updates in their shared singular subspace, from the factors alone.
//!
//! `D_i^CR = U diag(γᵢ) Uᵀ Dᵢ` with U the left singular vectors of `[D₁ … D_E]`. It changes `Bᵢ` to
//! `[B₁ … B_E] basis diag(γᵢ) coordsᵢ` and leaves `Aᵢ` as it is; the right side is the same on the transposes.

use faer::{Mat, MatRef};
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::direction::Direction;
use crate::fuse::grams::Grams;
use crate::fuse::options::{Gate, Restore, SharedRank, Side};
use crate::ops::gate::{self, Layout, Rule};
use crate::tensor::Store;

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
    /// Resolves the updates of each module, given by their Grams and the fusion's weights, which `--restore global` uses.
    pub fn resolve<B: Backend>(&self, backend: &B, modules: &[(&Grams, &[f64])]) -> Result<Vec<Resolution>> {
        let right = self.side == Side::Right;
        let first = self.one_side(backend, &modules.iter().map(|m| m.0).collect::<Vec<_>>(), right)?;
        let mut resolutions: Vec<Resolution> = first
            .into_iter()
            .map(|one| {
                let (left, right) = match right {
                    false => (one.map, None),
                    true => (None, one.map.map(|w| w.transpose().to_owned())),
                };
                let (directions, subspace_energy) = (one.directions, one.subspace_energy);
                Resolution { left, right, directions, subspace_energy }
            })
            .collect();
        if self.side == Side::Both {
            let halfway: Vec<Grams> = modules.iter().zip(&resolutions).map(|(m, r)| r.grams(m.0)).collect();
            let second = self.one_side(backend, &halfway.iter().collect::<Vec<_>>(), true)?;
            for (resolution, second) in resolutions.iter_mut().zip(second) {
                resolution.right = second.map.map(|w| w.transpose().to_owned());
            }
        }
        for (resolution, (grams, weights)) in resolutions.iter_mut().zip(modules) {
            self.restore(resolution, grams, weights);
        }
        Ok(resolutions)
    }

    /// The left side, or the left one of the transposed updates: the directions, and the map of B; no map where every
    /// update is zero.
    fn one_side<B: Backend>(&self, backend: &B, grams: &[&Grams], transposed: bool) -> Result<Vec<OneSide>> {
        let modules: Vec<&[usize]> = grams.iter().map(|g| g.bounds()).collect();
        let layouts: Vec<Layout> = modules.iter().map(|bounds| Layout::of(bounds)).collect();
        let (squares, numbers) =
            (layouts.iter().map(|l| l.rank * l.rank).sum(), layouts.iter().map(|l| l.len()).sum());
        let alloc = |len: usize| backend.alloc::<f64>("LoRA-CR", len);
        let flat = |left: bool| -> Vec<f64> {
            let side = grams.iter().map(|g| if left != transposed { &g.b } else { &g.a });
            side.flat_map(|g| (0..g.ncols()).flat_map(|j| g.col_as_slice(j)).copied()).collect()
        };
        let (mut b, mut a) = (alloc(squares)?, alloc(squares)?);
        backend.upload(B::Store::view_mut(&mut b, 0..squares), &flat(true))?;
        backend.upload(B::Store::view_mut(&mut a, 0..squares), &flat(false))?;
        let (mut map, mut scratch, mut directions) = (alloc(squares)?, alloc(squares)?, alloc(numbers)?);
        backend.gate(gate::Gate {
            map: B::Store::view_mut(&mut map, 0..squares),
            directions: B::Store::view_mut(&mut directions, 0..numbers),
            scratch: B::Store::view_mut(&mut scratch, 0..squares),
            b: B::Store::view(&b, 0..squares),
            a: B::Store::view(&a, 0..squares),
            modules: &modules,
            rule: self.rule(),
        })?;
        let (mut maps, mut found) = (vec![0.0; squares], vec![0.0; numbers]);
        backend.download(&mut maps, B::Store::view(&map, 0..squares))?;
        backend.download(&mut found, B::Store::view(&directions, 0..numbers))?;
        let (mut maps, mut found) = (&maps[..], &found[..]);
        let one = |layout: Layout| {
            let p = layout.rank;
            let ((map, rest), (own, after)) = (maps.split_at(p * p), found.split_at(layout.len()));
            (maps, found) = (rest, after);
            let directions: Vec<Direction> =
                (0..gate::finite(own)?).map(|k| Direction::of(layout, own, k)).collect();
            let kept: f64 = directions.iter().map(|d| d.sigma * d.sigma).sum();
            Ok(OneSide {
                map: (!directions.is_empty()).then(|| MatRef::from_row_major_slice(map, p, p).to_owned()),
                subspace_energy: if own[1] > 0.0 { (kept / own[1]).min(1.0) } else { 1.0 },
                directions,
            })
        };
        layouts.into_iter().map(one).collect()
    }

    pub(super) fn rule(&self) -> Rule {
        let (top, share) = match self.shared_rank {
            SharedRank::All => (usize::MAX, 0.0),
            SharedRank::Top(n) => (n, 0.0),
            SharedRank::Energy(share) => (usize::MAX, share),
        };
        Rule { top, share, opposition: self.gate == Gate::Opposition }
    }

    /// Scales the resolved updates as `--restore` says.
    fn restore(&self, resolution: &mut Resolution, grams: &Grams, weights: &[f64]) {
        if self.restore == Restore::None || (resolution.left.is_none() && resolution.right.is_none()) {
            return;
        }
        let (before, after) = (grams.products(), resolution.grams(grams).products());
        let factors = restore_factors(self.restore, &before, &after, weights).into_iter().flatten();
        for (e, factor) in factors.enumerate() {
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

/// What each resolved update is multiplied by so that norms are as `restore` says, from the products `⟨Dᵢ, Dⱼ⟩` before and
/// after; none where they stay.
pub(super) fn restore_factors(
    restore: Restore,
    before: &Mat<f64>,
    after: &Mat<f64>,
    weights: &[f64],
) -> Option<Vec<f64>> {
    let edges = before.nrows();
    let mixed = |m: &Mat<f64>| {
        (0..edges).map(|i| (0..edges).map(|j| weights[i] * weights[j] * m[(i, j)]).sum::<f64>()).sum::<f64>()
    };
    match restore {
        Restore::None => None,
        Restore::Client => Some((0..edges).map(|e| restored(before[(e, e)], after[(e, e)])).collect()),
        Restore::Global => Some(vec![restored(mixed(before), mixed(after)); edges]),
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
