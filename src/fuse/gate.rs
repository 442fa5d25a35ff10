//! How much of each direction of the shared subspace each update keeps.

use faer::{Mat, MatRef};
use serde::Serialize;

use crate::fuse::algebra::product;
use crate::fuse::grams::Grams;
use crate::fuse::options::Gate;
use crate::fuse::subspace::Subspace;

/// A row up to this share of σₖ, or a consensus up to this share of the largest row, is zero.
const NULL_CUT: f64 = 1e-7;

/// One direction uₖ of the shared subspace and what every adapter has along it.
#[derive(Clone, Debug, Serialize)]
pub struct Direction {
    /// `σₖ`.
    pub sigma: f64,
    /// `aᵢₖ = ‖uₖᵀ Dᵢ‖`.
    pub norm: Vec<f64>,
    /// `cos(zᵢₖ, z̄ₖ)` to the consensus `z̄ₖ = Σ a z / Σ a`; 0 for a row that is zero.
    pub cos: Vec<f64>,
    /// `cₖ = Σ a (1 − cos) / (2 Σ a)`, in `[0, 1]`.
    pub conflict: f64,
    /// `γᵢₖ`: the factor on `zᵢₖ`.
    pub gamma: Vec<f64>,
}

/// Every direction of `subspace`, in its order; `grams` are those it was made from.
///
/// All of it follows from `Hₖ(i, j) = ⟨zᵢₖ, zⱼₖ⟩ = coordsᵢ[k, :] G_Aⁱʲ coordsⱼ[k, :]ᵀ`.
pub fn directions(subspace: &Subspace, grams: &Grams, gate: Gate) -> Vec<Direction> {
    let edges = grams.edges();
    // Column block j of `towards[j]` is G_A[:, j] coordsⱼᵀ: [P, K].
    let towards: Vec<Mat<f64>> = (0..edges)
        .map(|j| {
            let at = grams.block(j);
            product(
                grams.a.subcols(at.start, at.len()),
                subspace.coords.subcols(at.start, at.len()).transpose(),
            )
        })
        .collect();
    (0..subspace.directions())
        .map(|k| {
            let h = Mat::from_fn(edges, edges, |i, j| {
                grams.block(i).map(|l| subspace.coords[(k, l)] * towards[j][(l, k)]).sum::<f64>()
            });
            direction(subspace.sigma[k], h.as_ref(), gate)
        })
        .collect()
}

/// One direction from `h[i, j] = ⟨zᵢ, zⱼ⟩`.
fn direction(sigma: f64, h: MatRef<'_, f64>, gate: Gate) -> Direction {
    let edges = h.nrows();
    let norm: Vec<f64> = (0..edges).map(|i| h[(i, i)].max(0.0).sqrt()).collect();
    let active: Vec<bool> = norm.iter().map(|&a| a > NULL_CUT * sigma).collect();
    let weight: Vec<f64> = (0..edges).map(|i| if active[i] { norm[i] } else { 0.0 }).collect();
    let total: f64 = weight.iter().sum();
    let share: Vec<f64> = weight.iter().map(|w| if total > 0.0 { w / total } else { 0.0 }).collect();

    // ⟨zᵢ, z̄⟩ and ‖z̄‖
    let along: Vec<f64> = (0..edges).map(|i| (0..edges).map(|j| h[(i, j)] * share[j]).sum()).collect();
    let consensus = (0..edges).map(|i| share[i] * along[i]).sum::<f64>().max(0.0).sqrt();
    let largest = weight.iter().copied().fold(0.0, f64::max);
    let agreed = consensus > NULL_CUT * largest;
    let cos: Vec<f64> = (0..edges)
        .map(|i| if agreed && active[i] { (along[i] / (norm[i] * consensus)).clamp(-1.0, 1.0) } else { 0.0 })
        .collect();
    let conflict = (0..edges).map(|i| share[i] * (1.0 - cos[i])).sum::<f64>() / 2.0;
    let conflict = conflict.clamp(0.0, 1.0);

    let gamma = match gate {
        Gate::Paper => cos.iter().map(|c| (1.0 - conflict) * c.max(0.0)).collect(),
        Gate::Opposition => (0..edges).map(|i| 1.0 - opposition(i, h, &norm, &weight)).collect(),
    };
    Direction { sigma, norm, cos, conflict, gamma }
}

/// `Σ_{j≠i} aⱼ / (Σ_{l≠i} aₗ) max(0, −cos(zᵢ, zⱼ))`; rows that are zero count 0.
fn opposition(i: usize, h: MatRef<'_, f64>, norm: &[f64], weight: &[f64]) -> f64 {
    let others = |j: &usize| *j != i;
    let total: f64 = (0..norm.len()).filter(others).map(|j| weight[j]).sum();
    if total == 0.0 || weight[i] == 0.0 {
        return 0.0;
    }
    let against = |j: usize| (-h[(i, j)] / (norm[i] * norm[j])).clamp(0.0, 1.0);
    (0..norm.len()).filter(others).filter(|&j| weight[j] > 0.0).map(|j| weight[j] / total * against(j)).sum()
}
