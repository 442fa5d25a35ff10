//! The singular values of `B A`, and its best approximation at a smaller rank, from the factors.

use faer::Mat;

use crate::algebra::{positive, product};
use crate::error::{Error, Result};
use crate::fuse::factors::Factors;

/// The largest singular values of a product and their vectors.
#[derive(Clone, Debug)]
pub struct Svd {
    /// `[O, q]`; the largest entry of each column is positive.
    u: Mat<f64>,
    /// `[q]`, descending.
    s: Vec<f64>,
    /// `[I, q]`.
    v: Mat<f64>,
    /// The share of `Σ σ²` that they hold.
    pub energy_kept: f64,
}

impl Svd {
    /// The q largest of `B A`: `B = Q_B R_B`, `Aᵀ = Q_A R_A`, `R_B R_Aᵀ = E S Fᵀ`, `U = Q_B E`, `V = Q_A F`.
    pub fn of(factors: &Factors, q: usize) -> Result<Svd> {
        let fail = || Error::Numeric("the singular values of an update could not be computed".into());
        let (qb, qa) = (factors.b().qr(), factors.a().transpose().qr());
        let core = product(qb.thin_R(), qa.thin_R().transpose());
        if !core.is_all_finite() {
            return Err(fail());
        }
        let svd = core.thin_svd().map_err(|_| fail())?;
        let all = svd.S().column_vector();
        let k = q.min(all.nrows());
        let energy: f64 = all.iter().map(|s| s * s).sum();
        let s: Vec<f64> = all.iter().take(k).copied().collect();
        let kept: f64 = s.iter().map(|s| s * s).sum();
        let mut u = product(qb.compute_thin_Q().as_ref(), svd.U().subcols(0, k));
        let mut v = product(qa.compute_thin_Q().as_ref(), svd.V().subcols(0, k));
        positive(&mut u, &mut v);
        Ok(Svd { u, s, v, energy_kept: if energy > 0.0 { kept / energy } else { 1.0 } })
    }

    /// `B = U diag(f(σ).0)`, `A = diag(f(σ).1) Vᵀ`.
    pub fn factors(&self, f: impl Fn(f64) -> (f64, f64)) -> Result<Factors> {
        let (u, v) = (&self.u, &self.v);
        Factors::new(
            Mat::from_fn(u.ncols(), u.nrows(), |k, o| u[(o, k)] * f(self.s[k]).0),
            Mat::from_fn(v.ncols(), v.nrows(), |k, i| v[(i, k)] * f(self.s[k]).1),
        )
    }
}

/// The singular values of `B A`, descending: as many as the smallest of R, O and I.
pub fn singular_values(factors: &Factors) -> Result<Vec<f64>> {
    Ok(Svd::of(factors, usize::MAX)?.s)
}

/// `B A ≈ B' A'` with `B'[O, q] = U_q S_q^½`, `A'[q, I] = S_q^½ V_qᵀ`, and the share of the energy that is kept.
///
/// A product whose rank is at most q is returned as it is.
pub fn truncate(factors: Factors, q: usize) -> Result<(Factors, f64)> {
    if q >= factors.rank() {
        return Ok((factors, 1.0));
    }
    let svd = Svd::of(&factors, q)?;
    Ok((svd.factors(|s| (s.sqrt(), s.sqrt()))?, svd.energy_kept))
}
