//! See [`crate::ops::swiglu`].

use rayon::prelude::*;

use super::exp::exp;
use super::parts::ELEMENTS;
use super::simd::{self, Isa, Kernel};
use crate::error::Result;
use crate::host::Host;
use crate::ops::swiglu::{SwiGlu, SwiGluBwd};
use crate::tensor::Real;

pub fn swiglu<T: Real>(op: SwiGlu<'_, Host, T>) -> Result<()> {
    op.check()?;
    let parts = op.gate.par_chunks(ELEMENTS).zip(op.up.par_chunks(ELEMENTS));
    op.h.par_chunks_mut(ELEMENTS).zip(parts).for_each(|(h, (gate, up))| gated(h, gate, up));
    Ok(())
}

/// `h = silu(gate) ∘ up` on the calling thread, for slices of one length.
pub(super) fn gated<T: Real>(h: &mut [T], gate: &[T], up: &[T]) {
    simd::run(Forward { h, gate, up });
}

pub fn swiglu_bwd<T: Real>(op: SwiGluBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    let inputs = op.dh.par_chunks(ELEMENTS).zip(op.gate.par_chunks(ELEMENTS)).zip(op.up.par_chunks(ELEMENTS));
    op.dgate
        .par_chunks_mut(ELEMENTS)
        .zip(op.dup.par_chunks_mut(ELEMENTS))
        .zip(inputs)
        .for_each(|((dgate, dup), ((dh, gate), up))| simd::run(Backward { dgate, dup, dh, gate, up }));
    Ok(())
}

struct Forward<'a, T> {
    h: &'a mut [T],
    gate: &'a [T],
    up: &'a [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for ((h, gate), up) in self.h.iter_mut().zip(self.gate).zip(self.up) {
            let z = gate.to_f32();
            *h = T::from_f32(z / (1.0 + exp::<I>(-z)) * up.to_f32());
        }
    }
}

struct Backward<'a, T> {
    dgate: &'a mut [T],
    dup: &'a mut [T],
    dh: &'a [T],
    gate: &'a [T],
    up: &'a [T],
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let inputs = self.dh.iter().zip(self.gate).zip(self.up);
        for ((dgate, dup), ((dh, gate), up)) in self.dgate.iter_mut().zip(self.dup).zip(inputs) {
            let (z, dh) = (gate.to_f32(), dh.to_f32());
            let sigma = 1.0 / (1.0 + exp::<I>(-z));
            *dup = T::from_f32(dh * (z * sigma));
            *dgate = T::from_f32(dh * up.to_f32() * (sigma * (1.0 + z * (1.0 - sigma))));
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ops::cases::{assert_close, normal, rounding, same_on_threads, unwritten};
    use crate::ops::swiglu::{reference, reference_bwd};

    fn check<T: Real>() {
        for n in [1, 13, ELEMENTS - 1, ELEMENTS, ELEMENTS + 1, 3 * ELEMENTS + 5] {
            let [mut gate, up, dh] = [1, 2, 3].map(|seed| normal::<T>(seed, n, 3.0));
            let far = [-200.0, 200.0, -95.0, 95.0, -88.0, 0.0];
            gate.iter_mut().skip(1).zip(far).for_each(|(gate, x)| *gate = T::from_f32(x));
            let relative = 2.0 * rounding::<T>() + 5e-7;

            let forward = |f: fn(SwiGlu<'_, Host, T>) -> Result<()>| {
                let mut h = unwritten::<T>(n);
                f(SwiGlu { h: h.out(), gate: &gate, up: &up }).expect("h");
                h.done()
            };
            let h = same_on_threads(|| forward(swiglu));
            assert_close("h", &h, &forward(reference), relative, 1e-37);

            let backward = |f: fn(SwiGluBwd<'_, Host, T>) -> Result<()>| {
                let (mut dgate, mut dup) = (unwritten::<T>(n), unwritten::<T>(n));
                let (dgate_out, dup_out) = (dgate.out(), dup.out());
                f(SwiGluBwd { dgate: dgate_out, dup: dup_out, dh: &dh, gate: &gate, up: &up })
                    .expect("dgate");
                (dgate.done(), dup.done())
            };
            let (dgate, dup) = same_on_threads(|| backward(swiglu_bwd));
            let (dgate_want, dup_want) = backward(reference_bwd);
            // 1 − σ and 1 + z(1 − σ) cancel, so the error is one of the factors', not of the result.
            assert_close("dgate", &dgate, &dgate_want, relative, 1e-5);
            assert_close("dup", &dup, &dup_want, relative, 1e-37);
        }
    }

    #[test]
    fn as_the_reference_in_f32() {
        check::<f32>();
    }

    #[test]
    fn as_the_reference_in_bf16() {
        check::<bf16>();
    }
}
