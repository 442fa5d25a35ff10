//! The largest singular values of frozen weights and their vectors, by a randomized search that reads a weight once a
//! pass (Halko, Martinsson, Tropp, *Finding structure with randomness*, SIAM Review 53, 2011; algorithm 4.4, with the
//! two products of a step made from one reading).

use super::{ensure, holds};
use crate::error::Result;
use crate::host::{Host, HostMatrix};
use crate::random::{Philox, Purpose};
use crate::tensor::{Frozen, Store};

/// Columns whose part that is orthogonal to the ones before is smaller than the square root of this, relative to the
/// column, are zero from then on: a Gram in f64 does not know that part.
pub(crate) const DEPENDENT: f64 = 1e-14;
/// Values up to this share of the largest are 0: sums in f32 do not know them.
pub(crate) const CUT: f64 = 1.0 / (1 << 20) as f64;

/// How the search is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sketch {
    /// Values and vectors asked for; there are at most min(O, I).
    pub rank: usize,
    /// Further directions that the search carries along.
    pub oversample: usize,
    /// q: multiplications by `AᵀA` before the values are taken. The matrix is read q + 1 times. A value's error
    /// falls as `(σ_{l+1} / σ)^4q`: 2 are enough for an approximation of nearly the least error; single values of a flat
    /// spectrum, that of a base weight, need more, and with 0 they are those of a random subspace.
    pub iterations: usize,
    /// With the tensor's number, decides where the search starts.
    pub seed: u64,
}

impl Sketch {
    /// `rank` directions, eight more, two iterations.
    pub fn new(rank: usize, seed: u64) -> Sketch {
        Sketch { rank, oversample: 8, iterations: 2, seed }
    }

    /// k, the values that a matrix `[O, I]` gets: `min(rank, O, I)`.
    pub fn values(&self, (o, i): (usize, usize)) -> usize {
        self.rank.min(o).min(i)
    }

    /// l, the directions that are carried: `min(rank + oversample, O, I)`.
    pub fn width(&self, (o, i): (usize, usize)) -> usize {
        self.rank.saturating_add(self.oversample).min(o).min(i)
    }

    /// The numbers that tensor number `tensor` starts from: column j of row i is `2 · uniform − 1` at place `i · l + j`.
    pub fn start(&self, tensor: u64) -> Philox {
        Philox::new(self.seed, Purpose::Sketch.stream(tensor))
    }
}

/// `A ≈ u diag(values) vᵀ` of each of several weights `A[O, I]` of one size.
///
/// `Z[I, l]` starts at random numbers in [−1, 1) and is made orthonormal; q times `Y = A Z`, `Z = orth(Aᵀ Y)`; then, with
/// `Yᵀ Y = V diag(λ) Vᵀ`, `values = √λ`, `u = Y V / √λ`, `v = Z V`, of which the first k are given, in descending order.
/// `A v = u diag(values)` holds as it is made; what is missing is `residuals = ‖Aᵀ u − v diag(values)‖` of each
/// direction: a singular value of A lies within that distance of each value.
///
/// `orth(X)` is `X W`, done twice, with `W = L⁻ᵀ` of `XᵀX = L Lᵀ`; columns that depend on others become zero. The largest
/// entry of each u is positive, the first of several. A value of at most 2⁻²⁰ of the largest is 0, with vectors of zeros.
/// A iterated product `AᵀA` in f32 does not resolve values below some 3·10⁻⁴ of the largest; that shows in the residuals.
/// Of a weight that holds NaN or infinity all values are NaN.
///
/// `Y` and `Aᵀ Y` are sums in f32, or of that grade; everything else is f64. The start is the same on all devices.
pub struct Rsvd<'a, S: Store> {
    /// `[k]` of each weight, written.
    pub values: S::ViewMut<'a, f64>,
    /// `[k]` of each weight, written.
    pub residuals: S::ViewMut<'a, f64>,
    /// `‖A‖²` of each weight, written.
    pub energy: S::ViewMut<'a, f64>,
    /// `u[O, k]` and `v[I, k]` of each weight, written, where they are wanted.
    pub vectors: Option<(S::ViewMut<'a, f64>, S::ViewMut<'a, f64>)>,
    /// Room as `rsvd_scratch` says.
    pub scratch: S::ViewMut<'a, f32>,
    /// The weights.
    pub a: &'a [&'a S::Matrix],
    /// The number of each, which its start is drawn by.
    pub tensors: &'a [u64],
    /// What is searched.
    pub sketch: Sketch,
}

impl<S: Store> Rsvd<'_, S> {
    /// `(O, I)`; 0 without a weight.
    pub fn size(&self) -> (usize, usize) {
        self.a.first().map_or((0, 0), |a| a.size())
    }

    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let ((o, i), n) = (self.size(), self.a.len());
        let other = self.a.iter().find(|a| a.size() != (o, i));
        ensure("rsvd", other.is_none(), || {
            let (p, j) = other.map_or((0, 0), |a| a.size());
            format!("a weight is [{p}, {j}], expected [{o}, {i}] as the first")
        })?;
        ensure("rsvd", n == 0 || (o > 0 && i > 0 && self.sketch.rank > 0), || {
            format!("weights are [{o}, {i}], {} values are asked for, expected one or more", self.sketch.rank)
        })?;
        ensure("rsvd", self.tensors.len() == n, || format!("{n} weights, {} numbers", self.tensors.len()))?;
        let k = self.sketch.values((o, i));
        holds("rsvd", "values", &self.values, &[("weights", n), ("k", k)])?;
        holds("rsvd", "residuals", &self.residuals, &[("weights", n), ("k", k)])?;
        holds("rsvd", "energy", &self.energy, &[("weights", n)])?;
        if let Some((u, v)) = &self.vectors {
            holds("rsvd", "u", u, &[("weights", n), ("O", o), ("k", k)])?;
            holds("rsvd", "v", v, &[("weights", n), ("I", i), ("k", k)])?;
        }
        Ok(())
    }
}

/// `W[l, l]`, upper triangular, such that the columns of `X W` are orthonormal where `g = XᵀX`: `L⁻ᵀ` of its Cholesky
/// factor, by way of columns of length 1. A column that depends on those before it, within what f64 knows, becomes zero.
/// NaN or infinity anywhere makes all of it NaN.
pub(crate) fn orthonormal(g: &[f64], l: usize) -> Vec<f64> {
    if !g.iter().all(|x| x.is_finite()) {
        return vec![f64::NAN; l * l];
    }
    let unit = |j: usize| if g[j * l + j] > 0.0 { 1.0 / g[j * l + j].sqrt() } else { 0.0 };
    let unit: Vec<f64> = (0..l).map(unit).collect();
    let (mut factor, mut w) = (vec![0.0; l * l], vec![0.0; l * l]);
    let row = |m: &[f64], i: usize, j: usize, n: usize| -> f64 {
        (0..n).map(|k| m[i * l + k] * m[j * l + k]).sum()
    };
    for j in 0..l {
        let pivot = unit[j] * unit[j] * g[j * l + j] - row(&factor, j, j, j);
        if pivot <= DEPENDENT {
            continue;
        }
        factor[j * l + j] = pivot.sqrt();
        for i in j + 1..l {
            let rest = unit[i] * unit[j] * g[i * l + j] - row(&factor, i, j, j);
            factor[i * l + j] = rest / factor[j * l + j];
        }
        // Column j of L⁻ᵀ, from the diagonal up.
        w[j * l + j] = 1.0 / factor[j * l + j];
        for i in (0..j).rev().filter(|&i| factor[i * l + i] > 0.0) {
            let sum: f64 = (i + 1..=j).map(|k| factor[k * l + i] * w[k * l + j]).sum();
            w[i * l + j] = -sum / factor[i * l + i];
        }
        (0..=j).for_each(|i| w[i * l + j] *= unit[i]);
    }
    w
}

/// The definition.
pub fn reference(op: Rsvd<'_, Host>) -> Result<()> {
    op.check()?;
    let (o, i) = op.size();
    let (k, l) = (op.sketch.values((o, i)), op.sketch.width((o, i)));
    let mut vectors = op.vectors;
    for (n, a) in op.a.iter().enumerate() {
        let mut rows = vec![0f32; o * i];
        HostMatrix::rows::<f32>(a, &mut rows, 0..o);
        let a: Vec<f64> = rows.into_iter().map(f64::from).collect();
        let random = op.sketch.start(op.tensors[n]);
        let start = (0..(i * l) as u64).map(|at| f64::from(2.0 * random.uniform(at) - 1.0)).collect();
        let mut z = orth(start, l);
        let mut y = times(&a, i, &z, l);
        let mut back = transposed_times(&a, i, &y, l);
        for _ in 0..op.sketch.iterations {
            z = orth(back, l);
            y = times(&a, i, &z, l);
            back = transposed_times(&a, i, &y, l);
        }
        let (lambda, w) = super::eigh::jacobi(&transposed_times(&y, l, &y, l), l);
        let values: Vec<f64> = lambda.iter().map(|x| x.max(0.0).sqrt()).collect();
        let gone = |j: usize| values[j] <= CUT * values[0];
        let (u, v) = (times(&y, l, &w, l), times(&z, l, &w, l));
        let down = times(&back, l, &w, l);
        op.energy[n] = a.iter().map(|x| x * x).sum();
        for j in 0..k {
            let value = if gone(j) { 0.0 } else { values[j] };
            op.values[n * k + j] = value;
            let column = |m: &[f64], by: f64| -> Vec<f64> {
                m.iter().skip(j).step_by(l).map(|x| if gone(j) { 0.0 } else { x / by }).collect()
            };
            let (u, v, down) = (column(&u, value), column(&v, 1.0), column(&down, value));
            let missing: f64 = down.iter().zip(&v).map(|(d, v)| (d - value * v).powi(2)).sum();
            op.residuals[n * k + j] = missing.sqrt();
            let sign = sign(&u);
            if let Some((all_u, all_v)) = &mut vectors {
                for (all, column, rows) in [(&mut *all_u, u, o), (&mut *all_v, v, i)] {
                    for (r, x) in column.into_iter().enumerate() {
                        all[n * rows * k + r * k + j] = sign * x;
                    }
                }
            }
        }
    }
    Ok(())
}

/// What makes the largest entry positive, the first of several.
pub(crate) fn sign(u: &[f64]) -> f64 {
    let largest = u.iter().fold(0.0f64, |m, x| if x.abs() > m.abs() { *x } else { m });
    if largest < 0.0 { -1.0 } else { 1.0 }
}

/// `x y` with `y[inner, columns]`.
fn times(x: &[f64], inner: usize, y: &[f64], columns: usize) -> Vec<f64> {
    let row = |x: &[f64]| {
        (0..columns)
            .map(|j| super::dot(x.iter().copied().zip(y[j..].iter().step_by(columns).copied())))
            .collect()
    };
    x.chunks(inner).flat_map(|x| -> Vec<f64> { row(x) }).collect()
}

/// `xᵀ y` with `x[n, rows]` and `y[n, columns]`.
fn transposed_times(x: &[f64], rows: usize, y: &[f64], columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * columns];
    for (x, y) in x.chunks(rows).zip(y.chunks(columns)) {
        for (x, out) in x.iter().zip(out.chunks_mut(columns)) {
            y.iter().zip(out).for_each(|(y, out)| *out += x * y);
        }
    }
    out
}

fn orth(x: Vec<f64>, l: usize) -> Vec<f64> {
    let once = |x: Vec<f64>| times(&x, l, &orthonormal(&transposed_times(&x, l, &x, l), l), l);
    once(once(x))
}
