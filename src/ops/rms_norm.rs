//! Root-mean-square normalisation.

use super::{holds, holds_rows, narrow, wide};
use crate::error::Result;
use crate::host::Host;
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
        holds_rows::<S>("rms_norm", "y", &self.y, &[t], &[d])?;
        holds("rms_norm", "rstd", &self.rstd, &[t])?;
        holds_rows::<S>("rms_norm", "x", &self.x, &[t], &[d])?;
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
        holds_rows::<S>("rms_norm_bwd", "dx", &self.dx, &[t], &[d])?;
        holds_rows::<S>("rms_norm_bwd", "dy", &self.dy, &[t], &[d])?;
        if let Some(r) = &self.residual {
            holds_rows::<S>("rms_norm_bwd", "residual", r, &[t], &[d])?;
        }
        holds_rows::<S>("rms_norm_bwd", "x", &self.x, &[t], &[d])?;
        holds("rms_norm_bwd", "rstd", &self.rstd, &[t])?;
        holds("rms_norm_bwd", "w", &self.w, &[d])
    }
}

/// The definition in f64.
pub fn reference<T: Real>(op: RmsNorm<'_, Host, T>) -> Result<()> {
    op.check()?;
    let (d, w) = (op.width, wide(op.w));
    for t in 0..op.tokens {
        let at = t * d..(t + 1) * d;
        let (y, rstd) = row(&wide(&op.x[at.clone()]), &w, f64::from(op.eps));
        op.rstd[t] = rstd as f32;
        narrow(&mut op.y[at], &y);
    }
    Ok(())
}

fn row(x: &[f64], w: &[f64], eps: f64) -> (Vec<f64>, f64) {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let rstd = 1.0 / (mean + eps).sqrt();
    (x.iter().zip(w).map(|(x, w)| x * rstd * w).collect(), rstd)
}

/// The definition in f64.
pub fn reference_bwd<T: Real>(op: RmsNormBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    let (d, w) = (op.width, wide(op.w));
    for t in 0..op.tokens {
        let at = t * d..(t + 1) * d;
        let (dy, x, rstd) = (wide(&op.dy[at.clone()]), wide(&op.x[at.clone()]), f64::from(op.rstd[t]));
        let mean = (0..d).map(|k| w[k] * dy[k] * x[k] * rstd).sum::<f64>() / d as f64;
        let past = op.residual.map_or(vec![0.0; d], |r| wide(&r[at.clone()]));
        let dx: Vec<f64> = (0..d).map(|k| past[k] + rstd * (w[k] * dy[k] - x[k] * rstd * mean)).collect();
        narrow(&mut op.dx[at], &dx);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{differences, normal};

    #[test]
    fn backward_is_the_derivative() -> Result<()> {
        for width in [1, 7, 64] {
            let (x, w) = (normal::<f32>(1, width, 1.0), normal::<f32>(2, width, 1.0));
            let (dy, residual) = (normal::<f32>(3, width, 1.0), normal::<f32>(4, width, 1.0));
            let eps = 1e-5;
            let (_, rstd) = row(&wide(&x), &wide(&w), eps);
            let mut dx = vec![f32::NAN; width];
            reference_bwd::<f32>(RmsNormBwd {
                dx: &mut dx,
                dy: &dy,
                residual: Some(&residual),
                x: &x,
                rstd: &[rstd as f32],
                w: &w,
                tokens: 1,
                width,
            })?;
            let slope = differences(&wide(&x), |x| {
                let (y, _) = row(x, &wide(&w), eps);
                y.iter().zip(&dy).map(|(y, dy)| y * f64::from(*dy)).sum()
            });
            for k in 0..width {
                let want = slope[k] + f64::from(residual[k]);
                assert!((f64::from(dx[k]) - want).abs() <= 1e-5, "width {width}, {k}: {} {want}", dx[k]);
            }
        }
        Ok(())
    }
}
