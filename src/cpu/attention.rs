//! See [`crate::ops::attention`].
//!
//! A block is up to 64 (query, head) pairs of one key/value head against 64 keys at a time. Its scores lie key by key,
//! `s[u, r]`, so that the softmax of all pairs runs side by side in vector registers; outputs are summed as `oᵀ[k, r]`, so
//! that scores are always a right factor, as they lie. Each thread keeps room for one block; all other numbers stay in
//! caches and registers.

mod backward;
mod blocks;
mod form;
#[cfg(test)]
mod tests;

use std::f32::consts::LOG2_E;

use rayon::prelude::*;

use self::blocks::{
    KEYS, LANES, Lanes, Pairs, PerPair, Room, Rows, before, each_run, head_runs, per_pair, queries,
    rows_of_keys, with_room,
};
use self::form::Form;
use super::exp::exp2;
use super::product::Mat;
use super::product::block::{Size, padded};
use super::product::pack::transpose;
use super::simd::{self, Isa, Kernel, fma};
use crate::error::Result;
use crate::host::Host;
use crate::ops::attention::{Attention, Heads, Segment};
use crate::tensor::Real;

pub use self::backward::{attention_bwd, attention_bwd_scratch};
pub(super) use self::blocks::room_bytes;

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
        let (n, dim, width, form) = (pairs.len(), heads.dim, padded(heads.dim), Form::of::<T>(heads.dim));
        let columns = form.columns(n);
        let [q_t, keys, sums, turned, ..] = room.wide;
        let [scores, _] = room.square;
        form.turned(q_t, |r| pairs.row(q, r, heads), n, dim, columns);
        let first = before(segment, &pairs.queries);
        let mut state = State { max: per_pair(f32::NEG_INFINITY), sum: per_pair(0.0), shrink: per_pair(0.0) };

        let end = first + pairs.queries.len();
        for start in (0..end).step_by(KEYS) {
            let block = start..end.min(start + KEYS);
            let left = form.across(keys, rows_of_keys(k, segment, block.clone(), kv, heads), dim);
            let size = Size { rows: block.len(), columns, depth: dim };
            form.product(scores, false, left, q_t, size);
            let seen = &mut scores[..block.len() * columns];
            hide(seen, columns, &pairs, first, block.start);
            state.take::<I>(seen, columns, heads.scale);
            form.round::<T>(scores, block.len(), columns);
            if start > 0 {
                for sums in sums.chunks_exact_mut(columns).take(dim) {
                    sums.iter_mut().zip(state.shrink.as_flattened()).for_each(|(s, shrink)| *s *= shrink);
                }
            }
            let left = form.upright(keys, rows_of_keys(v, segment, block.clone(), kv, heads), dim);
            let size = Size { rows: dim, columns, depth: block.len() };
            form.product(sums, start > 0, left, scores, size);
        }
        transpose(turned, width, Mat::new(sums, (dim, n), (columns, 1)));
        for (r, sums) in turned.chunks_exact(width).enumerate().take(n) {
            let (t, h) = (r / pairs.heads.len(), r % pairs.heads.len());
            let o = &mut o[(t * heads.q + h) * dim..][..dim];
            let (max, sum) = (state.max.as_flattened()[r], state.sum.as_flattened()[r]);
            let part = 1.0 / sum;
            o.iter_mut().zip(sums).for_each(|(o, s)| *o = T::from_f32(s * part));
            lse[t * heads.q + h] = max * heads.scale + sum.ln();
        }
    }
}

/// Scores `s[u, r]` of the keys from `start` on become −∞ where pair r does not see key u: the first query sees `first`
/// keys before its own, each further one a key more.
#[inline(always)]
fn hide(s: &mut [f32], columns: usize, pairs: &Pairs, first: usize, start: usize) {
    for (u, s) in s.chunks_exact_mut(columns).enumerate().skip((first + 1).saturating_sub(start)) {
        let blind = (start + u - first) * pairs.heads.len();
        s[..blind.min(pairs.len())].fill(f32::NEG_INFINITY);
    }
}

/// The softmax so far, of each pair.
struct State {
    /// Before they are scaled.
    max: PerPair,
    sum: PerPair,
    /// What the last block's maximum makes of earlier sums.
    shrink: PerPair,
}

impl State {
    /// Turns scores `s[u, r]`, not scaled yet, into exponentials: powers of two, of scores that are scaled by log₂ e as well.
    ///
    /// Each loop over the lanes does one thing, so that it becomes vector instructions.
    #[inline(always)]
    fn take<I: Isa>(&mut self, s: &mut [f32], columns: usize, scale: f32) {
        let scale = scale * LOG2_E;
        for j in (0..columns).step_by(LANES) {
            let i = j / LANES;
            let old = self.max[i];
            let mut max = old;
            for s in s.chunks_exact_mut(columns) {
                let s = lanes_mut(s, j);
                for c in 0..LANES {
                    max[c] = if s[c] > max[c] { s[c] } else { max[c] };
                }
            }
            let (mut shrink, mut sum, mut base) = ([0f32; LANES], self.sum[i], [0f32; LANES]);
            for c in 0..LANES {
                base[c] = -max[c] * scale;
            }
            for c in 0..LANES {
                // Exactly 1 where the maximum stays.
                shrink[c] = exp2::<I>(old[c] * scale + base[c]);
            }
            for c in 0..LANES {
                sum[c] *= shrink[c];
            }
            for s in s.chunks_exact_mut(columns) {
                let s = lanes_mut(s, j);
                for c in 0..LANES {
                    s[c] = exp2::<I>(fma::<I>(s[c], scale, base[c]));
                }
                for c in 0..LANES {
                    sum[c] += s[c];
                }
            }
            (self.max[i], self.sum[i], self.shrink[i]) = (max, sum, shrink);
        }
    }
}

/// Columns `j..j + LANES` of a row.
#[inline(always)]
fn lanes_mut(row: &mut [f32], j: usize) -> &mut Lanes {
    row[j..].first_chunk_mut().expect("rows are padded to whole columns")
}
