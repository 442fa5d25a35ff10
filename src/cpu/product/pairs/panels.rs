//! A right factor in panels of 16 columns: each row of a panel is a pair of bf16 of each column, one below the other.

use std::ops::Range;

use half::bf16;

use super::super::{Mat, pack};
use super::{PAIRS, PANEL, Pair, SIDE};
use crate::cpu::simd::{self, Isa, Kernel};

/// Rows of a panel of `depth` rows of b: pairs, and zeros.
pub(super) const fn rows_of_pairs(depth: usize) -> usize {
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
