//! A square root of a Gram matrix, and its inverse: the shape of a factor without its long side.

use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::{Spread, Whitening, panels, scale_columns};
use crate::error::Result;
use crate::ops::gate::{RANK_CUT, balance};

/// A Cholesky pivot up to this share of its diagonal is too small: the eigenvectors tell the rank then.
const PIVOT_CUT: f64 = 1e-7;

/// R of `[B₁ … B_E] = Q R` with orthonormal columns of Q, from `RᵀR = [B₁ … B_E]ᵀ [B₁ … B_E]`.
pub struct Root {
    /// `[q, P]`.
    pub r: Mat<f64>,
    /// The right inverse of R, `[P, q]`; none where R is upper triangular.
    inverse: Option<Mat<f64>>,
}

impl Root {
    /// Of the Gram of B, `[P, P]`, and the squared norms of the rows of A; none where B is zero. By Cholesky, or by the
    /// eigenvectors as [`Whitening`] does where B has dependent columns.
    ///
    /// A column of B and its row of A are first given equal norms, so that the cut on eigenvalues does not depend on how
    /// a product is split into factors. Fails where a number is not finite.
    pub fn of(b: MatRef<'_, f64>, a: &[f64], spread: Spread) -> Result<Option<Root>> {
        let p = b.nrows();
        let squares: Vec<f64> = (0..p).map(|j| b[(j, j)]).collect();
        let d = balance(&squares, a);
        let back: Vec<f64> = d.iter().map(|d| 1.0 / d).collect();
        let g = Mat::from_fn(p, p, |i, j| b[(i, j)] * back[i] * back[j]);
        if let Some(l) = cholesky(g.as_ref(), spread) {
            return Ok(Some(Root { r: scale_columns(l.transpose(), &d), inverse: None }));
        }
        let Whitening { to, from } = Whitening::scaled(b, &d, spread)?;
        Ok((to.nrows() > 0).then_some(Root { r: to, inverse: Some(from) }))
    }

    /// `[P, n]`: the W with `[B₁ … B_E] W = Q x`, from `x[q, n]`.
    pub fn map(&self, mut x: Mat<f64>, spread: Spread) -> Mat<f64> {
        let solve = |x: MatMut<'_, f64>| solve_upper_triangular_in_place(self.r.as_ref(), x, Par::Seq);
        match (&self.inverse, spread) {
            (Some(inverse), _) => return spread.product(inverse.as_ref(), x.as_ref()),
            (None, Spread::Thread) => solve(x.as_mut()),
            (None, Spread::Pool) => panels(x.as_mut()).for_each(|(_, panel)| solve(panel)),
        }
        x
    }
}

/// L with `g = L Lᵀ`; none where g is not positive definite by far.
fn cholesky(g: MatRef<'_, f64>, spread: Spread) -> Option<Mat<f64>> {
    let l = spread.cholesky(g)?;
    let largest = (0..g.nrows()).map(|j| g[(j, j)]).fold(0.0, f64::max);
    let sound = |j: usize| {
        let pivot = l[(j, j)] * l[(j, j)];
        pivot > PIVOT_CUT * g[(j, j)] && pivot > 10.0 * RANK_CUT * largest
    };
    (0..g.nrows()).all(sound).then_some(l)
}
