//! Loops compiled for what the processor at hand can do.
//!
//! The crate is built for the oldest processor of its architecture. A hot loop is a [`Kernel`]: plain Rust that the
//! compiler vectorises, built once per instruction set, of which [`run`] takes the widest that the processor has.
//! Results may therefore differ between processors, never between thread counts.

/// What a loop may want to know of the instructions that it is compiled for.
pub(crate) trait Isa {
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

#[cfg(target_arch = "x86_64")]
impl Isa for Avx512 {
    const FMA: bool = true;
    const WIDE: bool = true;
}
#[cfg(target_arch = "x86_64")]
impl Isa for Avx2 {
    const FMA: bool = true;
    const WIDE: bool = false;
}
impl Isa for Baseline {
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

/// Runs `kernel` with the widest instructions that the processor has.
#[inline]
#[allow(unsafe_code)]
pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has the features, as was just seen.
            return unsafe { avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the features, as was just seen.
            return unsafe { avx2(kernel) };
        }
    }
    kernel.run::<Baseline>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Asks for the line of the caches that `x` is in, wherever that is.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) fn prefetch<T>(x: *const T) {
    // SAFETY: SSE is part of x86-64, and a prefetch reads nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(x.cast());
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
pub(super) fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}

/// `Σ aᵢ bᵢ`.
#[inline(always)]
pub(super) fn dot<I: Isa>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a, b) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.0.iter().zip(b.0) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = fma::<I>(a, b, *lane);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a.1).zip(b.1) {
        *lane = fma::<I>(a, b, *lane);
    }
    total(lanes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::Isa;

    /// Fused multiply-adds, which a processor without them makes slowly.
    pub(crate) struct Fused;
    impl Isa for Fused {
        const FMA: bool = true;
        const WIDE: bool = false;
    }

    /// With wide registers too.
    pub(crate) struct Wide;
    impl Isa for Wide {
        const FMA: bool = true;
        const WIDE: bool = true;
    }
}
