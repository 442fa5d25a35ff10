//! The optimizer, over one flat arena of all A and B.

use super::{ensure, holds};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Length, Store};

/// AdamW with gradient clipping (Loshchilov and Hutter):
/// `g' = g · min(1, max_norm / (√norm_sq + 1e-6))`, `m = β₁m + (1−β₁)g'`, `v = β₂v + (1−β₂)g'²`,
/// `p = p(1 − lr·wd) − lr · (m / (1−β₁ᵏ)) / (√(v / (1−β₂ᵏ)) + eps)`.
///
/// Elements in f32, in PyTorch's order: `m += (1−β₁)(g' − m)` and `v = β₂v + (1−β₂)g'·g'` with the last product and the
/// sum fused where the device can, `p = p·(1 − lr·wd) + (−lr/(1−β₁ᵏ) · m) / (√v / √(1−β₂ᵏ) + eps)`. The factors that
/// all elements share are computed in f64 and rounded once ([`Hyper::factors`]).
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

impl Hyper {
    /// What all elements share at step `step` of a gradient whose squared norm is `norm_sq`.
    pub fn factors(&self, step: u64, norm_sq: f64) -> Factors {
        let clip = match self.max_norm {
            0.0 => 1.0,
            max => (max / (norm_sq.sqrt() + 1e-6)).clamp(0.0, 1.0),
        };
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Factors {
            clip: clip as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            new1: (1.0 - self.beta1) as f32,
            old2: self.beta2 as f32,
            new2: (1.0 - self.beta2) as f32,
            step: (-self.lr / correction(self.beta1)) as f32,
            root: correction(self.beta2).sqrt() as f32,
            eps: self.eps as f32,
        }
    }
}

/// What all elements of one step share, rounded to f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// Multiplies the gradient.
    pub clip: f32,
    /// `1 − lr·wd`.
    pub decay: f32,
    /// `1 − β₁`.
    pub new1: f32,
    /// `β₂`.
    pub old2: f32,
    /// `1 − β₂`.
    pub new2: f32,
    /// `−lr / (1 − β₁ᵏ)`.
    pub step: f32,
    /// `√(1 − β₂ᵏ)`.
    pub root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
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

/// The definition in f64, with the shared factors exact; rounds once at the end.
pub fn reference(op: AdamW<'_, Host>) -> Result<()> {
    op.check()?;
    let h = op.hyper;
    let norm = op.norm_sq[0].sqrt();
    let clip = if h.max_norm == 0.0 { 1.0 } else { (h.max_norm / (norm + 1e-6)).min(1.0) };
    let correct1 = 1.0 - h.beta1.powf(op.step as f64);
    let correct2 = 1.0 - h.beta2.powf(op.step as f64);
    for i in 0..op.params.len() {
        let g = f64::from(op.grads[i]) * clip;
        let m = h.beta1 * f64::from(op.m[i]) + (1.0 - h.beta1) * g;
        let v = h.beta2 * f64::from(op.v[i]) + (1.0 - h.beta2) * g * g;
        let step = h.lr * (m / correct1) / ((v / correct2).sqrt() + h.eps);
        op.params[i] = (f64::from(op.params[i]) * (1.0 - h.lr * h.weight_decay) - step) as f32;
        (op.m[i], op.v[i]) = (m as f32, v as f32);
    }
    Ok(())
}
