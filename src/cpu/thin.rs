//! Products with an adapter's rank as one of their sizes: too thin for a general product, which would spend its time
//! packing, but in tiles. Each streams over the wide matrix once and keeps its sums in registers.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::product::pairs::Pairs;
use super::product::{Mat, TileMut};
use super::simd::{self, Isa, Kernel, fma};
use crate::tensor::Real;

/// Rows of x that stay in the first-level cache while the ranks and columns of [`outer`] go by.
const ROWS: usize = 64;
/// Numbers of the narrowest vector.
const STEP: usize = 8;

/// Row-major elements, `stride` from row to row.
#[derive(Clone, Copy)]
pub(super) struct Lines<'a, T> {
    pub(super) data: &'a [T],
    pub(super) stride: usize,
}

impl<'a, T> Lines<'a, T> {
    /// Columns `columns` of row `r`.
    #[inline(always)]
    pub(super) fn at(&self, r: usize, columns: Range<usize>) -> &'a [T] {
        &self.data[r * self.stride..][columns]
    }

    /// The rows from `r` on, the columns from `c` on.
    pub(super) fn from(self, r: usize, c: usize) -> Lines<'a, T> {
        Lines { data: self.data.get(r * self.stride + c..).unwrap_or(&[]), stride: self.stride }
    }
}

/// A factor of an adapter as an operand: `[rows, columns]`, each row followed by zeros up to whole vectors.
pub(super) struct Factor {
    /// Rows.
    rows: usize,
    /// Columns.
    columns: usize,
}

impl Factor {
    /// A factor of `rows` rows and `columns` columns.
    pub(super) fn new(rows: usize, columns: usize) -> Factor {
        Factor { rows, columns }
    }

    /// f32 elements that it takes.
    pub(super) fn len(&self) -> usize {
        self.rows * self.columns.next_multiple_of(STEP)
    }

    /// What was packed, as a matrix.
    pub(super) fn matrix<'r>(&self, packed: Lines<'r, f32>) -> Mat<'r> {
        Mat::new(packed.data, (self.rows, self.columns), (packed.stride, 1))
    }

    /// `scale · from[rows, columns]`, rounded to `T`.
    pub(super) fn pack<'r, T: Real>(
        &self,
        room: &'r mut [f32],
        from: Lines<'_, f32>,
        scale: f32,
    ) -> Lines<'r, f32> {
        let stride = self.columns.next_multiple_of(STEP);
        for (r, out) in room[..self.len()].chunks_mut(stride.max(1)).enumerate() {
            let (out, zeros) = out.split_at_mut(self.columns);
            for (out, &from) in out.iter_mut().zip(from.at(r, 0..self.columns)) {
                *out = T::round(scale * from);
            }
            zeros.fill(0.0);
        }
        Lines { data: room, stride }
    }

    /// `scale · from[columns, rows]ᵀ`, rounded to `T`.
    pub(super) fn pack_transposed<'r, T: Real>(
        &self,
        room: &'r mut [f32],
        from: Lines<'_, f32>,
        scale: f32,
    ) -> Lines<'r, f32> {
        let stride = self.columns.next_multiple_of(STEP);
        for (r, out) in room[..self.len()].chunks_mut(stride.max(1)).enumerate() {
            let (out, zeros) = out.split_at_mut(self.columns);
            for (c, out) in out.iter_mut().enumerate() {
                *out = T::round(scale * from.data[c * from.stride + r]);
            }
            zeros.fill(0.0);
        }
        Lines { data: room, stride }
    }
}

/// A wide matrix.
pub(super) enum Wide<'a> {
    /// In f32.
    Singles(Mat<'a>),
    /// In bf16, where those are multiplied as they are.
    #[cfg(target_arch = "x86_64")]
    Halves(Mat<'a, bf16>, Pairs),
}

/// A thin matrix: a factor of an adapter.
#[derive(Clone, Copy)]
pub(super) enum Thin<'a> {
    /// Its ranks are rows: `[R, K]`.
    Rows(Lines<'a, f32>),
    /// Its ranks are columns: `[K, R]`.
    Columns(Lines<'a, f32>),
}

impl Wide<'_> {
    /// `out[m, r] = Σ_k x[m, k] f[r, k]`, added if `keep`, of rows `rows` of x; f is `scale · thin`, rounded to `T`, in `room`
    /// for a [`Factor`].
    pub(super) fn multiply<T: Real>(
        &self,
        out: &mut TileMut<'_, f32>,
        keep: bool,
        rows: Range<usize>,
        thin: Thin<'_>,
        scale: f32,
        room: &mut [f32],
    ) {
        let ranks = out.size().1;
        match self {
            Wide::Singles(x) => {
                let depth = x.columns();
                let factor = Factor::new(depth, ranks);
                let f = match thin {
                    Thin::Rows(f) => factor.pack_transposed::<T>(room, f, scale),
                    Thin::Columns(f) => factor.pack::<T>(room, f, scale),
                };
                multiply(out, keep, x.rows(rows).lines(), f, depth);
            }
            #[cfg(target_arch = "x86_64")]
            Wide::Halves(x, pairs) => {
                let depth = x.columns();
                let room: &mut [bf16] = &mut bytemuck::cast_slice_mut(room)[..ranks * depth];
                for (r, out) in room.chunks_mut(depth.max(1)).enumerate() {
                    let round = |(out, x): (&mut bf16, &f32)| *out = Real::from_f32(scale * x);
                    match thin {
                        Thin::Rows(f) => out.iter_mut().zip(f.at(r, 0..depth)).for_each(round),
                        Thin::Columns(f) => {
                            out.iter_mut().zip(f.data[r..].iter().step_by(f.stride)).for_each(round)
                        }
                    }
                }
                let f = Mat::new(room, (ranks, depth), (depth, 1));
                pairs.ranks(out, keep, x.rows(rows), f);
            }
        }
    }

    /// `out[R, n] += u[K, R]ᵀ x[K, n]`, u of numbers that are those of x.
    pub(super) fn outer<U: Real>(&self, out: &mut TileMut<'_, f32>, u: Lines<'_, U>) {
        match self {
            Wide::Singles(x) => outer(out, u, x.lines(), x.height()),
            #[cfg(target_arch = "x86_64")]
            Wide::Halves(x, pairs) => pairs.outer(out, u, *x),
        }
    }
}

/// The first `some` of L numbers, the others zero; all of them where `some` is L.
#[inline(always)]
fn load<const L: usize>(x: &[f32], some: usize) -> [f32; L] {
    let mut out = [0f32; L];
    if some == L {
        out.copy_from_slice(&x[..L])
    } else {
        out[..some].copy_from_slice(&x[..some])
    }
    out
}

/// `out[m, n] = x[m, K] b[K, n]`, added if `keep`: K or n is a rank, and b is a [`Factor`].
pub(super) fn multiply<T: Real>(
    out: &mut TileMut<'_, f32>,
    keep: bool,
    x: Lines<'_, T>,
    b: Lines<'_, f32>,
    k: usize,
) {
    simd::run(Multiply { out, keep, x, b, k });
}

struct Multiply<'a, 'b, T> {
    out: &'a mut TileMut<'b, f32>,
    keep: bool,
    x: Lines<'a, T>,
    b: Lines<'a, f32>,
    k: usize,
}

impl<T: Real> Kernel for Multiply<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        if I::WIDE { self.by::<I, 4, 32>() } else { self.by::<I, 4, 16>() }
    }
}

impl<T: Real> Multiply<'_, '_, T> {
    /// M rows by L columns where there are as many, then by narrow vectors.
    #[inline(always)]
    fn by<I: Isa, const M: usize, const L: usize>(mut self) {
        let (rows, columns) = self.out.size();
        let whole = columns / L * L;
        self.all_rows::<I, M, L>(rows, 0..whole);
        self.all_rows::<I, 8, STEP>(rows, whole..columns);
    }

    #[inline(always)]
    fn all_rows<I: Isa, const M: usize, const L: usize>(&mut self, rows: usize, columns: Range<usize>) {
        let whole = rows / M * M;
        for r in (0..whole).step_by(M) {
            for c in columns.clone().step_by(L) {
                self.some::<I, M, L>(r, c, L.min(columns.end - c));
            }
        }
        for r in whole..rows {
            for c in columns.clone().step_by(L) {
                self.some::<I, 1, L>(r, c, L.min(columns.end - c));
            }
        }
    }

    /// M rows and L columns, of which the first `some` are written.
    #[inline(always)]
    fn some<I: Isa, const M: usize, const L: usize>(&mut self, r: usize, c: usize, some: usize) {
        let mut sums = [[0f32; L]; M];
        // K by blocks of known length, so that no element's place needs a check.
        let x: [(&[[T; STEP]], &[T]); M] = std::array::from_fn(|i| self.x.at(r + i, 0..self.k).as_chunks());
        for block in 0..self.k / STEP {
            let x: [&[T; STEP]; M] = std::array::from_fn(|i| &x[i].0[block]);
            for n in 0..STEP {
                let b = load::<L>(self.b.at(block * STEP + n, c..c + L), L);
                for i in 0..M {
                    let x = x[i][n].to_f32();
                    for l in 0..L {
                        sums[i][l] = fma::<I>(x, b[l], sums[i][l]);
                    }
                }
            }
        }
        for n in 0..self.k % STEP {
            let b = load::<L>(self.b.at(self.k / STEP * STEP + n, c..c + L), L);
            for i in 0..M {
                let x = x[i].1[n].to_f32();
                for l in 0..L {
                    sums[i][l] = fma::<I>(x, b[l], sums[i][l]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            let out = &mut self.out.row(r + i)[c..c + some];
            store(out, self.keep, sums);
        }
    }
}

/// `out = sums`, added if `keep`.
#[inline(always)]
fn store<const L: usize>(out: &mut [f32], keep: bool, sums: &[f32; L]) {
    let mut new = *sums;
    if keep {
        let old = load::<L>(out, out.len());
        for l in 0..L {
            new[l] += old[l];
        }
    }
    out.copy_from_slice(&new[..out.len()]);
}

/// `out[R, n] += u[K, R]ᵀ x[K, n]`: R is a rank.
fn outer<U: Real>(out: &mut TileMut<'_, f32>, u: Lines<'_, U>, x: Lines<'_, f32>, k: usize) {
    simd::run(Outer { out, u, x, k });
}

struct Outer<'a, 'b, U> {
    out: &'a mut TileMut<'b, f32>,
    u: Lines<'a, U>,
    x: Lines<'a, f32>,
    k: usize,
}

impl<U: Real> Kernel for Outer<'_, '_, U> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        if I::WIDE { self.by::<I, 32>() } else { self.by::<I, STEP>() }
    }
}

impl<U: Real> Outer<'_, '_, U> {
    #[inline(always)]
    fn by<I: Isa, const L: usize>(mut self) {
        let (ranks, columns) = self.out.size();
        let (whole, narrow) = (columns / L * L, columns / STEP * STEP);
        for first in (0..self.k).step_by(ROWS) {
            let rows = first..(first + ROWS).min(self.k);
            let mut n = 0;
            while n < ranks {
                n += match ranks - n {
                    8.. => self.ranks::<I, 8, L>(rows.clone(), n, (whole, narrow, columns)),
                    4..8 => self.ranks::<I, 4, L>(rows.clone(), n, (whole, narrow, columns)),
                    _ => self.ranks::<I, 1, L>(rows.clone(), n, (whole, narrow, columns)),
                };
            }
        }
    }

    /// N ranks from `n` on, all columns; N.
    #[inline(always)]
    fn ranks<I: Isa, const N: usize, const L: usize>(
        &mut self,
        rows: Range<usize>,
        n: usize,
        (whole, narrow, columns): (usize, usize, usize),
    ) -> usize {
        (0..whole).step_by(L).for_each(|c| self.some::<I, N, L>(rows.clone(), n, c, L));
        (whole..narrow).step_by(STEP).for_each(|c| self.some::<I, N, STEP>(rows.clone(), n, c, STEP));
        if narrow < columns {
            self.some::<I, N, STEP>(rows, n, narrow, columns - narrow);
        }
        N
    }

    /// N ranks and `some` of L columns.
    #[inline(always)]
    fn some<I: Isa, const N: usize, const L: usize>(
        &mut self,
        rows: Range<usize>,
        n: usize,
        c: usize,
        some: usize,
    ) {
        let mut sums = [[0f32; L]; N];
        for r in rows {
            let (u, x) = (self.u.at(r, n..n + N), load::<L>(self.x.at(r, c..c + some), some));
            for j in 0..N {
                let u = u[j].to_f32();
                for l in 0..L {
                    sums[j][l] = fma::<I>(u, x[l], sums[j][l]);
                }
            }
        }
        for (j, sums) in sums.iter().enumerate() {
            store(&mut self.out.row(n + j)[c..c + some], true, sums);
        }
    }
}
