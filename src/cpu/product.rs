//! One matrix product on one thread.
//!
//! b goes through the thread's room in blocks of at most [`DEPTH`] × [`COLUMNS`], packed in panels as the micro-kernel
//! reads them, unless it was packed before. Of a a few rows at a time are copied there too, and stay in the first-level
//! cache while the panels come from the second: where they lie, rows whose distance is a power of two would push each
//! other out. Each element is a sum over blocks of K of sums over k, whatever its place, the sizes of dst, and whether b
//! was packed: it depends on a row of a and a column of b alone.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(super) mod block;
pub(super) mod dot;
pub(crate) mod group;
#[cfg(target_arch = "x86_64")]
pub(super) mod halves;
mod micro;
pub(super) mod pack;
#[cfg(target_arch = "x86_64")]
pub(super) mod pairs;
#[cfg(target_arch = "x86_64")]
pub(super) mod ranks;
pub(super) mod roof;
#[cfg(test)]
mod tests;

use std::any::TypeId;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128, __m256, __m512};
use std::marker::PhantomData;
use std::ops::Range;

use micro::Vector;
use pack::Panels;

use super::simd::{self, Isa, Kernel};
use super::thin::Lines;
use crate::tensor::Real;

/// Columns of b that are packed at a time, whole panels.
pub(super) const COLUMNS: usize = 256;
/// Rows of b that are packed at a time: a panel takes most of a first-level cache, a block of panels half of a second-level
/// one.
pub(super) const DEPTH: usize = 256;
/// Rows of a that are copied at a time, at most.
const ROWS: usize = 32;
/// Columns of a, and rows of b, that [`More`] has at most.
pub(super) const RANKS: usize = 64;
/// Numbers of a line of the caches.
const LINE: usize = 16;

/// Bytes of one thread's room, kept between products.
pub(super) const PACKED_BYTES: usize = (COLUMNS + ROWS) * (DEPTH + RANKS) * size_of::<f32>();

/// A matrix to read, of any strides.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a, T = f32> {
    data: &'a [T],
    size: (usize, usize),
    strides: (usize, usize),
}

impl<'a, T: Copy> Mat<'a, T> {
    /// `rows × cols` elements, element (r, c) at `r · strides.0 + c · strides.1` of `data`.
    pub(super) fn new(data: &'a [T], size: (usize, usize), strides: (usize, usize)) -> Mat<'a, T> {
        assert!(span(size, strides) <= data.len());
        Mat { data, size, strides }
    }

    /// Rows `rows` of it.
    pub(super) fn rows(self, rows: Range<usize>) -> Mat<'a, T> {
        self.block(rows, 0..self.size.1)
    }

    /// Rows `rows`, columns `cols`.
    fn block(self, rows: Range<usize>, cols: Range<usize>) -> Mat<'a, T> {
        assert!(rows.end <= self.size.0 && cols.end <= self.size.1);
        let size = (rows.len(), cols.len());
        let empty = size.0 == 0 || size.1 == 0;
        let start = if empty { 0 } else { rows.start * self.strides.0 + cols.start * self.strides.1 };
        Mat::new(&self.data[start..], size, self.strides)
    }

    /// It as lines, of a matrix whose rows are contiguous.
    pub(super) fn lines(self) -> Lines<'a, T> {
        assert!(self.strides.1 == 1);
        Lines { data: self.data, stride: self.strides.0 }
    }

    /// Row `r`, of a matrix whose rows are contiguous.
    pub(super) fn row(self, r: usize) -> &'a [T] {
        assert!(self.strides.1 == 1);
        &self.data[r * self.strides.0..][..self.size.1]
    }

    /// How many rows it has.
    pub(super) fn height(&self) -> usize {
        self.size.0
    }

    /// How many columns it has.
    pub(super) fn columns(&self) -> usize {
        self.size.1
    }

    /// The transpose.
    pub(super) fn t(self) -> Mat<'a, T> {
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

    /// Rows `rows`, columns `cols`, at least one of each.
    #[inline(always)]
    fn block(&mut self, rows: Range<usize>, cols: Range<usize>) -> TileMut<'_, T> {
        assert!(rows.start < rows.end && rows.end <= self.rows);
        assert!(cols.start < cols.end && cols.end <= self.cols);
        // SAFETY: the first of these elements is the tile's, as was just seen.
        let start = unsafe { self.start.add(rows.start * self.stride + cols.start) };
        TileMut { start, rows: rows.len(), cols: cols.len(), stride: self.stride, lives: PhantomData }
    }

    /// Rows `rows` of the tile.
    pub(super) fn part(&mut self, rows: Range<usize>) -> TileMut<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        // SAFETY: the rows are the tile's; an empty range at the end stays at the last row.
        let start = unsafe { self.start.add(rows.start.min(self.rows.saturating_sub(1)) * self.stride) };
        TileMut { start, rows: rows.len(), cols: self.cols, stride: self.stride, lives: PhantomData }
    }
}

impl<'a, T: Real> TileMut<'a, T> {
    /// The tile as f32, or as it was if that is not what it is.
    pub(super) fn into_single(self) -> Result<TileMut<'a, f32>, TileMut<'a, T>> {
        if TypeId::of::<T>() != TypeId::of::<f32>() {
            return Err(self);
        }
        let TileMut { start, rows, cols, stride, lives: _ } = self;
        Ok(TileMut { start: start.cast(), rows, cols, stride, lives: PhantomData })
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

/// A right factor.
#[derive(Clone, Copy)]
pub(super) enum Right<'a, T = f32, E = f32> {
    /// Where it lies; rows or columns are contiguous.
    Lies(Mat<'a, T>),
    /// Packed before, with as many rows and columns as the others have.
    Packed(Panels<'a, E>),
}

/// A thin product that is added to another one, a tile at a time while that is in the nearest cache: what an adapter adds.
#[derive(Clone, Copy)]
pub(super) struct More<'a> {
    /// `[m, R]`, R at most [`RANKS`].
    pub(super) a: Mat<'a>,
    /// `[R, n]`, whose rows are contiguous.
    pub(super) b: Mat<'a>,
}

impl More<'_> {
    /// R.
    pub(super) fn ranks(&self) -> usize {
        self.b.size.0
    }

    fn fits<T>(&self, dst: &TileMut<'_, T>) -> bool {
        let ((rows, depth), (ranks, columns)) = (self.a.size, self.b.size);
        (rows, columns) == dst.size() && depth == ranks && ranks <= RANKS
    }
}

/// How sums end.
#[derive(Default)]
pub(super) struct End<'a> {
    /// What is added to them, where a has columns.
    pub(super) more: Option<More<'a>>,
    /// Takes them when they are complete.
    pub(super) done: Option<Done<'a>>,
}

/// Called once for each element, with some rows and columns at a time and the first of each. It must not multiply, for the
/// thread's room is taken, nor wait for other tasks.
pub(super) type Done<'a> = &'a mut dyn FnMut(TileMut<'_, f32>, (usize, usize));

/// `dst = a b`, added to what `dst` holds if `keep`, and its end; the sums are f32, in an order that K alone decides.
pub(super) fn product(dst: &mut TileMut<'_, f32>, keep: bool, a: Mat<'_>, b: Right<'_>, end: End<'_>) {
    assert!(a.size.0 == dst.rows && end.more.is_none_or(|more| more.fits(dst)));
    if let Right::Lies(b) = b {
        assert!(b.size.1 == dst.cols && a.size.1 == b.size.0);
    }
    pack::with_room(|room| simd::run(Product { dst, keep, a, b, end, room }));
}

/// A product over no K at all.
fn nothing(dst: &mut TileMut<'_, f32>, keep: bool, done: Option<Done<'_>>) {
    let (rows, columns) = dst.size();
    if !keep {
        (0..rows).for_each(|r| dst.row(r).fill(0.0));
    }
    if let Some(done) = done {
        done(dst.columns(columns), (0, 0));
    }
}

struct Product<'a, 'b, 'e> {
    dst: &'a mut TileMut<'b, f32>,
    keep: bool,
    a: Mat<'a>,
    b: Right<'a>,
    end: End<'e>,
    room: pack::Room<'a>,
}

impl Kernel for Product<'_, '_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        // SAFETY: kernels run with instructions that the processor has (`simd::run`), and these are I's.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            let width = pack::Width.run::<I>();
            if I::WIDE {
                assert!(width == 32);
                self.by::<__m512, 14, 8, 2, 32>();
            } else if I::FMA {
                assert!(width == 16);
                self.by::<__m256, 6, 3, 2, 16>();
            } else {
                assert!(width == 8);
                self.by::<__m128, 6, 3, 2, 8>();
            }
        }
        // SAFETY: these are plain numbers.
        #[cfg(not(target_arch = "x86_64"))]
        unsafe {
            self.by::<micro::Lanes<f32, 4>, 6, 3, 2, 8>();
        }
    }
}

impl Product<'_, '_, '_> {
    /// M rows and N columns, which are C vectors, at a time; S rows where no more are left, or twice as many, which takes less
    /// than M and S.
    ///
    /// # Safety
    /// The processor has `V`.
    #[inline(always)]
    unsafe fn by<V: Vector<Of = f32>, const M: usize, const S: usize, const C: usize, const N: usize>(self) {
        const { assert!(COLUMNS.is_multiple_of(N) && M <= ROWS && S <= M) };
        let Product { dst, keep, a, b, end: End { more, mut done }, room } = self;
        let (rows, columns, depth) = (a.size.0, dst.cols, a.size.1);
        if rows == 0 {
            return;
        }
        if depth == 0 {
            return nothing(dst, keep, done);
        }
        for n in (0..columns).step_by(COLUMNS) {
            let ns = n..(n + COLUMNS).min(columns);
            let more = more.map(|More { a, b }| {
                let stride = b.size.0 * N;
                pack::panels::<N>(room.thin, stride, b.block(0..b.size.0, ns.clone()));
                (a, Panels::new(room.thin, stride))
            });
            for k in (0..depth).step_by(DEPTH) {
                let ks = k..(k + DEPTH).min(depth);
                let (panels, next) = match b {
                    Right::Lies(b) => {
                        let stride = ks.len() * N;
                        pack::panels::<N>(room.panels, stride, b.block(ks.clone(), ns.clone()));
                        (Panels::new(room.panels, stride), None)
                    }
                    Right::Packed(panels) => {
                        let next = (ks.end < depth).then(|| panels.from(n / N, ks.end * N));
                        (panels.from(n / N, k * N), next)
                    }
                };
                let last = ks.end == depth;
                let more = more.filter(|_| last);
                let a = a.block(0..rows, ks);
                let mut dst = dst.block(0..rows, ns.clone());
                let block = Block { keep: keep || k > 0, a, panels, next, more };
                let (mut r, mut strips) = (0, 0);
                while r < rows {
                    let first = r;
                    // SAFETY: the caller has `V`.
                    r += unsafe {
                        match rows - r {
                            left if left <= S || (M + 1..=2 * S).contains(&left) => {
                                block.strip::<V, S, C, N>(&mut dst, r, strips, room.lines)
                            }
                            _ => block.strip::<V, M, C, N>(&mut dst, r, strips, room.lines),
                        }
                    };
                    strips += 1;
                    if let (Some(done), true) = (&mut done, last) {
                        done(dst.block(first..r.min(rows), 0..ns.len()), (first, n));
                    }
                }
            }
        }
    }
}

/// A block of b and what it is multiplied with.
struct Block<'a> {
    keep: bool,
    a: Mat<'a>,
    panels: Panels<'a>,
    /// The next block, where that is packed already.
    next: Option<Panels<'a>>,
    /// The columns of [`More`]'s a, and its rows of b.
    more: Option<(Mat<'a>, Panels<'a>)>,
}

impl Block<'_> {
    /// `dst = a b`, added if `keep`, of at most M rows from `r` on, `before` which there were as many strips; M.
    ///
    /// # Safety
    /// The processor has `V`.
    #[inline(always)]
    unsafe fn strip<V: Vector<Of = f32>, const M: usize, const C: usize, const N: usize>(
        &self,
        dst: &mut TileMut<'_, f32>,
        r: usize,
        before: usize,
        lines: &mut [f32],
    ) -> usize {
        let Block { keep, a, panels, next, more } = *self;
        let ((rows, columns), depth) = (dst.size(), a.size.1);
        let (end, count) = ((r + M).min(rows), columns.div_ceil(N));
        let following = (end + M).min(rows) - end;
        let (lines, thin) = lines.split_at_mut(M * DEPTH);
        pack::lines::<DEPTH>(lines, a.block(r..end, 0..depth));
        let thin = &mut thin[..M * RANKS];
        if let Some((a, _)) = more {
            pack::lines::<RANKS>(thin, a.block(r..end, 0..a.size.1));
        }
        // A share of the next rows with each panel, and of the next block with each tile: both come from afar.
        let share = if a.strides.1 == 1 { depth.div_ceil(LINE).div_ceil(count) } else { 0 };
        let of_tile = depth.div_ceil(LINE) * LINE;
        for p in 0..count {
            let mut out = dst.block(r..end, p * N..(p * N + N).min(columns));
            let panel = panels.some(p, depth * N);
            let tile = before * count + p;
            let ahead = micro::Next {
                rows: a.data.as_ptr().wrapping_add(end * a.strides.0 + p * share * LINE),
                stride: a.strides.0,
                count: following,
                at_once: M.div_ceil((depth / micro::BLOCK).max(1)),
                lines: share,
                panel: match next {
                    Some(next) if tile * of_tile < count * DEPTH * N => {
                        next.start(tile * of_tile / (DEPTH * N)).wrapping_add(tile * of_tile % (DEPTH * N))
                    }
                    _ => panel.as_ptr(),
                },
            };
            let a = micro::Strip::<f32, DEPTH>(lines.as_ptr());
            let b = micro::Panel { start: panel.as_ptr(), stride: N, depth };
            // SAFETY: the caller has `V`; the lines are M rows of `DEPTH` numbers, and panels `depth` rows, which are no more.
            unsafe { micro::tile::<V, M, C, N>(&mut out, keep, a, b, ahead) };
            if let Some((Mat { size: (_, depth), .. }, panels)) = more {
                let a = micro::Strip::<f32, RANKS>(thin.as_ptr());
                let b = micro::Panel { start: panels.some(p, depth * N).as_ptr(), stride: N, depth };
                // SAFETY: the caller has `V`; the lines are M rows of `RANKS` numbers, which `depth` does not exceed (`fits`).
                unsafe { micro::tile::<V, M, C, N>(&mut out, true, a, b, ()) };
            }
        }
        M
    }
}
