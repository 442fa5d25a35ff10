//! Loops compiled for what the processor at hand can do.
//!
//! The crate is built for the oldest processor of its architecture. A hot loop is a [`Kernel`]: plain Rust that the
//! compiler vectorises, built once per instruction set, of which [`run`] takes the fastest that the processor has, or the
//! one that [`VARIABLE`] names. Results may therefore differ between processors, never between thread counts.

use std::env;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::product::amx;
use crate::error::{Error, Result};

/// The environment variable that names the instructions that loops are to use: those of an older processor, whose results
/// another machine is to repeat, or what is to be measured or tested.
pub(crate) const VARIABLE: &str = "ANABRANCH_INSTRUCTIONS";

/// A set of instructions that loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instructions {
    /// What every processor of the architecture has.
    Baseline,
    /// 16 registers of 256 bits, multiplications and additions in one, f16 widened by eights.
    Avx2,
    /// 32 registers of 512 bits.
    Avx512,
    /// Products of pairs of bf16 too, two of them added to a sum at once.
    Avx512Bf16,
    /// Tiles of bf16 too.
    Amx,
}

impl Instructions {
    /// From the oldest on.
    const ALL: [Instructions; 5] = [
        Instructions::Baseline,
        Instructions::Avx2,
        Instructions::Avx512,
        Instructions::Avx512Bf16,
        Instructions::Amx,
    ];

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Instructions::Baseline => "baseline",
            Instructions::Avx2 => "avx2",
            Instructions::Avx512 => "avx512",
            Instructions::Avx512Bf16 => "avx512-bf16",
            Instructions::Amx => "amx",
        }
    }

    /// Whether the processor has them, and the system lets them be used.
    #[cfg(target_arch = "x86_64")]
    fn are_here(self) -> bool {
        match self {
            Instructions::Baseline => true,
            Instructions::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Instructions::Avx512 => {
                Instructions::Avx2.are_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            Instructions::Avx512Bf16 => {
                Instructions::Avx512.are_here() && is_x86_feature_detected!("avx512bf16")
            }
            Instructions::Amx => Instructions::Avx512.are_here() && amx::available(),
        }
    }

    /// Whether the processor has them.
    #[cfg(not(target_arch = "x86_64"))]
    fn are_here(self) -> bool {
        self == Instructions::Baseline
    }

    /// Those that the processor has, from the oldest on.
    pub(crate) fn here() -> impl Iterator<Item = Instructions> {
        Instructions::ALL.into_iter().filter(|set| set.are_here())
    }

    /// Those that are used where nothing is asked for: the last of them that the processor is fastest with.
    pub(crate) fn fastest() -> Instructions {
        let fast = |set: &Instructions| *set != Instructions::Avx512Bf16 || pairs_are_fast();
        Instructions::here().filter(fast).last().unwrap_or(Instructions::Baseline)
    }

    /// Those that [`VARIABLE`] names, by default the fastest; an error where it names none, or some that the processor has
    /// not.
    pub(crate) fn asked() -> Result<Instructions> {
        let Some(name) = env::var_os(VARIABLE) else { return Ok(Instructions::fastest()) };
        #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "emulator")))]
        if name == Instructions::Amx.name() && Instructions::Avx512.are_here() && !amx::built_in() {
            amx::trap::install();
            return Ok(Instructions::Amx);
        }
        Instructions::here().find(|set| name == *set.name()).ok_or_else(|| {
            let names: Vec<&str> = Instructions::here().map(Instructions::name).collect();
            Error::Usage(format!(
                "{VARIABLE}={}: expected one of what this processor has: {}",
                name.to_string_lossy(),
                names.join(", ")
            ))
        })
    }

    /// Those that loops use: what was asked for when the first of them ran.
    #[inline]
    pub(crate) fn used() -> Instructions {
        static USED: OnceLock<Instructions> = OnceLock::new();
        *USED.get_or_init(|| Instructions::asked().unwrap_or_else(|_| Instructions::fastest()))
    }
}

/// Whether products of pairs are faster than fused multiply-adds of f32: twice as fast on AMD's, half as fast on Intel's.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn pairs_are_fast() -> bool {
    // SAFETY: every x86-64 has the instruction.
    #[allow(unused_unsafe)]
    let id = unsafe { std::arch::x86_64::__cpuid(0) };
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

/// There are none.
#[cfg(not(target_arch = "x86_64"))]
fn pairs_are_fast() -> bool {
    false
}

/// What a loop may want to know of the instructions that it is compiled for.
///
/// # Safety
/// A loop runs with one of them only where the processor has the instructions that it says.
#[allow(unsafe_code)]
pub(crate) unsafe trait Isa {
    /// A fused multiply-add is one instruction.
    const FMA: bool;
    /// There is room for 32 registers of 16 numbers.
    const WIDE: bool;
}

/// 32 registers of 512 bits.
#[cfg(target_arch = "x86_64")]
struct Avx512;
/// 16 registers of 256 bits.
#[cfg(target_arch = "x86_64")]
struct Avx2;
/// What every processor of the architecture has.
pub(crate) struct Baseline;

// SAFETY: nothing outside this module can name it, and `run_with` has them.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
unsafe impl Isa for Avx512 {
    const FMA: bool = true;
    const WIDE: bool = true;
}
// SAFETY: nothing outside this module can name it, and `run_with` has them.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
unsafe impl Isa for Avx2 {
    const FMA: bool = true;
    const WIDE: bool = false;
}
// SAFETY: every processor of the architecture has them.
#[allow(unsafe_code)]
unsafe impl Isa for Baseline {
    const FMA: bool = cfg!(target_arch = "aarch64");
    const WIDE: bool = false;
}

/// A loop worth compiling for several instruction sets.
pub(crate) trait Kernel {
    /// What it computes.
    type Output;
    /// The loop, `#[inline(always)]`.
    fn run<I: Isa>(self) -> Self::Output;
}

/// Runs `kernel` with the instructions that are [used](Instructions::used).
#[inline]
#[allow(unsafe_code)]
pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: those that are used are none that the processor lacks.
    unsafe { run_with(Instructions::used(), kernel) }
}

/// Runs `kernel` with the instructions of `set`.
///
/// # Safety
/// The processor has them.
#[inline]
#[allow(unsafe_code)]
unsafe fn run_with<K: Kernel>(set: Instructions, kernel: K) -> K::Output {
    match set {
        // SAFETY: as the caller says; what is wider has these too.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 | Instructions::Avx512Bf16 | Instructions::Amx => unsafe { avx512(kernel) },
        // SAFETY: as the caller says.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => unsafe { avx2(kernel) },
        _ => kernel.run::<Baseline>(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Asks for the line of the caches that `x` is in, wherever that is.
#[inline(always)]
pub(crate) fn prefetch<T>(x: *const T) {
    ask::<true, T>(x);
}

/// [`prefetch`] into the second-level cache alone.
#[inline(always)]
pub(crate) fn prefetch_second<T>(x: *const T) {
    ask::<false, T>(x);
}

/// [`prefetch`] of all lines of `x`.
#[inline(always)]
pub(crate) fn fetch<T>(x: &[T]) {
    x.chunks(64 / size_of::<T>()).for_each(|line| prefetch(line.as_ptr()));
}

#[inline(always)]
#[allow(unsafe_code)]
fn ask<const NEAREST: bool, T>(x: *const T) {
    // SAFETY: SSE is part of x86-64, and a prefetch reads nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if NEAREST { _mm_prefetch::<_MM_HINT_T0>(x.cast()) } else { _mm_prefetch::<_MM_HINT_T1>(x.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// `a · b + c`, rounded once where that is one instruction.
#[inline(always)]
pub(super) fn fma<I: Isa>(a: f32, b: f32, c: f32) -> f32 {
    if I::FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Partial sums that a loop keeps, so that it does not wait for one addition to end before the next.
pub(super) const LANES: usize = 32;

/// The sum of partial sums, pairs first.
#[inline(always)]
pub(super) fn total<const N: usize>(mut lanes: [f32; N]) -> f32 {
    const { assert!(N.is_power_of_two()) };
    let mut n = N / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Those that the processor has and loops are compiled for.
    pub(crate) fn loops() -> impl Iterator<Item = Instructions> {
        Instructions::here().take_while(|set| *set != Instructions::Avx512Bf16 && *set != Instructions::Amx)
    }

    /// Runs `kernel` with the instructions of `set`.
    #[allow(unsafe_code)]
    pub(crate) fn run_on<K: Kernel>(set: Instructions, kernel: K) -> K::Output {
        assert!(set.are_here());
        // SAFETY: the processor has them, as was just seen.
        unsafe { run_with(set, kernel) }
    }
}
