//! What a small difference has with other numbers and with itself: products in f32, at twice the speed.
//!
//! A difference is there to be measured: digits beyond the seventh of it say nothing. What is multiplied is brought near 1
//! by powers of two, so that no scale is too large or too small for f32.

use faer::{Mat, MatMut, MatRef};

use super::rank_k::{add_single, fits, slice};
use super::{Spread, mirrored};
use crate::cpu::simd::{Isa, Kernel, run};

/// Sums over columns of `δ[K, n]`, in f64 of parts in f32.
pub struct Difference {
    /// `δ yᵀ`, `[K, P]`.
    with: Mat<f64>,
    /// `δ δᵀ`, on and below the diagonal.
    square: Mat<f64>,
    /// Room for some columns of δ, of y, and for what they add.
    rooms: [Vec<f32>; 3],
}

impl Difference {
    /// Nothing yet, of a δ of `rank` rows and a y of `others`.
    pub fn new(rank: usize, others: usize) -> Difference {
        let (with, square) = (Mat::zeros(rank, others), Mat::zeros(rank, rank));
        Difference { with, square, rooms: [const { Vec::new() }; 3] }
    }

    /// Adds some columns of δ and of y.
    pub fn add(&mut self, delta: MatRef<'_, f64>, y: MatRef<'_, f64>) {
        let (with, square) = (&mut self.with, &mut self.square);
        if !fits(with.as_ref(), delta, y) || !fits(square.as_ref(), delta, delta) {
            // Fewer columns than rows: the last ones, or of a small factor.
            Spread::Thread.add_product(with.as_mut(), delta, y.transpose());
            Spread::Thread.add_gram(square.as_mut(), delta);
            return;
        }
        let [x, of_y, sums] = &mut self.rooms;
        let by = [single(x, delta), single(of_y, y)];
        let (rank, others, columns) = (delta.nrows(), y.nrows(), delta.ncols());
        let x = MatRef::from_column_major_slice(x, rank, columns);
        let of_y = MatRef::from_column_major_slice(of_y, others, columns);
        sums.clear();
        sums.resize(rank * (rank + others), 0.0);
        let (first, second) = sums.split_at_mut(rank * others);
        add_single(MatMut::from_column_major_slice_mut(first, rank, others), x, of_y, false);
        add_single(MatMut::from_column_major_slice_mut(second, rank, rank), x, x, true);
        add(with, first, by);
        add(square, second, [by[0], by[0]]);
    }

    /// `δ yᵀ` and `δ δᵀ`.
    pub fn sums(self) -> (Mat<f64>, Mat<f64>) {
        (self.with, mirrored(self.square))
    }
}

/// `out += sums / (by[0] by[1])`.
fn add(out: &mut Mat<f64>, sums: &[f32], by: [f64; 2]) {
    let rows = out.nrows();
    for (j, sums) in sums.chunks_exact(rows.max(1)).enumerate() {
        let column = out.col_as_slice_mut(j).iter_mut();
        column.zip(sums).for_each(|(out, sum)| *out += f64::from(*sum) / by[0] / by[1]);
    }
}

/// `x`, whose columns lie one after the other, in f32 and times the power of two that is given.
fn single(out: &mut Vec<f32>, x: MatRef<'_, f64>) -> f64 {
    let columns = || (0..x.ncols()).map(|j| slice(x, j));
    let by = near_one(columns().fold(0.0, |most: f64, x| most.max(run(Largest(x)))));
    out.resize(x.nrows() * x.ncols(), 0.0);
    for (out, x) in out.chunks_exact_mut(x.nrows().max(1)).zip(columns()) {
        run(Narrow { out, x, by });
    }
    by
}

/// The largest magnitude; what is no number is none.
struct Largest<'a>(&'a [f64]);

impl Kernel for Largest<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let mut most = [0.0f64; 16];
        let (chunks, rest) = self.0.as_chunks::<16>();
        let larger = |most: &mut f64, x: f64| *most = if x.abs() > *most { x.abs() } else { *most };
        for chunk in chunks {
            most.iter_mut().zip(chunk).for_each(|(most, x)| larger(most, *x));
        }
        most.iter_mut().zip(rest).for_each(|(most, x)| larger(most, *x));
        most.into_iter().fold(0.0, f64::max)
    }
}

/// `x` times `by`, rounded.
struct Narrow<'a> {
    out: &'a mut [f32],
    x: &'a [f64],
    by: f64,
}

impl Kernel for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        self.out.iter_mut().zip(self.x).for_each(|(out, x)| *out = (x * self.by) as f32);
    }
}

/// The power of two that brings `most` near 1; 1 for what is 0 or no finite number.
fn near_one(most: f64) -> f64 {
    let exponent = most.to_bits() >> 52;
    if most == 0.0 || !most.is_finite() { 1.0 } else { f64::from_bits((2046 - exponent).max(1) << 52) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algebra::{inner, product};

    #[test]
    fn as_in_f64_at_any_scale() {
        let numbers = |m: usize, n: usize, by: usize, scale: f64| {
            Mat::from_fn(m, n, |i, j| scale * (((i * by + j * 17 + i * j) % 101) as f64 / 7.0 - 6.0))
        };
        for (rank, others, columns) in
            [(8, 16, 700), (5, 3, 260), (33, 20, 513), (9, 40, 12), (0, 4, 30), (3, 0, 30)]
        {
            for scale in [1.0, 1e-140, 1e140, 3e-308] {
                let (x, y) = (
                    numbers(rank, columns, 31, scale),
                    numbers(others, columns, 13, 1.0 / scale.max(1e-300)),
                );
                let mut got = Difference::new(rank, others);
                for first in (0..columns).step_by(300) {
                    let some = 300.min(columns - first);
                    got.add(x.as_ref().subcols(first, some), y.as_ref().subcols(first, some));
                }
                let (with, square) = got.sums();
                for (got, want) in
                    [(with, product(x.as_ref(), y.transpose())), (square, product(x.as_ref(), x.transpose()))]
                {
                    let most = want.norm_max();
                    let near = |i: usize, j: usize| (got[(i, j)] - want[(i, j)]).abs() <= 1e-6 * most;
                    let all = (0..want.ncols()).all(|j| (0..want.nrows()).all(|i| near(i, j)));
                    assert!(all, "{rank} {others} {columns} {scale}");
                    let (own, said) =
                        (inner(want.as_ref(), want.as_ref()), inner(got.as_ref(), want.as_ref()));
                    assert!(
                        !own.is_normal() || (own - said).abs() <= 1e-7 * own,
                        "{rank} {others} {columns} {scale}"
                    );
                }
            }
        }
    }

    #[test]
    fn powers_of_two_bring_numbers_near_one() {
        for x in [1.0, 1.5, 3e-308, 1e308, f64::MAX, 0.1, 5e-324, 1e-310] {
            let by = near_one(x);
            assert!(by.is_normal() && by.to_bits() << 12 == 0 && x * by < 4.0, "{x}: {by}");
            assert!(x < f64::MIN_POSITIVE || x * by >= 0.5, "{x}: {by}");
        }
        assert_eq!([0.0, f64::INFINITY, f64::NAN].map(near_one), [1.0; 3]);
    }
}
