//! Products of pairs of bf16 in registers of AVX-512, by `vdpbf16ps`.

use std::arch::x86_64::{
    __m512bh, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::hint::black_box;
use std::mem::transmute;

use half::bf16;

use super::{Operands, PANEL, SIDE, Square};

/// The micro-kernel of AVX-512: eight rows and two panels in registers.
pub(super) struct Dots;

impl Square for Dots {
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn multiply(&self, of: Operands) {
        // SAFETY: as the caller says.
        unsafe { dots(of) }
    }
}

/// Rows of sums in registers.
const ROWS: usize = 8;

/// [`Square::multiply`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn dots(Operands { out, out_stride, keep, a, a_stride, b, beside, b_stride, pairs }: Operands) {
    for row in (0..SIDE).step_by(ROWS) {
        // SAFETY: rows stay below 32 and pairs below their number; a register of bf16 is 512 bits like any other.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            for k in 0..pairs {
                let left: __m512bh = transmute(_mm512_loadu_si512(b.add(k * b_stride).cast()));
                let right: __m512bh = transmute(_mm512_loadu_si512(beside.add(k * b_stride).cast()));
                for (m, sums) in sums.iter_mut().enumerate() {
                    let pair = a.add((row + m) * a_stride + 2 * k).cast::<i32>().read_unaligned();
                    let pair: __m512bh = transmute(_mm512_set1_epi32(pair));
                    *sums = [_mm512_dpbf16_ps(sums[0], pair, left), _mm512_dpbf16_ps(sums[1], pair, right)];
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                for (p, sum) in sums.iter().enumerate() {
                    let out = out.add((row + m) * out_stride + p * PANEL);
                    let was = if keep { _mm512_loadu_ps(out) } else { _mm512_setzero_ps() };
                    _mm512_storeu_ps(out, _mm512_add_ps(was, *sum));
                }
            }
        }
    }
}

/// Adds products of pairs to N registers of sums `rounds` times, and reads nothing: the multiplications and additions.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(in super::super) unsafe fn spin<const N: usize>(rounds: usize) -> usize {
    let ones = black_box([bf16::ONE; 2 * PANEL]);
    // SAFETY: a register of bf16 is 512 bits, which is what 32 of them take.
    unsafe {
        let ones: __m512bh = transmute(ones);
        let mut sums = [_mm512_setzero_ps(); N];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        let mut out = [0f32; PANEL];
        for sum in sums {
            _mm512_storeu_ps(out.as_mut_ptr(), sum);
            // As far as f32 counts.
            debug_assert!(rounds > 1 << 22 || out == [2.0 * rounds as f32; PANEL]);
            black_box(out);
        }
    }
    N * 2 * 2 * PANEL * rounds
}
