//! One product of bf16 on one thread, with instructions that add the products of two numbers to a sum at once.
//!
//! b goes through the thread's room in blocks of at most [`DEPTH`] × [`COLUMNS`], packed in panels of 16 columns, unless
//! it was packed before: a row of a panel holds two numbers of each column, one below the other. a is read where it lies,
//! 32 rows at a time, or is copied where those are not whole. Each element is summed over K in one order, whatever its
//! place and the sizes of dst; where K ends, products are made of zeros. Products are exact and sums are f32, to the
//! nearest; subnormal numbers count as 0.

use std::arch::x86_64::{
    __m512bh, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::hint::black_box;
use std::mem::transmute;
use std::ops::Range;

use half::bf16;

use super::amx::Tiles;
use super::block::{SIDE, STEP, Size};
use super::pack::{self, Panels};
use super::{End, Mat, More, Right, TileMut, nothing, ranks};
use crate::cpu::operand::narrow;
use crate::cpu::simd::{self, Instructions, Isa, Kernel, prefetch_second};
use crate::cpu::thin::Lines;
use crate::tensor::{DType, Real};

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

/// Rows of a panel of `depth` rows of b: pairs, and zeros.
const fn rows_of_pairs(depth: usize) -> usize {
    depth.div_ceil(2).next_multiple_of(PAIRS)
}

/// Pairs of a panel of `depth` rows of b, and the panels that `columns` take, an even number.
pub(in crate::cpu) const fn panels(depth: usize, columns: usize) -> (usize, usize) {
    (rows_of_pairs(depth) * PANEL, columns.next_multiple_of(SIDE) / PANEL)
}

/// b in panels `stride` apart, an even number of them, zeros below its last row and after its last column.
pub(in crate::cpu) fn pack(out: &mut [Pair], stride: usize, b: Mat<'_, bf16>) {
    simd::run(Pack { out, stride, b });
}

struct Pack<'a> {
    out: &'a mut [Pair],
    stride: usize,
    b: Mat<'a, bf16>,
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Pack { out, stride, b } = self;
        let (depth, columns) = b.size;
        let (len, count) = panels(depth, columns);
        for p in 0..count {
            let panel = &mut out[p * stride..][..len];
            let ns = (p * PANEL).min(columns)..((p + 1) * PANEL).min(columns);
            // Only what is not written below.
            if ns.len() < PANEL {
                panel.fill([bf16::ZERO; 2]);
            } else {
                panel[depth / 2 * PANEL..].fill([bf16::ZERO; 2]);
            }
            if b.strides.1 == 1 {
                interleave(panel, b, ns);
            } else {
                turn(panel, b.t(), ns);
            }
        }
    }
}

/// Rows of b by twos.
#[inline(always)]
fn interleave(panel: &mut [Pair], b: Mat<'_, bf16>, ns: Range<usize>) {
    let (panel, _) = panel.as_chunks_mut::<PANEL>();
    for (k, out) in panel.iter_mut().enumerate().take(b.size.0.div_ceil(2)) {
        let above = &b.row(2 * k)[ns.clone()];
        if 2 * k + 1 == b.size.0 {
            out.iter_mut().zip(above).for_each(|(out, x)| *out = [*x, bf16::ZERO]);
            continue;
        }
        let below = &b.row(2 * k + 1)[ns.clone()];
        match (above.first_chunk(), below.first_chunk()) {
            (Some(above), Some(below)) => *out = by_twos(above, below),
            _ => out.iter_mut().zip(above.iter().zip(below)).for_each(|(out, (x, y))| *out = [*x, *y]),
        }
    }
}

/// Two rows as pairs; a loop, for what is called once for each of its numbers is not made of vectors.
#[inline(always)]
fn by_twos(above: &[bf16; PANEL], below: &[bf16; PANEL]) -> [Pair; PANEL] {
    let mut out = [0u32; PANEL];
    for n in 0..PANEL {
        out[n] = u32::from(above[n].to_bits()) | u32::from(below[n].to_bits()) << 16;
    }
    bytemuck::cast(out)
}

/// Columns of b, which are rows of `b`, four pairs of four of them at a time.
#[inline(always)]
fn turn(panel: &mut [Pair], b: Mat<'_, bf16>, ns: Range<usize>) {
    let depth = b.size.1;
    let whole = ns.len() / pack::SIDE * pack::SIDE;
    let squares = depth / (2 * pack::SIDE);
    let pairs = |n: usize| b.row(ns.start + n).as_chunks::<2>();
    for n in (0..whole).step_by(pack::SIDE) {
        let rows: [&[[Pair; pack::SIDE]]; pack::SIDE] = std::array::from_fn(|i| pairs(n + i).0.as_chunks().0);
        for k in 0..squares {
            let turned = pack::square(bytemuck::cast(rows.map(|row| row[k])));
            for (j, row) in turned.iter().enumerate() {
                panel[(k * pack::SIDE + j) * PANEL + n..][..pack::SIDE].copy_from_slice(&bytemuck::cast::<
                    _,
                    [Pair; 4],
                >(
                    *row
                ));
            }
        }
    }
    for n in 0..ns.len() {
        let (pairs, last) = pairs(n);
        let done = if n < whole { squares * pack::SIDE } else { 0 };
        for (k, pair) in pairs.iter().enumerate().skip(done) {
            panel[k * PANEL + n] = *pair;
        }
        if let [last] = last {
            panel[pairs.len() * PANEL + n] = [*last, bf16::ZERO];
        }
    }
}

/// The micro-kernel of AVX-512: eight rows and two panels in registers.
struct Dots;

impl Square for Dots {
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn multiply(&self, of: Operands) {
        // SAFETY: as the caller says.
        unsafe { dots(of) }
    }
}

/// Rows of sums in registers.
const ROWS: usize = 8;

/// [`Square::multiply`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn dots(Operands { out, out_stride, keep, a, a_stride, b, beside, b_stride, pairs }: Operands) {
    for row in (0..SIDE).step_by(ROWS) {
        // SAFETY: rows stay below 32 and pairs below their number; a register of bf16 is 512 bits like any other.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            for k in 0..pairs {
                let left: __m512bh = transmute(_mm512_loadu_si512(b.add(k * b_stride).cast()));
                let right: __m512bh = transmute(_mm512_loadu_si512(beside.add(k * b_stride).cast()));
                for (m, sums) in sums.iter_mut().enumerate() {
                    let pair = a.add((row + m) * a_stride + 2 * k).cast::<i32>().read_unaligned();
                    let pair: __m512bh = transmute(_mm512_set1_epi32(pair));
                    *sums = [_mm512_dpbf16_ps(sums[0], pair, left), _mm512_dpbf16_ps(sums[1], pair, right)];
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                for (p, sum) in sums.iter().enumerate() {
                    let out = out.add((row + m) * out_stride + p * PANEL);
                    let was = if keep { _mm512_loadu_ps(out) } else { _mm512_setzero_ps() };
                    _mm512_storeu_ps(out, _mm512_add_ps(was, *sum));
                }
            }
        }
    }
}

/// Adds products of pairs to N registers of sums `rounds` times, and reads nothing: the multiplications and additions.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn spin<const N: usize>(rounds: usize) -> usize {
    let ones = black_box([bf16::ONE; 2 * PANEL]);
    // SAFETY: a register of bf16 is 512 bits, which is what 32 of them take.
    unsafe {
        let ones: __m512bh = transmute(ones);
        let mut sums = [_mm512_setzero_ps(); N];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        let mut out = [0f32; PANEL];
        for sum in sums {
            _mm512_storeu_ps(out.as_mut_ptr(), sum);
            // As far as f32 counts.
            debug_assert!(rounds > 1 << 22 || out == [2.0 * rounds as f32; PANEL]);
            black_box(out);
        }
    }
    N * 2 * 2 * PANEL * rounds
}

#[cfg(test)]
mod tests {
    use super::super::Shared;
    use super::super::amx;
    use super::super::tests::Taken;
    use super::*;
    use crate::ops::cases::normal;

    /// The instructions that the processor has, and tiles, one instruction at a time where it has none.
    fn all() -> Vec<Pairs> {
        let mut all: Vec<Pairs> = Instructions::here().filter_map(Pairs::of).collect();
        #[cfg(target_os = "linux")]
        if !amx::built_in() && all.iter().all(|pairs| pairs.0 != By::Tiles) {
            amx::trap::install();
            all.push(Pairs(By::Tiles));
        }
        all
    }

    fn at(m: Mat<'_, bf16>, r: usize, c: usize) -> f64 {
        m.data[r * m.strides.0 + c * m.strides.1].to_f64()
    }

    #[test]
    fn as_the_sums() {
        let sizes = [
            (2, 1, 1),
            (3, 31, 5),
            (5, 17, 0),
            (32, 32, 64),
            (33, 65, 33),
            (64, 32, 1024),
            (40, 257, 530),
            (37, 9, 1127),
            (0, 4, 4),
            (4, 0, 4),
        ];
        for (m, n, k) in sizes {
            // Rows that are longer than what they hold, and columns.
            let layouts = |rows: usize, columns: usize| [(columns + 3, 1), (1, rows + 5)];
            let both = layouts(m, k).into_iter().flat_map(|a| layouts(k, n).map(|b| (a, b)));
            for (i, (a_strides, b_strides)) in both.enumerate() {
                let keep = i % 2 == 1;
                let numbers =
                    |seed, rows: usize, columns: usize| normal::<bf16>(seed, (rows + 5) * (columns + 5), 1.0);
                let (a, b) = (numbers(1, m, k), numbers(2, k, n));
                let (a, b) = (Mat::new(&a, (m, k), a_strides), Mat::new(&b, (k, n), b_strides));
                let stride = n + 7;
                let old = normal::<f32>(3, (m + 4) * stride, 1.0);
                for pairs in all() {
                    let mut got = old.clone();
                    for (r, row) in got.chunks_mut(stride).enumerate() {
                        let inside = (2..2 + m).contains(&r) && !keep;
                        row[3..3 + n].iter_mut().filter(|_| inside).for_each(|x| *x = f32::NAN);
                    }
                    let shared = Shared::new(&mut got);
                    // SAFETY: it is the only tile.
                    let mut dst = unsafe { shared.tile(2 * stride + 3, m, n, stride) };
                    pairs.product(&mut dst, keep, a, Right::Lies(b), End::default());
                    for (i, got) in got.iter().enumerate() {
                        let (r, c) = (i / stride, i % stride);
                        if !(2..2 + m).contains(&r) || !(3..3 + n).contains(&c) {
                            assert_eq!(got.to_bits(), old[i].to_bits(), "{pairs:?}: {r}, {c} is outside");
                            continue;
                        }
                        let terms = (0..k).map(|k| at(a, r - 2, k) * at(b, k, c - 3));
                        let was = if keep { f64::from(old[i]) } else { 0.0 };
                        let (sum, size) = terms.fold((was, was.abs()), |(s, z), x| (s + x, z + x.abs()));
                        let tol = (k + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * size;
                        let err = (f64::from(*got) - sum).abs();
                        assert!(
                            err <= tol,
                            "{pairs:?} {m} × {n} × {k} [{}, {}]: {got}, expected {sum}",
                            r - 2,
                            c - 3
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_left_factor_in_f32_is_rounded() {
        let (m, n, k) = (35, 40, 70);
        let (a, b) = (normal::<f32>(1, m * k, 1.0), normal::<bf16>(2, k * n, 1.0));
        let rounded: Vec<bf16> = a.iter().map(|x| bf16::from_f32(*x)).collect();
        let b = Mat::new(&b, (k, n), (n, 1));
        for pairs in all() {
            let (mut got, mut want) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
            let left = Mat::new(&a, (m, k), (k, 1));
            pairs.product(&mut TileMut::new(&mut got, m, n), false, left, Right::Lies(b), End::default());
            let a = Mat::new(&rounded, (m, k), (k, 1));
            pairs.product(&mut TileMut::new(&mut want, m, n), false, a, Right::Lies(b), End::default());
            assert_eq!(got, want, "{pairs:?}");
        }
    }

    #[test]
    fn an_element_depends_on_its_row_and_column_alone() {
        let (m, n, k) = (70, 290, 530);
        let (a, b) = (normal::<bf16>(1, m * k, 1.0), normal::<bf16>(2, n * k, 1.0));
        let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
        for pairs in all() {
            let mut whole = normal::<f32>(3, m * n, 1.0);
            let old = whole.clone();
            pairs.product(&mut TileMut::new(&mut whole, m, n), true, a, Right::Lies(b), End::default());
            for (rows, cols) in [(0..2, 0..n), (3..17, 250..290), (31..70, 5..6)] {
                let mut part: Vec<f32> =
                    rows.clone().flat_map(|r| old[r * n..][cols.clone()].to_vec()).collect();
                let mut dst = TileMut::new(&mut part, rows.len(), cols.len());
                let right = Right::Lies(b.t().rows(cols.clone()).t());
                pairs.product(&mut dst, true, a.rows(rows.clone()), right, End::default());
                for (r, part) in rows.zip(part.chunks(cols.len())) {
                    assert_eq!(part, &whole[r * n..][cols.clone()], "{pairs:?}: row {r}");
                }
            }
        }
    }

    #[test]
    fn packed_columns_give_the_same_bits() {
        for (m, n, k) in [(1, 1, 1), (35, 31, 5), (70, 290, 1127), (3, 512, 512), (2, 33, 0), (0, 33, 1127)] {
            let (a, b) = (normal::<bf16>(1, m * k, 1.0), normal::<bf16>(2, n * k, 1.0));
            let a = Mat::new(&a, (m, k), (k, 1));
            for b in [Mat::new(&b, (k, n), (n, 1)), Mat::new(&b, (n, k), (k, 1)).t()] {
                let (stride, count) = panels(k, n);
                let mut packed = vec![[bf16::NAN; 2]; stride * count];
                for at in (0..k).step_by(DEPTH) {
                    let rows = at..(at + DEPTH).min(k);
                    pack(&mut packed[at / 2 * PANEL..], stride, b.block(rows, 0..n));
                }
                let packed = Panels::new(&packed, stride);
                let old = normal::<f32>(3, m * n, 1.0);
                for (pairs, keep) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
                    let (mut got, mut want) = (old.clone(), old.clone());
                    pairs.product(
                        &mut TileMut::new(&mut got, m, n),
                        keep,
                        a,
                        Right::Packed(packed),
                        End::default(),
                    );
                    pairs.product(
                        &mut TileMut::new(&mut want, m, n),
                        keep,
                        a,
                        Right::Lies(b),
                        End::default(),
                    );
                    assert_eq!(got, want, "{pairs:?} {m} × {n} × {k}");
                }
            }
        }
    }

    #[test]
    fn sums_over_nothing_are_done_too() {
        for (pairs, keep) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
            let (mut sums, mut taken) = (vec![3f32; 6], Taken::new(2, 3));
            let (a, b) = (Mat::<bf16>::new(&[], (2, 0), (1, 1)), Mat::new(&[], (0, 3), (1, 1)));
            let mut done = taken.done();
            let end = End { more: None, done: Some(&mut done) };
            pairs.product(&mut TileMut::new(&mut sums, 2, 3), keep, a, Right::Lies(b), end);
            drop(done);
            taken.were(&[if keep { 3.0 } else { 0.0 }; 6]);
        }
    }

    #[test]
    fn more_is_what_another_product_would_add() {
        for (m, n, k, r) in [(2, 1, 1, 1), (35, 290, 530, 8), (70, 33, 512, 64), (3, 600, 300, 5)] {
            let (a, b) = (normal::<bf16>(1, m * k, 1.0), normal::<bf16>(2, n * k, 1.0));
            let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
            let (thin_a, thin_b) = (normal::<f32>(4, m * r, 1.0), normal::<f32>(5, r * n, 1.0));
            let more = More { a: Mat::new(&thin_a, (m, r), (r, 1)), b: Mat::new(&thin_b, (r, n), (n, 1)) };
            let rounded: Vec<bf16> = thin_b.iter().map(|x| bf16::from_f32(*x)).collect();
            let alone = Right::Lies(Mat::new(&rounded, (r, n), (n, 1)));
            let old = normal::<f32>(3, m * n, 1.0);
            for (pairs, keep) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
                let (mut got, mut want) = (old.clone(), old.clone());
                let mut taken = Taken::new(m, n);
                let mut done = taken.done();
                let end = End { more: Some(more), done: Some(&mut done) };
                pairs.product(&mut TileMut::new(&mut got, m, n), keep, a, Right::Lies(b), end);
                drop(done);
                pairs.product(&mut TileMut::new(&mut want, m, n), keep, a, Right::Lies(b), End::default());
                pairs.product(&mut TileMut::new(&mut want, m, n), true, more.a, alone, End::default());
                let mut added = old.clone();
                pairs.product(&mut TileMut::new(&mut added, m, n), keep, a, Right::Lies(b), End::default());
                pairs.add(&mut TileMut::new(&mut added, m, n), more);
                assert_eq!(added, want, "{pairs:?} {m} × {n} × {k}, {r}");
                assert_eq!(got, want, "{pairs:?} {m} × {n} × {k}, {r}");
                taken.were(&want);
            }
        }
    }

    #[test]
    fn blocks_as_the_sums() {
        for (rows, columns, depth) in [(1, 32, 16), (32, 64, 32), (33, 32, 0), (64, 64, 48), (0, 32, 16)] {
            let whole = usize::next_multiple_of(rows, SIDE);
            // The stride is larger than what it holds.
            let stride = depth + 3;
            let (a, b) =
                (normal::<bf16>(1, 2 * whole * stride, 1.0), normal::<bf16>(2, 2 * depth * columns, 1.0));
            let single = |x: &[bf16]| bytemuck::pod_collect_to_vec::<_, f32>(x);
            let (of_a, of_b) = (single(&a), single(&b));
            let old = normal::<f32>(3, whole * columns, 1.0);
            for (pairs, add) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
                let mut c = if add { old.clone() } else { vec![f32::NAN; whole * columns] };
                pairs.block(&mut c, add, (&of_a, stride), &of_b, Size { rows, columns, depth });
                for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                    let of_b = |k: usize| b[(k / 2 * columns + j) * 2 + k % 2].to_f64();
                    let terms = (0..2 * depth).map(|k| a[2 * i * stride + k].to_f64() * of_b(k));
                    let want = terms.sum::<f64>() + if add { f64::from(old[i * columns + j]) } else { 0.0 };
                    let (got, tol) = (c[i * columns + j], 3e-7 * depth as f64 + 2e-7 * want.abs() + 5e-7);
                    let err = (f64::from(got) - want).abs();
                    assert!(
                        err <= tol,
                        "{pairs:?} {rows} × {columns} × {depth} [{i}, {j}] = {got}, expected {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_row_and_column() {
        let (m, n, k) = (9, 37, 11);
        let (mut a, mut b) = (vec![bf16::ONE; m * k], vec![bf16::ONE; k * n]);
        (a[7 * k + 4], b[3 * n + 35]) = (bf16::NAN, bf16::INFINITY);
        let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (k, n), (n, 1)));
        for pairs in all() {
            let mut c = vec![f32::NAN; m * n];
            pairs.product(&mut TileMut::new(&mut c, m, n), false, a, Right::Lies(b), End::default());
            for (i, x) in c.iter().enumerate() {
                let right = match (i / n, i % n) {
                    (7, _) => x.is_nan(),
                    (_, 35) => *x == f32::INFINITY,
                    _ => *x == k as f32,
                };
                assert!(right, "{pairs:?} [{}, {}] = {x}", i / n, i % n);
            }
        }
    }
}
