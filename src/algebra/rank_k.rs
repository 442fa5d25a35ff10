//! `x yᵀ` of matrices with few rows and many columns, as factors are: what their Grams are made of.
//!
//! A few columns at a time are packed into tiles, which the innermost loop reads from end to end, and each tile of the
//! result is summed in registers. The order of every sum is that of the columns.

use faer::{MatMut, MatRef};

use super::ahead::Ahead;
use crate::cpu::simd::{Isa, Kernel, run};

/// Rows in a group, which are packed together: one register of 512 bits.
pub(super) const GROUP: usize = 8;
/// Columns that are packed at once: a group of x and one of y stay in the first cache.
const DEPTH: usize = 128;
/// Columns from group to group of what is packed: with one more than there are, not all of them meet in one set of the
/// cache.
const PITCH: usize = DEPTH + 1;

/// Whether [`add`] is the way to `x yᵀ`, by shapes and strides.
pub(super) fn fits(out: MatRef<'_, f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> bool {
    // With fewer columns than rows packing would not be paid for.
    let side = |m: MatRef<'_, f64>| m.nrows() > 0 && m.ncols() >= m.nrows().max(GROUP) && m.row_stride() == 1;
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
    fn run<I: Isa>(self) {
        // Eight sums of eight numbers, or of four and four: no multiply-add waits for the one before.
        if I::WIDE { sweep::<I, 8>(self) } else { sweep::<I, 4>(self) }
    }
}

/// Tiles of GROUP rows of x and Y rows of y.
#[inline(always)]
fn sweep<I: Isa, const Y: usize>(Add { mut out, x, y, triangle }: Add<'_>) {
    let rows = y.nrows();
    let room = |rows: usize| vec![[0.0; GROUP]; rows.div_ceil(GROUP) * PITCH];
    let same = x.as_ptr() == y.as_ptr() && x.shape() == y.shape() && x.col_stride() == y.col_stride();
    let (mut xs, mut ys) = (room(x.nrows()), if same { Vec::new() } else { room(rows) });
    // At least so many.
    let tiles = (x.nrows().div_ceil(GROUP) * rows.div_ceil(Y)) >> usize::from(triangle);
    for first in (0..x.ncols()).step_by(DEPTH) {
        let depth = DEPTH.min(x.ncols() - first);
        pack(&mut xs, x.subcols(first, depth));
        if !same {
            pack(&mut ys, y.subcols(first, depth));
        }
        let ys = if same { &xs } else { &ys };
        let (mut x_next, mut y_next) = (
            Ahead::of(after(x, first + depth), tiles),
            (!same).then(|| Ahead::of(after(y, first + depth), tiles)),
        );
        for row in (0..rows).step_by(Y) {
            let (group, at) = (row / GROUP, row % GROUP);
            let y = &ys[group * PITCH..][..depth];
            let above = if triangle { group } else { 0 };
            for (i, x) in xs.chunks_exact(PITCH).enumerate().skip(above) {
                x_next.ask();
                if let Some(next) = &mut y_next {
                    next.ask();
                }
                let sums = tile::<I, Y>(&x[..depth], y, at);
                for (c, sums) in sums.iter().enumerate().take(rows - row) {
                    let column = out.as_mut().col_mut(row + c).try_as_col_major_mut();
                    let column = column.map(|c| c.as_slice_mut()).unwrap_or_default();
                    column[i * GROUP..].iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
            }
        }
    }
}

/// The columns that are packed next, from `first` on.
fn after(x: MatRef<'_, f64>, first: usize) -> MatRef<'_, f64> {
    x.subcols(first, DEPTH.min(x.ncols() - first))
}

/// Column `j` of a matrix whose columns are contiguous.
#[inline(always)]
pub(super) fn slice(x: MatRef<'_, f64>, j: usize) -> &[f64] {
    x.col(j).try_as_col_major().map(|c| c.as_slice()).unwrap_or_default()
}

/// Rows of `x` in groups, the columns of a group one after the other; rows past the last are left as they are, zero.
#[inline(always)]
fn pack(out: &mut [[f64; GROUP]], x: MatRef<'_, f64>) {
    for k in 0..x.ncols() {
        let (groups, rest) = slice(x, k).as_chunks::<GROUP>();
        for (out, group) in out[k..].iter_mut().step_by(PITCH).zip(groups) {
            *out = *group;
        }
        if !rest.is_empty() {
            out[groups.len() * PITCH + k][..rest.len()].copy_from_slice(rest);
        }
    }
}

/// `x yᵀ` of a group of x and Y rows of one of y, from row `at` on: a column a row of `y`.
#[inline(always)]
fn tile<I: Isa, const Y: usize>(x: &[[f64; GROUP]], y: &[[f64; GROUP]], at: usize) -> [[f64; GROUP]; Y] {
    let mut sums = [[0.0; GROUP]; Y];
    for (x, y) in x.iter().zip(y) {
        for (sums, y) in sums.iter_mut().zip(&y[at..at + Y]) {
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
    use crate::cpu::simd::Baseline;
    use crate::cpu::simd::tests::{Fused, Wide};

    #[test]
    fn as_the_definition_on_every_instruction_set() {
        as_the_definition(|a| a.run::<Baseline>());
        as_the_definition(|a| a.run::<Fused>());
        as_the_definition(|a| a.run::<Wide>());
    }

    fn as_the_definition(run: fn(Add<'_>)) {
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
            run(Add { out: got.as_mut(), x: x.as_ref(), y: y.as_ref(), triangle: false });
            assert!((&got - &want).norm_max() <= 1e-12 * want.norm_max(), "{m} {n} {columns}");
            if m == n {
                let mut got = Mat::from_fn(m, m, |_, _| 1.0);
                run(Add { out: got.as_mut(), x: x.as_ref(), y: x.as_ref(), triangle: true });
                let want =
                    Mat::from_fn(m, m, |i, j| 1.0 + (0..columns).map(|k| x[(i, k)] * x[(j, k)]).sum::<f64>());
                let near = |i: usize, j: usize| (got[(i, j)] - want[(i, j)]).abs() <= 1e-12 * want.norm_max();
                assert!((0..m).all(|j| (j..m).all(|i| near(i, j))), "{m} {columns}");
            }
            // A part of taller ones.
            let (m, n) = (m.div_ceil(2), n.div_ceil(2));
            let mut got = Mat::zeros(m, n);
            let (of_x, of_y) = (x.subrows(x.nrows() - m, m), y.subrows(0, n));
            run(Add { out: got.as_mut(), x: of_x, y: of_y, triangle: false });
            let entry = |i: usize, j: usize| want[(x.nrows() - m + i, j)] - 1.0;
            let near = |i: usize, j: usize| (got[(i, j)] - entry(i, j)).abs() <= 1e-12 * want.norm_max();
            assert!((0..m).all(|i| (0..n).all(|j| near(i, j))), "{m} {n} {columns}");
        }
    }

    #[test]
    fn other_shapes_and_strides_do_not_fit() {
        let (few, tall) = (Mat::<f64>::identity(20, 19), Mat::<f64>::identity(40, 8));
        assert!(!fits(few.as_ref(), few.as_ref(), few.as_ref()));
        let (none, wide) = (Mat::<f64>::zeros(0, 20), Mat::<f64>::zeros(4, 20));
        assert!(!fits(Mat::zeros(0, 4).as_ref(), none.as_ref(), wide.as_ref()));
        assert!(!fits(Mat::zeros(4, 0).as_ref(), wide.as_ref(), none.as_ref()));
        assert!(fits(Mat::zeros(4, 4).as_ref(), wide.as_ref(), wide.as_ref()));
        assert!(!fits(Mat::zeros(8, 8).as_ref(), tall.transpose(), tall.transpose()));
    }
}
