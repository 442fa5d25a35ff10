//! The shared subspace of several updates, from their Grams.

use faer::Mat;

use crate::error::Result;
use crate::fuse::algebra::{RANK_CUT, eigen, product, scale_columns};
use crate::fuse::grams::Grams;
use crate::fuse::options::SharedRank;

/// Singular values at or below this share of the largest one are no directions of the shared subspace.
const SIGMA_CUT: f64 = 1e-6;

/// Left singular pairs `(σₖ, uₖ)` of `[D₁ … D_E]`, with U known by its coordinates only.
#[derive(Clone, Debug)]
pub struct Subspace {
    /// `σₖ`, descending.
    pub sigma: Vec<f64>,
    /// `Σ σₖ²` over all directions, kept or not: `Σ ‖Dᵢ‖²`.
    pub energy: f64,
    /// `[P, K]`: `U = [B₁ … B_E] basis`.
    pub basis: Mat<f64>,
    /// `[K, P]`: `Uᵀ [B₁ … B_E]`, so that `zᵢₖ = coordsᵢ[k, :] Aᵢ`.
    pub coords: Mat<f64>,
}

impl Subspace {
    /// The directions that `rank` keeps; none where every update is zero.
    ///
    /// With `G_B = V Λ Vᵀ` and `R = Λ^½ Vᵀ`: `R blockdiag(G_Aⁱⁱ) Rᵀ = E diag(σ²) Eᵀ`, `basis = V Λ^-½ E`,
    /// `coords = Eᵀ R`. A column of B and its row of A are first given equal norms, which changes no update, so that
    /// the cut on Λ does not depend on how a product is split into its factors.
    pub fn of(grams: &Grams, rank: SharedRank) -> Result<Subspace> {
        let p = grams.rank();
        let none = Subspace { sigma: vec![], energy: 0.0, basis: Mat::zeros(p, 0), coords: Mat::zeros(0, p) };
        let d = balance(grams);
        let back: Vec<f64> = d.iter().map(|d| 1.0 / d).collect();
        let gb = Mat::from_fn(p, p, |i, j| grams.b[(i, j)] * back[i] * back[j]);
        let (lambda, v) = eigen(gb.as_ref())?;
        let cut = RANK_CUT * lambda[0];
        let q = lambda.iter().take_while(|&&l| l > cut && l > 0.0).count();
        if q == 0 {
            return Ok(none);
        }
        let root: Vec<f64> = lambda[..q].iter().map(|l| l.sqrt()).collect();
        let r = Mat::from_fn(q, p, |k, j| root[k] * v[(j, k)]);
        let mut core = Mat::zeros(q, q);
        for e in 0..grams.edges() {
            let at = grams.block(e);
            let ga = Mat::from_fn(at.len(), at.len(), |i, j| {
                grams.a[(at.start + i, at.start + j)] * d[at.start + i] * d[at.start + j]
            });
            let re = r.subcols(at.start, at.len());
            core += product(product(re, ga.as_ref()).as_ref(), re.transpose());
        }
        let (squares, e) = eigen(core.as_ref())?;
        let sigma: Vec<f64> = squares.iter().map(|s| s.max(0.0).sqrt()).collect();
        let energy: f64 = squares.iter().map(|s| s.max(0.0)).sum();
        let above = sigma.iter().take_while(|&&s| s > SIGMA_CUT * sigma[0]).count();
        let k = above.min(rank.limit(&sigma, energy));
        if k == 0 {
            return Ok(none);
        }
        let e = e.subcols(0, k);
        let inverse: Vec<f64> = root.iter().map(|x| 1.0 / x).collect();
        let basis = product(scale_columns(v.subcols(0, q), &inverse).as_ref(), e);
        let coords = product(e.transpose(), r.as_ref());
        Ok(Subspace {
            sigma: sigma[..k].to_vec(),
            energy,
            basis: Mat::from_fn(p, k, |i, j| basis[(i, j)] * back[i]),
            coords: scale_columns(coords.as_ref(), &d),
        })
    }

    /// K.
    pub fn directions(&self) -> usize {
        self.sigma.len()
    }

    /// `Σ σₖ²` of the kept directions over that of all; 1 where every update is zero.
    pub fn energy_kept(&self) -> f64 {
        if self.energy > 0.0 {
            (self.sigma.iter().map(|s| s * s).sum::<f64>() / self.energy).min(1.0)
        } else {
            1.0
        }
    }
}

/// dⱼ such that column j of B over dⱼ and row j of A times dⱼ have equal norms.
///
/// A column of B whose row of A is zero takes part in no update; it gets the norm of the largest balanced column.
fn balance(grams: &Grams) -> Vec<f64> {
    let norm = |x: &Mat<f64>, j: usize| x[(j, j)].max(0.0).sqrt();
    let p = grams.rank();
    let largest = (0..p).map(|j| (norm(&grams.b, j) * norm(&grams.a, j)).sqrt()).fold(0.0, f64::max);
    (0..p)
        .map(|j| match (norm(&grams.b, j), norm(&grams.a, j)) {
            (b, a) if b > 0.0 && a > 0.0 => (b / a).sqrt(),
            (b, _) if b > 0.0 && largest > 0.0 => b / largest,
            _ => 1.0,
        })
        .collect()
}
