//! The optimizer, over one flat arena of all A and B.

use super::{ensure, holds};
use crate::error::Result;
use crate::tensor::{Length, Store};

/// AdamW with gradient clipping (Loshchilov and Hutter, as PyTorch computes it):
/// `g' = g · min(1, max_norm / (√norm_sq + 1e-6))`, `m = β₁m + (1−β₁)g'`, `v = β₂v + (1−β₂)g'²`,
/// `p = p(1 − lr·wd) − lr · (m / (1−β₁ᵏ)) / (√(v / (1−β₂ᵏ)) + eps)`. All in f32, the bias corrections in f64.
pub struct AdamW<'a, S: Store> {
    /// `[n]`, changed in place.
    pub params: S::ViewMut<'a, f32>,
    /// `[n]`, first moment, changed in place.
    pub m: S::ViewMut<'a, f32>,
    /// `[n]`, second moment, changed in place.
    pub v: S::ViewMut<'a, f32>,
    /// `[n]`.
    pub grads: S::View<'a, f32>,
    /// `[1]`: the squared norm of all gradients of the step.
    pub norm_sq: S::View<'a, f64>,
    /// Step size, weight decay and the rest.
    pub hyper: Hyper,
    /// k, counted from 1.
    pub step: u64,
}

/// The optimizer's constants of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Step size.
    pub lr: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Norm above which gradients are scaled down; 0 turns clipping off.
    pub max_norm: f64,
}

impl<S: Store> AdamW<'_, S> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let n = [("n", self.params.len())];
        holds("adamw", "m", &self.m, &n)?;
        holds("adamw", "v", &self.v, &n)?;
        holds("adamw", "grads", &self.grads, &n)?;
        holds("adamw", "norm_sq", &self.norm_sq, &[("1", 1)])?;
        ensure("adamw", self.step > 0, || "step is 0, expected to count from 1".into())
    }
}
