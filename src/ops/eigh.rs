//! Eigenpairs of many small symmetric matrices.

use super::holds;
use crate::error::Result;
use crate::host::Host;
use crate::tensor::Store;

/// `a = vectors diag(values) vectorsᵀ` of each symmetric matrix, values descending; f64.
///
/// The lower triangle of `a` counts. A matrix that holds NaN or infinity gets values and vectors of NaN. Vectors of equal
/// values, and their signs, may differ between devices.
pub struct Eigh<'a, S: Store> {
    /// `[n]` of each matrix, written.
    pub values: S::ViewMut<'a, f64>,
    /// `[n, n]` of each matrix, a vector a column, written.
    pub vectors: S::ViewMut<'a, f64>,
    /// `[n, n]` of each matrix.
    pub a: S::View<'a, f64>,
    /// n of each, one after the other.
    pub sizes: &'a [usize],
}

impl<S: Store> Eigh<'_, S> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let sum =
            |f: &dyn Fn(usize) -> usize| self.sizes.iter().fold(0usize, |sum, &n| sum.saturating_add(f(n)));
        let (rows, squares) = (sum(&|n| n), sum(&|n| n.saturating_mul(n)));
        holds("eigh", "values", &self.values, &[("Σ n", rows)])?;
        holds("eigh", "vectors", &self.vectors, &[("Σ n²", squares)])?;
        holds("eigh", "a", &self.a, &[("Σ n²", squares)])
    }
}

/// The definition.
pub fn reference(op: Eigh<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut values, mut vectors, mut a) = (op.values, op.vectors, op.a);
    for &n in op.sizes {
        let (one, v) = jacobi(&a[..n * n], n);
        values[..n].copy_from_slice(&one);
        vectors[..n * n].copy_from_slice(&v);
        (values, vectors, a) = (&mut values[n..], &mut vectors[n * n..], &a[n * n..]);
    }
    Ok(())
}

/// Eigenvalues of `a[n, n]` in descending order and the vectors as columns: cyclic Jacobi rotations.
pub(super) fn jacobi(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    if !(0..n).all(|i| (0..=i).all(|j| a[i * n + j].is_finite())) {
        return (vec![f64::NAN; n], vec![f64::NAN; n * n]);
    }
    let mut x: Vec<f64> = (0..n * n).map(|i| a[(i / n).max(i % n) * n + (i / n).min(i % n)]).collect();
    let mut v: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i / n == i % n))).collect();
    for _ in 0..60 {
        let mut moved = false;
        for p in 0..n {
            for q in p + 1..n {
                let (pp, qq, pq) = (x[p * n + p], x[q * n + q], x[p * n + q]);
                if pq.abs() <= 2e-16 * pp.abs().sqrt() * qq.abs().sqrt() || pq.abs() <= 1e-290 {
                    continue;
                }
                moved = true;
                let tau = (qq - pp) / (2.0 * pq);
                let t = (if tau < 0.0 { -1.0 } else { 1.0 }) / (tau.abs() + (1.0 + tau * tau).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = t * c;
                for k in 0..n {
                    (x[k * n + p], x[k * n + q]) =
                        (c * x[k * n + p] - s * x[k * n + q], s * x[k * n + p] + c * x[k * n + q]);
                    (v[k * n + p], v[k * n + q]) =
                        (c * v[k * n + p] - s * v[k * n + q], s * v[k * n + p] + c * v[k * n + q]);
                }
                for k in 0..n {
                    (x[p * n + k], x[q * n + k]) =
                        (c * x[p * n + k] - s * x[q * n + k], s * x[p * n + k] + c * x[q * n + k]);
                }
                (x[p * n + q], x[q * n + p]) = (0.0, 0.0);
            }
        }
        if !moved {
            break;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| x[j * n + j].total_cmp(&x[i * n + i]));
    let vectors = (0..n * n).map(|i| v[i / n * n + order[i % n]]).collect();
    (order.iter().map(|&k| x[k * n + k]).collect(), vectors)
}
