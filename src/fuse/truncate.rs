//! The singular values of `B A`, and its best approximation at a smaller rank, from the factors.

use faer::linalg::solvers::{Qr, Svd};
use faer::{Mat, MatRef};

use crate::algebra::product;
use crate::error::{Error, Result};
use crate::fuse::factors::Factors;

/// `B = Q_B R_B`, `Aᵀ = Q_A R_A`, `R_B R_Aᵀ = E S Fᵀ`.
struct Core {
    qb: Qr<f64>,
    qa: Qr<f64>,
    svd: Svd<f64>,
}

impl Core {
    fn new(factors: &Factors) -> Result<Core> {
        let fail = || Error::Numeric("the singular values of an update could not be computed".into());
        let (qb, qa) = (factors.b().qr(), factors.a().transpose().qr());
        let core = product(qb.thin_R(), qa.thin_R().transpose());
        if !core.is_all_finite() {
            return Err(fail());
        }
        let svd = core.thin_svd().map_err(|_| fail())?;
        Ok(Core { qb, qa, svd })
    }

    /// S, descending.
    fn values(&self) -> Vec<f64> {
        self.svd.S().column_vector().iter().copied().collect()
    }
}

/// The singular values of `B A`, descending: as many as the smallest of R, O and I.
pub fn singular_values(factors: &Factors) -> Result<Vec<f64>> {
    Ok(Core::new(factors)?.values())
}

/// `B A ≈ B' A'` with `B'[O, q]`, `A'[q, I]`, and the share of the energy that is kept.
///
/// With `B = Q_B R_B`, `Aᵀ = Q_A R_A` and `R_B R_Aᵀ = E S Fᵀ`, `B' = Q_B E_q S_q^½`, `A' = S_q^½ F_qᵀ Q_Aᵀ`. The largest entry of each column of B' is
/// positive. A product whose rank is at most q is returned as it is.
pub fn truncate(factors: Factors, q: usize) -> Result<(Factors, f64)> {
    if q >= factors.rank() {
        return Ok((factors, 1.0));
    }
    let core = Core::new(&factors)?;
    let s = core.values();
    let energy: f64 = s.iter().map(|s| s * s).sum();
    let kept: f64 = s.iter().take(q).map(|s| s * s).sum();
    let k = q.min(s.len());
    let scaled = |x: MatRef<'_, f64>| Mat::from_fn(x.nrows(), k, |i, j| x[(i, j)] * s[j].sqrt());
    let mut b = product(core.qb.compute_thin_Q().as_ref(), scaled(core.svd.U()).as_ref());
    let mut at = product(core.qa.compute_thin_Q().as_ref(), scaled(core.svd.V()).as_ref());
    for j in 0..k {
        let largest = b.col_as_slice(j).iter().fold(0.0_f64, |m, x| if x.abs() > m.abs() { *x } else { m });
        if largest < 0.0 {
            b.col_as_slice_mut(j).iter_mut().for_each(|x| *x = -*x);
            at.col_as_slice_mut(j).iter_mut().for_each(|x| *x = -*x);
        }
    }
    let out = Factors::new(b.transpose().to_owned(), at.transpose().to_owned())?;
    Ok((out, if energy > 0.0 { kept / energy } else { 1.0 }))
}
