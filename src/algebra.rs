//! Dense algebra in f64: products, Grams, symmetric eigenpairs, pseudo-inverses, whitening.
//!
//! Modules are worked on in parallel, so nothing here starts a thread unless it is told to, and every sum has one order.
//! [`rsvd`] is the exception: it reads large matrices, on the threads of the pool that it is called in.

mod ahead;
pub mod difference;
mod few_rows;
mod rank_k;
pub mod root;
pub mod rsvd;
pub mod subspace;

use std::mem::swap;
use std::sync::Once;

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::prelude::ReborrowMut;
use faer::{Accum, Mat, MatMut, MatRef, Par, Spec};
use rayon::prelude::*;

pub(crate) use rank_k::slice;

use crate::error::{Error, Result};
use crate::ops::gate::RANK_CUT;
use crate::ops::rsvd::sign;

/// Columns of a product that one task of [`Spread::Pool`] makes: a fixed number, so that results do not depend on the
/// threads.
const PANEL: usize = 256;
/// Parts that a decomposition by [`Spread::Pool`] is cut into.
const PARTS: usize = 8;

/// Who works on a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// The calling thread, as others work on other modules.
    Thread,
    /// All threads: the module is too large for several at once.
    Pool,
}

impl Spread {
    /// `x y`.
    pub fn product(self, x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(x.nrows(), y.ncols());
        self.add_product(out.as_mut(), x, y);
        out
    }

    /// `out = x y`.
    pub fn product_into(self, out: MatMut<'_, f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>) {
        self.multiply(out, false, x, y);
    }

    /// `out += x y`.
    pub fn add_product(self, out: MatMut<'_, f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>) {
        self.multiply(out, true, x, y);
    }

    fn multiply(self, mut out: MatMut<'_, f64>, keep: bool, x: MatRef<'_, f64>, y: MatRef<'_, f64>) {
        match self {
            Spread::Thread if rank_k::fits(out.as_ref(), x, y.transpose()) => {
                if !keep {
                    out.fill(0.0);
                }
                rank_k::add(out, x, y.transpose(), false);
            }
            Spread::Thread if few_rows::fits(out.as_ref(), x, y) => few_rows::multiply(out, keep, x, y),
            Spread::Thread => {
                let accum = if keep { Accum::Add } else { Accum::Replace };
                matmul(out, accum, x, y, 1.0, Par::Seq);
            }
            Spread::Pool => panels(out).for_each(|(j, panel)| {
                let columns = y.subcols(j, panel.ncols());
                Spread::Thread.multiply(panel, keep, x, columns);
            }),
        }
    }

    /// See [`eigen`].
    pub fn eigen(self, g: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
        let fail = || {
            Error::Numeric(
                "the factors are too large: the eigenvalues of their Gram matrix are not finite".into(),
            )
        };
        if !g.is_all_finite() {
            return Err(fail());
        }
        let (n, par) = (g.nrows(), self.par());
        if n == 0 {
            return Ok((Vec::new(), Mat::zeros(0, 0)));
        }
        let (mut values, mut vectors) = (Diag::zeros(n), Mat::zeros(n, n));
        let room = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Spec::default());
        let (mut room, out) = (MemBuffer::new(room), Some(vectors.as_mut()));
        self_adjoint_evd(g, values.as_mut(), out, par, MemStack::new(&mut room), Spec::default())
            .map_err(|_| fail())?;
        let values = values.column_vector().iter().rev().copied().collect();
        // They come in ascending order.
        for k in 0..n / 2 {
            let (mut first, mut last) = vectors.two_cols_mut(k, n - 1 - k);
            first.rb_mut().iter_mut().zip(last.rb_mut().iter_mut()).for_each(|(x, y)| swap(x, y));
        }
        Ok((values, vectors))
    }

    /// L with `g = L Lᵀ`; none where g is not positive definite.
    pub fn cholesky(self, g: MatRef<'_, f64>) -> Option<Mat<f64>> {
        let (mut l, par) = (g.to_owned(), self.par());
        let mut room = MemBuffer::new(cholesky_in_place_scratch::<f64>(g.nrows(), par, Spec::default()));
        let stack = MemStack::new(&mut room);
        cholesky_in_place(l.as_mut(), LltRegularization::default(), par, stack, Spec::default()).ok()?;
        for j in 1..l.ncols() {
            l.col_as_slice_mut(j)[..j].fill(0.0);
        }
        Some(l)
    }

    /// Into how many parts work is cut: a fixed number, so that results do not depend on the threads.
    fn par(self) -> Par {
        match self {
            Spread::Thread => Par::Seq,
            Spread::Pool => Par::rayon(PARTS),
        }
    }

    /// `out += x xᵀ` on and below the diagonal; what is above means nothing until it is [`mirrored`].
    pub fn add_gram(self, out: MatMut<'_, f64>, x: MatRef<'_, f64>) {
        self.add_lower(out, x, x.transpose());
    }

    fn add_lower(self, out: MatMut<'_, f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>) {
        let n = x.nrows();
        match self {
            Spread::Thread if rank_k::fits(out.as_ref(), x, y.transpose()) => {
                rank_k::add(out, x, y.transpose(), true);
            }
            Spread::Thread => {
                let (half, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
                triangular::matmul(out, half, Accum::Add, x, whole, y, whole, 1.0, Par::Seq);
            }
            Spread::Pool => panels(out).for_each(|(j, panel)| {
                let width = panel.ncols();
                let (_, below) = panel.split_at_row_mut(j);
                let (square, rest) = below.split_at_row_mut(width);
                let columns = y.subcols(j, width);
                Spread::Thread.add_lower(square, x.subrows(j, width), columns);
                Spread::Thread.add_product(rest, x.subrows(j + width, n - j - width), columns);
            }),
        }
    }
}

/// Lets decompositions that take no [`Spread`] run on the thread that asks for them, whatever others do.
pub fn alone() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| faer::set_global_parallelism(Par::Seq));
}

/// Panels of columns with the index of their first one.
fn panels(x: MatMut<'_, f64>) -> impl ParallelIterator<Item = (usize, MatMut<'_, f64>)> {
    let (mut rest, mut panels, mut at) = (x, Vec::new(), 0);
    while rest.ncols() > 0 {
        let columns = PANEL.min(rest.ncols());
        let (panel, after) = rest.split_at_col_mut(columns);
        panels.push((at, panel));
        (rest, at) = (after, at + columns);
    }
    panels.into_par_iter()
}

/// `x y`.
pub fn product(x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> Mat<f64> {
    Spread::Thread.product(x, y)
}

/// `x y` where that is symmetric: one triangle is computed, the other is its mirror image.
pub fn symmetric_product(x: MatRef<'_, f64>, y: MatRef<'_, f64>, spread: Spread) -> Mat<f64> {
    let mut out = Mat::zeros(x.nrows(), x.nrows());
    spread.add_lower(out.as_mut(), x, y);
    mirrored(out)
}

/// `x xᵀ`, exactly symmetric.
pub fn gram(x: MatRef<'_, f64>) -> Mat<f64> {
    symmetric_product(x, x.transpose(), Spread::Thread)
}

/// `wᵀ g w` of a symmetric `g`, exactly symmetric.
pub fn congruence(g: MatRef<'_, f64>, w: MatRef<'_, f64>) -> Mat<f64> {
    mirrored(product(w.transpose(), product(g, w).as_ref()))
}

/// `x blockdiag(wᵢ)`: each wᵢ takes as many columns of x as it has rows, from where the one before ended.
pub fn by_block<'a>(x: MatRef<'_, f64>, blocks: impl Iterator<Item = MatRef<'a, f64>> + Clone) -> Mat<f64> {
    let mut out = Mat::zeros(x.nrows(), blocks.clone().map(|w| w.ncols()).sum());
    let (mut from, mut to) = (0, 0);
    for w in blocks {
        let own = out.subcols_mut(to, w.ncols());
        Spread::Thread.product_into(own, x.subcols(from, w.nrows()), w);
        (from, to) = (from + w.nrows(), to + w.ncols());
    }
    out
}

/// `Σ xᵢⱼ yᵢⱼ`.
pub fn inner(x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> f64 {
    (0..x.ncols()).map(|j| (0..x.nrows()).map(|i| x[(i, j)] * y[(i, j)]).sum::<f64>()).sum()
}

/// `x diag(d)`.
pub fn scale_columns(x: MatRef<'_, f64>, d: &[f64]) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] * d[j])
}

/// Turns pairs of columns around so that the largest entry of each column of `u` is positive.
pub fn positive(u: &mut Mat<f64>, v: &mut Mat<f64>) {
    for j in 0..u.ncols() {
        if sign(u.col_as_slice(j)) < 0.0 {
            u.col_as_slice_mut(j).iter_mut().for_each(|x| *x = -*x);
            v.col_as_slice_mut(j).iter_mut().for_each(|x| *x = -*x);
        }
    }
}

/// The lower triangle copied to the upper one.
pub fn mirrored(mut x: Mat<f64>) -> Mat<f64> {
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
    Spread::Thread.eigen(g)
}

/// The pseudo-inverse of a symmetric positive semi-definite `g`; eigenvalues up to [`RANK_CUT`] of the largest are zero.
pub fn pseudo_inverse(g: MatRef<'_, f64>) -> Result<Mat<f64>> {
    spectral(g, |l| 1.0 / l, Spread::Thread)
}

/// `V diag(f(λ)) Vᵀ` of a symmetric `g`, with a positive f, or 0 for eigenvalues up to [`RANK_CUT`] of the largest.
fn spectral(g: MatRef<'_, f64>, f: impl Fn(f64) -> f64, spread: Spread) -> Result<Mat<f64>> {
    let (values, mut v) = spread.eigen(g)?;
    let cut = RANK_CUT * values.first().copied().unwrap_or(0.0).max(0.0);
    for (k, &l) in values.iter().enumerate() {
        let by = if l > cut { f(l).sqrt() } else { 0.0 };
        v.col_as_slice_mut(k).iter_mut().for_each(|x| *x *= by);
    }
    Ok(symmetric_product(v.as_ref(), v.transpose(), spread))
}

/// `V diag(λ^-½) Vᵀ` of a symmetric positive semi-definite `g = V diag(λ) Vᵀ`; eigenvalues up to [`RANK_CUT`] of the
/// largest are zero, and so are their inverse roots.
///
/// With `g = XᵀX`, `X` times it is the orthogonal polar factor of X on the directions that X has.
pub fn inverse_root(g: MatRef<'_, f64>, spread: Spread) -> Result<Mat<f64>> {
    spectral(g, |l| 1.0 / l.sqrt(), spread)
}

/// What makes the columns of X orthonormal, from the Gram `XᵀX = toᵀ to` alone: `X from` has orthonormal columns, and
/// `X = (X from) to`.
#[derive(Clone, Debug)]
pub struct Whitening {
    /// `[R, P]`.
    pub to: Mat<f64>,
    /// `[P, R]`.
    pub from: Mat<f64>,
}

impl Whitening {
    /// Of a Gram `[P, P]`; columns of X that are zero, and those that depend on others by [`RANK_CUT`], add no direction.
    ///
    /// Columns are first given norm 1, so that the cut tells dependent ones and not small ones.
    pub fn of(gram: MatRef<'_, f64>) -> Result<Whitening> {
        let norm: Vec<f64> = (0..gram.nrows()).map(|k| gram[(k, k)].max(0.0).sqrt()).collect();
        Whitening::scaled(gram, &norm, Spread::Thread)
    }

    /// [`Whitening::of`] with the columns of X divided by `norm` before the cut; one whose norm is 0 is left out.
    fn scaled(gram: MatRef<'_, f64>, norm: &[f64], spread: Spread) -> Result<Whitening> {
        let p = gram.nrows();
        let inverse: Vec<f64> = norm.iter().map(|&n| if n > 0.0 { 1.0 / n } else { 0.0 }).collect();
        let unit = Mat::from_fn(p, p, |i, j| gram[(i, j)] * inverse[i] * inverse[j]);
        let (lambda, v) = spread.eigen(unit.as_ref())?;
        let cut = RANK_CUT * lambda.first().copied().unwrap_or(0.0).max(0.0);
        let r = lambda.iter().take_while(|&&l| l > cut).count();
        let root: Vec<f64> = lambda[..r].iter().map(|l| l.sqrt()).collect();
        Ok(Whitening {
            to: Mat::from_fn(r, p, |k, j| root[k] * v[(j, k)] * norm[j]),
            from: Mat::from_fn(p, r, |i, k| inverse[i] * v[(i, k)] / root[k]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_make_what_one_makes() {
        for (rows, columns) in [(1, 20), (PANEL, 600), (PANEL + 44, 40), (2 * PANEL + 1, 9)] {
            let x = Mat::from_fn(rows, columns, |i, j| ((i * 31 + j * 17 + i * j) % 101) as f64 / 7.0 - 6.0);
            let [one, all] =
                [Spread::Thread, Spread::Pool].map(|s| symmetric_product(x.as_ref(), x.transpose(), s));
            assert!((&one - &all).norm_max() <= 1e-12 * one.norm_max(), "{rows} {columns}");
            let y = Mat::from_fn(columns, rows, |i, j| x[(j, i)] + 0.5);
            let [one, all] = [Spread::Thread, Spread::Pool].map(|s| s.product(x.as_ref(), y.as_ref()));
            assert!((&one - &all).norm_max() <= 1e-12 * one.norm_max(), "{rows} {columns}");
        }
    }

    #[test]
    fn decompositions_do_not_depend_on_the_threads() {
        // Large enough for every one of their parts to be worked on side by side.
        let x = Mat::from_fn(420, 500, |i, j| ((i * 31 + j * 17 + i * j) % 101) as f64 / 7.0 - 6.0);
        let g = symmetric_product(x.as_ref(), x.transpose(), Spread::Thread);
        let g = Mat::from_fn(420, 420, |i, j| g[(i, j)] + if i == j { 1.0 } else { 0.0 });
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                (Spread::Pool.eigen(g.as_ref()).unwrap(), Spread::Pool.cholesky(g.as_ref()).unwrap())
            })
        };
        let ((values, vectors), l) = on(1);
        for threads in [2, 3] {
            assert!(on(threads) == ((values.clone(), vectors.clone()), l.clone()), "{threads} threads");
        }
        assert!(values.is_sorted_by(|x, y| x >= y));
        for ((values, vectors), l) in [
            ((values, vectors), l),
            (eigen(g.as_ref()).unwrap(), Spread::Thread.cholesky(g.as_ref()).unwrap()),
        ] {
            let again = product(scale_columns(vectors.as_ref(), &values).as_ref(), vectors.transpose());
            assert!((&again - &g).norm_max() <= 1e-12 * g.norm_max());
            let again = product(l.as_ref(), l.transpose());
            assert!((&again - &g).norm_max() <= 1e-12 * g.norm_max());
        }
        assert!(
            Spread::Pool
                .cholesky((&g - Mat::<f64>::identity(420, 420) * faer::Scale(1e9)).as_ref())
                .is_none()
        );
    }
}
