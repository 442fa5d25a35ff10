//! How operands of a block's products lie.

use half::bf16;

use super::blocks::LANES;
use crate::cpu::product::block::{self, Left, Size, padded};
use crate::tensor::{DType, Real};

/// What takes the place of one f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A number.
    Single,
    /// Two bf16 that are neighbours along k, zeros where there is no second: where pairs are multiplied faster.
    Pairs,
}

impl Form {
    /// That of heads of `dim` columns.
    pub fn of<T: Real>(dim: usize) -> Form {
        match T::DTYPE == DType::BF16 && dim.is_multiple_of(2) && block::pairs_are_used() {
            true => Form::Pairs,
            false => Form::Single,
        }
    }

    /// `c = a b`, or added to c; the depth counts numbers.
    #[inline(always)]
    pub fn product(self, c: &mut [f32], add: bool, a: Left<'_>, b: &[f32], size: Size) {
        match self {
            Form::Single => block::product(c, add, a, b, size),
            Form::Pairs => {
                block::product_of_pairs(c, add, a, b, Size { depth: size.depth.div_ceil(2), ..size })
            }
        }
    }

    /// Rows of `dim` numbers as a left factor, k along them.
    #[inline(always)]
    pub fn across<'r, 'a, T: Real>(
        self,
        room: &'r mut [f32],
        rows: impl Iterator<Item = &'a [T]>,
        dim: usize,
    ) -> Left<'r> {
        match self {
            Form::Single => Left::by_row(widened(room, rows, dim), padded(dim)),
            Form::Pairs => {
                let stride = dim / 2;
                for (out, row) in room.chunks_exact_mut(stride).zip(rows) {
                    bytemuck::cast_slice_mut(out).copy_from_slice(halves(row));
                }
                Left::by_row(room, stride)
            }
        }
    }

    /// Rows of `dim` numbers as a right factor, k from row to row.
    #[inline(always)]
    pub fn down<'r, 'a, T: Real>(
        self,
        room: &'r mut [f32],
        rows: impl Iterator<Item = &'a [T]>,
        dim: usize,
    ) -> &'r [f32] {
        match self {
            Form::Single => widened(room, rows, dim),
            Form::Pairs => {
                let width = padded(dim);
                for (i, row) in rows.enumerate() {
                    let out: &mut [u32] = bytemuck::cast_slice_mut(&mut room[i / 2 * width..][..width]);
                    let (out, rest) = out.split_at_mut(dim);
                    if i.is_multiple_of(2) {
                        out.iter_mut().zip(halves(row)).for_each(|(out, x)| *out = low(*x));
                        rest.fill(0);
                    } else {
                        out.iter_mut().zip(halves(row)).for_each(|(out, x)| *out |= low(*x) << 16);
                    }
                }
                room
            }
        }
    }

    /// At most 64 rows as a left factor, k along them, and as a right one, k from row to row.
    #[inline(always)]
    pub fn both<'r, 'a, T: Real>(
        self,
        room: &'r mut [f32],
        rows: impl Iterator<Item = &'a [T]> + Clone,
        dim: usize,
    ) -> (Left<'r>, &'r [f32]) {
        match self {
            Form::Single => {
                let room = widened(room, rows, dim);
                (Left::by_row(room, padded(dim)), room)
            }
            // Each takes half of the room.
            Form::Pairs => {
                let (left, right) = room.split_at_mut(room.len() / 2);
                (self.across(left, rows.clone(), dim), self.down(right, rows, dim))
            }
        }
    }

    /// `n` rows of `dim` numbers as the `columns` of a right factor, k along them: zeros beyond the last row.
    #[inline(always)]
    pub fn turned<'a, T: Real>(
        self,
        room: &mut [f32],
        row: impl Fn(usize) -> &'a [T],
        n: usize,
        dim: usize,
        columns: usize,
    ) {
        let depth = match self {
            Form::Single => dim,
            Form::Pairs => dim / 2,
        };
        room.chunks_exact_mut(columns).take(depth).for_each(|line| line[n..].fill(0.0));
        for i in 0..n {
            match self {
                Form::Single => {
                    for (line, x) in room.chunks_exact_mut(columns).zip(&row(i)[..dim]) {
                        line[i] = x.to_f32();
                    }
                }
                Form::Pairs => {
                    let pairs = halves(row(i)).as_chunks::<2>().0;
                    for (line, [x, y]) in room.chunks_exact_mut(columns).zip(pairs) {
                        line[i] = f32::from_bits(low(*x) | low(*y) << 16);
                    }
                }
            }
        }
    }

    /// Rounds rows of `columns` f32 where they stand, to a factor whose k runs from row to row.
    #[inline(always)]
    pub fn settle<T: Real>(self, s: &mut [f32], columns: usize) {
        match self {
            Form::Single if T::DTYPE == DType::F32 => {}
            Form::Single => s.iter_mut().for_each(|s| *s = T::round(*s)),
            Form::Pairs => {
                let rows = s.len() / columns;
                for r in (0..rows).step_by(2) {
                    for j in (0..columns).step_by(LANES) {
                        let line = |r: usize| match s.get(r * columns + j..).and_then(<[f32]>::first_chunk) {
                            Some(line) => *line,
                            None => [0f32; LANES],
                        };
                        let (above, below) = (line(r), line(r + 1));
                        let bits = |x: f32| low(Real::from_f32(x));
                        let out = &mut s[r / 2 * columns + j..][..LANES];
                        for (out, (x, y)) in out.iter_mut().zip(above.iter().zip(&below)) {
                            *out = f32::from_bits(bits(*x) | bits(*y) << 16);
                        }
                    }
                }
            }
        }
    }
}

/// The bits of `x` as the first of a pair.
#[inline(always)]
fn low(x: bf16) -> u32 {
    u32::from(x.to_bits())
}

/// A row of bf16, which is `T`.
#[inline(always)]
fn halves<T: Real>(row: &[T]) -> &[bf16] {
    bytemuck::cast_slice(row)
}

/// Rows in f32, each followed by zeros up to whole columns.
#[inline(always)]
fn widened<'r, 'a, T: Real>(
    room: &'r mut [f32],
    rows: impl Iterator<Item = &'a [T]>,
    dim: usize,
) -> &'r [f32] {
    for (out, row) in room.chunks_exact_mut(padded(dim)).zip(rows) {
        let (out, rest) = out.split_at_mut(dim);
        out.iter_mut().zip(row).for_each(|(out, x)| *out = x.to_f32());
        rest.fill(0.0);
    }
    room
}
