//! Operands as the micro-kernel reads them: a by rows, b in panels of N columns.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};

use super::{COLUMNS, DEPTH, Mat, PACKED_BYTES};

/// A line of the caches, so that no vector of a panel lies in two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A thread's room.
pub(super) struct Room<'a> {
    /// For a block of b.
    pub panels: &'a mut [f32],
    /// For rows of a.
    pub lines: &'a mut [f32],
}

/// Calls `f` with the calling thread's room, which holds what the last product left. `f` must not wait for other tasks.
pub(super) fn with_room<R>(f: impl FnOnce(Room<'_>) -> R) -> R {
    const { assert!(PACKED_BYTES.is_multiple_of(size_of::<Line>())) };
    thread_local! {
        static ROOM: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    ROOM.with_borrow_mut(|room| {
        room.resize(PACKED_BYTES / size_of::<Line>(), Line::zeroed());
        let (panels, lines) = bytemuck::cast_slice_mut(room).split_at_mut(COLUMNS * DEPTH);
        f(Room { panels, lines })
    })
}

/// Rows and columns that are turned together.
pub(super) const SIDE: usize = 4;

/// b in panels of N columns, zeros after its last column; a panel's rows follow one another.
#[inline(always)]
pub(super) fn panels<'r, const N: usize>(room: &'r mut [f32], b: Mat<'_>) -> &'r [[f32; N]] {
    let (depth, columns) = b.size;
    let room = &mut room.as_chunks_mut::<N>().0[..columns.div_ceil(N) * depth];
    if b.strides.1 == 1 {
        for r in 0..depth {
            let (whole, rest) = b.row(r).as_chunks::<N>();
            for (p, from) in whole.iter().enumerate() {
                room[p * depth + r] = *from;
            }
            if !rest.is_empty() {
                let out = &mut room[whole.len() * depth + r];
                *out = [0.0; N];
                out[..rest.len()].copy_from_slice(rest);
            }
        }
        return room;
    }
    for (p, panel) in room.chunks_exact_mut(depth.max(1)).enumerate() {
        let some = N.min(columns - p * N);
        if some < N {
            panel.as_flattened_mut().fill(0.0);
        }
        transpose(panel.as_flattened_mut(), N, b.block(0..depth, p * N..p * N + some).t());
    }
    room
}

/// a with contiguous rows: where it lies, or transposed.
#[inline(always)]
pub(super) fn lines<'r>(room: &'r mut [f32], a: Mat<'r>) -> Mat<'r> {
    if a.strides.1 == 1 {
        return a;
    }
    transpose(room, a.size.1, a.t());
    Mat::new(room, a.size, (a.size.1, 1))
}

/// `out[c · stride + r] = from[r, c]`.
#[inline(always)]
fn transpose(out: &mut [f32], stride: usize, from: Mat<'_>) {
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
