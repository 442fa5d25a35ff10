//! What a product reads: where it lies, in which type, and how a block of it becomes f32.
//!
//! A block is used in place where it is f32 already, or bf16 where pairs of those are multiplied; otherwise it is widened
//! into the calling thread's room, a few hundred columns of K at a time, so that no second copy of a matrix exists.

use std::marker::PhantomData;
use std::mem;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use half::bf16;
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::dropout::Mask;
use super::packed::Packed;
use super::product::dot::dots;
#[cfg(target_arch = "x86_64")]
use super::product::halves;
#[cfg(target_arch = "x86_64")]
use super::product::pairs::Pairs;
use super::product::{End, Mat, More, RANKS, Right, TileMut, product};
use super::simd::{self, Isa, Kernel};
use super::thin::{Lines, Wide, multiply};
use crate::backend::Pass;
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

    /// Rows `rows`, columns `cols` as bf16, which is `T`, in place or in `room`.
    #[cfg(target_arch = "x86_64")]
    fn halves<'r>(&self, rows: Range<usize>, cols: Range<usize>, room: &'r mut [bf16]) -> Mat<'r, bf16>
    where
        'a: 'r,
    {
        let size = (rows.len(), cols.len());
        if let Some((data, stride)) = self.halves_in_place() {
            let start = if size.0 * size.1 == 0 { 0 } else { rows.start * stride + cols.start };
            return Mat::new(&data[start..], size, (stride, 1));
        }
        let room = &mut room[..size.0 * size.1];
        let mut line = [0f32; DEPTH];
        for (out, r) in room.chunks_mut(size.1.max(1)).zip(rows) {
            for (out, c) in out.chunks_mut(DEPTH).zip(cols.clone().step_by(DEPTH)) {
                // Numbers that are bf16 already, whatever holds them.
                let row = self.block(r..r + 1, c..c + out.len(), &mut line);
                narrow(out, row.row(0));
            }
        }
        Mat::new(room, size, (size.1, 1))
    }

    /// [`block`](Self::block) as products with a thin matrix read it.
    pub(super) fn wide<'r>(&self, rows: Range<usize>, cols: Range<usize>, room: &'r mut [f32]) -> Wide<'r>
    where
        'a: 'r,
    {
        #[cfg(target_arch = "x86_64")]
        if let (Some(pairs), true) = (pairs::<T>(), self.halves_in_place().is_some()) {
            return Wide::Halves(self.halves(rows, cols, &mut []), pairs);
        }
        Wide::Singles(self.block(rows, cols, room))
    }

    /// The elements and their stride, if they are bf16 and used as they are.
    #[cfg(target_arch = "x86_64")]
    fn halves_in_place(&self) -> Option<(&'a [bf16], usize)> {
        match *self {
            Source::Real { data, stride } => {
                (T::DTYPE == DType::BF16).then(|| (bytemuck::cast_slice(data), stride))
            }
            Source::Weight(w) => match w.elements() {
                Elements::BF16(e) => Some((e, w.size().1)),
                _ => None,
            },
            Source::Masked { .. } | Source::Single { .. } => None,
        }
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
    /// Rows `outer` of `[outer, K]`, columns `k`, in place or in `room`.
    pub(super) fn block<'r>(&'r self, outer: Range<usize>, k: Range<usize>, room: &'r mut [f32]) -> Mat<'r> {
        if self.k_along_rows {
            self.source.block(k, outer, room).t()
        } else {
            self.source.block(outer, k, room)
        }
    }

    /// A frozen weight's copy that was packed for such products, if there is one.
    fn packed(&self) -> Option<&Packed> {
        let pass = if self.k_along_rows { Pass::Backward } else { Pass::Forward };
        match self.source {
            Source::Weight(w) => w.packed(pass).filter(|packed| packed.serves::<T>()),
            _ => None,
        }
    }

    /// [`block`](Self::block) as bf16.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn halves<'r>(
        &'r self,
        outer: Range<usize>,
        k: Range<usize>,
        room: &'r mut [bf16],
    ) -> Mat<'r, bf16> {
        if self.k_along_rows {
            self.source.halves(k, outer, room).t()
        } else {
            self.source.halves(outer, k, room)
        }
    }
}

/// `left[m, K] · right[n, K]ᵀ`, of which tiles are made.
#[derive(Clone, Copy)]
pub(super) struct Term<'a, T> {
    pub(super) left: Operand<'a, T>,
    pub(super) right: Operand<'a, T>,
    pub(super) k: usize,
}

impl<T: Real> Term<'_, T> {
    /// Writes rows `m` and columns `n` of the term to `dst`, or adds them if `keep`, and ends them, with `more` where it is
    /// [taken](Self::takes).
    pub(super) fn tile(
        &self,
        dst: &mut TileMut<'_, f32>,
        keep: bool,
        m: Range<usize>,
        n: Range<usize>,
        room: &mut [f32],
        mut end: End<'_>,
    ) {
        assert!(end.more.is_none_or(|more| self.takes(more.ranks(), m.len())));
        if self.dots(m.len()) {
            self.decode(dst.row(0), keep, m, n, room);
            if let Some(done) = end.done {
                done(dst.columns(dst.size().1), (0, 0));
            }
            return;
        }
        let mut end = |ks: &Range<usize>| if ks.end == self.k { mem::take(&mut end) } else { End::default() };
        let packed = self.right.packed();
        #[cfg(target_arch = "x86_64")]
        if let Some(pairs) = pairs::<T>() {
            let single = matches!(self.left.source, Source::Single { .. });
            let in_place = |x: &Operand<'_, T>| x.source.halves_in_place().is_some();
            let places = [single || in_place(&self.left), packed.is_some() || in_place(&self.right)];
            let room: &mut [bf16] = bytemuck::cast_slice_mut(room);
            let (left, right) = room.split_at_mut(if places[0] { 0 } else { m.len() * depth(self.k) });
            return self.blocks(keep, places == [true, true], |keep, ks| {
                let b = match packed {
                    Some(packed) => Right::Packed(packed.pairs(n.start, ks.start)),
                    None => Right::Lies(self.right.halves(n.clone(), ks.clone(), right).t()),
                };
                let end = end(&ks);
                match single {
                    true => pairs.product(dst, keep, self.left.block(m.clone(), ks, &mut []), b, end),
                    false => pairs.product(dst, keep, self.left.halves(m.clone(), ks, left), b, end),
                }
            });
        }
        let places = [self.left.source.in_place(), packed.is_some() || self.right.source.in_place()];
        let (left, right) = room.split_at_mut(if places[0] { 0 } else { m.len() * depth(self.k) });
        self.blocks(keep, places == [true, true], |keep, ks| {
            let b = match packed {
                Some(packed) => Right::Packed(packed.singles(n.start, ks.start)),
                None => Right::Lies(self.right.block(n.clone(), ks.clone(), right).t()),
            };
            let end = end(&ks);
            product(dst, keep, self.left.block(m.clone(), ks, left), b, end);
        });
    }

    /// [`tile`](Self::tile) of a single row: a token that is decoded.
    fn decode(&self, dst: &mut [f32], keep: bool, m: Range<usize>, n: Range<usize>, room: &mut [f32]) {
        let row = |stride: usize| m.start * stride..m.start * stride + self.k;
        let done = match self.left.source {
            Source::Real { data, stride } => self.decode_in_place(dst, keep, &data[row(stride)], &n),
            Source::Single { data, stride } => self.decode_in_place(dst, keep, &data[row(stride)], &n),
            Source::Masked { .. } | Source::Weight(_) => false,
        };
        if done {
            return;
        }
        let (left, right) = room.split_at_mut(if self.left.source.in_place() { 0 } else { depth(self.k) });
        self.blocks(keep, false, |keep, ks| {
            let x = self.left.block(m.clone(), ks.clone(), left);
            dots(dst, keep, x.row(0), self.right.block(n.clone(), ks, right).lines());
        });
    }

    /// A row times rows `n` of the right operand where that lies, if it is a weight that is not rounded.
    fn decode_in_place<A: Real>(&self, dst: &mut [f32], keep: bool, a: &[A], n: &Range<usize>) -> bool {
        let Source::Weight(w) = self.right.source else { return false };
        let stride = w.size().1;
        let exact = T::DTYPE == DType::F32;
        match w.elements() {
            Elements::BF16(e) => dots(dst, keep, a, Lines { data: e, stride }.from(n.start, 0)),
            Elements::F16(e) if exact => dots(dst, keep, a, Lines { data: e, stride }.from(n.start, 0)),
            Elements::F32(e) if exact => dots(dst, keep, a, Lines { data: e, stride }.from(n.start, 0)),
            Elements::F16(_) | Elements::F32(_) => return false,
        }
        true
    }

    /// Whether a thin product of so many ranks can be the last step of tiles of so many rows.
    pub(super) fn takes(&self, ranks: usize, rows: usize) -> bool {
        (1..=RANKS).contains(&ranks) && self.k > 0 && !self.dots(rows)
    }

    /// Whether tiles of so many rows are dot products, which need no packing.
    fn dots(&self, rows: usize) -> bool {
        rows == 1 && !self.right.k_along_rows
    }

    /// Calls `add` for all of K at once if it is `whole`, else for blocks of it, the first of which adds only if `keep`; once
    /// where there is no K.
    fn blocks(&self, keep: bool, whole: bool, mut add: impl FnMut(bool, Range<usize>)) {
        let step = if whole { self.k } else { depth(self.k) }.max(1);
        let mut k = 0;
        loop {
            let ks = k..(k + step).min(self.k);
            add(keep || k > 0, ks.clone());
            k = ks.end;
            if k == self.k {
                break;
            }
        }
    }
}

/// `dst += more`, to the bit as [`Term::tile`] adds it.
pub(super) fn add<T: Real>(dst: &mut TileMut<'_, f32>, more: More<'_>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = pairs::<T>() {
        return pairs.add(dst, more);
    }
    multiply(dst, true, more.a.lines(), more.b.lines(), more.ranks());
}

/// What multiplies operands of `T` as they are.
#[cfg(target_arch = "x86_64")]
fn pairs<T: Real>() -> Option<Pairs> {
    Pairs::used().filter(|_| T::DTYPE == DType::BF16)
}

/// Rounds a row of an operand where it stands: to numbers of `T` in the row's first part where those are multiplied as they
/// are, so that products need not round it again and again.
pub(super) fn settle<T: Real>(row: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if pairs::<T>().is_some() {
        let mut line = [T::zeroed(); DEPTH];
        for start in (0..row.len()).step_by(DEPTH) {
            let end = (start + DEPTH).min(row.len());
            narrow(&mut line[..end - start], &row[start..end]);
            bytemuck::cast_slice_mut(row)[start..end].copy_from_slice(&line[..end - start]);
        }
        return;
    }
    round::<T>(row);
}

/// A row of `T`, [settled](settle).
pub(super) fn settle_copy<T: Real>(out: &mut [f32], from: &[T]) {
    #[cfg(target_arch = "x86_64")]
    if pairs::<T>().is_some() {
        bytemuck::cast_slice_mut(out)[..from.len()].copy_from_slice(from);
        return;
    }
    widen::<T, T>(out, from);
}

/// Rows that are [settled](settle), `width` f32 each.
pub(super) fn settled<T: Real>(rows: &[f32], width: usize) -> Source<'_, T> {
    #[cfg(target_arch = "x86_64")]
    if pairs::<T>().is_some() {
        let data: &[T] = bytemuck::cast_slice(rows);
        return Source::Real { data, stride: width * (size_of::<f32>() / size_of::<T>()) };
    }
    Source::Single { data: rows, stride: width }
}

/// `out = from`, rounded to `T` where `U` is wider.
pub(super) fn widen<T: Real, U: Real>(out: &mut [f32], from: &[U]) {
    simd::run(Widen::<T, U>(out, from, PhantomData));
}

fn widen_half<T: Real>(out: &mut [f32], from: &[f16]) {
    from.convert_to_f32_slice(out);
    simd::run(Round::<T>(out, PhantomData));
}

/// `out = from`, rounded; where products count subnormal numbers as 0, those may become 0.
pub(super) fn narrow<T: Real>(out: &mut [T], from: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if T::DTYPE == DType::BF16 && halves::narrow(bytemuck::cast_slice_mut(out), from) {
        return;
    }
    simd::run(Narrow(out, from));
}

/// Rounds to `T` where it stands.
pub(super) fn round<T: Real>(x: &mut [f32]) {
    simd::run(Round::<T>(x, PhantomData));
}

/// `out += x`.
pub(super) fn add_to<T: Real>(out: &mut [f32], x: &[T]) {
    simd::run(Add(out, x));
}

struct Add<'a, T>(&'a mut [f32], &'a [T]);

impl<T: Real> Kernel for Add<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (out, x) in self.0.iter_mut().zip(self.1) {
            *out += x.to_f32();
        }
    }
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
