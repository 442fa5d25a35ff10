//! Products of rows of bf16 with the few rows of an adapter's factor, both read as they lie: `out = x fᵀ`.
//!
//! Each element is 16 sums, of two neighbours of every 32 along K each, and then the sum of those. Products are exact and
//! sums are f32, to the nearest; subnormal numbers count as 0.

use std::arch::x86_64::{
    __m512bh, _mm512_dpbf16_ps, _mm512_maskz_loadu_epi16, _mm512_reduce_add_ps, _mm512_setzero_ps,
};
use std::mem::transmute;

use half::bf16;

use super::{Mat, TileMut, block};

/// Numbers of a register.
const LANES: usize = 32;

/// `out[m, R] = alpha · x[m, K] f[R, K]ᵀ`, added if `keep`; wants [`block::dots_are_used`].
pub(in crate::cpu) fn product(
    out: &mut TileMut<'_, f32>,
    keep: bool,
    alpha: f32,
    x: Mat<'_, bf16>,
    f: Mat<'_, bf16>,
) {
    assert!(block::dots_are_used());
    // SAFETY: the instructions are used, so the processor has them.
    unsafe { run(out, keep, alpha, x, f) }
}

/// [`product`].
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn run(out: &mut TileMut<'_, f32>, keep: bool, alpha: f32, x: Mat<'_, bf16>, f: Mat<'_, bf16>) {
    assert!(out.size() == (x.size.0, f.size.0) && x.size.1 == f.size.1);
    let (rows, ranks) = out.size();
    let mut product = Product { out, keep, alpha, x, f };
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
    alpha: f32,
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
                    *out = was + self.alpha * _mm512_reduce_add_ps(*sum);
                }
            }
        }
    }
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
                unsafe { run(&mut out, keep, 0.5, mat(&x, rows), mat(&f, ranks)) };
                for (i, got) in got.iter().enumerate() {
                    let (r, n) = (i / (ranks + 2), i % (ranks + 2));
                    if n >= ranks {
                        assert_eq!(got.to_bits(), old[i].to_bits(), "{r}, {n} is outside");
                        continue;
                    }
                    let at = |x: &[bf16], r: usize, k: usize| x[r * (depth + 3) + k].to_f64();
                    let sum: f64 = (0..depth).map(|k| at(&x, r, k) * at(&f, n, k)).sum();
                    let want = 0.5 * sum + if keep { f64::from(old[i]) } else { 0.0 };
                    let tol = 2e-7 * depth as f64 + 2e-7 * want.abs();
                    assert!((f64::from(*got) - want).abs() <= tol, "[{r}, {n}] = {got}, expected {want}");
                }
            }
        }
    }
}
