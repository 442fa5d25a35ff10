//! A group of rows times some numbers of each column: what Grams and maps of factors are made of.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128, __m128d, __m256, __m256d, __m512, __m512d};

use super::micro::{self, Panel, Rows, Vector};
use crate::cpu::simd::Isa;

/// A number that is multiplied and added, with the registers that hold some. 128 bytes are a group: with 32 registers of
/// 512 bits, eight rows of two, a number that is loaded serves twice.
pub(crate) trait Number: Copy + Default {
    /// 512 bits.
    #[cfg(target_arch = "x86_64")]
    type Wide: Vector<Of = Self>;
    /// 256 bits.
    #[cfg(target_arch = "x86_64")]
    type Half: Vector<Of = Self>;
    /// 128 bits.
    type Quarter: Vector<Of = Self>;
    /// Adds `x`.
    fn plus(&mut self, x: Self);
}

macro_rules! number {
    ($t:ty, $wide:ty, $half:ty, $quarter:ty, $lanes:literal) => {
        impl Number for $t {
            #[cfg(target_arch = "x86_64")]
            type Wide = $wide;
            #[cfg(target_arch = "x86_64")]
            type Half = $half;
            #[cfg(target_arch = "x86_64")]
            type Quarter = $quarter;
            #[cfg(not(target_arch = "x86_64"))]
            type Quarter = micro::Lanes<$t, $lanes>;
            #[inline(always)]
            fn plus(&mut self, x: $t) {
                *self += x;
            }
        }
    };
}
number!(f32, __m512, __m256, __m128, 4);
number!(f64, __m512d, __m256d, __m128d, 2);

/// `Σ_k x[k] y[j][k · step]` for each of Y rows of y, in a kernel that runs with `I`; k ascends.
#[inline(always)]
pub(crate) fn sums<I: Isa, T: Number, const G: usize, const Y: usize>(
    x: &[[T; G]],
    y: [&[T]; Y],
    step: usize,
) -> [[T; G]; Y] {
    let last = x.len().saturating_sub(1) * step;
    assert!(x.is_empty() || y.iter().all(|y| last < y.len()));
    let a = Rows { starts: y.map(<[T]>::as_ptr), step };
    let b = Panel { start: x.as_flattened().as_ptr(), stride: G, depth: x.len() };
    // SAFETY: kernels run with instructions that the processor has (`simd::run`), and these are I's; x's rows have G
    // numbers, and each y reaches as far as the last of them, as was just seen.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if I::WIDE {
            return stored::<T::Wide, G, Y, 2>(a, b);
        } else if I::FMA {
            return stored::<T::Half, G, Y, 4>(a, b);
        }
        stored::<T::Quarter, G, Y, 8>(a, b)
    }
}

/// The sums, in registers of `V`, as numbers.
///
/// # Safety
/// As for [`micro::sums`].
#[inline(always)]
unsafe fn stored<V: Vector, const G: usize, const Y: usize, const C: usize>(
    a: Rows<V::Of, Y>,
    b: Panel<V::Of>,
) -> [[V::Of; G]; Y] {
    const { assert!(G == C * V::LANES) };
    let mut out = [[V::Of::default(); G]; Y];
    // SAFETY: as the caller says; a row of `out` takes C vectors.
    unsafe {
        for (out, sums) in out.iter_mut().zip(micro::sums::<V, Y, C>(a, b, ())) {
            for (out, sum) in out.chunks_exact_mut(V::LANES).zip(sums) {
                sum.store(out.as_mut_ptr());
            }
        }
    }
    out
}
