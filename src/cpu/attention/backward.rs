//! Gradients of attention in two passes, so that each task owns what it writes: dq over runs of queries, dk and dv over
//! runs of keys. Scores are made in both, `Σ_k do∘o` in the first.

use std::array::from_fn;
use std::f32::consts::LOG2_E;

use super::blocks::{
    KEYS, LANES, Lanes, Pairs, PerPair, Room, Rows, each_run, head_runs, per_pair, queries, rows_of_keys,
    with_room,
};
use super::form::Form;
use super::{hide, lanes_mut};
use crate::cpu::exp::exp2;
use crate::cpu::product::Mat;
use crate::cpu::product::block::{Size, padded};
use crate::cpu::product::dot::dot;
use crate::cpu::product::pack::transpose;
use crate::cpu::simd::{self, Isa, Kernel, fma};
use crate::cpu::tiles::enough;
use crate::error::Result;
use crate::host::Host;
use crate::ops::attention::{AttentionBwd, Heads, Segment};
use crate::tensor::Real;

/// f32 elements of scratch that [`attention_bwd`] uses: `Σ_k do∘o` of each query and head.
pub fn attention_bwd_scratch(tokens: usize, heads: usize) -> usize {
    tokens * heads
}

/// Computes [`AttentionBwd`].
pub fn attention_bwd<T: Real>(op: AttentionBwd<'_, Host, T>) -> Result<()> {
    let tokens = op.check()?;
    let heads = op.heads;
    let inputs = Inputs { do_: op.do_, o: op.o, lse: op.lse, q: op.q, k: op.k, v: op.v, heads };
    let (wide, narrow) = (heads.q * heads.dim, heads.kv * heads.dim);

    enough("attention_bwd", op.scratch, attention_bwd_scratch(tokens, heads.q))?;
    let dq = Rows { x: op.dq, width: wide };
    let delta = Rows { x: &mut *op.scratch, width: heads.q };
    each_run(op.segments, 0, queries(heads), dq, delta, &|segment, queries, dq, delta| {
        for kv in 0..heads.kv {
            for h in head_runs(heads, kv) {
                let (dq, delta) = (&mut dq.x[h.start * heads.dim..], &mut delta.x[h.start..]);
                let pairs = Pairs { queries: queries.clone(), heads: h };
                with_room(heads.dim, |room| {
                    simd::run(Queries { dq, delta, inputs, segment, pairs, kv, room })
                });
            }
        }
    });
    let delta = &*op.scratch;

    let (dk, dv) = (Rows { x: op.dk, width: narrow }, Rows { x: op.dv, width: narrow });
    each_run(op.segments, 0, KEYS, dk, dv, &|segment, keys, dk, dv| {
        for kv in 0..heads.kv {
            let (dk, dv) = (&mut dk.x[kv * heads.dim..], &mut dv.x[kv * heads.dim..]);
            let block = keys.start - segment.q.start..keys.end - segment.q.start;
            with_room(heads.dim, |room| simd::run(Keys { dk, dv, delta, inputs, segment, block, kv, room }));
        }
    });
    Ok(())
}

#[derive(Clone, Copy)]
struct Inputs<'a, T> {
    do_: &'a [T],
    o: &'a [T],
    lse: &'a [f32],
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    heads: Heads,
}

impl<T: Real> Inputs<'_, T> {
    /// Log-sum-exp to base 2 and `Σ_k do∘o` of each pair; zeros beyond them.
    #[inline(always)]
    fn numbers<I: Isa>(&self, pairs: &Pairs) -> (PerPair, PerPair) {
        let (mut lse, mut delta) = (per_pair(0.0), per_pair(0.0));
        for r in 0..pairs.len() {
            let (do_, o) = (pairs.row(self.do_, r, self.heads), pairs.row(self.o, r, self.heads));
            delta.as_flattened_mut()[r] = dot::<I, T, T>(do_, o);
            lse.as_flattened_mut()[r] = self.lse[pairs.at(r, self.heads)] * LOG2_E;
        }
        (lse, delta)
    }
}

/// dq of one block of pairs.
struct Queries<'a, T> {
    /// From the first pair's row on, `H·K` from query to query.
    dq: &'a mut [T],
    /// From the first pair's number on, `H` from query to query.
    delta: &'a mut [f32],
    inputs: Inputs<'a, T>,
    segment: &'a Segment,
    pairs: Pairs,
    kv: usize,
    room: Room<'a>,
}

impl<T: Real> Kernel for Queries<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Queries { dq, delta: own, inputs, segment, pairs, kv, room } = self;
        let heads = inputs.heads;
        let (n, dim, width, form) = (pairs.len(), heads.dim, padded(heads.dim), Form::of::<T>(heads.dim));
        let columns = form.columns(n);
        let [q_t, do_t, k, v, sums, turned] = room.wide;
        let [p, dp] = room.square;
        let scale = heads.scale * LOG2_E;
        form.turned(q_t, |r| pairs.row(inputs.q, r, heads), n, dim, columns);
        form.turned(do_t, |r| pairs.row(inputs.do_, r, heads), n, dim, columns);
        let (lse, delta) = inputs.numbers::<I>(&pairs);
        let first = pairs.queries.start - segment.q.start;

        let end = first + pairs.queries.len();
        for start in (0..end).step_by(KEYS) {
            let block = start..end.min(start + KEYS);
            let rows = |x| rows_of_keys(x, segment, block.clone(), kv, heads);
            let ((k, k_t), v) = (form.both(k, rows(inputs.k), dim), form.across(v, rows(inputs.v), dim));
            let size = Size { rows: block.len(), columns, depth: dim };
            form.product(p, false, k, q_t, size);
            form.product(dp, false, v, do_t, size);
            let (seen, dp) = (&mut p[..block.len() * columns], &dp[..block.len() * columns]);
            hide(seen, columns, &pairs, first, block.start);
            for (p, dp) in seen.chunks_exact_mut(columns).zip(dp.chunks_exact(columns)) {
                for j in (0..columns).step_by(LANES) {
                    let (s, dp) = (lanes_mut(p, j), &dp[j..][..LANES]);
                    let (lse, delta) = (lse[j / LANES], delta[j / LANES]);
                    let p: Lanes = from_fn(|c| exp2::<I>(fma::<I>(s[c], scale, -lse[c])));
                    *s = from_fn(|c| p[c] * (dp[c] - delta[c]));
                }
            }
            form.round::<T>(p, block.len(), columns);
            let size = Size { rows: dim, columns, depth: block.len() };
            form.product(sums, start > 0, k_t, p, size);
        }
        transpose(turned, width, Mat::new(sums, (dim, n), (columns, 1)));
        for (r, sums) in turned.chunks_exact(width).enumerate().take(n) {
            let (t, h) = (r / pairs.heads.len(), r % pairs.heads.len());
            own[t * heads.q + h] = delta.as_flattened()[r];
            let dq = &mut dq[(t * heads.q + h) * dim..][..dim];
            dq.iter_mut().zip(sums).for_each(|(dq, s)| *dq = T::from_f32(s * heads.scale));
        }
    }
}

/// dk and dv of one block of keys.
struct Keys<'a, T> {
    /// From the first key's row on, `G·K` from key to key.
    dk: &'a mut [T],
    dv: &'a mut [T],
    delta: &'a [f32],
    inputs: Inputs<'a, T>,
    segment: &'a Segment,
    /// Keys, counted from the segment's first.
    block: std::ops::Range<usize>,
    kv: usize,
    room: Room<'a>,
}

impl<T: Real> Kernel for Keys<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Keys { dk, dv, delta, inputs, segment, block, kv, room } = self;
        let heads = inputs.heads;
        let (n, dim, width, form) = (block.len(), heads.dim, padded(heads.dim), Form::of::<T>(heads.dim));
        let columns = form.columns(n);
        let [k_t, v_t, q, do_, dk_sums, dv_sums] = room.wide;
        let [p, ds] = room.square;
        let scale = heads.scale * LOG2_E;
        let from = segment.q.start + block.start;
        let row = |u: usize| ((from + u) * heads.kv + kv) * dim;
        form.turned(k_t, |u| &inputs.k[row(u)..][..dim], n, dim, columns);
        form.turned(v_t, |u| &inputs.v[row(u)..][..dim], n, dim, columns);

        let mut added = false;
        for start in (from..segment.q.end).step_by(queries(heads)) {
            for h in head_runs(heads, kv) {
                let queries = start..segment.q.end.min(start + queries(heads));
                let pairs = Pairs { queries, heads: h };
                let (q, q_t) = form.both(q, pairs.rows(inputs.q, heads), dim);
                let (do_, do_t) = form.both(do_, pairs.rows(inputs.do_, heads), dim);
                let size = Size { rows: pairs.len(), columns, depth: dim };
                form.product(p, false, q, k_t, size);
                form.product(ds, false, do_, v_t, size);
                let rows = p.chunks_exact_mut(columns).zip(ds.chunks_exact_mut(columns));
                for (r, (p, ds)) in rows.enumerate().take(pairs.len()) {
                    let at = pairs.at(r, heads);
                    let (lse, delta) = (inputs.lse[at] * LOG2_E, delta[at]);
                    let seen = (pairs.query(r) - from + 1).min(n);
                    p[seen..].fill(f32::NEG_INFINITY);
                    for j in (0..columns).step_by(LANES) {
                        let (s, dp) = (lanes_mut(p, j), lanes_mut(ds, j));
                        let p: Lanes = from_fn(|c| exp2::<I>(fma::<I>(s[c], scale, -lse)));
                        (*s, *dp) = (p, from_fn(|c| p[c] * (dp[c] - delta)));
                    }
                }
                for s in [&mut *p, &mut *ds] {
                    form.round::<T>(s, pairs.len(), columns);
                }
                let size = Size { rows: dim, columns, depth: pairs.len() };
                form.product(dv_sums, added, do_t, p, size);
                form.product(dk_sums, added, q_t, ds, size);
                added = true;
            }
        }
        // Keys and values are not wanted any more.
        let (dk_rows, dv_rows) = (k_t, v_t);
        transpose(dk_rows, width, Mat::new(dk_sums, (dim, n), (columns, 1)));
        transpose(dv_rows, width, Mat::new(dv_sums, (dim, n), (columns, 1)));
        let sums = dk_rows.chunks_exact(width).zip(dv_rows.chunks_exact(width));
        for (u, (dk_sum, dv_sum)) in sums.enumerate().take(n) {
            let at = u * heads.kv * dim..u * heads.kv * dim + dim;
            let (dk, dv) = (&mut dk[at.clone()], &mut dv[at]);
            dk.iter_mut().zip(dk_sum).for_each(|(dk, s)| *dk = T::from_f32(s * heads.scale));
            dv.iter_mut().zip(dv_sum).for_each(|(dv, s)| *dv = T::from_f32(*s));
        }
    }
}
