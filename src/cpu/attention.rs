//! See [`crate::ops::attention`].
//!
//! A block is up to 64 (query, head) pairs of one key/value head against 64 keys at a time. Its scores lie key by key,
//! `s[u, r]`, so that the softmax of all pairs runs side by side in vector registers. Each thread keeps room for one
//! block; all other numbers stay in caches and registers.

mod backward;
mod blocks;
mod product;
#[cfg(test)]
mod tests;

use std::ops::Range;

use rayon::prelude::*;

use self::blocks::{
    KEYS, Pairs, PerPair, Room, Rows, before, each_run, gather, head_runs, key_rows, per_pair, queries,
    transpose, with_room,
};
use self::product::{ByColumn, ByRow, COLUMNS, Size, padded, product};
use super::exp::exp;
use super::simd::{self, Isa, Kernel};
use crate::error::Result;
use crate::host::Host;
use crate::ops::attention::{Attention, Heads, Segment};
use crate::tensor::Real;

pub use self::backward::attention_bwd;
pub(super) use self::blocks::ROOM_BYTES;

pub fn attention<T: Real>(op: Attention<'_, Host, T>) -> Result<()> {
    op.check()?;
    let heads = op.heads;
    let (q, k, v) = (op.q, op.k, op.v);
    let o = Rows { x: op.o, width: heads.q * heads.dim };
    let lse = Rows { x: op.lse, width: heads.q };
    each_run(op.segments, 0, queries(heads), o, lse, &|segment, queries, o, lse| {
        let group = heads.q / heads.kv;
        let run = |kv: usize, o: &mut [T], lse: &mut [f32]| {
            for h in head_runs(heads, kv) {
                let skip = h.start - kv * group;
                let pairs = Pairs { queries: queries.clone(), heads: h };
                let (o, lse) = (&mut o[skip * heads.dim..], &mut lse[skip..]);
                with_room(heads.dim, |room| {
                    simd::run(Forward { o, lse, q, k, v, segment, pairs, kv, heads, room });
                });
            }
        };
        if queries.len() == 1 {
            // A decoded token: its heads lie one after the other, so that several threads can write them.
            let outs = o.x.par_chunks_mut(group * heads.dim).zip(lse.x.par_chunks_mut(group));
            outs.enumerate().for_each(|(kv, (o, lse))| run(kv, o, lse));
        } else {
            for kv in 0..heads.kv {
                run(kv, &mut o.x[kv * group * heads.dim..], &mut lse.x[kv * group..]);
            }
        }
    });
    Ok(())
}

struct Forward<'a, T> {
    /// From the first pair's row on, `H·K` from query to query.
    o: &'a mut [T],
    /// From the first pair's number on, `H` from query to query.
    lse: &'a mut [f32],
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    segment: &'a Segment,
    pairs: Pairs,
    kv: usize,
    heads: Heads,
    room: Room<'a>,
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Forward { o, lse, q, k, v, segment, pairs, kv, heads, room } = self;
        let (n, dim, width) = (pairs.len(), heads.dim, padded(heads.dim));
        let columns = padded(n);
        let [q_t, keys, sums, ..] = room.wide;
        let [scores, _] = room.square;
        transpose(q_t, |r| pairs.row(q, r, heads), n, dim);
        let first = before(segment, &pairs.queries);
        let mut state = State { max: per_pair(f32::NEG_INFINITY), sum: per_pair(0.0), shrink: per_pair(0.0) };

        let end = first + pairs.queries.len();
        for start in (0..end).step_by(KEYS) {
            let block = start..end.min(start + KEYS);
            let rows = |x| rows_of(x, segment, block.clone(), kv, heads);
            gather(keys, rows(k), dim);
            let size = Size { rows: block.len(), columns, depth: dim };
            product(scores, false, ByRow(keys, width), q_t, size);
            let seen = seen(&pairs, first, &block);
            state.take::<I, T>(&mut scores[..block.len() * columns], columns, &seen, heads.scale);
            for (sums, shrink) in sums.chunks_exact_mut(width).zip(state.shrink.as_flattened()).take(n) {
                sums.iter_mut().for_each(|s| *s *= shrink);
            }
            gather(keys, rows(v), dim);
            let size = Size { rows: n, columns: width, depth: block.len() };
            product(sums, start > 0, ByColumn(scores, columns), keys, size);
        }
        for (r, sums) in sums.chunks_exact(width).enumerate().take(n) {
            let (t, h) = (r / pairs.heads.len(), r % pairs.heads.len());
            let o = &mut o[(t * heads.q + h) * dim..][..dim];
            let (max, sum) = (state.max.as_flattened()[r], state.sum.as_flattened()[r]);
            o.iter_mut().zip(sums).for_each(|(o, s)| *o = T::from_f32(s / sum));
            lse[t * heads.q + h] = max + sum.ln();
        }
    }
}

/// The rows of `x[U, G·K]` of key/value head `kv`, of the keys `block`.
#[inline(always)]
fn rows_of<'a, T>(
    x: &'a [T],
    s: &'a Segment,
    block: Range<usize>,
    kv: usize,
    heads: Heads,
) -> impl Iterator<Item = &'a [T]> {
    key_rows(s, block).map(move |u| &x[(u * heads.kv + kv) * heads.dim..][..heads.dim])
}

/// How many keys of `block` each pair sees; the first query sees `first` keys before its own.
#[inline(always)]
fn seen(pairs: &Pairs, first: usize, block: &Range<usize>) -> PerPair<u32> {
    let mut seen = per_pair(block.len() as u32);
    for (r, seen) in seen.as_flattened_mut().iter_mut().enumerate().take(pairs.len()) {
        let sees = first + r / pairs.heads.len() + 1;
        *seen = sees.saturating_sub(block.start).min(block.len()) as u32;
    }
    seen
}

/// The softmax so far, of each pair.
struct State {
    max: PerPair<f32>,
    sum: PerPair<f32>,
    /// What the last block's maximum makes of earlier sums.
    shrink: PerPair<f32>,
}

impl State {
    /// Turns scores `s[u, r]` into exponentials, rounded as operands of the next product.
    #[inline(always)]
    fn take<I: Isa, T: Real>(&mut self, s: &mut [f32], columns: usize, seen: &PerPair<u32>, scale: f32) {
        for j in (0..columns).step_by(COLUMNS) {
            let i = j / COLUMNS;
            let (old, seen) = (self.max[i], seen[i]);
            let (mut max, mut sum) = (old, self.sum[i]);
            for (u, s) in s.chunks_exact_mut(columns).enumerate() {
                let s = lanes_mut(s, j);
                for c in 0..COLUMNS {
                    let x = if (u as u32) < seen[c] { s[c] * scale } else { f32::NEG_INFINITY };
                    s[c] = x;
                    max[c] = if x > max[c] { x } else { max[c] };
                }
            }
            let shrink = &mut self.shrink[i];
            for c in 0..COLUMNS {
                shrink[c] = exp::<I>(old[c] - max[c]);
                sum[c] *= shrink[c];
            }
            for s in s.chunks_exact_mut(columns) {
                let s = lanes_mut(s, j);
                for c in 0..COLUMNS {
                    let e = exp::<I>(s[c] - max[c]);
                    sum[c] += e;
                    s[c] = T::round(e);
                }
            }
            (self.max[i], self.sum[i]) = (max, sum);
        }
    }
}

/// Columns `j..j + COLUMNS` of a row.
#[inline(always)]
fn lanes_mut(row: &mut [f32], j: usize) -> &mut [f32; COLUMNS] {
    row[j..].first_chunk_mut().expect("rows are padded to whole columns")
}
