//! One product of bf16 on one thread, with instructions that add the products of two numbers to a sum at once.
//!
//! b goes through the thread's room in blocks of at most [`DEPTH`] × [`COLUMNS`], packed in panels of 16 columns, unless
//! it was packed before: a row of a panel holds two numbers of each column, one below the other. a is read where it lies,
//! 32 rows at a time, or is copied where those are not whole. Each element is summed over K in one order, whatever its
//! place and the sizes of dst; where K ends, products are made of zeros. Products are exact and sums are f32, to the
//! nearest; subnormal numbers count as 0.

mod dots;
mod panels;
#[cfg(test)]
mod tests;

use half::bf16;

use self::dots::Dots;
use self::panels::rows_of_pairs;
use super::amx::Tiles;
use super::block::{SIDE, STEP, Size};
use super::pack::{self, Panels};
use super::{End, Mat, More, Right, TileMut, nothing, ranks};
use crate::cpu::operand::narrow;
use crate::cpu::simd::{self, Instructions, Isa, Kernel, prefetch_second};
use crate::cpu::thin::Lines;
use crate::tensor::{DType, Real};

pub(super) use self::dots::spin;
pub(in crate::cpu) use self::panels::{pack, panels};

/// Columns of b that are packed at a time.
const COLUMNS: usize = super::COLUMNS;
/// Rows of b that are packed at a time, which take the room of half as many f32.
const DEPTH: usize = 2 * super::DEPTH;
/// Columns of a panel.
pub(in crate::cpu) const PANEL: usize = 16;
/// Pairs of a panel come in multiples of this, zeros after the last: as many as any square wants.
const PAIRS: usize = Tiles::STEP;
// A thin b is rounded where a strip of a comes after.
const _: () = assert!(super::RANKS * COLUMNS <= SIDE * DEPTH);
const _: () = assert!(PAIRS.is_multiple_of(Dots::STEP) && SIDE == 2 * PANEL && STEP == PAIRS);

/// Two numbers of a column of b, one below the other.
pub(in crate::cpu) type Pair = [bf16; 2];

/// The instructions that multiply pairs, which the processor has.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Pairs(By);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// `vdpbf16ps` of AVX-512.
    Dots,
    /// Tiles of AMX.
    Tiles,
}

impl Pairs {
    /// Those that are [used](Instructions::used), if any.
    pub(in crate::cpu) fn used() -> Option<Pairs> {
        Pairs::of(Instructions::used())
    }

    /// Those of a set that the processor has, or that is done in its place.
    fn of(set: Instructions) -> Option<Pairs> {
        match set {
            Instructions::Baseline | Instructions::Avx2 | Instructions::Avx512 => None,
            Instructions::Avx512Bf16 => Some(Pairs(By::Dots)),
            Instructions::Amx => Some(Pairs(By::Tiles)),
        }
    }

    /// `dst = a b`, added to what `dst` holds if `keep`, and its end; rows or columns of each are contiguous, and what is
    /// f32 is rounded to bf16.
    pub(in crate::cpu) fn product<A: Real>(
        self,
        dst: &mut TileMut<'_, f32>,
        keep: bool,
        a: Mat<'_, A>,
        b: Right<'_, bf16, Pair>,
        end: End<'_>,
    ) {
        assert!(a.size.0 == dst.rows && end.more.is_none_or(|more| more.fits(dst)));
        if let Right::Lies(b) = b {
            assert!(b.size.1 == dst.cols && a.size.1 == b.size.0);
        }
        // SAFETY: they are made of sets that the processor has, or of one that is done in its place.
        unsafe {
            match self.0 {
                By::Dots => run(&Dots, dst, keep, a, b, end),
                By::Tiles => run(&Tiles::new(), dst, keep, a, b, end),
            }
        }
    }

    /// `c = a b` of a block that lies in the nearest caches, added to what `c` holds if `add`: every f32 of a and b stands for
    /// two bf16 that are neighbours along k. Rows, columns and depth count what is multiplied: rows are rounded up to
    /// [`SIDE`], of which c and a have as many, columns are a multiple of it, and the depth is one of [`STEP`].
    pub(in crate::cpu) fn block(self, c: &mut [f32], add: bool, a: (&[f32], usize), b: &[f32], size: Size) {
        let size = Size { rows: size.rows.next_multiple_of(SIDE), ..size };
        let Size { rows, columns, depth } = size;
        if rows == 0 || columns == 0 {
            return;
        }
        assert!(columns.is_multiple_of(SIDE) && depth.is_multiple_of(STEP));
        assert!(rows * columns <= c.len() && depth * columns <= b.len());
        assert!((rows - 1) * a.1 + depth <= a.0.len());
        // SAFETY: the instructions are there (`product`); the sizes fit, as was just seen.
        unsafe {
            match self.0 {
                By::Dots => squares(&Dots, c, add, a, b, size),
                By::Tiles => squares(&Tiles::new(), c, add, a, b, size),
            }
        }
    }

    /// `out[m, R] = x[m, K] f[R, K]ᵀ`, added if `keep`: R is the rank of an adapter.
    pub(in crate::cpu) fn ranks(
        self,
        out: &mut TileMut<'_, f32>,
        keep: bool,
        x: Mat<'_, bf16>,
        f: Mat<'_, bf16>,
    ) {
        match self.0 {
            // SAFETY: the instructions are there (`product`).
            By::Dots => unsafe { ranks::product(out, keep, x, f) },
            By::Tiles => self.product(out, keep, x, Right::Lies(f.t()), End::default()),
        }
    }

    /// `out[R, n] += u[K, R]ᵀ x[K, n]`, u rounded to bf16: R is the rank of an adapter.
    pub(in crate::cpu) fn outer<U: Real>(
        self,
        out: &mut TileMut<'_, f32>,
        u: Lines<'_, U>,
        x: Mat<'_, bf16>,
    ) {
        match self.0 {
            // SAFETY: as before.
            By::Dots => unsafe { ranks::outer(out, u, x) },
            By::Tiles => {
                let u = Mat::new(u.data, (x.size.0, out.size().0), (u.stride, 1)).t();
                self.product(out, true, u, Right::Lies(x), End::default());
            }
        }
    }

    /// `dst += a b` of a thin product, as [`product`](Self::product) adds it.
    pub(in crate::cpu) fn add(self, dst: &mut TileMut<'_, f32>, more: More<'_>) {
        assert!(more.fits(dst));
        // SAFETY: as before.
        unsafe {
            match self.0 {
                By::Dots => add(&Dots, dst, more),
                By::Tiles => add(&Tiles::new(), dst, more),
            }
        }
    }
}

/// [`Pairs::block`].
///
/// # Safety
/// The processor has the instructions of `square`; sizes are multiples of what it takes, and the slices have them.
unsafe fn squares(
    square: &impl Square,
    c: &mut [f32],
    keep: bool,
    (a, stride): (&[f32], usize),
    b: &[f32],
    Size { rows, columns, depth }: Size,
) {
    let (a, b): (&[bf16], &[Pair]) = (bytemuck::cast_slice(a), bytemuck::cast_slice(b));
    let (out_stride, a_stride, b_stride) = (columns, 2 * stride, columns);
    for i in (0..rows).step_by(SIDE) {
        for j in (0..columns).step_by(SIDE) {
            // SAFETY: as the caller says.
            unsafe {
                let out = c.as_mut_ptr().add(i * columns + j);
                let (a, b) = (a.as_ptr().add(i * a_stride), b.as_ptr().add(j));
                let beside = b.add(PANEL);
                square.multiply(Operands {
                    out,
                    out_stride,
                    keep,
                    a,
                    a_stride,
                    b,
                    beside,
                    b_stride,
                    pairs: depth,
                });
            }
        }
    }
}

/// What a square of sums is made of, and where it goes.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// 32 rows of 32 numbers.
    pub out: *mut f32,
    /// From row to row of `out`.
    pub out_stride: usize,
    /// What `out` holds is added to.
    pub keep: bool,
    /// 32 rows of `2 pairs` numbers.
    pub a: *const bf16,
    /// From row to row of a.
    pub a_stride: usize,
    /// A panel: `pairs` rows of 16 pairs.
    pub b: *const Pair,
    /// The next one.
    pub beside: *const Pair,
    /// From row to row of both.
    pub b_stride: usize,
    /// Pairs of K, a multiple of [`Square::STEP`].
    pub pairs: usize,
}

/// A micro-kernel: a square of sums.
pub(super) trait Square {
    /// Pairs of K that it takes at a time.
    const STEP: usize;

    /// `out[32, 32] = a b`, added if `keep`.
    ///
    /// # Safety
    /// The processor has the instructions; the operands are as they say.
    unsafe fn multiply(&self, of: Operands);
}

/// The product, square by square.
///
/// # Safety
/// The processor has the instructions of `square`.
unsafe fn run<A: Real, S: Square>(
    square: &S,
    dst: &mut TileMut<'_, f32>,
    keep: bool,
    a: Mat<'_, A>,
    b: Right<'_, bf16, Pair>,
    End { more, mut done }: End<'_>,
) {
    let (rows, columns, depth) = (a.size.0, dst.cols, a.size.1);
    if depth == 0 {
        return nothing(dst, keep, done);
    }
    pack::with_room(|room| {
        let packed: &mut [Pair] = bytemuck::cast_slice_mut(room.panels);
        let thin_panels: &mut [Pair] = bytemuck::cast_slice_mut(room.thin);
        let (lines, thin_lines) = bytemuck::cast_slice_mut(room.lines).split_at_mut(SIDE * DEPTH);
        for n in (0..columns).step_by(COLUMNS) {
            let ns = n..(n + COLUMNS).min(columns);
            let more = more.map(|More { a, b }| {
                (a, thin(thin_panels, lines, b.block(0..b.size.0, ns.clone())), pairs::<S>(b.size.0))
            });
            for k in (0..depth).step_by(DEPTH) {
                let ks = k..(k + DEPTH).min(depth);
                let pairs = pairs::<S>(ks.len());
                let (panels, next) = match b {
                    Right::Lies(b) => {
                        let stride = rows_of_pairs(ks.len()) * PANEL;
                        pack(packed, stride, b.block(ks.clone(), ns.clone()));
                        (Panels::new(packed, stride), None)
                    }
                    Right::Packed(panels) => {
                        let next = (ks.end < depth).then(|| panels.from(n / PANEL, ks.end / 2 * PANEL));
                        (panels.from(n / PANEL, k / 2 * PANEL), next)
                    }
                };
                let ahead = next.map(|next| Ahead {
                    panels: next,
                    count: ns.len().div_ceil(PANEL),
                    len: (depth - ks.end).min(DEPTH) / 2 * PANEL,
                    each: ns.len().div_ceil(PANEL).div_ceil(rows.div_ceil(SIDE).max(1)),
                });
                for m in (0..rows).step_by(SIDE) {
                    let ms = m..(m + SIDE).min(rows);
                    let a = strip(lines, a.block(ms.clone(), ks.clone()), 2 * pairs);
                    let mut dst = dst.block(ms.clone(), ns.clone());
                    let ahead = ahead.map(|ahead| (ahead, m / SIDE));
                    // SAFETY: the caller has the instructions; a strip has 32 rows of as many numbers.
                    unsafe { row_of_squares(square, &mut dst, keep || k > 0, a, panels, pairs, ahead) };
                    if ks.end < depth {
                        continue;
                    }
                    if let Some((a, panels, pairs)) = more {
                        let a = strip(thin_lines, a.block(ms.clone(), 0..a.size.1), 2 * pairs);
                        // SAFETY: as before.
                        unsafe { row_of_squares(square, &mut dst, true, a, panels, pairs, None) };
                    }
                    if let Some(done) = &mut done {
                        done(dst, (ms.start, n));
                    }
                }
            }
        }
    });
}

/// [`Pairs::add`].
///
/// # Safety
/// The processor has the instructions of `square`.
unsafe fn add<S: Square>(square: &S, dst: &mut TileMut<'_, f32>, More { a, b }: More<'_>) {
    let ((rows, columns), depth) = (dst.size(), b.size.0);
    let pairs = pairs::<S>(depth);
    pack::with_room(|room| {
        let panels: &mut [Pair] = bytemuck::cast_slice_mut(room.thin);
        let lines: &mut [bf16] = bytemuck::cast_slice_mut(room.lines);
        for n in (0..columns).step_by(COLUMNS) {
            let ns = n..(n + COLUMNS).min(columns);
            let panels = thin(panels, lines, b.block(0..depth, ns.clone()));
            for m in (0..rows).step_by(SIDE) {
                let ms = m..(m + SIDE).min(rows);
                let a = strip(lines, a.block(ms.clone(), 0..depth), 2 * pairs);
                // SAFETY: the caller has the instructions; a strip has 32 rows of as many numbers.
                unsafe {
                    row_of_squares(square, &mut dst.block(ms, ns.clone()), true, a, panels, pairs, None)
                };
            }
        }
    });
}

/// A few rows of b, rounded, in panels; with room for the numbers.
fn thin<'r>(panels: &'r mut [Pair], room: &mut [bf16], b: Mat<'_>) -> Panels<'r, Pair> {
    let (stride, (depth, columns)) = (rows_of_pairs(b.size.0) * PANEL, b.size);
    let rounded = &mut room[..depth * columns];
    rounded.chunks_exact_mut(columns).enumerate().for_each(|(k, out)| narrow(out, b.row(k)));
    pack(panels, stride, Mat::new(rounded, b.size, (columns, 1)));
    Panels::new(panels, stride)
}

/// 32 rows, the first of them a's, the others anything, each of `depth` numbers, zeros after its own: where a lies if it is
/// so already.
fn strip<'r, A: Real>(room: &'r mut [bf16], a: Mat<'r, A>, depth: usize) -> (&'r [bf16], usize) {
    if A::DTYPE == DType::BF16 && a.strides.1 == 1 && a.size == (SIDE, depth) {
        return (bytemuck::cast_slice(a.data), a.strides.0);
    }
    let room = &mut room[..SIDE * depth];
    simd::run(Copied { out: room, stride: depth, a });
    (room, depth)
}

/// At most 32 rows of a, rounded, `stride` numbers apart, zeros after each.
struct Copied<'a, A> {
    out: &'a mut [bf16],
    stride: usize,
    a: Mat<'a, A>,
}

impl<A: Real> Kernel for Copied<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        const PART: usize = 64;
        let Copied { out, stride, a } = self;
        let (rows, depth) = a.size;
        out.chunks_exact_mut(stride).take(rows).for_each(|out| out[depth..].fill(bf16::ZERO));
        if a.strides.1 == 1 {
            for (r, out) in out.chunks_exact_mut(stride).enumerate().take(rows) {
                let (out, row) = (&mut out[..depth], a.row(r));
                match A::DTYPE {
                    DType::BF16 => out.copy_from_slice(bytemuck::cast_slice(row)),
                    DType::F32 => narrow(out, bytemuck::cast_slice(row)),
                    DType::F16 => {
                        out.iter_mut().zip(row).for_each(|(out, x)| *out = Real::from_f32(x.to_f32()))
                    }
                }
            }
            return;
        }
        let a = a.t();
        for k in (0..depth).step_by(PART) {
            let some = PART.min(depth - k);
            let (mut lines, mut turned) = ([[0f32; SIDE]; PART], [[0f32; PART]; SIDE]);
            for (line, k) in lines.iter_mut().zip(k..k + some) {
                line.iter_mut().zip(a.row(k)).for_each(|(line, x)| *line = x.to_f32());
            }
            let lines = Mat::new(lines.as_flattened(), (some, rows), (SIDE, 1));
            pack::transpose(turned.as_flattened_mut(), PART, lines);
            for (r, turned) in turned.iter().enumerate().take(rows) {
                narrow(&mut out[r * stride + k..][..some], &turned[..some]);
            }
        }
    }
}

/// The block of b that comes next, packed already: each strip of a asks for some of its panels, a part with each square, so
/// that they come while others are multiplied.
#[derive(Clone, Copy)]
struct Ahead<'a> {
    panels: Panels<'a, Pair>,
    /// Panels of the block.
    count: usize,
    /// Pairs of a panel.
    len: usize,
    /// Panels that a strip asks for.
    each: usize,
}

impl Ahead<'_> {
    /// Asks for what strip `strip` has to with square `p` of `squares`.
    #[inline(always)]
    fn ask(&self, strip: usize, p: usize, squares: usize) {
        let part = self.len.div_ceil(squares).next_multiple_of(PANEL);
        let some = (p * part).min(self.len)..((p + 1) * part).min(self.len);
        for panel in strip * self.each..((strip + 1) * self.each).min(self.count) {
            let lines = self.panels.some(panel, self.len)[some.clone()].chunks(PANEL);
            lines.for_each(|line| prefetch_second(line.as_ptr()));
        }
    }
}

/// `dst = a b` of a strip of a and a block of panels.
///
/// # Safety
/// The processor has the instructions of `square`; a has 32 rows of `2 pairs` numbers.
unsafe fn row_of_squares(
    square: &impl Square,
    dst: &mut TileMut<'_, f32>,
    keep: bool,
    (a, stride): (&[bf16], usize),
    panels: Panels<'_, Pair>,
    pairs: usize,
    ahead: Option<(Ahead<'_>, usize)>,
) {
    assert!(a.len() >= (SIDE - 1) * stride + 2 * pairs);
    let (rows, columns) = dst.size();
    let squares = columns.div_ceil(SIDE);
    for p in 0..squares {
        if let Some((ahead, strip)) = ahead {
            ahead.ask(strip, p, squares);
        }
        let ns = p * SIDE..(p * SIDE + SIDE).min(columns);
        let [b, beside] = [2 * p, 2 * p + 1].map(|p| panels.some(p, pairs * PANEL).as_ptr());
        let mut out = dst.block(0..rows, ns);
        let (out_stride, a_stride) = (out.stride, stride);
        let a = a.as_ptr();
        let whole =
            Operands { out: out.start, out_stride, keep, a, a_stride, b, beside, b_stride: PANEL, pairs };
        // SAFETY: what is whole has 32 rows and columns, and so has `part`; a and the panels are as was just seen.
        unsafe {
            if out.size() == (SIDE, SIDE) {
                square.multiply(whole);
                continue;
            }
            let mut part = [[0f32; SIDE]; SIDE];
            let columns = out.size().1;
            if keep {
                (0..rows).for_each(|r| part[r][..columns].copy_from_slice(out.row(r)));
            }
            square.multiply(Operands { out: part.as_mut_ptr().cast(), out_stride: SIDE, ..whole });
            (0..rows).for_each(|r| out.row(r).copy_from_slice(&part[r][..columns]));
        }
    }
}

/// Pairs of `depth` numbers that S multiplies.
const fn pairs<S: Square>(depth: usize) -> usize {
    depth.div_ceil(2).next_multiple_of(S::STEP)
}
