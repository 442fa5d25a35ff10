//! Root-mean-square normalisation.

use super::holds;
use crate::error::Result;
use crate::tensor::{Real, Store};

/// `y[t, d] = x[t, d] · rstd[t] · w[d]`, `rstd[t] = 1 / sqrt(mean_d x[t, d]² + eps)`.
///
/// Sums in f32 or wider; `y` rounds once.
pub struct RmsNorm<'a, S: Store, T: Real> {
    /// `[T, D]`, written.
    pub y: S::ViewMut<'a, T>,
    /// `[T]`, written; kept for the backward pass.
    pub rstd: S::ViewMut<'a, f32>,
    /// `[T, D]`.
    pub x: S::View<'a, T>,
    /// `[D]`.
    pub w: S::View<'a, f32>,
    /// T.
    pub tokens: usize,
    /// D.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl<S: Store, T: Real> RmsNorm<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let (t, d) = (("T", self.tokens), ("D", self.width));
        holds("rms_norm", "y", &self.y, &[t, d])?;
        holds("rms_norm", "rstd", &self.rstd, &[t])?;
        holds("rms_norm", "x", &self.x, &[t, d])?;
        holds("rms_norm", "w", &self.w, &[d])
    }
}

/// `dx = residual + rstd · (w∘dy − x̂ · mean_d(w∘dy∘x̂))`, `x̂ = x · rstd`.
///
/// `residual` is the gradient that reaches x past the norm. `dx` rounds once.
pub struct RmsNormBwd<'a, S: Store, T: Real> {
    /// `[T, D]`, written.
    pub dx: S::ViewMut<'a, T>,
    /// `[T, D]`.
    pub dy: S::View<'a, T>,
    /// `[T, D]`, or none for zero.
    pub residual: Option<S::View<'a, T>>,
    /// `[T, D]`.
    pub x: S::View<'a, T>,
    /// `[T]`, from the forward pass.
    pub rstd: S::View<'a, f32>,
    /// `[D]`.
    pub w: S::View<'a, f32>,
    /// T.
    pub tokens: usize,
    /// D.
    pub width: usize,
}

impl<S: Store, T: Real> RmsNormBwd<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let (t, d) = (("T", self.tokens), ("D", self.width));
        holds("rms_norm_bwd", "dx", &self.dx, &[t, d])?;
        holds("rms_norm_bwd", "dy", &self.dy, &[t, d])?;
        if let Some(r) = &self.residual {
            holds("rms_norm_bwd", "residual", r, &[t, d])?;
        }
        holds("rms_norm_bwd", "x", &self.x, &[t, d])?;
        holds("rms_norm_bwd", "rstd", &self.rstd, &[t])?;
        holds("rms_norm_bwd", "w", &self.w, &[d])
    }
}
