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
