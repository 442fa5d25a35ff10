//! Sums in registers: the micro-kernel, once for all instruction sets.
//!
//! Left to itself the compiler keeps the sums in memory, or reads b again for each row of a, as soon as a detail around
//! the loop changes: either halves the speed, or worse. So vectors are spelled out, and so is `unsafe`.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::TileMut;
use crate::cpu::simd::prefetch;
#[cfg(any(test, not(target_arch = "x86_64")))]
use crate::cpu::simd::{Baseline, fma};

/// A register of [`Vector::LANES`] numbers.
///
/// # Safety
/// Its functions read and write that many numbers, and want a processor that has the register.
pub(super) unsafe trait Vector: Copy {
    /// Numbers in it.
    const LANES: usize;
    /// `x` in all lanes.
    unsafe fn splat(x: f32) -> Self;
    /// The numbers at `x`.
    unsafe fn load(x: *const f32) -> Self;
    /// Writes them to `x`.
    unsafe fn store(self, x: *mut f32);
    /// `self · b`.
    unsafe fn mul(self, b: Self) -> Self;
    /// `self · b + c`, rounded once where that is one instruction.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

/// The vectors of x86-64: type, lanes, splat, load, store, mul, and how a b + c is made.
#[cfg(target_arch = "x86_64")]
macro_rules! vector {
    ($v:ty, $n:literal, $splat:ident, $load:ident, $store:ident, $mul:ident, |$a:ident, $b:ident, $c:ident| $fma:expr) => {
        // SAFETY: loads and stores are the unaligned ones of that many numbers.
        unsafe impl Vector for $v {
            const LANES: usize = $n;
            #[inline(always)]
            unsafe fn splat(x: f32) -> $v {
                // SAFETY: the caller has the instructions.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(x: *const f32) -> $v {
                // SAFETY: the caller has the numbers and the instructions.
                unsafe { $load(x) }
            }
            #[inline(always)]
            unsafe fn store(self, x: *mut f32) {
                // SAFETY: the caller has the numbers and the instructions.
                unsafe { $store(x, self) }
            }
            #[inline(always)]
            unsafe fn mul(self, b: $v) -> $v {
                // SAFETY: the caller has the instructions.
                unsafe { $mul(self, b) }
            }
            #[inline(always)]
            unsafe fn mul_add(self, $b: $v, $c: $v) -> $v {
                let $a = self;
                // SAFETY: the caller has the instructions.
                unsafe { $fma }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vector!(__m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_mul_ps, |a, b, c| {
    _mm512_fmadd_ps(a, b, c)
});
#[cfg(target_arch = "x86_64")]
vector!(__m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_mul_ps, |a, b, c| {
    _mm256_fmadd_ps(a, b, c)
});
#[cfg(target_arch = "x86_64")]
vector!(__m128, 4, _mm_set1_ps, _mm_loadu_ps, _mm_storeu_ps, _mm_mul_ps, |a, b, c| _mm_add_ps(
    _mm_mul_ps(a, b),
    c
));

/// Numbers one after another, for other processors.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[derive(Clone, Copy)]
pub(super) struct Lanes([f32; 4]);

#[cfg(any(test, not(target_arch = "x86_64")))]
// SAFETY: it reads and writes four numbers, with instructions that every processor has.
unsafe impl Vector for Lanes {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        Lanes([x; 4])
    }
    #[inline(always)]
    unsafe fn load(x: *const f32) -> Lanes {
        // SAFETY: the caller has the numbers.
        Lanes(unsafe { x.cast::<[f32; 4]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, x: *mut f32) {
        // SAFETY: the caller has the numbers.
        unsafe { x.cast::<[f32; 4]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Lanes) -> Lanes {
        Lanes(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Lanes, c: Lanes) -> Lanes {
        Lanes(std::array::from_fn(|i| fma::<Baseline>(self.0[i], b.0[i], c.0[i])))
    }
}

/// M rows of a.
#[derive(Clone, Copy)]
pub(super) struct Rows<const M: usize> {
    /// Where each begins.
    pub starts: [*const f32; M],
    /// From number to number of a row.
    pub step: usize,
}

/// Columns of b.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Where they begin.
    pub start: *const f32,
    /// From row to row.
    pub stride: usize,
    /// Rows.
    pub depth: usize,
}

/// `out = alpha a b`, added if `keep`: the first of M rows and N columns, N = C · LANES; k ascends.
///
/// # Safety
/// The processor has `V`; a's rows have as many numbers as b has rows, and b's rows N numbers.
#[inline(always)]
pub(super) unsafe fn tile<V: Vector, const M: usize, const C: usize, const N: usize>(
    out: &mut TileMut<'_, f32>,
    keep: bool,
    alpha: f32,
    a: Rows<M>,
    b: Panel,
) {
    const { assert!(N == C * V::LANES) };
    // What the sums are added to is wanted when they are done.
    for m in 0..out.size().0 {
        prefetch(out.start.wrapping_add(m * out.stride));
    }
    let (some_rows, some_columns) = out.size();
    // SAFETY: k stays below the depth; a whole tile has M rows of N numbers, and so has `part`.
    unsafe {
        let mut sums = [[V::splat(0.0); C]; M];
        let steps = b.depth - b.depth % STEP;
        for k in (0..steps).step_by(STEP) {
            for i in 0..STEP {
                add(&mut sums, a, b, k + i);
            }
        }
        for k in steps..b.depth {
            add(&mut sums, a, b, k);
        }
        if (some_rows, some_columns) == (M, N) {
            return finish(out.start, out.stride, keep, alpha, &sums);
        }
        let mut part = [[0f32; N]; M];
        if keep {
            for (m, part) in part[..some_rows].iter_mut().enumerate() {
                part[..some_columns].copy_from_slice(out.row(m));
            }
        }
        finish(part.as_mut_ptr().cast(), N, keep, alpha, &sums);
        for (m, part) in part[..some_rows].iter().enumerate() {
            out.row(m).copy_from_slice(&part[..some_columns]);
        }
    }
}

/// Depths between two looks at whether it is the last.
const STEP: usize = 4;

/// `sums[m, n] += a[m][k] b[k, n]`.
///
/// # Safety
/// The processor has `V`; a and b have a k-th number and row.
#[inline(always)]
unsafe fn add<V: Vector, const M: usize, const C: usize>(
    sums: &mut [[V; C]; M],
    a: Rows<M>,
    b: Panel,
    k: usize,
) {
    // SAFETY: as the caller says.
    unsafe {
        let mut of_b = [V::splat(0.0); C];
        for (c, of_b) in of_b.iter_mut().enumerate() {
            *of_b = V::load(b.start.add(k * b.stride + c * V::LANES));
        }
        let starts = a.starts;
        for m in 0..M {
            let x = V::splat(*starts[m].add(k * a.step));
            for c in 0..C {
                sums[m][c] = x.mul_add(of_b[c], sums[m][c]);
            }
        }
    }
}

/// `out = alpha · sums`, added if `keep`.
///
/// # Safety
/// The processor has `V`; `out` has M rows of C vectors, `stride` numbers from row to row.
#[inline(always)]
unsafe fn finish<V: Vector, const M: usize, const C: usize>(
    out: *mut f32,
    stride: usize,
    keep: bool,
    alpha: f32,
    sums: &[[V; C]; M],
) {
    // SAFETY: as the caller says.
    unsafe {
        let alpha = V::splat(alpha);
        for (m, sums) in sums.iter().enumerate() {
            for (c, &sum) in sums.iter().enumerate() {
                let out = out.add(m * stride + c * V::LANES);
                if keep { alpha.mul_add(sum, V::load(out)) } else { alpha.mul(sum) }.store(out);
            }
        }
    }
}
