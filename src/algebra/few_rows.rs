//! `w x` of a small w and an x of few rows and many columns: a map of factors.
//!
//! w is packed once, in groups of rows; x is read where it lies, a few columns at a time, each number of them multiplied
//! with a group's column at once. The order of every sum is that of the columns of w, wherever a column of x stands.

use faer::{MatMut, MatRef};

use super::ahead::Ahead;
use super::rank_k::{GROUP, slice};
use crate::cpu::product::group::sums;
use crate::cpu::simd::{Isa, Kernel, run};

/// Columns of w that are multiplied at once: a group of them, and the numbers of x that go with it, stay in the first
/// cache.
const DEPTH: usize = 256;
/// Columns of x that are multiplied with a group of w before the next one, where w is large.
const BLOCK: usize = 128;
/// Bytes that stay in a second cache.
const SECOND: usize = 1 << 19;
/// Columns of x for each row or column of w from which on packing w is paid for.
const COLUMNS: usize = 2;

/// Whether [`multiply`] is the way to `w x`, by shapes and strides.
pub(super) fn fits(out: MatRef<'_, f64>, w: MatRef<'_, f64>, x: MatRef<'_, f64>) -> bool {
    let many = x.ncols() >= COLUMNS * w.nrows().max(w.ncols()).max(GROUP);
    many && w.ncols() > 0 && x.row_stride() == 1 && out.row_stride() == 1
}

/// `out = w x`, added to what `out` holds if `keep`, of matrices that [`fits`].
pub(super) fn multiply(out: MatMut<'_, f64>, keep: bool, w: MatRef<'_, f64>, x: MatRef<'_, f64>) {
    run(Multiply { out, keep, w, x });
}

struct Multiply<'a> {
    out: MatMut<'a, f64>,
    keep: bool,
    w: MatRef<'a, f64>,
    x: MatRef<'a, f64>,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        if I::WIDE { sweep::<I, 8>(self) } else { sweep::<I, 2>(self) }
    }
}

/// Tiles of GROUP rows of w and Y columns of x.
#[inline(always)]
fn sweep<I: Isa, const Y: usize>(Multiply { mut out, keep, w, x }: Multiply<'_>) {
    // One more than there are, so that not all groups meet in one set of the cache.
    let pitch = w.ncols() + 1;
    let groups = packed(w, pitch);
    let number = w.nrows().div_ceil(GROUP);
    for first in (0..w.ncols()).step_by(DEPTH) {
        let depth = DEPTH.min(w.ncols() - first);
        let part = x.subrows(first, depth);
        let keep = keep || first > 0;
        // What of w is multiplied goes by once for each block: where it does not stay in the second cache, that one does.
        let small = number * depth * size_of::<[f64; GROUP]>() <= SECOND;
        let block = if small { Y } else { BLOCK };
        let mut columns = [&[][..]; BLOCK];
        for start in (0..x.ncols()).step_by(block) {
            let end = (start + block).min(x.ncols());
            for (c, column) in columns.iter_mut().enumerate().take(block) {
                *column = slice(part, (start + c).min(end - 1));
            }
            let next = (if small { end + Y } else { end }).min(x.ncols());
            let tiles = number * (end - start).div_ceil(Y);
            let mut ahead = Ahead::of(part.subcols(next, block.min(x.ncols() - next)), tiles);
            for (i, group) in groups.chunks_exact(pitch).enumerate() {
                for column in (start..end).step_by(Y) {
                    ahead.ask();
                    let of_x = std::array::from_fn(|c| columns[column - start + c]);
                    let sums = sums::<I, f64, GROUP, Y>(&group[first..][..depth], of_x, 1);
                    for (c, sums) in sums.iter().enumerate().take(end - column) {
                        let column = out.as_mut().col_mut(column + c).try_as_col_major_mut();
                        let column = column.map(|c| c.as_slice_mut()).unwrap_or_default();
                        let own = column[i * GROUP..].iter_mut().zip(sums);
                        match keep {
                            true => own.for_each(|(out, sum)| *out += sum),
                            false => own.for_each(|(out, sum)| *out = *sum),
                        }
                    }
                }
            }
        }
    }
}

/// Rows of `w` in groups, the columns of a group one after the other, `pitch` from group to group; zeros past the last
/// row.
fn packed(w: MatRef<'_, f64>, pitch: usize) -> Vec<[f64; GROUP]> {
    let mut out = vec![[0.0; GROUP]; w.nrows().div_ceil(GROUP) * pitch];
    for k in 0..w.ncols() {
        for i in 0..w.nrows() {
            out[i / GROUP * pitch + k][i % GROUP] = w[(i, k)];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;
    use crate::cpu::simd::tests::{loops, run_on};

    #[test]
    fn as_the_definition_on_every_instruction_set() {
        loops().for_each(|set| as_the_definition(|m| run_on(set, m)));
    }

    fn as_the_definition(run: impl Fn(Multiply<'_>)) {
        let numbers = |m: usize, n: usize, by: usize| {
            Mat::from_fn(m, n, |i, j| ((i * by + j * 17 + i * j) % 101) as f64 / 7.0 - 6.0)
        };
        for (m, k, columns) in [
            (0, 3, 40),
            (1, 1, 33),
            (8, 8, 33),
            (9, 7, 35),
            (64, 64, 131),
            (12, 300, 601),
            (5, 257, 514),
            (3, 2, 34),
            // More than stays in a second cache.
            (272, 256, 700),
        ] {
            let (w, x) = (numbers(m, k, 31), numbers(k + 2, columns, 13));
            // A part of a taller one.
            let x = x.subrows(1, k);
            for (keep, w) in [(false, w.as_ref()), (true, w.transpose().to_owned().transpose())] {
                let was = if keep { 1.0 } else { 0.0 };
                let want =
                    Mat::from_fn(m, columns, |i, j| was + (0..k).map(|k| w[(i, k)] * x[(k, j)]).sum::<f64>());
                let mut got = Mat::from_fn(m, columns, |_, _| if keep { 1.0 } else { f64::NAN });
                assert!(fits(got.as_ref(), w, x), "{m} {k} {columns}");
                run(Multiply { out: got.as_mut(), keep, w, x });
                assert!((&got - &want).norm_max() <= 1e-12 * want.norm_max(), "{m} {k} {columns}");
                // A column's bytes do not depend on where it stands.
                if columns > 3 + 2 * m.max(k).max(GROUP) {
                    let mut part = Mat::from_fn(m, columns - 3, |_, _| was);
                    run(Multiply { out: part.as_mut(), keep, w, x: x.subcols(3, columns - 3) });
                    assert_eq!(part.as_ref(), got.subcols(3, columns - 3), "{m} {k} {columns}");
                }
            }
        }
    }

    #[test]
    fn other_shapes_and_strides_do_not_fit() {
        let (square, wide) = (Mat::<f64>::identity(20, 20), Mat::<f64>::identity(20, 40));
        assert!(!fits(square.as_ref(), square.as_ref(), square.as_ref()));
        assert!(fits(wide.as_ref(), square.as_ref(), wide.as_ref()));
        let tall = Mat::<f64>::identity(40, 20);
        assert!(!fits(wide.as_ref(), square.as_ref(), tall.transpose()));
        assert!(!fits(tall.transpose(), square.as_ref(), wide.as_ref()));
    }
}
