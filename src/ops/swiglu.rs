//! The gated activation of the MLP.

use super::holds;
use crate::error::Result;
use crate::tensor::{Length, Real, Store};

/// `h = silu(gate) ∘ up`, `silu(z) = z / (1 + e^−z)`. Computed in f32, rounded once.
pub struct SwiGlu<'a, S: Store, T: Real> {
    /// `[T, F]`, written.
    pub h: S::ViewMut<'a, T>,
    /// `[T, F]`.
    pub gate: S::View<'a, T>,
    /// `[T, F]`.
    pub up: S::View<'a, T>,
}

impl<S: Store, T: Real> SwiGlu<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let n = ("T·F", self.h.len());
        holds("swiglu", "gate", &self.gate, &[n])?;
        holds("swiglu", "up", &self.up, &[n])
    }
}

/// `dgate = dh ∘ up ∘ σ(gate)(1 + gate(1 − σ(gate)))`, `dup = dh ∘ silu(gate)`; each rounded once.
pub struct SwiGluBwd<'a, S: Store, T: Real> {
    /// `[T, F]`, written.
    pub dgate: S::ViewMut<'a, T>,
    /// `[T, F]`, written.
    pub dup: S::ViewMut<'a, T>,
    /// `[T, F]`.
    pub dh: S::View<'a, T>,
    /// `[T, F]`.
    pub gate: S::View<'a, T>,
    /// `[T, F]`.
    pub up: S::View<'a, T>,
}

impl<S: Store, T: Real> SwiGluBwd<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let n = ("T·F", self.dh.len());
        holds("swiglu_bwd", "dgate", &self.dgate, &[n])?;
        holds("swiglu_bwd", "dup", &self.dup, &[n])?;
        holds("swiglu_bwd", "gate", &self.gate, &[n])?;
        holds("swiglu_bwd", "up", &self.up, &[n])
    }
}
