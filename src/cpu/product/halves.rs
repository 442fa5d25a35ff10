//! f32 rounded to bf16 by the instruction for it, where products are made of pairs.
//!
//! As those have it, to the nearest, ties to even, and subnormal numbers are 0.

use std::arch::x86_64::{
    __m256bh, __m256i, _mm256_mask_storeu_epi16, _mm256_storeu_si256, _mm512_cvtneps_pbh, _mm512_loadu_ps,
    _mm512_maskz_loadu_ps,
};
use std::mem::transmute;

use half::bf16;

use super::pairs::Pairs;

/// Numbers of a register.
const LANES: usize = 16;

/// Rounds all of `from`, or nothing where the instruction is not used: whether it did.
pub(in crate::cpu) fn narrow(out: &mut [bf16], from: &[f32]) -> bool {
    // Tiles may be emulated on a processor that has no such instruction.
    let used = Pairs::used().is_some() && is_x86_feature_detected!("avx512bf16");
    if used {
        // SAFETY: the processor has the instructions, as was just seen: none that is used lacks the others.
        unsafe { run(out, from) }
    }
    used
}

/// [`narrow`].
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn run(out: &mut [bf16], from: &[f32]) {
    assert!(out.len() == from.len());
    let (mut out, mut from, mut left) = (out.as_mut_ptr(), from.as_ptr(), from.len());
    // SAFETY: both have so many numbers left, and those beyond are neither read nor written; a register of 16 bf16 is 256
    // bits like any other.
    unsafe {
        while left >= LANES {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
            _mm256_storeu_si256(out.cast(), transmute::<__m256bh, __m256i>(rounded));
            (out, from, left) = (out.add(LANES), from.add(LANES), left - LANES);
        }
        let some = (1u16 << left) - 1;
        let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from));
        _mm256_mask_storeu_epi16(out.cast(), some, transmute::<__m256bh, __m256i>(rounded));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Real;

    #[test]
    fn normal_numbers_are_rounded_as_everywhere_and_subnormal_ones_to_zero() {
        if !is_x86_feature_detected!("avx512bf16") {
            return;
        }
        let bits = (0..u32::MAX).step_by(0x3001).chain([0x7F80_0000, 0xFF80_0000, 0x7FC0_0001, 0x8000_0000]);
        let from: Vec<f32> = bits.map(f32::from_bits).collect();
        for len in (0..40).chain([from.len()]) {
            let mut out = vec![bf16::MAX; len + 1];
            // SAFETY: the processor has the instructions, as was just seen.
            unsafe { run(&mut out[..len], &from[..len]) };
            for (x, got) in from.iter().zip(&out[..len]) {
                let want: bf16 = Real::from_f32(if x.is_subnormal() { 0.0f32.copysign(*x) } else { *x });
                assert_eq!(got.to_bits(), want.to_bits(), "{x:e}");
            }
            assert_eq!(out[len], bf16::MAX, "beyond the last");
        }
    }
}
