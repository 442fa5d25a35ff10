//! `x yᵀ` of matrices with few rows and many columns, as factors are: what their Grams are made of.
//!
//! A few columns at a time are packed into tiles, which the innermost loop reads from end to end, and each tile of the
//! result is summed in registers. The order of every sum is that of the columns.

use faer::{MatMut, MatRef};

use super::ahead::Ahead;
use crate::cpu::product::group::{Number, sums};
use crate::cpu::simd::{Isa, Kernel, run};

/// Rows in a group of f64, which are packed together.
pub(super) const GROUP: usize = 16;
/// Rows in a group of f32.
const GROUP_OF_SINGLE: usize = 32;
/// Columns that are packed at once: a group of x and one of y stay in the first cache.
const DEPTH: usize = 128;
/// Rows of y that every group of x is multiplied with before the next ones: whole groups.
const BLOCK: usize = 64;
/// Columns from group to group of what is packed: with one more than there are, not all of them meet in one set of the
/// cache.
const PITCH: usize = DEPTH + 1;

/// Whether [`add`] is the way to `x yᵀ`, by shapes and strides.
pub(super) fn fits<T>(out: MatRef<'_, T>, x: MatRef<'_, T>, y: MatRef<'_, T>) -> bool {
    // With fewer columns than rows packing would not be paid for.
    let side = |m: MatRef<'_, T>| m.nrows() > 0 && m.ncols() >= m.nrows().max(GROUP) && m.row_stride() == 1;
    side(x) && side(y) && out.row_stride() == 1
}

/// `out += x yᵀ` of matrices that [`fits`]; if `triangle`, on and below the diagonal, where what is above means nothing.
pub(super) fn add(out: MatMut<'_, f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>, triangle: bool) {
    run(Add { out, x, y, triangle });
}

/// [`add`] in f32.
pub(super) fn add_single(out: MatMut<'_, f32>, x: MatRef<'_, f32>, y: MatRef<'_, f32>, triangle: bool) {
    run(Add { out, x, y, triangle });
}

struct Add<'a, T> {
    out: MatMut<'a, T>,
    x: MatRef<'a, T>,
    y: MatRef<'a, T>,
    triangle: bool,
}

impl Kernel for Add<'_, f64> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        // As many sums as there are registers for: no multiply-add waits for the one before.
        if I::WIDE { sweep::<I, f64, GROUP, 8>(self) } else { sweep::<I, f64, GROUP, 2>(self) }
    }
}

impl Kernel for Add<'_, f32> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        match I::WIDE {
            true => sweep::<I, f32, GROUP_OF_SINGLE, 8>(self),
            false => sweep::<I, f32, GROUP_OF_SINGLE, 2>(self),
        }
    }
}

/// Tiles of G rows of x and Y rows of y.
#[inline(always)]
fn sweep<I: Isa, T: Number, const G: usize, const Y: usize>(Add { mut out, x, y, triangle }: Add<'_, T>) {
    let rows = y.nrows();
    let room = |rows: usize| vec![[T::default(); G]; rows.div_ceil(G) * PITCH];
    let same = x.as_ptr() == y.as_ptr() && x.shape() == y.shape() && x.col_stride() == y.col_stride();
    let (mut xs, mut ys) = (room(x.nrows()), if same { Vec::new() } else { room(rows) });
    // At least so many.
    let tiles = (x.nrows().div_ceil(G) * rows.div_ceil(Y)) >> usize::from(triangle);
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
        for block in (0..rows).step_by(BLOCK) {
            // A group of x stays in the first cache while a block of rows of y goes by, which stays in the second.
            let above = if triangle { block / G } else { 0 };
            for (i, x) in xs.chunks_exact(PITCH).enumerate().skip(above) {
                let end = if triangle { rows.min((i + 1) * G) } else { rows };
                for row in (block..end.min(block + BLOCK)).step_by(Y) {
                    x_next.ask();
                    if let Some(next) = &mut y_next {
                        next.ask();
                    }
                    let y = ys[row / G * PITCH..][..depth].as_flattened();
                    let numbers = std::array::from_fn(|j| &y[row % G + j..]);
                    let sums = sums::<I, T, G, Y>(&x[..depth], numbers, G);
                    for (c, sums) in sums.iter().enumerate().take(rows - row) {
                        let column = out.as_mut().col_mut(row + c).try_as_col_major_mut();
                        let column = column.map(|c| c.as_slice_mut()).unwrap_or_default();
                        column[i * G..].iter_mut().zip(sums).for_each(|(out, sum)| out.plus(*sum));
                    }
                }
            }
        }
    }
}

/// The columns that are packed next, from `first` on.
fn after<T>(x: MatRef<'_, T>, first: usize) -> MatRef<'_, T> {
    x.subcols(first, DEPTH.min(x.ncols() - first))
}

/// Column `j` of a matrix whose columns are contiguous.
#[inline(always)]
pub(crate) fn slice<T>(x: MatRef<'_, T>, j: usize) -> &[T] {
    debug_assert!(x.row_stride() == 1 || x.nrows() <= 1);
    x.col(j).try_as_col_major().map(|c| c.as_slice()).unwrap_or_default()
}

/// Rows of `x` in groups, the columns of a group one after the other; rows past the last are left as they are, zero.
#[inline(always)]
fn pack<T: Number, const G: usize>(out: &mut [[T; G]], x: MatRef<'_, T>) {
    for k in 0..x.ncols() {
        let (groups, rest) = slice(x, k).as_chunks::<G>();
        for (out, group) in out[k..].iter_mut().step_by(PITCH).zip(groups) {
            *out = *group;
        }
        if !rest.is_empty() {
            out[groups.len() * PITCH + k][..rest.len()].copy_from_slice(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;
    use crate::cpu::simd::tests::{loops, run_on};

    #[test]
    fn as_the_definition_on_every_instruction_set() {
        for set in loops() {
            as_the_definition::<f64>(|a| run_on(set, a), 1e-12);
            as_the_definition::<f32>(|a| run_on(set, a), 1e-5);
        }
    }

    trait Wider: Number {
        fn wide(self) -> f64;
        fn of(x: f64) -> Self;
    }
    impl Wider for f64 {
        fn wide(self) -> f64 {
            self
        }
        fn of(x: f64) -> f64 {
            x
        }
    }
    impl Wider for f32 {
        fn wide(self) -> f64 {
            f64::from(self)
        }
        fn of(x: f64) -> f32 {
            x as f32
        }
    }

    fn as_the_definition<T: Wider>(run: impl Fn(Add<'_, T>), near: f64) {
        let x = |m: usize, n: usize, by: usize| {
            Mat::from_fn(m, n, |i, j| T::of(((i * by + j * 17 + i * j) % 101) as f64 / 8.0 - 6.0))
        };
        let near = |got: T, want: f64, most: f64| (got.wide() - want).abs() <= near * most;
        for (m, n, columns) in [
            (1, 1, 16),
            (8, 6, 128),
            (9, 7, 129),
            (16, 64, 300),
            (65, 12, 257),
            (23, 23, 50),
            (70, 150, 200),
            (150, 150, 170),
        ] {
            let (x, y) = (x(m, columns, 31), x(n, columns, 13));
            let sum = |a: &Mat<T>, b: &Mat<T>, i: usize, j: usize| -> f64 {
                (0..columns).map(|k| a[(i, k)].wide() * b[(j, k)].wide()).sum()
            };
            let want = Mat::from_fn(m, n, |i, j| 1.0 + sum(&x, &y, i, j));
            let most = want.norm_max();
            let mut got = Mat::from_fn(m, n, |_, _| T::of(1.0));
            assert!(fits(got.as_ref(), x.as_ref(), y.as_ref()), "{m} {n} {columns}");
            run(Add { out: got.as_mut(), x: x.as_ref(), y: y.as_ref(), triangle: false });
            let all = || (0..n).flat_map(|j| (0..m).map(move |i| (i, j)));
            assert!(all().all(|at| near(got[at], want[at], most)), "{m} {n} {columns}");
            if m == n {
                let mut got = Mat::from_fn(m, m, |_, _| T::of(1.0));
                run(Add { out: got.as_mut(), x: x.as_ref(), y: x.as_ref(), triangle: true });
                let want = Mat::from_fn(m, m, |i, j| 1.0 + sum(&x, &x, i, j));
                let most = want.norm_max();
                let mut below = all().filter(|(i, j)| i >= j);
                assert!(below.all(|at| near(got[at], want[at], most)), "{m} {columns}");
            }
            // A part of taller ones.
            let (m, n) = (m.div_ceil(2), n.div_ceil(2));
            let mut got = Mat::from_fn(m, n, |_, _| T::of(0.0));
            let (of_x, of_y) = (x.subrows(x.nrows() - m, m), y.subrows(0, n));
            run(Add { out: got.as_mut(), x: of_x, y: of_y, triangle: false });
            let part = |i: usize, j: usize| want[(x.nrows() - m + i, j)] - 1.0;
            let right = |i: usize| (0..n).all(|j| near(got[(i, j)], part(i, j), most));
            assert!((0..m).all(right), "{m} {n} {columns}");
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
