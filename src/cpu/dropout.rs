//! A mask of random zeros, by place: dropout's, and that of entries of an update that are dropped.

use super::simd::{self, Isa, Kernel};
use crate::ops::linear::Dropout;
use crate::random::{Philox, Purpose};

/// Which elements of one x are kept.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    numbers: Philox,
    /// A word is kept from this on, once shifted: `uniform ≥ p` in integers.
    least: u32,
    /// 1 / (1 − p).
    pub(super) scale: f32,
}

/// Blocks of four numbers that are made side by side.
const LANES: usize = 16;

impl Mask {
    pub(super) fn new(d: Dropout) -> Mask {
        let numbers = Philox::new(d.seed, Purpose::Dropout.stream(d.tensor)).at_step(d.step);
        Mask::of(numbers, f64::from(d.p))
    }

    /// Each element is dropped with probability `p`, by the numbers at its place.
    pub(super) fn of(numbers: Philox, p: f64) -> Mask {
        // Uniform numbers are multiples of 2^-24, so this bound is exact.
        let least = (p * f64::from(1u32 << 24)).ceil() as u32;
        Mask { numbers, least, scale: (1.0 / (1.0 - p)) as f32 }
    }

    /// Multiplies the elements from place `at` on by `scale` or, where they are dropped, by zero.
    pub(super) fn apply(&self, x: &mut [f32], at: u64, scale: f32) {
        simd::run(Apply { mask: self, x, at, scale });
    }
}

struct Apply<'a> {
    mask: &'a Mask,
    x: &'a mut [f32],
    at: u64,
    scale: f32,
}

impl Kernel for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Apply { mask, x, at, scale } = self;
        let mut words = [0u32; 4 * LANES];
        // Blocks begin at multiples of four.
        let mut skip = (at % 4) as usize;
        let mut block = at / 4;
        let mut rest = x;
        while !rest.is_empty() {
            for (words, place) in words.chunks_exact_mut(4).zip(block..) {
                words.copy_from_slice(&mask.numbers.block(place));
            }
            let (now, later) = rest.split_at_mut(rest.len().min(words.len() - skip));
            for (x, word) in now.iter_mut().zip(&words[skip..]) {
                *x = if word >> 8 >= mask.least { *x * scale } else { 0.0 };
            }
            (rest, skip, block) = (later, 0, block + LANES as u64);
        }
    }
}
