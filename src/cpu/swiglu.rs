//! The gated activation of the MLP, on the calling thread: [`crate::ops::linear::Epilogue::SwiGlu`] and
//! [`crate::ops::linear::Below::SwiGlu`].
//!
//! Results are made as f32, a piece of a row at a time, and then rounded by the instruction for it, where there is one.

use super::exp::exp;
use super::operand::narrow;
use super::simd::{self, Isa, Kernel};
use crate::tensor::Real;

/// Numbers of a piece: a few of them stay in the first-level cache.
const PIECE: usize = 256;

/// Room for the pieces of a few rows, one after another.
pub(super) struct Gate<T> {
    wide: [[f32; PIECE]; 3],
    rounded: [T; PIECE],
}

impl<T: Real> Gate<T> {
    pub(super) fn new() -> Gate<T> {
        Gate { wide: [[0.0; PIECE]; 3], rounded: [T::zeroed(); PIECE] }
    }

    /// `h = silu(gate) ∘ up`, of slices of one length.
    pub(super) fn forward(&mut self, h: &mut [T], gate: &[T], up: &[T]) {
        for ((h, gate), up) in h.chunks_mut(PIECE).zip(gate.chunks(PIECE)).zip(up.chunks(PIECE)) {
            let wide = &mut self.wide[0][..h.len()];
            simd::run(Forward { h: wide, gate, up });
            narrow(h, wide);
        }
    }

    /// `h` again, and of its gradient `dh`, which rounds to `T`, those of gate and up where these lie.
    pub(super) fn backward(&mut self, h: &mut [T], gate: &mut [T], up: &mut [T], dh: &[f32]) {
        let gates = gate.chunks_mut(PIECE).zip(up.chunks_mut(PIECE));
        for ((h, (gate, up)), dh) in h.chunks_mut(PIECE).zip(gates).zip(dh.chunks(PIECE)) {
            let rounded = &mut self.rounded[..dh.len()];
            narrow(rounded, dh);
            let [of_h, dgate, dup] = self.wide.each_mut().map(|wide| &mut wide[..dh.len()]);
            simd::run(Backward { h: of_h, dgate, dup, gate, up, dh: rounded });
            narrow(h, of_h);
            narrow(gate, dgate);
            narrow(up, dup);
        }
    }
}

/// `z σ(z)` and `σ(z)`.
#[inline(always)]
fn silu<I: Isa>(z: f32) -> (f32, f32) {
    let sigma = 1.0 / (1.0 + exp::<I>(-z));
    (z * sigma, sigma)
}

struct Forward<'a, T> {
    h: &'a mut [f32],
    gate: &'a [T],
    up: &'a [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for ((h, gate), up) in self.h.iter_mut().zip(self.gate).zip(self.up) {
            *h = silu::<I>(gate.to_f32()).0 * up.to_f32();
        }
    }
}

struct Backward<'a, T> {
    h: &'a mut [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
    gate: &'a [T],
    up: &'a [T],
    dh: &'a [T],
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let outs = self.h.iter_mut().zip(self.dgate).zip(self.dup);
        for (((h, dgate), dup), ((gate, up), dh)) in outs.zip(self.gate.iter().zip(self.up).zip(self.dh)) {
            let (z, y, dh) = (gate.to_f32(), up.to_f32(), dh.to_f32());
            let (silu, sigma) = silu::<I>(z);
            *h = silu * y;
            *dgate = dh * y * (sigma * (1.0 + z * (1.0 - sigma)));
            *dup = dh * silu;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::normal;

    #[test]
    fn a_row_in_pieces_is_as_its_pieces() {
        let n = 2 * PIECE + 7;
        let [z, u, dh] = [1, 2, 3].map(|seed| normal::<f32>(seed, n, 2.0));
        let run = |step: usize| {
            let (mut h, mut again, mut gate, mut up) = (z.clone(), z.clone(), z.clone(), u.clone());
            for at in (0..n).step_by(step) {
                let some = at..(at + step).min(n);
                let mut room = Gate::new();
                room.forward(&mut h[some.clone()], &gate[some.clone()], &up[some.clone()]);
                let (gate, up) = (&mut gate[some.clone()], &mut up[some.clone()]);
                room.backward(&mut again[some.clone()], gate, up, &dh[some]);
            }
            assert!(h == again);
            [h, gate, up]
        };
        assert!(run(n) == run(31));
    }
}
