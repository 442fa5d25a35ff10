//! The entries of low-rank updates, made in f32 a tile at a time, and the loops over a tile: what element-wise methods
//! are built from.
//!
//! An entry is one chain of multiply-adds over the rank, in the rank's order, whatever the tile that it is made in: its
//! bits are the same in every pass.

use std::ops::Range;

use faer::MatRef;

use super::dropout::Mask;
use super::product::TileMut;
use super::simd::{self, Isa, Kernel};
use super::thin::{Factor, Lines, multiply};
use crate::random::Philox;

/// Numbers that a loop works on side by side.
const LANES: usize = 16;

/// The update `B A` of one module, its factors in f32.
#[derive(Clone, Debug)]
pub(crate) struct Entries {
    /// `(O, I)`.
    size: (usize, usize),
    rank: usize,
    /// `B[O, R]`.
    b: Vec<f32>,
    /// `A[R, I]`, each row followed by zeros up to whole vectors.
    a: Vec<f32>,
    /// Numbers from a row of `a` to the next.
    stride: usize,
}

impl Entries {
    /// Of `Bᵀ[R, O]` and `A[R, I]`, each number rounded once.
    pub(crate) fn new(bt: MatRef<'_, f64>, a: MatRef<'_, f64>) -> Entries {
        let (rank, o, i) = (a.nrows(), bt.ncols(), a.ncols());
        let b = (0..o * rank).map(|x| bt[(x % rank, x / rank)] as f32).collect();
        let rows: Vec<f32> = (0..rank * i).map(|x| a[(x / i, x % i)] as f32).collect();
        let factor = Factor::new(rank, i);
        let mut packed = vec![0.0; factor.len()];
        let stride = factor.pack::<f32>(&mut packed, Lines { data: &rows, stride: i }, 1.0).stride;
        Entries { size: (o, i), rank, b, a: packed, stride }
    }

    /// `(O, I)`.
    pub(crate) fn size(&self) -> (usize, usize) {
        self.size
    }

    /// `out = (B A)[rows, columns]`, row by row. `columns` begins at a multiple of 8.
    pub(crate) fn tile(&self, out: &mut [f32], rows: Range<usize>, columns: Range<usize>) {
        debug_assert!(columns.start.is_multiple_of(8) && columns.end <= self.size.1);
        let mut out = TileMut::new(out, rows.len(), columns.len());
        let b = Lines { data: &self.b, stride: self.rank }.from(rows.start, 0);
        let a = Lines { data: &self.a[..], stride: self.stride }.from(0, columns.start);
        multiply(&mut out, false, b, a, self.rank);
    }
}

/// The bits of `|x|`: as integers they are ordered as the magnitudes are.
#[inline(always)]
pub(crate) fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Whether no number is NaN or infinite.
pub(crate) fn finite(x: &[f32]) -> bool {
    simd::run(Finite { x })
}

struct Finite<'a> {
    x: &'a [f32],
}

impl Kernel for Finite<'_> {
    type Output = bool;
    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let largest = self.x.iter().fold(0, |m, x| m.max(magnitude(*x) as i32));
        f32::from_bits(largest as u32).is_finite()
    }
}

/// A range of magnitudes, cut into bins of `2^shift`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The least; at least 1, so that zeros are in no window.
    pub(crate) least: u32,
    /// The bins' width as a power of two.
    pub(crate) shift: u32,
    /// How many.
    pub(crate) bins: usize,
}

/// Adds those of `x` that lie in `window` to their `bins`; gives the number of those above it.
pub(crate) fn count(x: &[f32], window: Window, bins: &mut [u64]) -> u64 {
    simd::run(Count { x, window, bins })
}

struct Count<'a> {
    x: &'a [f32],
    window: Window,
    bins: &'a mut [u64],
}

impl Kernel for Count<'_> {
    type Output = u64;
    #[inline(always)]
    fn run<I: Isa>(self) -> u64 {
        let Count { x, window, bins } = self;
        // Magnitudes are below 2^31, so signed comparisons serve; the end may be 2^31 itself.
        let least = window.least as i32;
        let last =
            (u64::from(window.least) + ((window.bins as u64) << window.shift) - 1).min(0x7fff_ffff) as i32;
        let mut above = [0i32; LANES];
        let mut one = |key: i32| bins[((key - least) >> window.shift) as usize] += 1;
        let (blocks, rest) = x.as_chunks::<LANES>();
        for x in blocks {
            let mut inside = 0i32;
            for l in 0..LANES {
                let key = magnitude(x[l]) as i32;
                let (high, from) = (i32::from(key > last), i32::from(key >= least));
                above[l] += high;
                inside |= high ^ from;
            }
            if inside != 0 {
                for x in x {
                    let key = magnitude(*x) as i32;
                    if key >= least && key <= last {
                        one(key);
                    }
                }
            }
        }
        let mut high = above.iter().map(|&n| n as u64).sum();
        for x in rest {
            let key = magnitude(*x) as i32;
            if key > last {
                high += 1;
            } else if key >= least {
                one(key);
            }
        }
        high
    }
}

/// What becomes of an entry before the updates are put together.
#[derive(Clone, Debug)]
pub(crate) enum Keep {
    /// Entries of at least this magnitude stay as they are, the others become zero.
    Least(u32),
    /// Entries stay with a probability and are multiplied by its inverse; the place of an entry is its row times I
    /// plus its column.
    Drawn(Mask),
}

impl Keep {
    /// Each entry is dropped with probability `p`.
    pub(crate) fn drawn(numbers: Philox, p: f64) -> Keep {
        Keep::Drawn(Mask::of(numbers, p))
    }

    /// `out = kept x` for entries of one row, the first of which has place `at`; the number that are not zero.
    pub(crate) fn apply(&self, out: &mut [f32], x: &[f32], at: u64) -> u64 {
        match self {
            Keep::Least(least) => simd::run(Trim { out, x, least: *least }),
            Keep::Drawn(mask) => {
                out.copy_from_slice(x);
                mask.apply(out, at, mask.scale);
                simd::run(NonZero { x: out })
            }
        }
    }
}

struct Trim<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    least: u32,
}

impl Kernel for Trim<'_> {
    type Output = u64;
    #[inline(always)]
    fn run<I: Isa>(self) -> u64 {
        let Trim { out, x, least } = self;
        let mut kept = 0u32;
        for (out, &x) in out.iter_mut().zip(x) {
            let keep = magnitude(x) as i32 >= least as i32;
            *out = if keep { x } else { 0.0 };
            kept += u32::from(keep);
        }
        u64::from(kept)
    }
}

struct NonZero<'a> {
    x: &'a [f32],
}

impl Kernel for NonZero<'_> {
    type Output = u64;
    #[inline(always)]
    fn run<I: Isa>(self) -> u64 {
        u64::from(self.x.iter().map(|x| u32::from(magnitude(*x) != 0)).sum::<u32>())
    }
}

/// How the kept entries of several updates become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Join {
    /// `λ Σ wₑ xₑ`.
    Sum,
    /// `λ Σ wₑ xₑ / Σ wₑ` over those that have the sign of `Σ wₑ xₑ`, which is + where that is zero; 0 where none has.
    Elect,
}

/// `out` of the tiles `x` of E updates, one after the other, with E `weights`.
pub(crate) fn join(out: &mut [f32], x: &[f32], weights: &[f32], lambda: f32, how: Join) {
    debug_assert!(x.len() == out.len() * weights.len());
    simd::run(Joined { out, x, weights, lambda, how });
}

struct Joined<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    weights: &'a [f32],
    lambda: f32,
    how: Join,
}

impl Kernel for Joined<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        match self.how {
            Join::Sum => self.all::<false>(),
            Join::Elect => self.all::<true>(),
        }
    }
}

impl Joined<'_> {
    #[inline(always)]
    fn all<const ELECT: bool>(&mut self) {
        let n = self.out.len();
        let whole = n / LANES * LANES;
        (0..whole).step_by(LANES).for_each(|at| self.some::<ELECT, LANES>(at));
        (whole..n).for_each(|at| self.some::<ELECT, 1>(at));
    }

    #[inline(always)]
    fn some<const ELECT: bool, const L: usize>(&mut self, at: usize) {
        let (n, lambda) = (self.out.len(), self.lambda);
        let Some(out) = self.out[at..].first_chunk_mut::<L>() else { return };
        // Those above zero and those below, and the weights of each.
        let ([mut up, mut down], [mut of_up, mut of_down]) = ([[0f32; L]; 2], [[0f32; L]; 2]);
        for (e, &w) in self.weights.iter().enumerate() {
            let Some(x) = self.x[e * n + at..].first_chunk::<L>() else { return };
            for l in 0..L {
                up[l] += w * x[l].max(0.0);
                down[l] += w * x[l].min(0.0);
                if ELECT {
                    of_up[l] += if x[l] > 0.0 { w } else { 0.0 };
                    of_down[l] += if x[l] < 0.0 { w } else { 0.0 };
                }
            }
        }
        for l in 0..L {
            let sum = up[l] + down[l];
            out[l] = lambda * sum;
            if ELECT {
                let part = if sum >= 0.0 { up[l] } else { down[l] };
                let of = if sum >= 0.0 { of_up[l] } else { of_down[l] };
                // Where nobody agrees there is nothing to divide.
                out[l] = lambda * (part / if of > 0.0 { of } else { 1.0 });
            }
        }
    }
}

/// `Σ x y`, products and sums in f64.
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f64 {
    simd::run(Dot { x, y })
}

struct Dot<'a> {
    x: &'a [f32],
    y: &'a [f32],
}

impl Kernel for Dot<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let mut sums = [0f64; LANES];
        let (x, y) = (self.x.as_chunks::<LANES>(), self.y.as_chunks::<LANES>());
        for (x, y) in x.0.iter().zip(y.0) {
            for l in 0..LANES {
                // A product of two f32 is exact in f64.
                sums[l] += f64::from(x[l]) * f64::from(y[l]);
            }
        }
        let rest = x.1.iter().zip(y.1).map(|(x, y)| f64::from(*x) * f64::from(*y));
        sums.into_iter().chain(rest).sum()
    }
}

/// `Σ (new − old − delta)²` in f64.
pub(crate) fn lost(new: &[f32], old: &[f32], delta: &[f32]) -> f64 {
    simd::run(Lost { new, old, delta })
}

struct Lost<'a> {
    new: &'a [f32],
    old: &'a [f32],
    delta: &'a [f32],
}

impl Kernel for Lost<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let one = |new: f32, old: f32, delta: f32| {
            let lost = f64::from(new) - f64::from(old) - f64::from(delta);
            lost * lost
        };
        let mut sums = [0f64; LANES];
        let (new, old, delta) =
            (self.new.as_chunks::<LANES>(), self.old.as_chunks::<LANES>(), self.delta.as_chunks::<LANES>());
        for ((new, old), delta) in new.0.iter().zip(old.0).zip(delta.0) {
            for l in 0..LANES {
                sums[l] += one(new[l], old[l], delta[l]);
            }
        }
        let rest = new.1.iter().zip(old.1).zip(delta.1).map(|((n, o), d)| one(*n, *o, *d));
        sums.into_iter().chain(rest).sum()
    }
}
