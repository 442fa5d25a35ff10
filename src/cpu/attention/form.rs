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
        match T::DTYPE == DType::BF16 && dim.is_multiple_of(2) && block::dots_are_used() {
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

    /// Rounds rows of `columns` f32 where they stand, as a factor whose k runs from row to row.
    #[inline(always)]
    pub fn round<T: Real>(self, s: &mut [f32], columns: usize) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::normal;

    /// Number `k` of what takes an f32's place, `at` of a room.
    fn number(form: Form, room: &[f32], at: impl Fn(usize) -> usize, k: usize) -> f32 {
        match form {
            Form::Single => room[at(k)],
            Form::Pairs => bytemuck::cast::<_, [bf16; 2]>(room[at(k / 2)])[k % 2].to_f32(),
        }
    }

    #[test]
    fn numbers_are_where_products_look_for_them() {
        for form in [Form::Single, Form::Pairs] {
            for (n, dim) in [(1, 2), (2, 6), (63, 30), (64, 64), (5, 8)] {
                let x = normal::<bf16>(1, n * dim, 1.0);
                let row = |r: usize| &x[r * dim..][..dim];
                let want = |r: usize, d: usize| row(r)[d].to_f32();
                let (width, columns) = (padded(dim), n.next_multiple_of(LANES));
                let stale = || vec![f32::NAN; 64 * width.max(64)];
                let here = |r: usize, d: usize| format!("{form:?} {n} × {dim} [{r}, {d}]");

                let mut turned = stale();
                form.turned(&mut turned, row, n, dim, columns);
                let [mut across, mut down] = [stale(), stale()];
                form.across(&mut across, (0..n).map(row), dim);
                form.down(&mut down, (0..n).map(row), dim);
                let stride = if form == Form::Single { width } else { dim / 2 };
                for (r, d) in (0..n).flat_map(|r| (0..dim).map(move |d| (r, d))) {
                    let got = [
                        number(form, &turned, |k| k * columns + r, d),
                        number(form, &across, |k| r * stride + k, d),
                        number(form, &down, |k| k * width + d, r),
                    ];
                    assert_eq!(got, [want(r, d); 3], "{}", here(r, d));
                }
                // Zeros beyond: columns that pad, and a row that makes a pair whole.
                for d in 0..dim {
                    assert!((n..columns).all(|r| number(form, &turned, |k| k * columns + r, d) == 0.0));
                }
                for (r, d) in (0..n).flat_map(|r| (dim..width).map(move |d| (r, d))) {
                    assert_eq!(number(form, &down, |k| k * width + d, r), 0.0, "{}", here(r, d));
                }
                if form == Form::Pairs && n % 2 == 1 {
                    assert!((0..width).all(|d| number(form, &down, |k| k * width + d, n) == 0.0));
                }

                let mut both = stale();
                let (_, right) = form.both(&mut both, (0..n).map(row), dim);
                let lines = if form == Form::Single { n } else { n.div_ceil(2) };
                assert_eq!(right[..lines * width], down[..lines * width], "{form:?} {n} × {dim}");
            }
        }
    }

    #[test]
    fn scores_are_rounded_where_they_stand() {
        for (form, rows) in [Form::Single, Form::Pairs].into_iter().flat_map(|f| [(f, 1), (f, 2), (f, 63)]) {
            let columns = 2 * LANES;
            let scores = normal::<f32>(1, rows * columns, 1.0);
            let mut got = scores.clone();
            form.round::<bf16>(&mut got, columns);
            for (i, &want) in scores.iter().enumerate() {
                let (r, c) = (i / columns, i % columns);
                assert_eq!(
                    number(form, &got, |k| k * columns + c, r),
                    bf16::from_f32(want).to_f32(),
                    "{form:?} [{r}, {c}]"
                );
            }
            if form == Form::Pairs && rows % 2 == 1 {
                assert!((0..columns).all(|c| number(form, &got, |k| k * columns + c, rows) == 0.0));
            }
        }
    }
}
