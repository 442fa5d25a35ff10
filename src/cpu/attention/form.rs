//! How operands of a block's products lie.

use half::bf16;

use super::blocks::{KEYS, LANES};
use crate::cpu::product::Mat;
use crate::cpu::product::block::{self, Left, SIDE, STEP, Size, padded};
#[cfg(target_arch = "x86_64")]
use crate::cpu::product::halves;
use crate::cpu::product::pack;
use crate::tensor::{DType, Real};

/// What takes the place of one f32, and what multiplies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A number.
    Single,
    /// Two bf16 that are neighbours along k, zeros where there is no second: where pairs are multiplied faster.
    Pairs,
    /// The same, multiplied in tiles: k is a multiple of what those take, zeros after the last number.
    Tiles,
}

impl Form {
    /// That of heads of `dim` columns.
    pub fn of<T: Real>(dim: usize) -> Form {
        match T::DTYPE == DType::BF16 && dim.is_multiple_of(2) {
            true if block::tiles_are_used() => Form::Tiles,
            true if block::dots_are_used() => Form::Pairs,
            _ => Form::Single,
        }
    }

    /// Columns of a right factor of `n`, the rest zeros.
    pub fn columns(self, n: usize) -> usize {
        match self {
            Form::Single | Form::Pairs => n.next_multiple_of(LANES),
            Form::Tiles => n.next_multiple_of(SIDE),
        }
    }

    /// f32 that `n` numbers along k take.
    fn depth(self, n: usize) -> usize {
        match self {
            Form::Single => n,
            Form::Pairs => n.div_ceil(2),
            Form::Tiles => n.div_ceil(2).next_multiple_of(STEP),
        }
    }

    /// `c = a b`, or added to c; the depth counts numbers.
    #[inline(always)]
    pub fn product(self, c: &mut [f32], add: bool, a: Left<'_>, b: &[f32], size: Size) {
        let size = Size { depth: self.depth(size.depth), ..size };
        match self {
            Form::Single => block::product(c, add, a, b, size),
            Form::Pairs => block::product_of_pairs(c, add, a, b, size),
            Form::Tiles => block::product_in_tiles(c, add, a, b, size),
        }
    }

    /// Rows of `dim` numbers as a left factor of as many rows, k along them.
    #[inline(always)]
    pub fn across<'r, 'a, T: Real>(
        self,
        room: &'r mut [f32],
        rows: impl Iterator<Item = &'a [T]>,
        dim: usize,
    ) -> Left<'r> {
        match self {
            Form::Single => Left::by_row(widened(room, rows, dim), padded(dim)),
            Form::Pairs | Form::Tiles => {
                let stride = self.depth(dim);
                for (out, row) in room.chunks_exact_mut(stride).zip(rows) {
                    let (out, zeros) = out.split_at_mut(dim / 2);
                    bytemuck::cast_slice_mut(out).copy_from_slice(as_halves(row));
                    zeros.fill(0.0);
                }
                Left::by_row(room, stride)
            }
        }
    }

    /// Rows of `dim` numbers, at most 64, as a left factor of `dim` rows, k from row to row.
    #[inline(always)]
    pub fn upright<'r, 'a, T: Real>(
        self,
        room: &'r mut [f32],
        rows: impl Iterator<Item = &'a [T]>,
        dim: usize,
    ) -> Left<'r> {
        match self {
            Form::Single => Left::by_column(widened(room, rows, dim), padded(dim)),
            Form::Pairs => {
                let width = padded(dim);
                for (i, row) in rows.enumerate() {
                    put(&mut room[i / 2 * width..][..dim], as_halves(row), i % 2);
                }
                Left::by_column(room, width)
            }
            Form::Tiles => {
                let (mut all, mut n) = ([&[][..]; KEYS], 0);
                for (slot, row) in all.iter_mut().zip(rows) {
                    (*slot, n) = (as_halves(row), n + 1);
                }
                let stride = self.depth(KEYS);
                for k in (0..self.depth(n)).step_by(TOGETHER) {
                    turn(&mut room[k..], stride, dim, |i, out, d| {
                        for (half, row) in all[2 * (k + i)..].iter().take(2).enumerate() {
                            // Zeros where there is no row.
                            put(out, row.get(d..).unwrap_or(&[]), half);
                        }
                    });
                }
                Left::by_row(room, stride)
            }
        }
    }

    /// At most 64 rows as a left factor across and one upright.
    #[inline(always)]
    pub fn both<'r, 'a, T: Real>(
        self,
        room: &'r mut [f32],
        rows: impl Iterator<Item = &'a [T]> + Clone,
        dim: usize,
    ) -> (Left<'r>, Left<'r>) {
        match self {
            Form::Single => {
                let (room, stride) = (widened(room, rows, dim), padded(dim));
                (Left::by_row(room, stride), Left::by_column(room, stride))
            }
            // Each takes half of the room.
            Form::Pairs | Form::Tiles => {
                let (across, upright) = room.split_at_mut(room.len() / 2);
                (self.across(across, rows.clone(), dim), self.upright(upright, rows, dim))
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
        let depth = self.depth(dim);
        room.chunks_exact_mut(columns).take(depth).for_each(|line| line[n..].fill(0.0));
        for r in (0..n).step_by(TOGETHER) {
            turn(&mut room[r..], columns, depth, |i, out, d| {
                // Zeros beyond the last row and its last number.
                let row = if r + i < n { row(r + i) } else { &[] };
                match self {
                    Form::Single => {
                        let row = row.get(d..).unwrap_or(&[]);
                        out.iter_mut().zip(row).for_each(|(out, x)| *out = x.to_f32());
                    }
                    Form::Pairs | Form::Tiles => {
                        let row = as_halves(row).get(2 * d..).unwrap_or(&[]);
                        let out: &mut [bf16] = bytemuck::cast_slice_mut(out);
                        out.iter_mut().zip(row).for_each(|(out, x)| *out = *x);
                    }
                }
            });
        }
    }

    /// Rounds `rows` rows of `columns` f32 where they stand, as a right factor whose k runs from row to row.
    #[inline(always)]
    pub fn round<T: Real>(self, s: &mut [f32], rows: usize, columns: usize) {
        match self {
            Form::Single if T::DTYPE == DType::F32 => {}
            Form::Single => s[..rows * columns].iter_mut().for_each(|s| *s = T::round(*s)),
            Form::Pairs | Form::Tiles => {
                let lines = rows.next_multiple_of(2);
                s[rows * columns..lines * columns].fill(0.0);
                by_twos(&mut s[..lines * columns], columns);
                s[lines / 2 * columns..self.depth(rows) * columns].fill(0.0);
            }
        }
    }
}

/// Rounds each two rows into a row of pairs, in the place of the first half of them.
fn by_twos(rows: &mut [f32], columns: usize) {
    #[cfg(target_arch = "x86_64")]
    if halves::by_twos(rows, columns) {
        return;
    }
    one_by_one(rows, columns);
}

/// [`by_twos`], where tiles are emulated and there is no instruction for it.
fn one_by_one(rows: &mut [f32], columns: usize) {
    for at in 0..rows.len() / 2 {
        let above = at / columns * 2 * columns + at % columns;
        rows[at] = bytemuck::cast([above, above + columns].map(|i| bf16::from_f32(rows[i])));
    }
}

/// Rows that [`turn`] takes at a time.
const TOGETHER: usize = pack::SIDE;

/// `out[d · stride + i] = line(i)[d]` of a few lines of `width` numbers: the part of line i from d on, zeros until then, is
/// asked of `line(i, part, d)`.
#[inline(always)]
fn turn(out: &mut [f32], stride: usize, width: usize, line: impl Fn(usize, &mut [f32], usize)) {
    const PART: usize = 64;
    for d in (0..width).step_by(PART) {
        let mut lines = [[0f32; PART]; TOGETHER];
        let some = PART.min(width - d);
        lines.iter_mut().enumerate().for_each(|(i, part)| line(i, &mut part[..some], d));
        let lines = Mat::new(lines.as_flattened(), (TOGETHER, some), (PART, 1));
        pack::transpose(&mut out[d * stride..], stride, lines);
    }
}

/// Puts a row where the first or the second numbers of pairs are; the first leave nothing of what was there.
#[inline(always)]
fn put(pairs: &mut [f32], row: &[bf16], half: usize) {
    let pairs: &mut [u32] = bytemuck::cast_slice_mut(pairs);
    match half {
        0 => pairs.iter_mut().zip(row).for_each(|(pair, x)| *pair = low(*x)),
        _ => pairs.iter_mut().zip(row).for_each(|(pair, x)| *pair |= low(*x) << 16),
    }
}

/// The bits of `x` as the first of a pair.
#[inline(always)]
fn low(x: bf16) -> u32 {
    u32::from(x.to_bits())
}

/// A row of bf16, which is `T`.
#[inline(always)]
fn as_halves<T: Real>(row: &[T]) -> &[bf16] {
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

    const FORMS: [Form; 3] = [Form::Single, Form::Pairs, Form::Tiles];

    #[test]
    fn two_rows_are_pairs_with_and_without_an_instruction() {
        for (lines, columns) in [(2, 16), (6, 48), (64, 64)] {
            let rows = normal::<f32>(1, lines * columns, 1.0);
            let [mut one, mut other] = [rows.clone(), rows.clone()];
            by_twos(&mut one, columns);
            one_by_one(&mut other, columns);
            let half = lines / 2 * columns;
            for (at, pair) in bytemuck::cast_slice::<f32, [bf16; 2]>(&other[..half]).iter().enumerate() {
                let above = at / columns * 2 * columns + at % columns;
                assert_eq!(*pair, [rows[above], rows[above + columns]].map(bf16::from_f32));
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&one[..half]), bits(&other[..half]), "{lines} × {columns}");
        }
    }

    /// Number `k` of what takes an f32's place, `at` of a room.
    fn number(form: Form, room: &[f32], at: impl Fn(usize) -> usize, k: usize) -> f32 {
        match form {
            Form::Single => room[at(k)],
            Form::Pairs | Form::Tiles => bytemuck::cast::<_, [bf16; 2]>(room[at(k / 2)])[k % 2].to_f32(),
        }
    }

    /// Numbers along k that products read of `n`.
    fn read(form: Form, n: usize) -> usize {
        match form {
            Form::Single => n,
            Form::Pairs | Form::Tiles => 2 * form.depth(n),
        }
    }

    #[test]
    fn numbers_are_where_products_look_for_them() {
        for form in FORMS {
            for (n, dim) in [(1, 2), (2, 6), (9, 16), (63, 30), (64, 64), (33, 100), (5, 8)] {
                let x = normal::<bf16>(1, n * dim, 1.0);
                let row = |r: usize| &x[r * dim..][..dim];
                let want = |r: usize, d: usize| if r < n && d < dim { row(r)[d].to_f32() } else { 0.0 };
                let columns = form.columns(n);
                let stale = || vec![f32::NAN; 64 * dim.next_multiple_of(SIDE)];
                let [mut turned, mut across, mut upright, mut both] = [stale(), stale(), stale(), stale()];
                form.turned(&mut turned, row, n, dim, columns);
                let of_across = form.across(&mut across, (0..n).map(row), dim);
                let of_upright = form.upright(&mut upright, (0..n).map(row), dim);
                let of_both = form.both(&mut both, (0..n).map(row), dim);
                let found = |left: Left<'_>, i, k| number(form, left.data(), |k| left.at(i, k), k);
                for (r, d) in (0..n).flat_map(|r| (0..read(form, dim)).map(move |d| (r, d))) {
                    let turned = number(form, &turned, |k| k * columns + r, d);
                    let got = [turned, found(of_across, r, d), found(of_both.0, r, d)];
                    assert_eq!(got, [want(r, d); 3], "{form:?} {n} × {dim} [{r}, {d}]");
                }
                for (r, d) in (0..read(form, n)).flat_map(|r| (0..dim).map(move |d| (r, d))) {
                    let got = [found(of_upright, d, r), found(of_both.1, d, r)];
                    assert_eq!(got, [want(r, d); 2], "{form:?} {n} × {dim} [{r}, {d}]");
                }
                // Columns that pad.
                for d in 0..read(form, dim) {
                    assert!((n..columns).all(|r| number(form, &turned, |k| k * columns + r, d) == 0.0));
                }
            }
        }
    }

    #[test]
    fn scores_are_rounded_where_they_stand() {
        for (form, rows) in FORMS.into_iter().flat_map(|form| [1, 2, 33, 63, 64].map(|rows| (form, rows))) {
            let columns = 2 * LANES;
            let scores = normal::<f32>(1, KEYS * columns, 1.0);
            let mut got = scores.clone();
            form.round::<bf16>(&mut got, rows, columns);
            for (r, c) in (0..read(form, rows)).flat_map(|r| (0..columns).map(move |c| (r, c))) {
                let want = if r < rows { bf16::from_f32(scores[r * columns + c]).to_f32() } else { 0.0 };
                assert_eq!(number(form, &got, |k| k * columns + c, r), want, "{form:?} {rows} [{r}, {c}]");
            }
        }
    }
}
