//! A large symmetric positive-definite matrix, held as its lower triangle, and solves with it.
//!
//! Block columns are updated in parallel, each by one thread and in one order, so the result does not depend on how many
//! threads there are.

use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Accum, Mat, Par};
use rayon::prelude::*;

/// Columns of a block.
const BLOCK: usize = 128;

/// Bytes that a matrix of width `n` takes.
pub fn bytes(n: usize) -> u64 {
    let columns = (0..n.div_ceil(BLOCK)).map(|p| (n - p * BLOCK).min(BLOCK) as u64 * (n - p * BLOCK) as u64);
    8 * columns.sum::<u64>()
}

/// `S[n, n]`, from `BLOCK` columns to the next the rows from the diagonal block down.
#[derive(Clone, Debug)]
pub struct Symmetric {
    n: usize,
    panels: Vec<Mat<f64>>,
}

/// `D^-½ S D^-½ = L Lᵀ` with D the diagonal of S.
#[derive(Clone, Debug)]
pub struct Cholesky {
    factor: Symmetric,
    /// `D^-½`; 0 for a row of S that is zero.
    scale: Vec<f64>,
}

impl Symmetric {
    /// Zeros.
    pub fn zeros(n: usize) -> Symmetric {
        let panel = |p: usize| Mat::zeros(n - p * BLOCK, (n - p * BLOCK).min(BLOCK));
        Symmetric { n, panels: (0..n.div_ceil(BLOCK)).map(panel).collect() }
    }

    /// Adds numbers at rows `k..` of column `k`.
    pub fn add_column(&mut self, k: usize, numbers: impl Iterator<Item = (usize, f64)>) {
        let top = k / BLOCK * BLOCK;
        let column = self.panels[k / BLOCK].col_as_slice_mut(k - top);
        numbers.for_each(|(j, x)| column[j - top] += x);
    }

    /// Factors the matrix in place. None where it is not positive definite on the rows that are not zero.
    ///
    /// A row whose diagonal is zero is taken to be zero, and stands alone: solves give 0 there, as the pseudo-inverse does.
    pub fn cholesky(mut self) -> Option<Cholesky> {
        let diagonal = |s: &Symmetric, k: usize| s.panels[k / BLOCK][(k % BLOCK, k % BLOCK)];
        let scale: Vec<f64> = (0..self.n)
            .map(|k| match diagonal(&self, k) {
                d if d > 0.0 => 1.0 / d.sqrt(),
                _ => 0.0,
            })
            .collect();
        self.panels.par_iter_mut().enumerate().for_each(|(p, panel)| {
            let top = p * BLOCK;
            for j in 0..panel.ncols() {
                let own = scale[top + j];
                panel.col_as_slice_mut(j).iter_mut().zip(&scale[top..]).for_each(|(x, s)| *x *= s * own);
                panel[(j, j)] = 1.0;
            }
        });
        for p in 0..self.panels.len() {
            let (left, right) = self.panels.split_at_mut(p + 1);
            let done = &mut left[p];
            let width = done.ncols();
            factor_block(done)?;
            let (top, mut below) = done.as_mut().split_at_row_mut(width);
            let top = top.as_ref();
            // below · L⁻ᵀ, in pieces of rows.
            let mut pieces = Vec::new();
            let mut rest = below.as_mut();
            while rest.nrows() > 0 {
                let rows = rest.nrows().min(4 * BLOCK);
                let (piece, after) = rest.split_at_row_mut(rows);
                pieces.push(piece);
                rest = after;
            }
            pieces.into_par_iter().for_each(|rows| {
                solve_lower_triangular_in_place(top, rows.transpose_mut(), Par::Seq);
            });
            let below = below.as_ref();
            right.par_iter_mut().enumerate().for_each(|(q, panel)| {
                let rows = below.subrows(q * BLOCK, panel.nrows());
                let columns = rows.subrows(0, panel.ncols()).transpose();
                matmul(panel.as_mut(), Accum::Add, rows, columns, -1.0, Par::Seq);
            });
        }
        Some(Cholesky { factor: self, scale })
    }
}

/// The Cholesky factor of the first `BLOCK` rows, in their lower triangle.
fn factor_block(panel: &mut Mat<f64>) -> Option<()> {
    for j in 0..panel.ncols() {
        let pivot = panel[(j, j)] - (0..j).map(|k| panel[(j, k)] * panel[(j, k)]).sum::<f64>();
        if !(pivot > f64::EPSILON && pivot.is_finite()) {
            return None;
        }
        let root = pivot.sqrt();
        panel[(j, j)] = root;
        for i in j + 1..panel.ncols() {
            let dot: f64 = (0..j).map(|k| panel[(i, k)] * panel[(j, k)]).sum();
            panel[(i, j)] = (panel[(i, j)] - dot) / root;
        }
    }
    Some(())
}

impl Cholesky {
    /// `X S⁻¹` of `X[R, n]`, in place of X.
    pub fn divide(&self, x: &mut Mat<f64>) {
        let r = x.nrows();
        let mut y = Mat::from_fn(self.factor.n, r, |k, j| x[(j, k)] * self.scale[k]);
        for (p, panel) in self.factor.panels.iter().enumerate() {
            let width = panel.ncols();
            let (top, below) = panel.as_ref().split_at_row(width);
            let (mut own, mut rest) =
                y.as_mut().subrows_mut(p * BLOCK, panel.nrows()).split_at_row_mut(width);
            solve_lower_triangular_in_place(top, own.as_mut(), Par::Seq);
            matmul(&mut rest, Accum::Add, below, own.as_ref(), -1.0, Par::Seq);
        }
        for (p, panel) in self.factor.panels.iter().enumerate().rev() {
            let width = panel.ncols();
            let (top, below) = panel.as_ref().split_at_row(width);
            let (mut own, rest) = y.as_mut().subrows_mut(p * BLOCK, panel.nrows()).split_at_row_mut(width);
            matmul(&mut own, Accum::Add, below.transpose(), rest.as_ref(), -1.0, Par::Seq);
            solve_upper_triangular_in_place(top.transpose(), own, Par::Seq);
        }
        for k in 0..self.factor.n {
            (0..r).for_each(|j| x[(j, k)] = y[(k, j)] * self.scale[k]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algebra::product;
    use crate::random::Philox;

    /// `X S⁻¹ S = X`, at widths around that of a block; rows that are zero stay out.
    #[test]
    fn divides_by_the_matrix() {
        for n in [1, 2, 127, 128, 129, 300] {
            let random = Philox::new(n as u64, 0);
            let x = Mat::from_fn(n, n, |i, j| random.uniform_f64((i * n + j) as u64) - 0.5);
            let mut dense = product(x.as_ref(), x.transpose());
            (0..n).for_each(|k| dense[(k, k)] += 1.0);
            let zero = n / 2;
            if n > 2 {
                (0..n).for_each(|k| (dense[(k, zero)], dense[(zero, k)]) = (0.0, 0.0));
            }
            let mut s = Symmetric::zeros(n);
            for k in 0..n {
                s.add_column(k, (k..n).map(|j| (j, dense[(j, k)])));
            }
            assert_eq!(s.panels.iter().map(|p| 8 * (p.nrows() * p.ncols()) as u64).sum::<u64>(), bytes(n));
            let want = Mat::from_fn(3, n, |i, j| if n > 2 && j == zero { 0.0 } else { (i + j) as f64 });
            let mut got = product(want.as_ref(), dense.as_ref());
            s.cholesky().unwrap().divide(&mut got);
            let err = (&got - &want).norm_max() / want.norm_max().max(1.0);
            assert!(err <= 1e-11, "{n}: {err}");
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        let mut s = Symmetric::zeros(2);
        s.add_column(0, [(0, 1.0), (1, 2.0)].into_iter());
        s.add_column(1, [(1, 1.0)].into_iter());
        assert!(s.cholesky().is_none());
    }
}
