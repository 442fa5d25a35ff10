//! One matrix product on one thread: the only place that knows which crate makes it.
//!
//! `gemm` 0.19 was taken over `matrixmultiply` 0.3 because it is faster at most shapes that models have; both are
//! measured by the ignored test below, the figures are in docs/performance.md.

#![allow(unsafe_code)]

use std::any::TypeId;
use std::marker::PhantomData;
use std::ops::Range;

use super::thin::Lines;
use crate::tensor::Real;

/// Bytes that one thread's product may hold while it packs: a tile's operands, 512 deep, and what rounding them up to
/// whole micro-panels adds.
pub(super) const PACKED_BYTES: usize = 2 << 20;

/// A matrix to read, of any strides.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    size: (usize, usize),
    strides: (usize, usize),
}

impl<'a> Mat<'a> {
    /// `rows × cols` elements, element (r, c) at `r · strides.0 + c · strides.1` of `data`.
    pub(super) fn new(data: &'a [f32], size: (usize, usize), strides: (usize, usize)) -> Mat<'a> {
        assert!(span(size, strides) <= data.len());
        Mat { data, size, strides }
    }

    /// Rows `rows` of it.
    pub(super) fn rows(self, rows: Range<usize>) -> Mat<'a> {
        assert!(rows.end <= self.size.0);
        let start = if rows.is_empty() { 0 } else { rows.start * self.strides.0 };
        Mat::new(&self.data[start..], (rows.len(), self.size.1), self.strides)
    }

    /// It as lines, of a matrix whose rows are contiguous.
    pub(super) fn lines(self) -> Lines<'a, f32> {
        assert!(self.strides.1 == 1);
        Lines { data: self.data, stride: self.strides.0 }
    }

    /// Row `r`, of a matrix whose rows are contiguous.
    pub(super) fn row(self, r: usize) -> &'a [f32] {
        assert!(self.strides.1 == 1);
        &self.data[r * self.strides.0..][..self.size.1]
    }

    /// The transpose.
    pub(super) fn t(self) -> Mat<'a> {
        let swap = |(a, b)| (b, a);
        Mat { data: self.data, size: swap(self.size), strides: swap(self.strides) }
    }
}

/// Elements from the first to the last of a matrix, inclusive.
fn span(size: (usize, usize), strides: (usize, usize)) -> usize {
    if size.0 == 0 || size.1 == 0 { 0 } else { (size.0 - 1) * strides.0 + (size.1 - 1) * strides.1 + 1 }
}

/// A row-major matrix to write, `stride` elements from row to row: a whole one, or a tile of one.
pub(super) struct TileMut<'a, T> {
    start: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    lives: PhantomData<&'a mut [T]>,
}

impl<'a, T> TileMut<'a, T> {
    /// A whole matrix.
    pub(super) fn new(data: &'a mut [T], rows: usize, cols: usize) -> TileMut<'a, T> {
        assert!(span((rows, cols), (cols, 1)) <= data.len());
        TileMut { start: data.as_mut_ptr(), rows, cols, stride: cols, lives: PhantomData }
    }

    /// The first `cols` columns.
    pub(super) fn columns(&mut self, cols: usize) -> TileMut<'_, T> {
        assert!(cols <= self.cols);
        TileMut { start: self.start, rows: self.rows, cols, stride: self.stride, lives: PhantomData }
    }

    /// Rows and columns.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Row `r`.
    #[inline(always)]
    pub(super) fn row(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows);
        // SAFETY: the tile has the row, borrows its elements exclusively, and `self` is borrowed with the row.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(r * self.stride), self.cols) }
    }

    /// Rows `rows` of the tile.
    pub(super) fn part(&mut self, rows: Range<usize>) -> TileMut<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        // SAFETY: the rows are the tile's; an empty range at the end stays at the end of the last row.
        let start = unsafe { self.start.add(rows.start.min(self.rows.saturating_sub(1)) * self.stride) };
        TileMut { start, rows: rows.len(), cols: self.cols, stride: self.stride, lives: PhantomData }
    }
}

impl<T: Real> TileMut<'_, T> {
    /// The tile as f32, if that is what it is.
    pub(super) fn single(&mut self) -> Option<TileMut<'_, f32>> {
        let &mut TileMut { start, rows, cols, stride, lives: _ } = self;
        let single = TypeId::of::<T>() == TypeId::of::<f32>();
        single.then_some(TileMut { start: start.cast(), rows, cols, stride, lives: PhantomData })
    }
}

/// A buffer that several threads write disjoint tiles of.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    lives: PhantomData<&'a mut [T]>,
}

// SAFETY: the buffer is only reached through `tile`, whose callers keep tiles disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: it borrows the buffer exclusively.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Takes the buffer for the time of the parallel loop.
    pub(super) fn new(data: &'a mut [T]) -> Shared<'a, T> {
        Shared { start: data.as_mut_ptr(), len: data.len(), lives: PhantomData }
    }

    /// `rows × cols` elements from `start` on, `stride` elements from row to row.
    ///
    /// # Safety
    /// While the tile lives, no other tile of this buffer may share an element with it.
    pub(super) unsafe fn tile(
        &self,
        start: usize,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> TileMut<'_, T> {
        assert!(start + span((rows, cols), (stride, 1)) <= self.len);
        // SAFETY: the tile ends within the buffer, as was just seen.
        TileMut { start: unsafe { self.start.add(start) }, rows, cols, stride, lives: PhantomData }
    }
}

/// `dst = alpha a b`, added to what `dst` holds if `keep`; the sums are f32, in an order that the shapes decide.
pub(super) fn product(dst: &mut TileMut<'_, f32>, keep: bool, alpha: f32, a: Mat<'_>, b: Mat<'_>) {
    let (m, k, n) = (a.size.0, a.size.1, b.size.1);
    assert!(m == dst.rows && n == dst.cols && k == b.size.0);
    let [ars, acs, brs, bcs] =
        [a.strides.0, a.strides.1, b.strides.0, b.strides.1].map(|s| isize::try_from(s).expect("a stride"));
    let stride = isize::try_from(dst.stride).expect("a stride");
    // SAFETY: sizes and strides stay within the three views (`Mat::new`, `TileMut`), and `dst` is borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.start,
            1,
            stride,
            keep,
            a.data.as_ptr(),
            acs,
            ars,
            b.data.as_ptr(),
            bcs,
            brs,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::time::{Duration, Instant};

    use super::*;

    /// `cargo test --release --lib of_two_crates -- --ignored --nocapture` prints docs/performance.md's table.
    #[test]
    #[ignore = "a measurement, not a check"]
    fn of_two_crates() {
        // T, O, I; forward is x Wᵀ over I, backward dy W over O.
        let shapes = [
            (1024, 1024, 1024),
            (1024, 2816, 1024),
            (1024, 1024, 2816),
            (1024, 1127, 1024),
            (256, 32_000, 1024),
            (1500, 192, 192),
            (1500, 512, 192),
            (1500, 192, 512),
        ];
        let numbers = |n: usize| (0..n).map(|i| (i * 7919 % 1009) as f32 / 504.0 - 1.0).collect::<Vec<_>>();
        println!("| T | O | I | forward gemm | matrixmultiply | backward gemm | matrixmultiply |");
        for (t, o, i) in shapes {
            let (x, w, dy) = (numbers(t * i), numbers(o * i), numbers(t * o));
            let (mut y, mut dx) = (vec![0f32; t * o], vec![0f32; t * i]);
            let w_t = Mat::new(&w, (o, i), (i, 1)).t();
            let forward = (Mat::new(&x, (t, i), (i, 1)), w_t);
            let backward = (Mat::new(&dy, (t, o), (o, 1)), w_t.t());
            let mut found = Vec::new();
            for (out, (a, b)) in [(&mut y, forward), (&mut dx, backward)] {
                let columns = b.size.1;
                let ours = best(|| product(&mut TileMut::new(out, t, columns), false, 1.0, a, b));
                let other = best(|| {
                    let [ars, acs, brs, bcs] =
                        [a.strides.0, a.strides.1, b.strides.0, b.strides.1].map(|s| s as isize);
                    let (m, k, n) = (a.size.0, a.size.1, columns);
                    // SAFETY: sizes and strides are those of the three slices, which the loop borrows.
                    unsafe {
                        matrixmultiply::sgemm(
                            m,
                            k,
                            n,
                            1.0,
                            a.data.as_ptr(),
                            ars,
                            acs,
                            b.data.as_ptr(),
                            brs,
                            bcs,
                            0.0,
                            out.as_mut_ptr(),
                            n as isize,
                            1,
                        );
                    }
                    black_box(&out);
                });
                found.extend([ours, other].map(|d| (2 * t * o * i) as f64 / d.as_secs_f64() / 1e9));
            }
            println!(
                "| {t} | {o} | {i} | {:.0} | {:.0} | {:.0} | {:.0} |",
                found[0], found[1], found[2], found[3]
            );
        }
    }

    fn best(mut f: impl FnMut()) -> Duration {
        let one = |_| {
            let start = Instant::now();
            f();
            start.elapsed()
        };
        (0..12).map(one).min().unwrap_or_default()
    }
}
