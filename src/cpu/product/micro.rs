//! Sums in registers: the micro-kernel, once for all instruction sets.
//!
//! Left to itself the compiler keeps the sums in memory, or reads b again for each row of a, as soon as a detail around
//! the loop changes: either halves the speed, or worse. So vectors are spelled out, and so is `unsafe`.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
#[cfg(target_arch = "x86_64")]
use std::mem::transmute;

use super::{LINE, TileMut};
#[cfg(any(test, not(target_arch = "x86_64")))]
use crate::cpu::simd::{Baseline, Isa};
use crate::cpu::simd::{prefetch, prefetch_second};

/// A register of [`Vector::LANES`] numbers.
///
/// # Safety
/// Its functions read and write that many numbers, and want a processor that has the register.
pub(crate) unsafe trait Vector: Copy {
    /// One of its numbers.
    type Of: Copy + Default;
    /// Numbers in it.
    const LANES: usize;
    /// `x` in all lanes.
    unsafe fn splat(x: Self::Of) -> Self;
    /// The numbers at `x`.
    unsafe fn load(x: *const Self::Of) -> Self;
    /// Writes them to `x`.
    unsafe fn store(self, x: *mut Self::Of);
    /// `self + b`.
    unsafe fn add(self, b: Self) -> Self;
    /// `self · b + c`, rounded once where that is one instruction of f32 or f64.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

/// The vectors of x86-64: type, number, lanes, splat, load, store, add, and how a b + c is made.
#[cfg(target_arch = "x86_64")]
macro_rules! vector {
    (
        $v:ty, $t:ty, $n:literal, $splat:ident, $load:ident, $store:ident, $add:ident,
        |$a:ident, $b:ident, $c:ident| $fma:expr
    ) => {
        // SAFETY: loads and stores are the unaligned ones of that many numbers.
        unsafe impl Vector for $v {
            type Of = $t;
            const LANES: usize = $n;
            #[inline(always)]
            unsafe fn splat(x: $t) -> $v {
                // SAFETY: the caller has the instructions.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(x: *const $t) -> $v {
                // SAFETY: the caller has the numbers and the instructions.
                unsafe { $load(x) }
            }
            #[inline(always)]
            unsafe fn store(self, x: *mut $t) {
                // SAFETY: the caller has the numbers and the instructions.
                unsafe { $store(x, self) }
            }
            #[inline(always)]
            unsafe fn add(self, b: $v) -> $v {
                // SAFETY: the caller has the instructions.
                unsafe { $add(self, b) }
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
vector!(__m512, f32, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, |a, b, c| {
    _mm512_fmadd_ps(a, b, c)
});
#[cfg(target_arch = "x86_64")]
vector!(__m256, f32, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, |a, b, c| {
    _mm256_fmadd_ps(a, b, c)
});
#[cfg(target_arch = "x86_64")]
vector!(__m128, f32, 4, _mm_set1_ps, _mm_loadu_ps, _mm_storeu_ps, _mm_add_ps, |a, b, c| {
    _mm_add_ps(_mm_mul_ps(a, b), c)
});
#[cfg(target_arch = "x86_64")]
vector!(__m512d, f64, 8, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_add_pd, |a, b, c| {
    _mm512_fmadd_pd(a, b, c)
});
#[cfg(target_arch = "x86_64")]
vector!(__m256d, f64, 4, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_add_pd, |a, b, c| {
    _mm256_fmadd_pd(a, b, c)
});
#[cfg(target_arch = "x86_64")]
vector!(__m128d, f64, 2, _mm_set1_pd, _mm_loadu_pd, _mm_storeu_pd, _mm_add_pd, |a, b, c| {
    _mm_add_pd(_mm_mul_pd(a, b), c)
});

/// A register whose every f32 stands for two bf16 where it is multiplied, of which both products are added.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Dotted<V>(V);

#[cfg(target_arch = "x86_64")]
macro_rules! dotted {
    ($v:ty, $pairs:ty, $n:literal, $dot:ident) => {
        // SAFETY: it reads and writes what `$v` does.
        unsafe impl Vector for Dotted<$v> {
            type Of = f32;
            const LANES: usize = $n;
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                // SAFETY: the caller has the instructions.
                Dotted(unsafe { <$v>::splat(x) })
            }
            #[inline(always)]
            unsafe fn load(x: *const f32) -> Self {
                // SAFETY: the caller has the numbers and the instructions.
                Dotted(unsafe { <$v>::load(x) })
            }
            #[inline(always)]
            unsafe fn store(self, x: *mut f32) {
                // SAFETY: the caller has the numbers and the instructions.
                unsafe { self.0.store(x) }
            }
            #[inline(always)]
            unsafe fn add(self, b: Self) -> Self {
                // SAFETY: the caller has the instructions.
                Dotted(unsafe { self.0.add(b.0) })
            }
            #[inline(always)]
            unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                // SAFETY: the caller has the instructions; registers of one size hold anything.
                Dotted(unsafe { $dot(c.0, transmute::<$v, $pairs>(self.0), transmute::<$v, $pairs>(b.0)) })
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
dotted!(__m512, __m512bh, 16, _mm512_dpbf16_ps);
#[cfg(target_arch = "x86_64")]
dotted!(__m256, __m256bh, 8, _mm256_dpbf16_ps);

/// Numbers one after another, for other processors.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[derive(Clone, Copy)]
pub(crate) struct Lanes<T, const N: usize>([T; N]);

#[cfg(any(test, not(target_arch = "x86_64")))]
macro_rules! lanes {
    ($t:ty, $n:literal) => {
        // SAFETY: it reads and writes as many numbers, with instructions that every processor has.
        unsafe impl Vector for Lanes<$t, $n> {
            type Of = $t;
            const LANES: usize = $n;
            #[inline(always)]
            unsafe fn splat(x: $t) -> Self {
                Lanes([x; $n])
            }
            #[inline(always)]
            unsafe fn load(x: *const $t) -> Self {
                // SAFETY: the caller has the numbers.
                Lanes(unsafe { x.cast::<[$t; $n]>().read() })
            }
            #[inline(always)]
            unsafe fn store(self, x: *mut $t) {
                // SAFETY: the caller has the numbers.
                unsafe { x.cast::<[$t; $n]>().write(self.0) }
            }
            #[inline(always)]
            unsafe fn add(self, b: Self) -> Self {
                Lanes(std::array::from_fn(|i| self.0[i] + b.0[i]))
            }
            #[inline(always)]
            unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                let fma = |a: $t, b, c| if Baseline::FMA { a.mul_add(b, c) } else { a * b + c };
                Lanes(std::array::from_fn(|i| fma(self.0[i], b.0[i], c.0[i])))
            }
        }
    };
}
#[cfg(any(test, not(target_arch = "x86_64")))]
lanes!(f32, 4);
#[cfg(any(test, not(target_arch = "x86_64")))]
lanes!(f64, 2);

/// M rows of a.
pub(super) trait Left<T, const M: usize>: Copy {
    /// Where number `k` of row `m` is.
    fn at(&self, m: usize, k: usize) -> *const T;
}

/// Rows wherever they are.
#[derive(Clone, Copy)]
pub(super) struct Rows<T, const M: usize> {
    /// Where each begins.
    pub starts: [*const T; M],
    /// From number to number of a row.
    pub step: usize,
}

impl<T: Copy, const M: usize> Left<T, M> for Rows<T, M> {
    #[inline(always)]
    fn at(&self, m: usize, k: usize) -> *const T {
        self.starts[m].wrapping_add(k * self.step)
    }
}

/// Rows that begin `STRIDE` numbers apart: one register says where all of them are.
#[derive(Clone, Copy)]
pub(super) struct Strip<T, const STRIDE: usize>(pub *const T);

impl<T: Copy, const M: usize, const STRIDE: usize> Left<T, M> for Strip<T, STRIDE> {
    #[inline(always)]
    fn at(&self, m: usize, k: usize) -> *const T {
        self.0.wrapping_add(m * STRIDE + k)
    }
}

/// Columns of b.
#[derive(Clone, Copy)]
pub(super) struct Panel<T> {
    /// Where they begin.
    pub start: *const T,
    /// From row to row.
    pub stride: usize,
    /// Rows.
    pub depth: usize,
}

/// `out = a b`, added if `keep`: the first of M rows and N columns, N = C · LANES; k ascends.
///
/// # Safety
/// The processor has `V`; a's rows have as many numbers as b has rows, and b's rows N numbers.
#[inline(always)]
pub(super) unsafe fn tile<V: Vector<Of = f32>, const M: usize, const C: usize, const N: usize>(
    out: &mut TileMut<'_, f32>,
    keep: bool,
    a: impl Left<f32, M>,
    b: Panel<f32>,
    ahead: impl Ahead,
) {
    const { assert!(N == C * V::LANES) };
    // What the sums are added to is wanted when they are done.
    for m in 0..out.size().0 {
        prefetch(out.start.wrapping_add(m * out.stride));
    }
    let (some_rows, some_columns) = out.size();
    // SAFETY: as the caller says; a whole tile has M rows of N numbers, and so has `part`.
    unsafe {
        let sums = sums::<V, M, C>(a, b, ahead);
        if (some_rows, some_columns) == (M, N) {
            return finish(out.start, out.stride, keep, &sums);
        }
        let mut part = [[0f32; N]; M];
        if keep {
            for (m, part) in part[..some_rows].iter_mut().enumerate() {
                part[..some_columns].copy_from_slice(out.row(m));
            }
        }
        finish(part.as_mut_ptr().cast(), N, keep, &sums);
        for (m, part) in part[..some_rows].iter().enumerate() {
            out.row(m).copy_from_slice(&part[..some_columns]);
        }
    }
}

/// `a b`: M rows and C vectors; k ascends.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(super) unsafe fn sums<V: Vector, const M: usize, const C: usize>(
    a: impl Left<V::Of, M>,
    b: Panel<V::Of>,
    ahead: impl Ahead,
) -> [[V; C]; M] {
    // SAFETY: k stays below the depth.
    unsafe {
        let mut sums = [[V::splat(V::Of::default()); C]; M];
        let (blocks, steps) = (b.depth / BLOCK, b.depth / STEP);
        for block in 0..blocks {
            ahead.ask(block);
            for k in (block * BLOCK..(block + 1) * BLOCK).step_by(STEP) {
                for i in 0..STEP {
                    add(&mut sums, a, b, k + i);
                }
            }
        }
        for k in (blocks * BLOCK..steps * STEP).step_by(STEP) {
            for i in 0..STEP {
                add(&mut sums, a, b, k + i);
            }
        }
        for k in steps * STEP..b.depth {
            add(&mut sums, a, b, k);
        }
        sums
    }
}

/// Depths between two looks at whether it is the last.
const STEP: usize = 4;
/// Depths between two questions of what is ahead.
pub(super) const BLOCK: usize = 16;

/// What other caches hold and is wanted soon, asked for little by little while sums are made.
pub(super) trait Ahead: Copy {
    /// Asks for part `block` of it.
    fn ask(&self, block: usize);
}

impl Ahead for () {
    #[inline(always)]
    fn ask(&self, _: usize) {}
}

/// The next rows of a, and what follows in a panel of b.
#[derive(Clone, Copy)]
pub(super) struct Next {
    /// Where the rows begin, or a part of them.
    pub rows: *const f32,
    /// From row to row.
    pub stride: usize,
    /// How many there are.
    pub count: usize,
    /// How many are asked for at a time.
    pub at_once: usize,
    /// Lines of each row.
    pub lines: usize,
    /// A line of b for each block.
    pub panel: *const f32,
}

impl Ahead for Next {
    #[inline(always)]
    fn ask(&self, block: usize) {
        for row in block * self.at_once..((block + 1) * self.at_once).min(self.count) {
            let row = self.rows.wrapping_add(row * self.stride);
            (0..self.lines).for_each(|line| prefetch_second(row.wrapping_add(line * LINE)));
        }
        prefetch_second(self.panel.wrapping_add(block * LINE));
    }
}

/// `sums[m, n] += a[m][k] b[k, n]`.
///
/// # Safety
/// The processor has `V`; a and b have a k-th number and row.
#[inline(always)]
unsafe fn add<V: Vector, const M: usize, const C: usize>(
    sums: &mut [[V; C]; M],
    a: impl Left<V::Of, M>,
    b: Panel<V::Of>,
    k: usize,
) {
    // SAFETY: as the caller says.
    unsafe {
        let mut of_b = [V::splat(V::Of::default()); C];
        for (c, of_b) in of_b.iter_mut().enumerate() {
            *of_b = V::load(b.start.add(k * b.stride + c * V::LANES));
        }
        for (m, sums) in sums.iter_mut().enumerate() {
            let x = V::splat(*a.at(m, k));
            for c in 0..C {
                sums[c] = x.mul_add(of_b[c], sums[c]);
            }
        }
    }
}

/// `out = sums`, added if `keep`.
///
/// # Safety
/// The processor has `V`; `out` has M rows of C vectors, `stride` numbers from row to row.
#[inline(always)]
unsafe fn finish<V: Vector<Of = f32>, const M: usize, const C: usize>(
    out: *mut f32,
    stride: usize,
    keep: bool,
    sums: &[[V; C]; M],
) {
    // SAFETY: as the caller says.
    unsafe {
        for (m, sums) in sums.iter().enumerate() {
            for (c, &sum) in sums.iter().enumerate() {
                let out = out.add(m * stride + c * V::LANES);
                if keep { sum.add(V::load(out)) } else { sum }.store(out);
            }
        }
    }
}
