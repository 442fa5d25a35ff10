//! Conflict scores: how far the updates of several adapters disagree, per module, per layer and in all.

use std::cmp::Ordering;

use faer::Mat;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::compare::{Compared, Resolved, Wanted, compare};
use crate::fuse::direction::Direction;
use crate::fuse::factors::Batch;
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::LoraCr;
use crate::fuse::options::{Restore, Side};

/// Directions of a module that are kept to be looked at: those of the largest σ.
pub const LEADING: usize = 12;
/// Adapters beyond which it is not told who dominates whom: the table grows with the square of their number.
pub const MOST_COMPARED: usize = 64;

/// The conflict score c̄ of one module: two means of `cₖ` over the directions of the shared subspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// `Σ cₖ / K`.
    pub conflict_mean: f64,
    /// `Σ σₖ cₖ / Σ σₖ`.
    pub conflict_weighted: f64,
}

impl Score {
    /// Of these directions; 0 where there are none.
    pub fn of(directions: &[Direction]) -> Score {
        Score::of_pairs(directions.iter().map(|d| (d.sigma, d.conflict)))
    }

    /// Of directions with these `(σₖ, cₖ)`; 0 where there are none.
    pub(super) fn of_pairs(directions: impl ExactSizeIterator<Item = (f64, f64)> + Clone) -> Score {
        if directions.len() == 0 {
            return Score::default();
        }
        let sigma: f64 = directions.clone().map(|(sigma, _)| sigma).sum();
        Score {
            conflict_mean: directions.clone().map(|(_, c)| c).sum::<f64>() / directions.len() as f64,
            conflict_weighted: directions.map(|(sigma, c)| sigma * c).sum::<f64>() / sigma,
        }
    }

    /// The mean of several scores; 0 of none.
    pub fn mean<'a>(scores: impl Iterator<Item = &'a Score> + Clone) -> Score {
        let n = scores.clone().count().max(1) as f64;
        Score {
            conflict_mean: scores.clone().map(|s| s.conflict_mean).sum::<f64>() / n,
            conflict_weighted: scores.map(|s| s.conflict_weighted).sum::<f64>() / n,
        }
    }
}

/// The updates of one module side by side, and what LoRA-CR does to them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModuleConflict {
    /// Counted from 0.
    pub layer: usize,
    /// `q`, `k`, `v`, `o`, `gate`, `up` or `down`.
    pub target: String,
    /// `[O, I]`.
    pub shape: [usize; 2],
    /// Which adapters have the module, counted from 0.
    pub adapters: Vec<usize>,
    /// The rank of each of them.
    pub ranks: Vec<usize>,
    /// K, the directions of the shared subspace.
    pub directions: usize,
    /// The share of `Σ ‖Dᵢ‖²` that lies in them.
    pub subspace_energy: f64,
    /// c̄ of the updates.
    pub before: Score,
    /// c̄ of the resolved updates, their subspace computed anew.
    pub after: Score,
    /// `‖Dᵢ‖`.
    pub norms: Vec<f64>,
    /// `‖D_i^CR‖`.
    pub norms_after: Vec<f64>,
    /// `⟨Dᵢ, Dⱼ⟩ / (‖Dᵢ‖ ‖Dⱼ‖)`; 0 with an update of norm 0.
    pub cosines: Vec<Vec<f64>>,
    /// `Σ ‖Dᵢ‖²`.
    pub energy: f64,
    /// `Σ ‖D_i^CR‖² / Σ ‖Dᵢ‖²`; 1 where every update is zero.
    pub energy_kept: f64,
    /// The [`LEADING`] directions of the largest σ.
    pub leading: Vec<Direction>,
    /// Row i, column j: `Σₖ σₖ² [aᵢₖ > aⱼₖ] / Σₖ σₖ²`, the share of the energy that lies in directions where update i
    /// is the longer one; half a direction each where they are equal. Empty beyond [`MOST_COMPARED`] adapters.
    pub dominance: Vec<Vec<f64>>,
}

/// Scores of one layer: the mean of its modules'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerConflict {
    /// Counted from 0.
    pub layer: usize,
    /// c̄ of the updates.
    pub before: Score,
    /// c̄ of the resolved updates.
    pub after: Score,
}

/// Conflict of a set of adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConflictReport {
    /// Every module, by layer and in the order of the forward pass.
    pub modules: Vec<ModuleConflict>,
    /// Every layer that has modules.
    pub layers: Vec<LayerConflict>,
    /// Mean over modules, of the updates.
    pub before: Score,
    /// Mean over modules, of the resolved updates.
    pub after: Score,
    /// Cosine of the whole updates, all modules taken together.
    pub cosines: Vec<Vec<f64>>,
    /// Norm of each whole update.
    pub norms: Vec<f64>,
    /// `Σ ‖D_i^CR‖² / Σ ‖Dᵢ‖²` over all modules.
    pub energy_kept: f64,
    /// `‖D_i^CR‖² / ‖Dᵢ‖²` of each adapter over all modules; 1 for one that is zero.
    pub kept: Vec<f64>,
    /// [`ModuleConflict::dominance`], modules weighted by their energy; 0 of two that share no module.
    pub dominance: Vec<Vec<f64>>,
}

/// c̄ of the updates with each of these Grams, compared as `options` say: on the left side, or the right one under
/// `--side right`.
pub fn scores<B: Backend>(backend: &B, grams: &[Grams], options: &LoraCr) -> Result<Vec<Score>> {
    let side = match options.side {
        Side::Both => Side::Left,
        side => side,
    };
    let options = LoraCr { side, restore: Restore::None, ..*options };
    let modules: Vec<(&Grams, &[f64])> = grams.iter().map(|g| (g, &[][..])).collect();
    Ok(options.resolve(backend, &modules)?.iter().map(|r| Score::of(&r.directions)).collect())
}

/// Compares the updates of each module as `options` say.
///
/// The scores are those of the left side, or of the right one under `--side right`.
pub fn module_conflicts<B: Backend>(
    backend: &B,
    batches: &[Batch],
    options: &LoraCr,
) -> Result<Vec<ModuleConflict>> {
    let compared = compare(backend, batches, Some(options), Wanted::Scores)?;
    let both = batches.iter().zip(&compared);
    Ok(both.filter_map(|(b, c)| Some(module_conflict(b, c, c.resolved.as_ref()?))).collect())
}

fn module_conflict(batch: &Batch, compared: &Compared, resolved: &Resolved) -> ModuleConflict {
    let (before, after) = (&compared.products, &resolved.products);
    let norms = norms(before);
    let directions = &resolved.directions;
    let energy = trace(before);
    ModuleConflict {
        layer: batch.frame.module.layer,
        target: batch.frame.module.target.short().to_owned(),
        shape: [batch.frame.size.0, batch.frame.size.1],
        adapters: batch.frame.members.clone(),
        ranks: batch.frame.ranks(),
        directions: resolved.directions.len(),
        subspace_energy: resolved.subspace_energy,
        before: compared.score,
        after: resolved.score,
        cosines: cosines(before),
        norms_after: self::norms(after),
        norms,
        energy,
        energy_kept: if energy > 0.0 { trace(after) / energy } else { 1.0 },
        leading: directions.iter().take(LEADING).cloned().collect(),
        dominance: dominance(directions, batch.frame.edges()),
    }
}

/// Who is the longer one in how much of the energy, see [`ModuleConflict::dominance`].
fn dominance(directions: &[Direction], edges: usize) -> Vec<Vec<f64>> {
    if edges > MOST_COMPARED {
        return Vec::new();
    }
    let energy: f64 = directions.iter().map(|d| d.sigma * d.sigma).sum();
    let share = |i: usize, j: usize| {
        let longer = |d: &Direction| match d.norm[i].partial_cmp(&d.norm[j]) {
            Some(Ordering::Greater) => d.sigma * d.sigma,
            Some(Ordering::Equal) => 0.5 * d.sigma * d.sigma,
            _ => 0.0,
        };
        if energy > 0.0 { directions.iter().map(longer).sum::<f64>() / energy } else { 0.5 }
    };
    (0..edges).map(|i| (0..edges).map(|j| share(i, j)).collect()).collect()
}

impl ConflictReport {
    /// Sums up the modules of `adapters` adapters.
    pub fn new(adapters: usize, mut modules: Vec<ModuleConflict>) -> ConflictReport {
        // `sort_by_key` is stable: within a layer the order of the forward pass stays.
        modules.sort_by_key(|m| m.layer);
        let mut layers: Vec<usize> = modules.iter().map(|m| m.layer).collect();
        layers.dedup();
        let layers = layers
            .into_iter()
            .map(|layer| {
                let here = modules.iter().filter(|m| m.layer == layer);
                LayerConflict {
                    layer,
                    before: Score::mean(here.clone().map(|m| &m.before)),
                    after: Score::mean(here.map(|m| &m.after)),
                }
            })
            .collect();
        let mut products = Mat::zeros(adapters, adapters);
        let mut kept = vec![0.0; adapters];
        for m in &modules {
            for (i, &x) in m.adapters.iter().enumerate() {
                kept[x] += m.norms_after[i] * m.norms_after[i];
                for (j, &y) in m.adapters.iter().enumerate() {
                    products[(x, y)] += m.cosines[i][j] * m.norms[i] * m.norms[j];
                }
            }
        }
        for (e, kept) in kept.iter_mut().enumerate() {
            *kept = if products[(e, e)] > 0.0 { *kept / products[(e, e)] } else { 1.0 };
        }
        let energy: f64 = modules.iter().map(|m| m.energy).sum();
        let energy_kept: f64 = modules.iter().map(|m| m.energy * m.energy_kept).sum();
        ConflictReport {
            before: Score::mean(modules.iter().map(|m| &m.before)),
            after: Score::mean(modules.iter().map(|m| &m.after)),
            cosines: cosines(&products),
            norms: norms(&products),
            energy_kept: if energy > 0.0 { energy_kept / energy } else { 1.0 },
            dominance: whole_dominance(adapters, &modules),
            kept,
            layers,
            modules,
        }
    }
}

/// The modules' dominance weighted by their energy.
fn whole_dominance(adapters: usize, modules: &[ModuleConflict]) -> Vec<Vec<f64>> {
    if adapters > MOST_COMPARED {
        return Vec::new();
    }
    let mut sums = vec![vec![(0.0, 0.0); adapters]; adapters];
    for m in modules {
        for (i, &x) in m.adapters.iter().enumerate() {
            for (j, &y) in m.adapters.iter().enumerate() {
                let (sum, weight) = &mut sums[x][y];
                *sum += m.energy * m.dominance[i][j];
                *weight += m.energy;
            }
        }
    }
    let share = |(sum, weight): (f64, f64)| if weight > 0.0 { sum / weight } else { 0.0 };
    sums.into_iter().map(|row| row.into_iter().map(share).collect()).collect()
}

pub(super) fn trace(products: &Mat<f64>) -> f64 {
    (0..products.nrows()).map(|i| products[(i, i)].max(0.0)).sum()
}

fn norms(products: &Mat<f64>) -> Vec<f64> {
    (0..products.nrows()).map(|i| products[(i, i)].max(0.0).sqrt()).collect()
}

fn cosines(products: &Mat<f64>) -> Vec<Vec<f64>> {
    let norm = norms(products);
    let cosine = |i: usize, j: usize| match norm[i] * norm[j] {
        n if n > 0.0 => (products[(i, j)] / n).clamp(-1.0, 1.0),
        _ => 0.0,
    };
    (0..norm.len()).map(|i| (0..norm.len()).map(|j| cosine(i, j)).collect()).collect()
}
