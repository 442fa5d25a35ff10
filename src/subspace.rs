//! The output space that several updates share, from the Grams of their factors: what LoRA-CR compares them in and
//! KnOTS aligns them in.

use faer::{Mat, MatRef};

use crate::algebra::{eigen, product, scale_columns};
use crate::error::Result;
use crate::ops::gate::{Layout, RANK_CUT, Rule, balance};

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
    /// The directions that `rule` keeps, from the two Grams `[P, P]`; none where every update is zero.
    pub fn of(b: &[f64], a: &[f64], bounds: &[usize], rule: Rule) -> Result<Option<Subspace>> {
        let p = Layout::of(bounds).rank;
        let (gram_b, gram_a) =
            (MatRef::from_column_major_slice(b, p, p), MatRef::from_column_major_slice(a, p, p));
        let d = balance(b, a, p);
        let back: Vec<f64> = d.iter().map(|d| 1.0 / d).collect();
        let gb = Mat::from_fn(p, p, |i, j| gram_b[(i, j)] * back[i] * back[j]);
        let (lambda, v) = eigen(gb.as_ref())?;
        let cut = RANK_CUT * lambda[0];
        let q = lambda.iter().take_while(|&&l| l > cut && l > 0.0).count();
        if q == 0 {
            return Ok(None);
        }
        let root: Vec<f64> = lambda[..q].iter().map(|l| l.sqrt()).collect();
        let r = Mat::from_fn(q, p, |k, j| root[k] * v[(j, k)]);
        let mut core = Mat::zeros(q, q);
        for at in bounds.windows(2).map(|w| w[0]..w[1]) {
            let ga = Mat::from_fn(at.len(), at.len(), |i, j| {
                gram_a[(at.start + i, at.start + j)] * d[at.start + i] * d[at.start + j]
            });
            let re = r.subcols(at.start, at.len());
            core += product(product(re, ga.as_ref()).as_ref(), re.transpose());
        }
        let (squares, e) = eigen(core.as_ref())?;
        let sigma: Vec<f64> = squares.iter().map(|s| s.max(0.0).sqrt()).collect();
        let energy: f64 = squares.iter().map(|s| s.max(0.0)).sum();
        let k = rule.kept(&sigma, energy);
        if k == 0 {
            return Ok(None);
        }
        let e = e.subcols(0, k);
        let inverse: Vec<f64> = root.iter().map(|x| 1.0 / x).collect();
        let basis = product(scale_columns(v.subcols(0, q), &inverse).as_ref(), e);
        let coords = product(e.transpose(), r.as_ref());
        Ok(Some(Subspace {
            sigma: sigma[..k].to_vec(),
            energy,
            basis: Mat::from_fn(p, k, |i, j| basis[(i, j)] * back[i]),
            coords: scale_columns(coords.as_ref(), &d),
        }))
    }
}
