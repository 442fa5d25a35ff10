//! The roof of all products: multiply-adds whose operands never leave the registers.

use std::hint::black_box;

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::group::Number;
use super::micro::Vector;
#[cfg(target_arch = "x86_64")]
use super::pairs;
use crate::cpu::simd::{Instructions, Isa, Kernel};

/// Sums that are added to in turn, so many that none waits for the one before: a processor begins two multiply-adds a cycle
/// and ends one within five, and with their operands they fit into 16 registers. Twice as many of pairs of bf16, which take
/// longer, where there are 32.
const SUMS: usize = 12;

/// Multiplies and adds f32, each of a few registers `rounds` times.
pub(crate) struct Singles {
    pub rounds: usize,
}

impl Kernel for Singles {
    /// Multiplications and additions.
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self) -> usize {
        // SAFETY: kernels run with instructions that the processor has (`simd::run`), and these are I's.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if I::WIDE {
                return singles::<<f32 as Number>::Wide>(self.rounds);
            } else if I::FMA {
                return singles::<<f32 as Number>::Half>(self.rounds);
            }
            singles::<<f32 as Number>::Quarter>(self.rounds)
        }
    }
}

/// # Safety
/// The processor has `V`.
#[inline(always)]
unsafe fn singles<V: Vector<Of = f32>>(rounds: usize) -> usize {
    // SAFETY: as the caller says; there is room for the widest register.
    unsafe {
        // s ← s / 2 + 1 stays near 2.
        let (half, one) = (V::splat(black_box(0.5)), V::splat(black_box(1.0)));
        let mut sums = [one; SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = sum.mul_add(half, one);
            }
        }
        let mut out = [0f32; 16];
        for sum in sums {
            sum.store(out.as_mut_ptr());
            black_box(out);
        }
    }
    2 * SUMS * V::LANES * rounds
}

/// Multiplies and adds pairs or tiles of bf16 `rounds` times a few: the multiplications and additions; none where bf16 is
/// multiplied as f32.
pub(crate) fn halves(rounds: usize) -> Option<usize> {
    match (Instructions::used(), rounds) {
        // SAFETY: they are used, so they are there.
        #[cfg(target_arch = "x86_64")]
        (Instructions::Avx512Bf16, rounds) => Some(unsafe { pairs::spin::<{ 2 * SUMS }>(rounds) }),
        // SAFETY: they are used, so they are there.
        #[cfg(target_arch = "x86_64")]
        (Instructions::Amx, rounds) => Some(unsafe { amx::Tiles::new() }.spin(rounds)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::{loops, run_on};

    #[test]
    fn what_was_done_is_counted_by_registers() {
        let lanes = |set| match set {
            Instructions::Baseline => 4,
            Instructions::Avx2 => 8,
            _ => 16,
        };
        for set in loops() {
            assert_eq!(run_on(set, Singles { rounds: 0 }), 0);
            assert_eq!(run_on(set, Singles { rounds: 7 }), 2 * 7 * SUMS * lanes(set), "{}", set.name());
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn pairs_are_counted_too() {
        if Instructions::here().any(|set| set == Instructions::Avx512Bf16) {
            // SAFETY: the processor has them, as was just seen.
            let counted = [0, 7].map(|rounds| unsafe { pairs::spin::<{ 2 * SUMS }>(rounds) });
            assert_eq!(counted, [0, 7 * 2 * SUMS * 2 * 2 * 16]);
        }
    }

    #[test]
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn tiles_are_counted_too() {
        if !amx::available() {
            if amx::built_in() || Instructions::here().all(|set| set != Instructions::Avx512) {
                return;
            }
            amx::trap::install();
        }
        // SAFETY: there are tiles, or the trap does what they would.
        let tiles = unsafe { amx::Tiles::new() };
        assert_eq!((tiles.spin(0), tiles.spin(3)), (0, 3 * 4 * 16 * 16 * 32 * 2));
    }
}
