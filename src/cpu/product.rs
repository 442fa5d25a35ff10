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
        // SAFETY: the rows are the tile's; an empty range at the end stays at the end of the last row.
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

    /// The tile as f32, if that is what it is.
    pub(super) fn single(&mut self) -> Option<TileMut<'_, f32>> {
        self.columns(self.cols).into_single().ok()
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

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::cpu::simd::Instructions;
    use crate::cpu::simd::tests::{loops, run_on};
    use crate::ops::cases::normal;

    /// What [`Done`] was called with.
    pub(super) struct Taken {
        sums: Vec<f32>,
        times: Vec<usize>,
        columns: usize,
    }

    impl Taken {
        pub(super) fn new(rows: usize, columns: usize) -> Taken {
            Taken { sums: vec![f32::NAN; rows * columns], times: vec![0; rows * columns], columns }
        }

        pub(super) fn done(&mut self) -> impl FnMut(TileMut<'_, f32>, (usize, usize)) {
            |mut sums, (row, column)| {
                let (rows, columns) = sums.size();
                for r in 0..rows {
                    let at = (row + r) * self.columns + column;
                    self.sums[at..at + columns].copy_from_slice(sums.row(r));
                    self.times[at..at + columns].iter_mut().for_each(|n| *n += 1);
                }
            }
        }

        /// They are all of `want`, each once.
        pub(super) fn were(&self, want: &[f32]) {
            assert_eq!(self.sums, want);
            assert!(self.times.iter().all(|&n| n == 1), "{:?}", self.times);
        }
    }

    /// Every micro-kernel that the processor has, and the one for other architectures.
    #[derive(Clone, Copy, Debug)]
    enum By {
        Set(Instructions),
        Lanes,
    }

    fn kernels() -> impl Iterator<Item = By> {
        loops().map(By::Set).chain([By::Lanes])
    }

    fn with(by: By, dst: &mut TileMut<'_, f32>, keep: bool, a: Mat<'_>, b: Mat<'_>) {
        multiply(by, dst, keep, a, Right::Lies(b));
    }

    fn multiply(by: By, dst: &mut TileMut<'_, f32>, keep: bool, a: Mat<'_>, b: Right<'_>) {
        pack::with_room(|room| {
            let product = Product { dst, keep, a, b, end: End::default(), room };
            match by {
                By::Set(set) => run_on(set, product),
                // SAFETY: these are plain numbers.
                By::Lanes => unsafe { product.by::<micro::Lanes<f32, 4>, 6, 3, 2, 8>() },
            }
        });
    }

    /// Strides of a matrix that is larger than `size`: by rows, by columns, by neither.
    fn layouts((rows, cols): (usize, usize)) -> [(usize, usize); 3] {
        [(cols + 3, 1), (1, rows + 5), (2 * cols + 1, 2)]
    }

    /// Σ_k of the products and of their sizes.
    fn sum(a: Mat<'_>, b: Mat<'_>, i: usize, j: usize) -> (f64, f64) {
        let at = |m: Mat<'_>, r: usize, c: usize| f64::from(m.data[r * m.strides.0 + c * m.strides.1]);
        let terms = (0..a.size.1).map(|k| at(a, i, k) * at(b, k, j));
        terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
    }

    #[test]
    fn as_the_sums() {
        let sizes = [
            (1, 1, 1),
            (1, 300, 31),
            (1, 40, 0),
            (6, 16, 256),
            (7, 33, 257),
            (8, 32, 4),
            (50, 15, 600),
            (13, 257, 9),
            (97, 65, 64),
            (5, 40, 0),
            (0, 4, 4),
            (4, 0, 4),
        ];
        for (m, n, k) in sizes {
            for (at, (a_strides, b_strides)) in
                layouts((m, k)).into_iter().flat_map(|a| layouts((k, n)).map(|b| (a, b))).enumerate()
            {
                let (a, b) = (
                    normal::<f32>(1, 4 * (m + 9) * (k + 9), 1.0),
                    normal::<f32>(2, 4 * (k + 9) * (n + 9), 1.0),
                );
                let (a, b) = (Mat::new(&a, (m, k), a_strides), Mat::new(&b, (k, n), b_strides));
                let keep = at % 2 == 1;
                // A tile in a larger matrix, which stays as it is.
                let stride = n + 7;
                let mut old = normal::<f32>(3, (m + 4) * stride, 1.0);
                for (r, row) in old.chunks_mut(stride).enumerate() {
                    let inside = (2..2 + m).contains(&r);
                    row[3..3 + n].iter_mut().filter(|_| inside && !keep).for_each(|x| *x = f32::NAN);
                }
                for by in kernels() {
                    let mut got = old.clone();
                    let shared = Shared::new(&mut got);
                    // SAFETY: it is the only tile.
                    let mut dst = unsafe { shared.tile(2 * stride + 3, m, n, stride) };
                    with(by, &mut dst, keep, a, b);
                    for (i, got) in got.iter().enumerate() {
                        let (r, c) = (i / stride, i % stride);
                        if !(2..2 + m).contains(&r) || !(3..3 + n).contains(&c) {
                            assert_eq!(got.to_bits(), old[i].to_bits(), "{by:?}: {r}, {c} is outside");
                            continue;
                        }
                        let (sum, size) = sum(a, b, r - 2, c - 3);
                        let was = if keep { f64::from(old[i]) } else { 0.0 };
                        let want = sum + was;
                        let tol = (k + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * (size + was.abs());
                        let err = (f64::from(*got) - want).abs();
                        assert!(
                            err <= tol,
                            "{by:?} {m} × {n} × {k} [{}, {}]: {got}, expected {want}",
                            r - 2,
                            c - 3
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn an_element_depends_on_its_row_and_column_alone() {
        let (m, n, k) = (29, 290, 530);
        let (a, b) = (normal::<f32>(1, m * k, 1.0), normal::<f32>(2, n * k, 1.0));
        let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
        for by in kernels() {
            let mut whole = normal::<f32>(3, m * n, 1.0);
            let old = whole.clone();
            with(by, &mut TileMut::new(&mut whole, m, n), true, a, b);
            for (rows, cols) in [(0..2, 0..n), (3..17, 250..290), (11..29, 5..6)] {
                let mut part: Vec<f32> =
                    rows.clone().flat_map(|r| old[r * n..][cols.clone()].to_vec()).collect();
                let mut dst = TileMut::new(&mut part, rows.len(), cols.len());
                with(by, &mut dst, true, a.rows(rows.clone()), b.t().rows(cols.clone()).t());
                for (r, part) in rows.zip(part.chunks(cols.len())) {
                    assert_eq!(part, &whole[r * n..][cols.clone()], "{by:?}: row {r}");
                }
            }
        }
    }

    #[test]
    fn packed_columns_give_the_same_bits() {
        for (m, n, k) in
            [(1, 1, 1), (1, 1, 530), (1, 290, 530), (3, 31, 5), (15, 290, 530), (29, 512, 256), (2, 33, 0)]
        {
            let (a, b) = (normal::<f32>(1, m * k, 1.0), normal::<f32>(2, n * k, 1.0));
            let a = Mat::new(&a, (m, k), (k, 1));
            for (by, b) in kernels().flat_map(|by| {
                [Mat::new(&b, (k, n), (n, 1)), Mat::new(&b, (n, k), (k, 1)).t()].map(|b| (by, b))
            }) {
                let width = match by {
                    By::Set(set) => run_on(set, pack::Width),
                    By::Lanes => 8,
                };
                let mut packed = vec![f32::NAN; k * n.next_multiple_of(width)];
                match by {
                    By::Set(set) => run_on(set, pack::Pack { out: &mut packed, stride: k * width, b }),
                    By::Lanes => pack::panels::<8>(&mut packed, k * width, b),
                }
                let panels = Panels::new(&packed, k * width);
                let old = normal::<f32>(3, m * n, 1.0);
                for keep in [false, true] {
                    let (mut got, mut want) = (old.clone(), old.clone());
                    multiply(by, &mut TileMut::new(&mut got, m, n), keep, a, Right::Packed(panels));
                    multiply(by, &mut TileMut::new(&mut want, m, n), keep, a, Right::Lies(b));
                    assert_eq!(got, want, "{by:?} {m} × {n} × {k}");
                }
                // From a panel's column and a block's row on.
                if (m, n, k) == (15, 290, 530) {
                    let (mut got, mut want) = (old.clone(), old.clone());
                    let (columns, rows) = (n - 256, k - 256);
                    let part = Right::Packed(panels.from(256 / width, 256 * width));
                    let a = a.block(0..m, 256..k);
                    multiply(by, &mut TileMut::new(&mut got, m, columns), true, a, part);
                    let part = Right::Lies(b.block(256..k, 256..n));
                    multiply(by, &mut TileMut::new(&mut want, m, columns), true, a, part);
                    assert_eq!(got, want, "{by:?}: {rows} rows");
                }
            }
        }
    }

    #[test]
    fn sums_over_nothing_are_done_too() {
        for keep in [false, true] {
            let (mut sums, mut taken) = (vec![3f32; 6], Taken::new(2, 3));
            let (a, b) = (Mat::new(&[], (2, 0), (1, 1)), Mat::new(&[], (0, 3), (1, 1)));
            let mut done = taken.done();
            let end = End { more: None, done: Some(&mut done) };
            product(&mut TileMut::new(&mut sums, 2, 3), keep, a, Right::Lies(b), end);
            drop(done);
            taken.were(&[if keep { 3.0 } else { 0.0 }; 6]);
        }
    }

    #[test]
    fn more_is_what_another_product_would_add() {
        for (m, n, k, r) in [(2, 1, 1, 1), (15, 290, 530, 8), (29, 33, 256, 64), (3, 600, 300, 5)] {
            let numbers = |seed, len| normal::<f32>(seed, len, 1.0);
            let (a, b) = (numbers(1, m * k), numbers(2, n * k));
            let (thin_a, thin_b) = (numbers(4, m * (r + 2)), numbers(5, r * (n + 1)));
            let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
            let more =
                More { a: Mat::new(&thin_a, (m, r), (r + 2, 1)), b: Mat::new(&thin_b, (r, n), (n + 1, 1)) };
            let old = numbers(3, m * n);
            for (by, keep) in kernels().flat_map(|by| [(by, false), (by, true)]) {
                let (mut got, mut want) = (old.clone(), old.clone());
                let mut dst = TileMut::new(&mut got, m, n);
                let b = Right::Lies(b);
                let mut taken = Taken::new(m, n);
                pack::with_room(|room| {
                    let mut done = taken.done();
                    let end = End { more: Some(more), done: Some(&mut done) };
                    let product = Product { dst: &mut dst, keep, a, b, end, room };
                    match by {
                        By::Set(set) => run_on(set, product),
                        // SAFETY: these are plain numbers.
                        By::Lanes => unsafe { product.by::<micro::Lanes<f32, 4>, 6, 3, 2, 8>() },
                    }
                });
                multiply(by, &mut TileMut::new(&mut want, m, n), keep, a, b);
                multiply(by, &mut TileMut::new(&mut want, m, n), true, more.a, Right::Lies(more.b));
                assert_eq!(got, want, "{by:?} {m} × {n} × {k}, {r}");
                taken.were(&want);
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_row_and_column() {
        let (m, n, k) = (9, 37, 11);
        let (mut a, mut b) = (vec![1f32; m * k], vec![1f32; k * n]);
        (a[7 * k + 4], b[3 * n + 35]) = (f32::NAN, f32::INFINITY);
        let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (k, n), (n, 1)));
        for by in kernels() {
            let mut c = vec![f32::NAN; m * n];
            with(by, &mut TileMut::new(&mut c, m, n), false, a, b);
            for (i, x) in c.iter().enumerate() {
                let right = match (i / n, i % n) {
                    (7, _) => x.is_nan(),
                    (_, 35) => *x == f32::INFINITY,
                    _ => *x == k as f32,
                };
                assert!(right, "{by:?} [{}, {}] = {x}", i / n, i % n);
            }
        }
    }

    /// `cargo test --release --lib beside_two_crates -- --ignored --nocapture` prints docs/performance.md's table.
    #[test]
    #[ignore = "a measurement, not a check"]
    fn beside_two_crates() {
        // T, O, I; forward is x Wᵀ over I, backward dy W over O.
        let shapes = [
            (1024, 1024, 1024),
            (1024, 2816, 1024),
            (1024, 1024, 2816),
            (1024, 1127, 1024),
            (256, 32_000, 1024),
            (512, 4096, 4096),
            (1500, 192, 192),
            (1500, 512, 192),
            (1500, 192, 512),
            (4096, 64, 64),
            (4096, 172, 64),
            (4096, 64, 172),
            (4096, 32, 64),
            (1, 1024, 1024),
            (16, 1024, 1024),
        ];
        let numbers = |n: usize| (0..n).map(|i| (i * 7919 % 1009) as f32 / 504.0 - 1.0).collect::<Vec<_>>();
        println!(
            "| T | O | I | forward ours | gemm | matrixmultiply | backward ours | gemm | matrixmultiply |"
        );
        for (t, o, i) in shapes {
            let (x, w, dy) = (numbers(t * i), numbers(o * i), numbers(t * o));
            let (mut y, mut dx) = (vec![0f32; t * o], vec![0f32; t * i]);
            let w_t = Mat::new(&w, (o, i), (i, 1)).t();
            let forward = (Mat::new(&x, (t, i), (i, 1)), w_t);
            let backward = (Mat::new(&dy, (t, o), (o, 1)), w_t.t());
            let mut line = format!("| {t} | {o} | {i} |");
            for (out, (a, b)) in [(&mut y, forward), (&mut dx, backward)] {
                let (m, k, n) = (a.size.0, a.size.1, b.size.1);
                let [ars, acs, brs, bcs] =
                    [a.strides.0, a.strides.1, b.strides.0, b.strides.1].map(|s| s as isize);
                let (a_start, b_start, start) = (a.data.as_ptr(), b.data.as_ptr(), out.as_mut_ptr());
                // In turns, so that what else the machine does slows all of them.
                let times = best([
                    &mut || product(&mut TileMut::new(out, m, n), false, a, Right::Lies(b), End::default()),
                    // SAFETY: sizes and strides are those of the three slices.
                    &mut || unsafe {
                        gemm::gemm(
                            m,
                            n,
                            k,
                            start,
                            1,
                            n as isize,
                            false,
                            a_start,
                            acs,
                            ars,
                            b_start,
                            bcs,
                            brs,
                            0.0,
                            1.0,
                            false,
                            false,
                            false,
                            gemm::Parallelism::None,
                        );
                    },
                    // SAFETY: sizes and strides are those of the three slices.
                    &mut || unsafe {
                        matrixmultiply::sgemm(
                            m, k, n, 1.0, a_start, ars, acs, b_start, brs, bcs, 0.0, start, n as isize, 1,
                        );
                    },
                ]);
                black_box(&out);
                for time in times {
                    line += &format!(" {:.0} |", (2 * t * o * i) as f64 / time.as_secs_f64() / 1e9);
                }
            }
            println!("{line}");
        }
    }

    /// The shortest time of each.
    fn best(mut all: [&mut dyn FnMut(); 3]) -> [Duration; 3] {
        let mut best = [Duration::MAX; 3];
        let begin = Instant::now();
        for round in 0.. {
            if round >= 12 && begin.elapsed() > Duration::from_millis(300) {
                break;
            }
            for (f, best) in all.iter_mut().zip(&mut best) {
                let start = Instant::now();
                f();
                *best = start.elapsed().min(*best);
            }
        }
        best
    }
}
