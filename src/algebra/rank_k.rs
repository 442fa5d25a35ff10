//! `x yᵀ` of matrices with few rows and many columns, as factors are: what their Grams are made of.
//!
//! A few columns at a time are packed into tiles, which the innermost loop reads from end to end, and each tile of the
//! result is summed in registers. The order of every sum is that of the columns.

use faer::{MatMut, MatRef};

use crate::cpu::simd::{Isa, Kernel, run};

/// Rows of x in a tile of the result.
const X: usize = 8;
/// Rows of y in a tile of the result: with these X, twelve registers of four sums.
const Y: usize = 6;
/// Columns that are packed at once: a tile of x and one of y stay in the first cache.
const DEPTH: usize = 128;
/// Columns a row from which on this is the quicker way: packing is paid for, and products of other shapes have a better
/// one.
const COLUMNS: usize = 2;

/// Whether [`add`] is the way to `x yᵀ`, by shapes and strides.
pub(super) fn fits(out: MatRef<'_, f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> bool {
    let side = |m: MatRef<'_, f64>| m.ncols() >= COLUMNS * m.nrows().max(X) && m.row_stride() == 1;
    side(x) && side(y) && out.row_stride() == 1
}

/// `out += x yᵀ` of matrices that [`fits`]; if `triangle`, on and below the diagonal, where what is above means nothing.
pub(super) fn add(out: MatMut<'_, f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>, triangle: bool) {
    run(Add { out, x, y, triangle });
}

struct Add<'a> {
    out: MatMut<'a, f64>,
    x: MatRef<'a, f64>,
    y: MatRef<'a, f64>,
    triangle: bool,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let (m, n) = (self.x.nrows(), self.y.nrows());
        let mut xs = vec![[0.0; X]; m.div_ceil(X) * DEPTH];
        let mut ys = vec![[0.0; Y]; n.div_ceil(Y) * DEPTH];
        for first in (0..self.x.ncols()).step_by(DEPTH) {
            let depth = DEPTH.min(self.x.ncols() - first);
            pack(&mut xs, self.x.subcols(first, depth));
            pack(&mut ys, self.y.subcols(first, depth));
            for (j, y) in ys.chunks_exact(DEPTH).enumerate() {
                let above = if self.triangle { j * Y / X } else { 0 };
                for (i, x) in xs.chunks_exact(DEPTH).enumerate().skip(above) {
                    let sums = tile::<I>(&x[..depth], &y[..depth]);
                    for (c, sums) in sums.iter().enumerate().take(n - j * Y) {
                        let column = self.out.as_mut().col_mut(j * Y + c).try_as_col_major_mut();
                        let column = column.map(|c| c.as_slice_mut()).unwrap_or_default();
                        column[i * X..].iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                    }
                }
            }
        }
    }
}

/// Rows of `x` in groups of N, the columns of a group one after the other; rows past the last are left as they are, zero.
#[inline(always)]
fn pack<const N: usize>(out: &mut [[f64; N]], x: MatRef<'_, f64>) {
    for k in 0..x.ncols() {
        let column = x.col(k).try_as_col_major().map(|c| c.as_slice()).unwrap_or_default();
        let (groups, rest) = column.as_chunks::<N>();
        for (out, group) in out[k..].iter_mut().step_by(DEPTH).zip(groups) {
            *out = *group;
        }
        if !rest.is_empty() {
            out[groups.len() * DEPTH + k][..rest.len()].copy_from_slice(rest);
        }
    }
}

/// `x yᵀ` of one group of each, a column a row of `y`.
#[inline(always)]
fn tile<I: Isa>(x: &[[f64; X]], y: &[[f64; Y]]) -> [[f64; X]; Y] {
    let mut sums = [[0.0; X]; Y];
    for (x, y) in x.iter().zip(y) {
        for (sums, y) in sums.iter_mut().zip(y) {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = if I::FMA { x.mul_add(*y, *sum) } else { x * y + *sum };
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;

    #[test]
    fn as_the_definition_at_every_edge_of_a_tile() {
        let x = |m: usize, n: usize, by: usize| {
            Mat::from_fn(m, n, |i, j| ((i * by + j * 17 + i * j) % 101) as f64 / 7.0 - 6.0)
        };
        for (m, n, columns) in
            [(1, 1, 16), (8, 6, 128), (9, 7, 129), (16, 64, 300), (65, 12, 257), (23, 23, 50)]
        {
            let (x, y) = (x(m, columns, 31), x(n, columns, 13));
            let want =
                Mat::from_fn(m, n, |i, j| 1.0 + (0..columns).map(|k| x[(i, k)] * y[(j, k)]).sum::<f64>());
            let mut got = Mat::from_fn(m, n, |_, _| 1.0);
            assert!(fits(got.as_ref(), x.as_ref(), y.as_ref()), "{m} {n} {columns}");
            add(got.as_mut(), x.as_ref(), y.as_ref(), false);
            assert!((&got - &want).norm_max() <= 1e-12 * want.norm_max(), "{m} {n} {columns}");
            if m == n {
                let mut got = Mat::from_fn(m, m, |_, _| 1.0);
                add(got.as_mut(), x.as_ref(), x.as_ref(), true);
                let want =
                    Mat::from_fn(m, m, |i, j| 1.0 + (0..columns).map(|k| x[(i, k)] * x[(j, k)]).sum::<f64>());
                let near = |i: usize, j: usize| (got[(i, j)] - want[(i, j)]).abs() <= 1e-12 * want.norm_max();
                assert!((0..m).all(|j| (j..m).all(|i| near(i, j))), "{m} {columns}");
            }
            // A part of taller ones.
            let (m, n) = (m.div_ceil(2), n.div_ceil(2));
            let mut got = Mat::zeros(m, n);
            add(got.as_mut(), x.subrows(x.nrows() - m, m), y.subrows(0, n), false);
            let entry = |i: usize, j: usize| want[(x.nrows() - m + i, j)] - 1.0;
            let near = |i: usize, j: usize| (got[(i, j)] - entry(i, j)).abs() <= 1e-12 * want.norm_max();
            assert!((0..m).all(|i| (0..n).all(|j| near(i, j))), "{m} {n} {columns}");
        }
    }

    #[test]
    fn other_shapes_and_strides_do_not_fit() {
        let (square, tall) = (Mat::<f64>::identity(20, 20), Mat::<f64>::identity(40, 8));
        assert!(!fits(square.as_ref(), square.as_ref(), square.as_ref()));
        assert!(!fits(Mat::zeros(8, 8).as_ref(), tall.transpose(), tall.transpose()));
    }
}
