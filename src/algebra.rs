//! Small dense algebra in f64, on one thread: products, Grams, symmetric eigenpairs, pseudo-inverses.
//!
//! Modules are worked on in parallel, so nothing here starts a thread, and every sum has one order. [`rsvd`] is the
//! exception: it reads large matrices, on the threads of the pool that it is called in.

pub mod rsvd;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Side};

use crate::error::{Error, Result};
use crate::ops::gate::RANK_CUT;

/// `x y`.
pub fn product(x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(x.nrows(), y.ncols());
    matmul(&mut out, Accum::Replace, x, y, 1.0, Par::Seq);
    out
}

/// `x xᵀ`, exactly symmetric.
pub fn gram(x: MatRef<'_, f64>) -> Mat<f64> {
    symmetric(product(x, x.transpose()))
}

/// `wᵀ g w` of a symmetric `g`, exactly symmetric.
pub fn congruence(g: MatRef<'_, f64>, w: MatRef<'_, f64>) -> Mat<f64> {
    symmetric(product(w.transpose(), product(g, w).as_ref()))
}

/// `Σ xᵢⱼ yᵢⱼ`.
pub fn inner(x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> f64 {
    (0..x.ncols()).map(|j| (0..x.nrows()).map(|i| x[(i, j)] * y[(i, j)]).sum::<f64>()).sum()
}

/// `x diag(d)`.
pub fn scale_columns(x: MatRef<'_, f64>, d: &[f64]) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] * d[j])
}

/// The lower triangle copied to the upper one.
fn symmetric(mut x: Mat<f64>) -> Mat<f64> {
    for j in 1..x.ncols() {
        for i in 0..j {
            x[(i, j)] = x[(j, i)];
        }
    }
    x
}

/// `g = V diag(λ) Vᵀ` of a symmetric `g`: the eigenvalues in descending order, and their vectors as columns.
///
/// Fails where `g` holds NaN or infinity.
pub fn eigen(g: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let fail = || {
        Error::Numeric(
            "the factors are too large: the eigenvalues of their Gram matrix are not finite".into(),
        )
    };
    if !g.is_all_finite() {
        return Err(fail());
    }
    let e = g.self_adjoint_eigen(Side::Lower).map_err(|_| fail())?;
    let n = g.nrows();
    let values = (0..n).rev().map(|k| e.S().column_vector()[k]).collect();
    let vectors = Mat::from_fn(n, n, |i, k| e.U()[(i, n - 1 - k)]);
    Ok((values, vectors))
}

/// The pseudo-inverse of a symmetric positive semi-definite `g`; eigenvalues up to [`RANK_CUT`] of the largest are zero.
pub fn pseudo_inverse(g: MatRef<'_, f64>) -> Result<Mat<f64>> {
    let (values, v) = eigen(g)?;
    let cut = RANK_CUT * values.first().copied().unwrap_or(0.0).max(0.0);
    let inverse: Vec<f64> = values.iter().map(|&l| if l > cut { 1.0 / l } else { 0.0 }).collect();
    Ok(product(scale_columns(v.as_ref(), &inverse).as_ref(), v.transpose()))
}
