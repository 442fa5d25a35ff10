//! What the loss and the choice share: supervised rows of x, and the log-sum-exp of their logits.

#![allow(unsafe_code)]

use super::exp::exp;
use super::operand::{Source, Term, depth, weight_in_place, widen};
use super::product::dot::dots;
use super::product::{End, Shared, TileMut};
use super::simd::{self, Isa, Kernel, LANES, total};
use super::tiles::Rooms;
use crate::host::HostMatrix;
use crate::tensor::{DType, Frozen, Real};

/// Rows of a chunk at most.
pub(super) const ROWS: usize = 512;
/// Logits of a row that one task makes.
const COLS: usize = 256;

/// A frozen head over some hidden states.
pub(super) struct Head<'a, T> {
    pub(super) w: &'a HostMatrix,
    pub(super) x: &'a [T],
}

/// Scratch of one chunk of rows: x in f32, and each task's largest logit and sum.
pub(super) struct Chunk<'a> {
    xs: &'a mut [f32],
    parts: &'a mut [f32],
    lse: &'a mut [f32],
}

/// f32 elements of a [`Chunk`] of `rows` rows.
fn chunk(rows: usize, vocab: usize, width: usize) -> usize {
    rows * (width + 2 * vocab.div_ceil(COLS) + 1)
}

/// f32 elements of one thread's room.
pub(super) fn room<T: Real>(rows: usize, vocab: usize, width: usize, dtype: DType) -> usize {
    let n = COLS.min(vocab);
    // A row of W, or a tile and its panel.
    let panel = if weight_in_place::<T>(dtype) { 0 } else { n * depth(width) };
    rows * n + panel.max(width)
}

/// f32 elements that [`Head::score`] uses for `rows` pairs.
pub(super) fn score_scratch<T: Real>(
    rows: usize,
    vocab: usize,
    width: usize,
    dtype: DType,
    threads: usize,
) -> usize {
    let rows = rows.min(ROWS);
    chunk(rows, vocab, width) + threads * room::<T>(rows, vocab, width, dtype)
}

impl<T: Real> Head<'_, T> {
    /// Rows of x, one after another, in f32.
    fn gather(&self, xs: &mut [f32], rows: &[u32]) {
        let d = self.w.size().1;
        for (xs, &row) in xs.chunks_mut(d.max(1)).zip(rows) {
            widen::<T, T>(xs, &self.x[row as usize * d..][..d]);
        }
    }

    /// `out[n] = x[rows[n]]·W[ids[n]] − lse(x[rows[n]] Wᵀ)`, times `sign`; rows do not descend.
    pub(super) fn score(&self, out: &mut [f32], scratch: &mut [f32], rows: &[u32], ids: &[u32], sign: f32) {
        let (v, d) = self.w.size();
        let most = rows.len().min(ROWS);
        let (own, scratch) = scratch.split_at_mut(chunk(most, v, d));
        let rooms = Rooms::new(scratch, room::<T>(most, v, d, self.w.dtype()));
        let (xs, own) = own.split_at_mut(most * d);
        let (lse, parts) = own.split_at_mut(most);
        let mut chunk = Chunk { xs, parts, lse };
        let mut at = 0;
        while at < rows.len() {
            // The next distinct rows, and how many pairs they have.
            let mut distinct = [0u32; ROWS];
            let (mut count, mut end) = (0, at);
            while end < rows.len() && (count < most || distinct[count - 1] == rows[end]) {
                if count == 0 || distinct[count - 1] != rows[end] {
                    distinct[count] = rows[end];
                    count += 1;
                }
                end += 1;
            }
            self.gather(chunk.xs, &distinct[..count]);
            self.log_sum_exp(&mut chunk, &rooms, count);
            let shared = Shared::new(&mut out[at..end]);
            let (xs, lse) = (&*chunk.xs, &*chunk.lse);
            rooms.each((end - at).div_ceil(PAIRS), |i, room| {
                let pairs = i * PAIRS..(i * PAIRS + PAIRS).min(end - at);
                // SAFETY: blocks of pairs are disjoint.
                let mut out = unsafe { shared.tile(pairs.start, 1, pairs.len(), pairs.len()) };
                for (out, n) in out.row(0).iter_mut().zip(at + pairs.start..) {
                    let k = distinct[..count].partition_point(|&row| row < rows[n]);
                    *out = sign * (self.logit(&xs[k * d..][..d], ids[n] as usize, room) - lse[k]);
                }
            });
            at = end;
        }
    }

    /// One logit.
    fn logit(&self, x: &[f32], id: usize, room: &mut [f32]) -> f32 {
        let d = x.len();
        let w = Source::<T>::Weight(self.w).block(id..id + 1, 0..d, room);
        let mut logit = [0.0];
        dots(&mut logit, false, x, w.lines());
        logit[0]
    }

    /// The log-sum-exp of the chunk's first `rows` rows.
    fn log_sum_exp(&self, chunk: &mut Chunk<'_>, rooms: &Rooms<'_>, rows: usize) {
        let (v, d) = self.w.size();
        let tasks = v.div_ceil(COLS);
        let left = Source::Single { data: &*chunk.xs, stride: d }.by_columns();
        let product = Term { left, right: Source::<T>::Weight(self.w).by_columns(), k: d };
        let parts = Shared::new(&mut *chunk.parts);
        rooms.each(tasks, |i, room| {
            let n = i * COLS..(i * COLS + COLS).min(v);
            let (tile, room) = room.split_at_mut(rows * n.len());
            let mut logits = TileMut::new(tile, rows, n.len());
            product.tile(&mut logits, false, 0..rows, n.clone(), room, End::default());
            // SAFETY: each task has its own part.
            let mut part = unsafe { parts.tile(i * rows * 2, 1, rows * 2, rows * 2) };
            for (part, tile) in part.row(0).chunks_mut(2).zip(tile.chunks_mut(n.len())) {
                let most = simd::run(Largest(tile));
                part.copy_from_slice(&[most, simd::run(Exps { x: tile, most }) as f32]);
            }
        });
        let parts = &*chunk.parts;
        for (row, lse) in chunk.lse[..rows].iter_mut().enumerate() {
            let of_row =
                || (0..tasks).map(|i| (parts[(i * rows + row) * 2], parts[(i * rows + row) * 2 + 1]));
            let most = of_row().map(|p| p.0).fold(f32::NEG_INFINITY, nan_max);
            let sum: f64 = of_row().map(|(m, sum)| f64::from(sum) * f64::from(m - most).exp()).sum();
            *lse = (f64::from(most) + sum.ln()) as f32;
        }
    }
}

/// Pairs that one task scores.
const PAIRS: usize = 64;

/// Turns a row of logits into the gradient of its loss, `weight (softmax − e_target)`; the loss.
pub(super) fn softmax(logits: &mut [f32], target: usize, weight: f32) -> f32 {
    let hit = logits[target];
    let most = simd::run(Largest(logits));
    let sum = simd::run(Exps { x: logits, most });
    let lse = f64::from(most) + sum.ln();
    simd::run(Multiply { x: logits, by: (f64::from(weight) / sum) as f32 });
    logits[target] = ((f64::from(hit) - lse).exp_m1() * f64::from(weight)) as f32;
    (lse - f64::from(hit)) as f32
}

/// The larger one; NaN if either is.
#[inline(always)]
fn nan_max(a: f32, b: f32) -> f32 {
    if a >= b || a.is_nan() { a } else { b }
}

/// The largest; NaN if one is.
struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<I: Isa>(self) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = nan_max(*lane, x);
            }
        }
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, nan_max)
    }
}

/// `x = e^(x − most)`; their sum, in f32 over short runs and in f64 over those.
struct Exps<'a> {
    x: &'a mut [f32],
    most: f32,
}

impl Kernel for Exps<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let mut sum = 0f64;
        for run in self.x.chunks_mut(64 * LANES) {
            let mut lanes = [0f32; LANES];
            let (chunks, rest) = run.as_chunks_mut::<LANES>();
            for chunk in chunks {
                for (lane, x) in lanes.iter_mut().zip(chunk) {
                    *x = exp::<I>(*x - self.most);
                    *lane += *x;
                }
            }
            for (lane, x) in lanes.iter_mut().zip(rest) {
                *x = exp::<I>(*x - self.most);
                *lane += *x;
            }
            sum += f64::from(total(lanes));
        }
        sum
    }
}

struct Multiply<'a> {
    x: &'a mut [f32],
    by: f32,
}

impl Kernel for Multiply<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        self.x.iter_mut().for_each(|x| *x *= self.by);
    }
}
