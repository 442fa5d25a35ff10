//! Products of bf16 as it lies with the few ranks of an adapter: `out = x fᵀ`, and `out = uᵀ x`.
//!
//! Each element of the first is 16 sums, of two neighbours of every 32 along K each, and then the sum of those; of the
//! second one sum for every 64 of K. Products are exact and sums are f32, to the nearest; subnormal numbers count as 0.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi16,
    _mm512_maskz_loadu_ps, _mm512_permutex2var_ps, _mm512_reduce_add_ps, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
};
use std::mem::transmute;
use std::ops::Range;

use half::bf16;

use super::{Mat, TileMut};
use crate::cpu::simd::prefetch_second;
use crate::cpu::thin::Lines;
use crate::tensor::Real;

/// Numbers of a register.
const LANES: usize = 32;
/// Rows of x that [`outer`] takes at a time, all columns of them.
const ROWS: usize = 64;
/// Ranks whose sums fit the registers.
const RANKS: usize = 8;

/// `out[m, R] = x[m, K] f[R, K]ᵀ`, added if `keep`.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(super) unsafe fn product(out: &mut TileMut<'_, f32>, keep: bool, x: Mat<'_, bf16>, f: Mat<'_, bf16>) {
    assert!(out.size() == (x.size.0, f.size.0) && x.size.1 == f.size.1);
    let (rows, ranks) = out.size();
    let mut product = Product { out, keep, x, f };
    let mut n = 0;
    while n < ranks {
        // SAFETY: the caller has the instructions.
        n += unsafe {
            match ranks - n {
                8.. => product.all_rows::<8>(rows, n),
                4..8 => product.all_rows::<4>(rows, n),
                _ => product.all_rows::<1>(rows, n),
            }
        };
    }
}

struct Product<'a, 'b> {
    out: &'a mut TileMut<'b, f32>,
    keep: bool,
    x: Mat<'a, bf16>,
    f: Mat<'a, bf16>,
}

impl Product<'_, '_> {
    /// N ranks from `n` on; N.
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn all_rows<const N: usize>(&mut self, rows: usize, n: usize) -> usize {
        // SAFETY: the caller has the instructions.
        unsafe {
            (0..rows / 2).for_each(|r| self.some::<2, N>(2 * r, n));
            if !rows.is_multiple_of(2) {
                self.some::<1, N>(rows - 1, n);
            }
        }
        N
    }

    /// M rows from `r` on and N ranks from `n` on.
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn some<const M: usize, const N: usize>(&mut self, r: usize, n: usize) {
        let x: [&[bf16]; M] = std::array::from_fn(|m| self.x.row(r + m));
        let f: [&[bf16]; N] = std::array::from_fn(|j| self.f.row(n + j));
        let depth = self.x.size.1;
        // SAFETY: the caller has the instructions; numbers beyond the depth are not read.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); N]; M];
            for k in (0..depth).step_by(LANES) {
                let some = u32::MAX >> (LANES - LANES.min(depth - k));
                let load = |row: &[bf16]| -> __m512bh {
                    transmute(_mm512_maskz_loadu_epi16(some, row.as_ptr().add(k).cast()))
                };
                let x = x.map(load);
                for (j, f) in f.iter().enumerate() {
                    let f = load(f);
                    for (sums, x) in sums.iter_mut().zip(x) {
                        sums[j] = _mm512_dpbf16_ps(sums[j], x, f);
                    }
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                for (out, sum) in self.out.row(r + m)[n..n + N].iter_mut().zip(sums) {
                    let was = if self.keep { *out } else { 0.0 };
                    *out = was + _mm512_reduce_add_ps(*sum);
                }
            }
        }
    }
}

/// `out[R, n] += u[K, R]ᵀ x[K, n]`, u rounded to bf16.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(super) unsafe fn outer<U: Real>(out: &mut TileMut<'_, f32>, u: Lines<'_, U>, x: Mat<'_, bf16>) {
    assert!(x.size.1 == out.size().1);
    let (depth, ranks) = (x.size.0, out.size().0);
    for k in (0..depth).step_by(ROWS) {
        let ks = k..(k + ROWS).min(depth);
        let mut n = 0;
        while n < ranks {
            // SAFETY: the caller has the instructions.
            n += unsafe {
                match ranks - n {
                    RANKS.. => some_ranks::<U, RANKS>(out, u, x, ks.clone(), n),
                    4..RANKS => some_ranks::<U, 4>(out, u, x, ks.clone(), n),
                    _ => some_ranks::<U, 1>(out, u, x, ks.clone(), n),
                }
            };
        }
    }
}

/// N ranks from `n` on, all columns, K from `ks`; N.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn some_ranks<U: Real, const N: usize>(
    out: &mut TileMut<'_, f32>,
    u: Lines<'_, U>,
    x: Mat<'_, bf16>,
    ks: Range<usize>,
    n: usize,
) -> usize {
    // Two rows of u for each of x, a zero below the last where they are odd.
    let mut pairs = [[[bf16::ZERO; 2]; N]; ROWS / 2];
    for (i, k) in ks.clone().enumerate() {
        let pairs = pairs[i / 2].iter_mut().zip(u.at(k, n..n + N));
        pairs.for_each(|(pair, u)| pair[i % 2] = Real::from_f32(u.to_f32()));
    }
    let columns = out.size().1;
    // What is unpacked lies by fours, those of the lower and the upper half in turns.
    let places: [i32; LANES] = std::array::from_fn(turned);
    // SAFETY: the caller has the instructions; columns beyond the last are neither read nor written.
    unsafe {
        let places: [__m512i; 2] = transmute(places);
        for c in (0..columns).step_by(LANES) {
            let some = u32::MAX >> (LANES - LANES.min(columns - c));
            let mut sums = [[_mm512_setzero_ps(); 2]; N];
            for (i, pairs) in pairs.iter().enumerate().take(ks.len().div_ceil(2)) {
                let k = ks.start + 2 * i;
                for ahead in k + ROWS..(k + ROWS + 2).min(x.size.0) {
                    prefetch_second(x.row(ahead)[c..].as_ptr());
                }
                let row = |k: usize| x.row(k)[c..].as_ptr().cast();
                let above = _mm512_maskz_loadu_epi16(some, row(k));
                let below = match k + 1 == ks.end {
                    true => _mm512_setzero_si512(),
                    false => _mm512_maskz_loadu_epi16(some, row(k + 1)),
                };
                let low: __m512bh = transmute(_mm512_unpacklo_epi16(above, below));
                let high: __m512bh = transmute(_mm512_unpackhi_epi16(above, below));
                for (sums, pair) in sums.iter_mut().zip(pairs) {
                    let pair: __m512bh = transmute(_mm512_set1_epi32(bytemuck::cast(*pair)));
                    *sums = [_mm512_dpbf16_ps(sums[0], pair, low), _mm512_dpbf16_ps(sums[1], pair, high)];
                }
            }
            for (j, [low, high]) in sums.into_iter().enumerate() {
                let row = out.row(n + j)[c..].as_mut_ptr();
                for (half, places) in places.into_iter().enumerate() {
                    let (some, row) =
                        ((some >> (half * LANES / 2)) as u16, row.wrapping_add(half * LANES / 2));
                    let sum = _mm512_permutex2var_ps(low, places, high);
                    let new = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, row));
                    _mm512_mask_storeu_ps(row, some, new);
                }
            }
        }
    }
    N
}

/// Where column `c` of 32 is among the sums of the lower halves and then of the upper ones.
const fn turned(c: usize) -> i32 {
    (c / 8 * 4 + c % 4 + c / 4 % 2 * (LANES / 2)) as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Instructions;
    use crate::ops::cases::normal;

    #[test]
    fn as_the_sums() {
        if Instructions::here().all(|set| set != Instructions::Avx512Bf16) {
            return;
        }
        for (rows, ranks, depth) in
            [(1, 1, 1), (2, 8, 32), (3, 9, 33), (5, 15, 31), (4, 64, 513), (7, 3, 0), (0, 8, 8)]
        {
            let numbers = |seed, rows: usize| normal::<bf16>(seed, rows * (depth + 3), 1.0);
            let (x, f) = (numbers(1, rows), numbers(2, ranks));
            let old = normal::<f32>(3, rows * (ranks + 2), 1.0);
            for keep in [false, true] {
                let mut got = old.clone();
                let mut whole = TileMut::new(&mut got, rows, ranks + 2);
                let mut out = whole.columns(ranks);
                let mat = |data, rows| Mat::new(data, (rows, depth), (depth + 3, 1));
                // SAFETY: the processor has the instructions, as was just seen.
                unsafe { product(&mut out, keep, mat(&x, rows), mat(&f, ranks)) };
                for (i, got) in got.iter().enumerate() {
                    let (r, n) = (i / (ranks + 2), i % (ranks + 2));
                    if n >= ranks {
                        assert_eq!(got.to_bits(), old[i].to_bits(), "{r}, {n} is outside");
                        continue;
                    }
                    let at = |x: &[bf16], r: usize, k: usize| x[r * (depth + 3) + k].to_f64();
                    let sum: f64 = (0..depth).map(|k| at(&x, r, k) * at(&f, n, k)).sum();
                    let want = sum + if keep { f64::from(old[i]) } else { 0.0 };
                    let tol = 2e-7 * depth as f64 + 2e-7 * want.abs();
                    assert!((f64::from(*got) - want).abs() <= tol, "[{r}, {n}] = {got}, expected {want}");
                }
            }
        }
    }

    #[test]
    fn outer_products_as_the_sums() {
        if Instructions::here().all(|set| set != Instructions::Avx512Bf16) {
            return;
        }
        for (ranks, columns, depth) in [
            (1, 1, 1),
            (8, 32, 2),
            (9, 33, 3),
            (15, 256, 127),
            (4, 63, 129),
            (64, 95, 256),
            (3, 5, 0),
            (8, 0, 8),
        ] {
            let u: Vec<f32> =
                normal::<bf16>(1, depth * (ranks + 1), 1.0).iter().map(|u| u.to_f32()).collect();
            let x = normal::<bf16>(2, depth * (columns + 3), 1.0);
            let old = normal::<f32>(3, ranks * (columns + 2), 1.0);
            let mut got = old.clone();
            let mut whole = TileMut::new(&mut got, ranks, columns + 2);
            let mut out = whole.columns(columns);
            let lines = Lines { data: &u, stride: ranks + 1 };
            // SAFETY: the processor has the instructions, as was just seen.
            unsafe { outer(&mut out, lines, Mat::new(&x, (depth, columns), (columns + 3, 1))) };
            for (i, got) in got.iter().enumerate() {
                let (r, c) = (i / (columns + 2), i % (columns + 2));
                if c >= columns {
                    assert_eq!(got.to_bits(), old[i].to_bits(), "{r}, {c} is outside");
                    continue;
                }
                let term = |k: usize| f64::from(u[k * (ranks + 1) + r]) * x[k * (columns + 3) + c].to_f64();
                let want = (0..depth).map(term).sum::<f64>() + f64::from(old[i]);
                let tol = 2e-7 * depth as f64 + 2e-7 * want.abs();
                assert!((f64::from(*got) - want).abs() <= tol, "[{r}, {c}] = {got}, expected {want}");
            }
        }
    }
}
