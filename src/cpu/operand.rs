//! What a product reads: where it lies, in which type, and how a block of it becomes f32.
//!
//! A block is used in place where it is f32 already; otherwise it is widened into the calling thread's room, a few
//! hundred columns of K at a time, so that no second copy of a matrix exists.

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::dropout::Mask;
use super::product::{Mat, TileMut, product};
use super::simd::{self, Isa, Kernel};
use crate::host::{Elements, HostMatrix};
use crate::tensor::{DType, Frozen, Real};

/// Columns of K that are widened at a time.
const DEPTH: usize = 512;

/// Columns of K that are widened at a time where K is `k`.
pub(super) fn depth(k: usize) -> usize {
    k.min(DEPTH)
}

/// Row-major elements, and how they become operands.
#[derive(Clone, Copy)]
pub(super) enum Source<'a, T> {
    /// Activations.
    Real { data: &'a [T], stride: usize },
    /// Activations after dropout, without the division by 1 − p; the rows follow one another.
    Masked { data: &'a [T], stride: usize, mask: &'a Mask },
    /// f32 that is an operand as it is.
    Single { data: &'a [f32], stride: usize },
    /// A frozen weight, rounded to `T`.
    Weight(&'a HostMatrix),
}

/// A source with K along its rows or its columns.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a, T> {
    source: Source<'a, T>,
    k_along_rows: bool,
}

impl<'a, T: Real> Source<'a, T> {
    /// The operand whose K runs along the columns: `[outer, K]` as it lies.
    pub(super) fn by_columns(self) -> Operand<'a, T> {
        Operand { source: self, k_along_rows: false }
    }

    /// The operand whose K runs along the rows: `[K, outer]` as it lies.
    pub(super) fn by_rows(self) -> Operand<'a, T> {
        Operand { source: self, k_along_rows: true }
    }

    /// Whether blocks are used in place.
    pub(super) fn in_place(&self) -> bool {
        let single = T::DTYPE == DType::F32;
        match self {
            Source::Real { .. } => single,
            Source::Masked { .. } => false,
            Source::Single { .. } => true,
            Source::Weight(w) => weight_in_place::<T>(w.dtype()),
        }
    }

    /// Rows `rows`, columns `cols`, in place or in `room`.
    pub(super) fn block<'r>(&self, rows: Range<usize>, cols: Range<usize>, room: &'r mut [f32]) -> Mat<'r>
    where
        'a: 'r,
    {
        let size = (rows.len(), cols.len());
        if let Some((data, stride)) = self.in_place().then(|| self.single()).flatten() {
            let start = if size.0 * size.1 == 0 { 0 } else { rows.start * stride + cols.start };
            return Mat::new(&data[start..], size, (stride, 1));
        }
        let room = &mut room[..size.0 * size.1];
        for (out, r) in room.chunks_mut(size.1.max(1)).zip(rows) {
            let at = |stride: usize| r * stride + cols.start..r * stride + cols.end;
            match *self {
                Source::Real { data, stride } => widen::<T, T>(out, &data[at(stride)]),
                Source::Masked { data, stride, mask } => {
                    widen::<T, T>(out, &data[at(stride)]);
                    mask.apply(out, (r * stride + cols.start) as u64, 1.0);
                }
                Source::Single { data, stride } => out.copy_from_slice(&data[at(stride)]),
                Source::Weight(w) => match w.elements() {
                    Elements::BF16(e) => widen::<T, _>(out, &e[at(w.size().1)]),
                    Elements::F16(e) => widen_half::<T>(out, &e[at(w.size().1)]),
                    Elements::F32(e) => widen::<T, _>(out, &e[at(w.size().1)]),
                },
            }
        }
        Mat::new(room, size, (size.1, 1))
    }

    /// The elements and their stride, if they are f32.
    fn single(&self) -> Option<(&'a [f32], usize)> {
        match *self {
            Source::Real { data, stride } | Source::Masked { data, stride, .. } => {
                bytemuck::try_cast_slice(data).ok().filter(|_| T::DTYPE == DType::F32).map(|d| (d, stride))
            }
            Source::Single { data, stride } => Some((data, stride)),
            Source::Weight(w) => match w.elements() {
                Elements::F32(e) => Some((e, w.size().1)),
                _ => None,
            },
        }
    }
}

/// Whether a weight stored as `dtype` is used where it lies.
pub(super) fn weight_in_place<T: Real>(dtype: DType) -> bool {
    T::DTYPE == DType::F32 && dtype == DType::F32
}

impl<T: Real> Operand<'_, T> {
    fn block<'r>(&'r self, outer: Range<usize>, k: Range<usize>, room: &'r mut [f32]) -> Mat<'r> {
        if self.k_along_rows {
            self.source.block(k, outer, room).t()
        } else {
            self.source.block(outer, k, room)
        }
    }
}

/// `alpha · left[m, K] · right[n, K]ᵀ`, of which tiles are made.
#[derive(Clone, Copy)]
pub(super) struct Term<'a, T> {
    pub(super) left: Operand<'a, T>,
    pub(super) right: Operand<'a, T>,
    pub(super) k: usize,
    pub(super) alpha: f32,
}

impl<T: Real> Term<'_, T> {
    /// Writes rows `m` and columns `n` of the term to `dst`, or adds them if `keep`.
    pub(super) fn tile(
        &self,
        dst: &mut TileMut<'_, f32>,
        keep: bool,
        m: Range<usize>,
        n: Range<usize>,
        room: &mut [f32],
    ) {
        let places = (self.left.source.in_place(), self.right.source.in_place());
        let step = if places == (true, true) { self.k } else { depth(self.k) };
        let (left, right) = room.split_at_mut(if places.0 { 0 } else { m.len() * step });
        let mut k = 0;
        while k < self.k || (k == 0 && !keep) {
            let ks = k..(k + step).min(self.k);
            let a = self.left.block(m.clone(), ks.clone(), left);
            let b = self.right.block(n.clone(), ks.clone(), right);
            product(dst, keep || k > 0, self.alpha, a, b.t());
            if ks.is_empty() {
                break;
            }
            k = ks.end;
        }
    }
}

/// `out = from`, rounded to `T` where `U` is wider.
pub(super) fn widen<T: Real, U: Real>(out: &mut [f32], from: &[U]) {
    simd::run(Widen::<T, U>(out, from, PhantomData));
}

fn widen_half<T: Real>(out: &mut [f32], from: &[f16]) {
    from.convert_to_f32_slice(out);
    simd::run(Round::<T>(out, PhantomData));
}

/// `out = from`, rounded.
pub(super) fn narrow<T: Real>(out: &mut [T], from: &[f32]) {
    simd::run(Narrow(out, from));
}

/// Rounds to `T` where it stands.
pub(super) fn round<T: Real>(x: &mut [f32]) {
    simd::run(Round::<T>(x, PhantomData));
}

struct Widen<'a, T, U>(&'a mut [f32], &'a [U], PhantomData<T>);

impl<T: Real, U: Real> Kernel for Widen<'_, T, U> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        // A bf16 is a bf16 and an f32 whatever T is.
        let exact = U::DTYPE == DType::BF16 || T::DTYPE == DType::F32;
        for (out, x) in self.0.iter_mut().zip(self.1) {
            *out = if exact { x.to_f32() } else { T::round(x.to_f32()) };
        }
    }
}

struct Round<'a, T>(&'a mut [f32], PhantomData<T>);

impl<T: Real> Kernel for Round<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        if T::DTYPE != DType::F32 {
            self.0.iter_mut().for_each(|x| *x = T::round(*x));
        }
    }
}

struct Narrow<'a, T>(&'a mut [T], &'a [f32]);

impl<T: Real> Kernel for Narrow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (out, x) in self.0.iter_mut().zip(self.1) {
            *out = T::from_f32(*x);
        }
    }
}
