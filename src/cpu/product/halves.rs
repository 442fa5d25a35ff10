//! f32 rounded to bf16 by the instructions for it, where products are made of pairs.
//!
//! As those have it, to the nearest, ties to even, and subnormal numbers are 0.

use std::arch::x86_64::{
    __m256bh, __m256i, __m512bh, __m512i, _mm256_mask_storeu_epi16, _mm256_storeu_si256, _mm512_cvtne2ps_pbh,
    _mm512_cvtneps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_ps, _mm512_permutexvar_epi16,
    _mm512_storeu_si512,
};
use std::mem::transmute;

use half::bf16;

use super::pairs::Pairs;

/// Numbers of a register.
const LANES: usize = 16;

/// Whether the instructions are used: tiles may be emulated on a processor that has none.
fn used() -> bool {
    Pairs::used().is_some() && is_x86_feature_detected!("avx512bf16")
}

/// Rounds all of `from`, or nothing where the instruction is not used: whether it did.
pub(in crate::cpu) fn narrow(out: &mut [bf16], from: &[f32]) -> bool {
    let used = used();
    if used {
        // SAFETY: the processor has the instructions, as was just seen: none that is used lacks the others.
        unsafe { run(out, from) }
    }
    used
}

/// Rounds each two rows of `columns` f32 into a row of pairs; these take the place of the first half of the rows. Or nothing,
/// where the instructions are not used: whether it did. Rows are even in number, `columns` is whole registers.
pub(in crate::cpu) fn by_twos(rows: &mut [f32], columns: usize) -> bool {
    let used = used();
    if used {
        // SAFETY: as of `narrow`.
        unsafe { run_by_twos(rows, columns) }
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

/// [`by_twos`].
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn run_by_twos(rows: &mut [f32], columns: usize) {
    assert!(columns > 0 && columns.is_multiple_of(LANES) && rows.len().is_multiple_of(2 * columns));
    let turn: [u16; 2 * LANES] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
    for at in 0..rows.len() / (2 * columns) {
        for j in (0..columns).step_by(LANES) {
            let from = 2 * at * columns + j;
            // SAFETY: there are two rows from `from - j` on, `at` rows of pairs before them, and whole registers; registers
            // of bf16 are 512 bits like any other.
            unsafe {
                let above = rows.as_mut_ptr().add(from);
                let both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(above.add(columns)), _mm512_loadu_ps(above));
                let turn = _mm512_loadu_si512(turn.as_ptr().cast());
                let pairs = _mm512_permutexvar_epi16(turn, transmute::<__m512bh, __m512i>(both));
                _mm512_storeu_si512(rows.as_mut_ptr().add(at * columns + j).cast(), pairs);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Real;

    #[test]
    fn two_rows_are_pairs() {
        if !is_x86_feature_detected!("avx512bf16") {
            return;
        }
        for (lines, columns) in [(0, 16), (2, 16), (6, 48)] {
            let rows: Vec<f32> = (0..lines * columns).map(|i| 1.0 + i as f32 / 512.0).collect();
            let mut got = rows.clone();
            // SAFETY: the processor has the instructions, as was just seen.
            unsafe { run_by_twos(&mut got, columns) };
            let pairs: &[[bf16; 2]] = bytemuck::cast_slice(&got);
            for (i, pair) in pairs.iter().enumerate().take(lines / 2 * columns) {
                let (at, j) = (i / columns * 2 * columns, i % columns);
                let want: [bf16; 2] = [0, columns].map(|below| Real::from_f32(rows[at + below + j]));
                assert_eq!(*pair, want, "{lines} × {columns}: {i}");
            }
        }
    }

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
