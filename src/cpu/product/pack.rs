//! Operands as the micro-kernel reads them: a by rows, b in panels of N columns.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};

use super::{COLUMNS, DEPTH, Mat, PACKED_BYTES, RANKS, ROWS};
use crate::cpu::simd::{Isa, Kernel};

/// A line of the caches, so that no vector of a panel lies in two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(in crate::cpu) struct Line([f32; 16]);

/// A thread's room.
pub(in crate::cpu) struct Room<'a> {
    /// For a block of b.
    pub panels: &'a mut [f32],
    /// For rows of a, and of a thin one.
    pub lines: &'a mut [f32],
    /// For a block of a thin b.
    pub thin: &'a mut [f32],
}

/// Calls `f` with the calling thread's room, which holds what the last product left. `f` must not wait for other tasks.
pub(in crate::cpu) fn with_room<R>(f: impl FnOnce(Room<'_>) -> R) -> R {
    const { assert!(PACKED_BYTES.is_multiple_of(size_of::<Line>())) };
    thread_local! {
        static ROOM: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    ROOM.with_borrow_mut(|room| {
        room.resize(PACKED_BYTES / size_of::<Line>(), Line::zeroed());
        let (panels, rest) = bytemuck::cast_slice_mut(room).split_at_mut(COLUMNS * DEPTH);
        let (lines, thin) = rest.split_at_mut(ROWS * (DEPTH + RANKS));
        f(Room { panels, lines, thin })
    })
}

/// Rows and columns that are turned together.
pub(in crate::cpu) const SIDE: usize = 4;

/// Panels of a matrix, one `stride` numbers after the other.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Panels<'a, E = f32> {
    data: &'a [E],
    stride: usize,
}

impl<'a, E> Panels<'a, E> {
    /// Those of `data`.
    pub(in crate::cpu) fn new(data: &'a [E], stride: usize) -> Panels<'a, E> {
        Panels { data, stride }
    }

    /// The panels from `p` on, each from its number `at` on.
    pub(in crate::cpu) fn from(self, p: usize, at: usize) -> Panels<'a, E> {
        Panels { data: &self.data[p * self.stride + at..], stride: self.stride }
    }

    /// Where panel `p` begins, if there are so many.
    #[inline(always)]
    pub(super) fn start(&self, p: usize) -> *const E {
        self.data.as_ptr().wrapping_add(p * self.stride)
    }

    /// The first `len` numbers of panel `p`.
    #[inline(always)]
    pub(super) fn some(&self, p: usize, len: usize) -> &'a [E] {
        &self.data[p * self.stride..][..len]
    }
}

/// Columns of a panel.
pub(in crate::cpu) struct Width;

impl Kernel for Width {
    type Output = usize;
    #[inline(always)]
    fn run<I: Isa>(self) -> usize {
        match (cfg!(target_arch = "x86_64"), I::WIDE, I::FMA) {
            (true, true, _) => 32,
            (true, _, true) => 16,
            _ => 8,
        }
    }
}

/// b in panels of that width, `stride` numbers apart.
pub(in crate::cpu) struct Pack<'a> {
    pub out: &'a mut [f32],
    pub stride: usize,
    pub b: Mat<'a>,
}

impl Kernel for Pack<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Pack { out, stride, b } = self;
        match Width.run::<I>() {
            32 => panels::<32>(out, stride, b),
            16 => panels::<16>(out, stride, b),
            _ => panels::<8>(out, stride, b),
        }
    }
}

/// b in panels of N columns, zeros after its last column; a panel's rows follow one another, and panels are `stride` numbers
/// apart.
#[inline(always)]
pub(super) fn panels<const N: usize>(out: &mut [f32], stride: usize, b: Mat<'_>) {
    let (depth, columns) = b.size;
    if b.strides.1 == 1 {
        for r in 0..depth {
            let (whole, rest) = b.row(r).as_chunks::<N>();
            for (p, from) in whole.iter().enumerate() {
                out[p * stride + r * N..][..N].copy_from_slice(from);
            }
            if !rest.is_empty() {
                let out = &mut out[whole.len() * stride + r * N..][..N];
                out.fill(0.0);
                out[..rest.len()].copy_from_slice(rest);
            }
        }
        return;
    }
    for p in 0..columns.div_ceil(N) {
        let panel = &mut out[p * stride..][..depth * N];
        let some = N.min(columns - p * N);
        if some < N {
            panel.fill(0.0);
        }
        transpose(panel, N, b.block(0..depth, p * N..p * N + some).t());
    }
}

/// The rows of a, `STRIDE` numbers apart.
#[inline(always)]
pub(super) fn lines<const STRIDE: usize>(out: &mut [f32], a: Mat<'_>) {
    if a.strides.1 == 1 {
        let (depth, rows) = (a.size.1, out.chunks_exact_mut(STRIDE));
        rows.enumerate().take(a.size.0).for_each(|(r, out)| out[..depth].copy_from_slice(a.row(r)));
    } else {
        transpose(out, STRIDE, a.t());
    }
}

/// `out[c · stride + r] = from[r, c]`.
#[inline(always)]
pub(in crate::cpu) fn transpose(out: &mut [f32], stride: usize, from: Mat<'_>) {
    let (rows, columns) = from.size;
    let whole = if from.strides.1 == 1 { (rows - rows % SIDE, columns - columns % SIDE) } else { (0, 0) };
    for r in (0..whole.0).step_by(SIDE) {
        let (a, b) = (from.row(r).as_chunks().0, from.row(r + 1).as_chunks().0);
        let (c, d) = (from.row(r + 2).as_chunks().0, from.row(r + 3).as_chunks().0);
        for (i, (((a, b), c), d)) in a.iter().zip(b).zip(c).zip(d).enumerate() {
            for (j, turned) in square([*a, *b, *c, *d]).iter().enumerate() {
                out[(i * SIDE + j) * stride + r..][..SIDE].copy_from_slice(turned);
            }
        }
    }
    for r in 0..rows {
        for c in if r < whole.0 { whole.1 } else { 0 }..columns {
            out[c * stride + r] = from.data[r * from.strides.0 + c * from.strides.1];
        }
    }
}

/// The transpose of a square.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
pub(super) fn square(x: [[f32; SIDE]; SIDE]) -> [[f32; SIDE]; SIDE] {
    use std::arch::x86_64::{_mm_movehl_ps, _mm_movelh_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};
    let [a, b, c, d] = bytemuck::cast(x);
    // SAFETY: SSE is part of x86-64.
    bytemuck::cast(unsafe {
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_end, cd_end) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        [
            _mm_movelh_ps(ab, cd),
            _mm_movehl_ps(cd, ab),
            _mm_movelh_ps(ab_end, cd_end),
            _mm_movehl_ps(cd_end, ab_end),
        ]
    })
}

/// The transpose of a square.
#[inline(always)]
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn square(x: [[f32; SIDE]; SIDE]) -> [[f32; SIDE]; SIDE] {
    std::array::from_fn(|i| std::array::from_fn(|j| x[j][i]))
}
