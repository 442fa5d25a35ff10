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
    let parts = op.gate.par_chunks_mut(ELEMENTS).zip(op.up.par_chunks_mut(ELEMENTS));
    parts.zip(op.dh.par_chunks(ELEMENTS)).for_each(|((gate, up), dh)| simd::run(Backward { gate, up, dh }));
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
    gate: &'a mut [T],
    up: &'a mut [T],
    dh: &'a [T],
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for ((gate, up), dh) in self.gate.iter_mut().zip(self.up).zip(self.dh) {
            let (z, dh) = (gate.to_f32(), dh.to_f32());
            let sigma = 1.0 / (1.0 + exp::<I>(-z));
            *gate = T::from_f32(dh * up.to_f32() * (sigma * (1.0 + z * (1.0 - sigma))));
            *up = T::from_f32(dh * (z * sigma));
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cpu::tests::on_threads;
    use crate::ops::cases::swiglu::conforms;

    #[test]
    fn as_the_reference_in_f32() {
        conforms::<_, f32>(&on_threads());
    }

    #[test]
    fn as_the_reference_in_bf16() {
        conforms::<_, bf16>(&on_threads());
    }
}
