//! Sums of products of two rows where they lie, widened in registers: of a row and itself, or of a token that is decoded
//! and the rows of a weight, where packing or widening in memory would take longer than the products.
//!
//! How fast a weight comes from memory bounds the latter. What follows is asked for ahead of the loop: processors' own
//! guesses end with a page. Vectors are spelled out, for the compiler takes sums apart into single numbers here.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::{bf16, f16};

#[cfg(not(target_arch = "x86_64"))]
use super::micro::Lanes;
use super::micro::Vector;
use super::pack::Line;
use crate::cpu::simd::{self, Isa, Kernel, fma, prefetch, total};
use crate::cpu::thin::Lines;
use crate::tensor::{DType, Real};

/// Bytes of a weight between what is multiplied and what is asked for.
const AHEAD: usize = 2048;

/// `dst[n] = Σ_k a[k] b[n, k]`, added if `keep`. Each sum depends on a and its row of b alone.
pub(in crate::cpu) fn dots<A: Real, B: Real>(dst: &mut [f32], keep: bool, a: &[A], b: Lines<'_, B>) {
    simd::run(Dots { dst, keep, a, b });
}

struct Dots<'a, A, B> {
    dst: &'a mut [f32],
    keep: bool,
    a: &'a [A],
    b: Lines<'a, B>,
}

impl<A: Real, B: Real> Kernel for Dots<'_, A, B> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Dots { dst, keep, a, b } = self;
        for (n, out) in dst.iter_mut().enumerate() {
            let dot = dot::<I, A, B>(a, b.at(n, 0..a.len()));
            *out = if keep { *out + dot } else { dot };
        }
    }
}

/// `Σ_k a[k] b[k]`, in a kernel that runs with I's instructions.
#[inline(always)]
pub(in crate::cpu) fn dot<I: Isa, A: Real, B: Real>(a: &[A], b: &[B]) -> f32 {
    // SAFETY: kernels run with instructions that the processor has (`simd::run`), and these are I's.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        if I::WIDE {
            by::<I, __m512, 4, A, B>(a, b)
        } else if I::FMA {
            by::<I, __m256, 8, A, B>(a, b)
        } else {
            by::<I, __m128, 8, A, B>(a, b)
        }
    }
    // SAFETY: these are plain numbers.
    #[cfg(not(target_arch = "x86_64"))]
    unsafe {
        by::<I, Lanes<f32, 4>, 8, A, B>(a, b)
    }
}

/// [`dot`] with S registers of sums: so many that none waits for the one before, and that each sum is short.
///
/// # Safety
/// The processor has `V`.
#[inline(always)]
unsafe fn by<I: Isa, V: Widened, const S: usize, A: Real, B: Real>(a: &[A], b: &[B]) -> f32 {
    const { assert!(S.is_power_of_two()) };
    assert!(a.len() == b.len());
    let step = S * V::LANES;
    let (whole, vectors) = (a.len() / step * step, a.len() / V::LANES * V::LANES);
    let mut lanes = [0f32; 16];
    // SAFETY: the caller has `V`; vectors end within both rows, and no register has more than 16 numbers.
    unsafe {
        let mut sums = [V::splat(0.0); S];
        for at in (0..whole).step_by(step) {
            for byte in (0..step * size_of::<B>()).step_by(size_of::<Line>()) {
                prefetch(b.as_ptr().wrapping_add(at).wrapping_byte_add(AHEAD + byte));
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                let at = at + i * V::LANES;
                *sum = V::widened(a.as_ptr().add(at)).mul_add(V::widened(b.as_ptr().add(at)), *sum);
            }
        }
        for at in (whole..vectors).step_by(V::LANES) {
            sums[0] = V::widened(a.as_ptr().add(at)).mul_add(V::widened(b.as_ptr().add(at)), sums[0]);
        }
        // Pairs first, as below.
        let mut n = S / 2;
        while n > 0 {
            (0..n).for_each(|i| sums[i] = sums[i].add(sums[i + n]));
            n /= 2;
        }
        sums[0].store(lanes.as_mut_ptr());
    }
    let rest = a[vectors..].iter().zip(&b[vectors..]);
    rest.fold(total(lanes), |sum, (a, b)| fma::<I>(a.to_f32(), b.to_f32(), sum))
}

/// A register that numbers are widened into.
///
/// # Safety
/// As for [`Vector`].
unsafe trait Widened: Vector<Of = f32> {
    /// The numbers at `x`.
    unsafe fn of_bf16(x: *const bf16) -> Self;

    /// The numbers at `x`.
    #[inline(always)]
    unsafe fn of_f16(x: *const f16) -> Self {
        let mut numbers = [0f32; 16];
        // SAFETY: the caller has the numbers and the register, of at most 16.
        unsafe {
            (0..Self::LANES).for_each(|i| numbers[i] = (*x.add(i)).to_f32());
            Self::load(numbers.as_ptr())
        }
    }

    /// The numbers at `x`.
    #[inline(always)]
    unsafe fn widened<E: Real>(x: *const E) -> Self {
        // SAFETY: the caller has the numbers, of the type that is told, and the register.
        unsafe {
            match E::DTYPE {
                DType::F32 => Self::load(x.cast()),
                DType::BF16 => Self::of_bf16(x.cast()),
                DType::F16 => Self::of_f16(x.cast()),
            }
        }
    }
}

// SAFETY: it reads 16 numbers.
#[cfg(target_arch = "x86_64")]
unsafe impl Widened for __m512 {
    #[inline(always)]
    unsafe fn of_bf16(x: *const bf16) -> __m512 {
        // SAFETY: the caller has the numbers and the instructions.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.cast()))))
        }
    }
    #[inline(always)]
    unsafe fn of_f16(x: *const f16) -> __m512 {
        // SAFETY: the caller has the numbers and the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.cast())) }
    }
}

// SAFETY: it reads 8 numbers.
#[cfg(target_arch = "x86_64")]
unsafe impl Widened for __m256 {
    #[inline(always)]
    unsafe fn of_bf16(x: *const bf16) -> __m256 {
        // SAFETY: the caller has the numbers and the instructions.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(x.cast()))))
        }
    }
    #[inline(always)]
    unsafe fn of_f16(x: *const f16) -> __m256 {
        // SAFETY: the caller has the numbers and the instructions.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.cast())) }
    }
}

// SAFETY: it reads 4 numbers.
#[cfg(target_arch = "x86_64")]
unsafe impl Widened for __m128 {
    #[inline(always)]
    unsafe fn of_bf16(x: *const bf16) -> __m128 {
        // SAFETY: the caller has the numbers, and every processor the instructions.
        unsafe { _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(x.cast()))) }
    }
}

// SAFETY: it reads 4 numbers.
#[cfg(not(target_arch = "x86_64"))]
unsafe impl Widened for Lanes<f32, 4> {
    #[inline(always)]
    unsafe fn of_bf16(x: *const bf16) -> Self {
        // SAFETY: the caller has the numbers.
        let numbers = unsafe { x.cast::<[bf16; 4]>().read() }.map(Real::to_f32);
        // SAFETY: there are four.
        unsafe { Self::load(numbers.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::{loops, run_on};
    use crate::ops::cases::normal;

    fn conforms<A: Real, B: Real>() {
        for (rows, k) in [(1, 1), (3, 31), (5, 64), (2, 0), (0, 4), (7, 1127)] {
            let (a, b) = (normal::<A>(1, k, 1.0), normal::<B>(2, rows * (k + 3), 1.0));
            let old = normal::<f32>(3, rows, 1.0);
            for (set, keep) in loops().flat_map(|set| [(set, false), (set, true)]) {
                let mut got = if keep { old.clone() } else { vec![f32::NAN; rows] };
                run_on(set, Dots { dst: &mut got, keep, a: &a, b: Lines { data: &b, stride: k + 3 } });
                for (n, got) in got.iter().enumerate() {
                    let terms = a.iter().zip(&b[n * (k + 3)..]);
                    let terms = terms.map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32()));
                    let was = if keep { f64::from(old[n]) } else { 0.0 };
                    let (sum, size) = terms.fold((was, was.abs()), |(s, z), x| (s + x, z + x.abs()));
                    let tol = (k + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * size;
                    let err = (f64::from(*got) - sum).abs();
                    assert!(err <= tol, "{} {rows} × {k} [{n}] = {got}, expected {sum}", set.name());
                }
            }
        }
    }

    #[test]
    fn as_the_sums() {
        conforms::<f32, f32>();
        conforms::<f32, bf16>();
        conforms::<bf16, f32>();
        conforms::<bf16, bf16>();
        conforms::<f32, f16>();
        conforms::<f16, bf16>();
    }
}
