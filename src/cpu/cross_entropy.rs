//! See [`crate::ops::cross_entropy`].
//!
//! Chunks of rows: x is gathered, logits are made by tiles in f32, turned into their gradient row by row, and multiplied
//! with W by tiles into the place where x was. Both factors are rounded once, not by each product. Without dx the logits'
//! tiles are reduced where they are made.

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::head::{Head, ROWS, score_scratch, softmax};
use super::operand::{Operand, Source, Term, depth, narrow, settle, settle_copy, settled, weight_in_place};
use super::parts;
use super::product::{End, Shared};
use super::tiles::{Grid, Rooms, enough};
use crate::error::Result;
use crate::host::Host;
use crate::ops::cross_entropy::CrossEntropy;
use crate::tensor::{DType, Frozen, Real};

/// Logits of a chunk at most, but for a head of very many words.
const LOGITS: usize = 1 << 23;
/// Rows of a chunk however many words there are, and what their number is a multiple of if that fits: products like whole
/// strips.
const FEW: usize = 32;

/// Rows of a chunk at most, of `rows` supervised rows or fewer.
fn most(rows: usize, vocab: usize) -> usize {
    (LOGITS / vocab.max(1)).clamp(FEW, ROWS).min(rows)
}

/// Rows of a chunk of `rows` supervised rows: of nearly one size.
fn chunk(rows: usize, vocab: usize) -> usize {
    let most = most(rows, vocab).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(FEW).min(most)
}

/// Room of one thread: W widened, and where a tile is one row, that row of x.
fn room<T: Real>(rows: usize, vocab: usize, width: usize, dtype: DType) -> usize {
    if weight_in_place::<T>(dtype) {
        return 0;
    }
    let logits = Grid::most(rows, vocab).1 * depth(width);
    logits.max(Grid::most(rows, width).1 * depth(vocab)) + depth(width)
}

/// f32 elements of scratch that [`cross_entropy`] uses on `threads` threads for `rows` rows or fewer: logits and x of a chunk,
/// and the rooms.
pub fn cross_entropy_scratch<T: Real>(
    rows: usize,
    vocab: usize,
    width: usize,
    dtype: DType,
    threads: usize,
) -> usize {
    let chunk = most(rows, vocab);
    let both = chunk * (vocab + width) + threads * room::<T>(chunk, vocab, width, dtype);
    both.max(score_scratch::<T>(rows, vocab, width, dtype, threads))
}

/// Computes [`CrossEntropy`].
pub fn cross_entropy<T: Real>(op: CrossEntropy<'_, Host, T>) -> Result<()> {
    let (v, d) = op.check()?;
    let CrossEntropy { nll, dx, scratch, x, head, rows, targets, weight, .. } = op;
    let need = cross_entropy_scratch::<T>(rows.len(), v, d, head.dtype(), rayon::current_num_threads());
    enough("cross_entropy", scratch, need)?;
    let Some(dx) = dx else {
        Head { w: head, x }.score(nll, scratch, rows, targets, -1.0);
        return Ok(());
    };
    dx.par_chunks_mut(parts::ELEMENTS).for_each(|dx| dx.fill(T::zeroed()));
    if rows.is_empty() {
        return Ok(());
    }
    let most = chunk(rows.len(), v);
    let (logits, scratch) = scratch.split_at_mut(most * v);
    let (xs, scratch) = scratch.split_at_mut(most * d);
    let rooms = Rooms::new(scratch, room::<T>(most, v, d, head.dtype()));
    let chunks = nll.chunks_mut(most).zip(rows.chunks(most)).zip(targets.chunks(most));
    for ((nll, rows), targets) in chunks {
        let count = rows.len();
        let few = parts::rows(d);
        xs.par_chunks_mut((few * d).max(1)).zip(rows.par_chunks(few)).for_each(|(xs, rows)| {
            for (xs, &row) in xs.chunks_mut(d.max(1)).zip(rows) {
                settle_copy(xs, &x[row as usize * d..][..d]);
            }
        });
        let weights = Source::<T>::Weight(head);
        product(&mut logits[..count * v], xs, count, v, d, weights.by_columns(), &rooms);
        let few = parts::rows(v);
        let lines = logits.par_chunks_mut(few * v).zip(nll.par_chunks_mut(few)).zip(targets.par_chunks(few));
        lines.for_each(|((logits, nll), targets)| {
            for ((logits, nll), &target) in logits.chunks_mut(v).zip(nll).zip(targets) {
                *nll = softmax(logits, target as usize, weight);
                settle::<T>(logits);
            }
        });
        product(&mut xs[..count * d], logits, count, d, v, weights.by_rows(), &rooms);
        for (sum, &row) in xs.chunks(d.max(1)).zip(rows) {
            narrow(&mut dx[row as usize * d..][..d], sum);
        }
    }
    Ok(())
}

/// `out[rows, cols] = left[rows, K] · right[cols, K]ᵀ` by tiles; rows of `left` are settled.
fn product<T: Real>(
    out: &mut [f32],
    left: &[f32],
    rows: usize,
    cols: usize,
    k: usize,
    right: Operand<'_, T>,
    rooms: &Rooms<'_>,
) {
    let left = settled(left, k).by_columns();
    let (term, grid, out) = (Term { left, right, k }, Grid::new(rows, cols, k), Shared::new(out));
    rooms.each(grid.len(), |i, room| {
        let (m, n) = grid.at(i);
        // SAFETY: tiles of a grid are disjoint.
        let mut tile = unsafe { out.tile(m.start * cols + n.start, m.len(), n.len(), cols) };
        term.tile(&mut tile, false, m, n, room, End::default());
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::tests::on_threads;
    use crate::ops::cases::cross_entropy::conforms;

    #[test]
    fn what_is_planned_for_some_rows_is_enough_for_fewer() {
        for vocab in [1, 512, 32_000, 151_936] {
            let mut planned = 0;
            for rows in 0..2100 {
                let need = cross_entropy_scratch::<bf16>(rows, vocab, 64, DType::F32, 2);
                assert!(need >= planned, "{rows} rows of {vocab} words");
                planned = need;
                let chunk = chunk(rows, vocab);
                assert!(chunk <= most(rows, vocab).max(1) && (chunk > 0 || rows == 0));
                assert!(chunk.is_multiple_of(FEW) || chunk == most(rows, vocab), "{rows}: {chunk}");
            }
        }
    }

    #[test]
    fn as_the_reference_on_shared_cases() {
        conforms::<_, f32>(&on_threads());
        conforms::<_, bf16>(&on_threads());
    }
}
