//! Singular value decompositions of updates from the Grams of their factors: `D = B C A` with `[P, P]` cores only.
//!
//! Whatever commutes with rotations of output and input space (TSV, Iso-C) is computed on these and is the same as
//! on the dense updates.

use faer::{Mat, MatRef};

use crate::algebra::{Whitening, alone, product, scale_columns};
use crate::error::{Error, Result};
use crate::fuse::linear::{Linear, Pair};
use crate::ops::gate::SIGMA_CUT;

/// `D = U diag(σ) Vᵀ` with `U = B left` and `V = Aᵀ right`.
#[derive(Clone, Debug)]
pub struct Core {
    /// `[P, K]`.
    pub left: Mat<f64>,
    /// `σₖ`, descending; those up to [`SIGMA_CUT`] of the largest are no directions.
    pub sigma: Vec<f64>,
    /// `[P, K]`.
    pub right: Mat<f64>,
}

impl Core {
    /// Of `D = B diag(c) A`, from `b = BᵀB` and `a = A Aᵀ`.
    pub fn of(b: MatRef<'_, f64>, a: MatRef<'_, f64>, c: &[f64]) -> Result<Core> {
        let (left, right) = (Whitening::of(b)?, Whitening::of(a)?);
        let core = product(scale_columns(left.to.as_ref(), c).as_ref(), right.to.transpose());
        if core.nrows().min(core.ncols()) == 0 {
            let none = || Mat::zeros(b.nrows(), 0);
            return Ok(Core { left: none(), sigma: Vec::new(), right: none() });
        }
        let fail = || Error::Numeric("the singular values of an update could not be computed".into());
        if !core.is_all_finite() {
            return Err(fail());
        }
        alone();
        let svd = core.thin_svd().map_err(|_| fail())?;
        let mut sigma: Vec<f64> = svd.S().column_vector().iter().copied().collect();
        let largest = sigma.first().copied().unwrap_or(0.0);
        sigma.retain(|&s| s > SIGMA_CUT * largest);
        let k = sigma.len();
        Ok(Core {
            left: product(left.from.as_ref(), svd.U().subcols(0, k)),
            right: product(right.from.as_ref(), svd.V().subcols(0, k)),
            sigma,
        })
    }
}

/// What makes `(B left) diag(d) (Aᵀ right)ᵀ` of factors, `√|d|` on each, the sign on B: where both `left` and `right`
/// make orthonormal columns, rounding the factors loses no more than rounding the product.
pub fn balanced(left: MatRef<'_, f64>, d: &[f64], right: MatRef<'_, f64>) -> Pair {
    let side = |x: MatRef<'_, f64>, signed| Linear::Map(weighed(x.transpose().to_owned(), d, signed));
    Pair { bt: side(left, true), a: side(right, false) }
}

/// Rows times `√|d|`, with the sign if `signed`; of no rows one of zeros, as factors have one rank at least.
pub fn weighed(mut rows: Mat<f64>, d: &[f64], signed: bool) -> Mat<f64> {
    if d.is_empty() {
        return Mat::zeros(1, rows.ncols());
    }
    let by: Vec<f64> = d.iter().map(|d| d.abs().sqrt() * if signed { d.signum() } else { 1.0 }).collect();
    for j in 0..rows.ncols() {
        rows.col_as_slice_mut(j).iter_mut().zip(&by).for_each(|(x, by)| *x *= by);
    }
    rows
}
