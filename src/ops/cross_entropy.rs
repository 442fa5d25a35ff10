//! The loss, over supervised rows only, with a frozen head.

use super::{dot, ensure, holds, holds_rows, narrow, wide};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Frozen, Real, Store};

/// `nll[n] = lse(x[rows[n]] Wᵀ) − x[rows[n]]·W[targets[n]]`, and
/// `dx[rows[n]] = weight · (softmax(x[rows[n]] Wᵀ) − e_target) W`; other rows of dx are zero.
///
/// Made over chunks of rows: logits of T × V never exist. Logits, softmax and sums in f32; under bf16 the gradient of
/// the logits rounds to bf16 before it meets W; dx rounds once.
pub struct CrossEntropy<'a, S: Store, T: Real> {
    /// `[n]`, written.
    pub nll: S::ViewMut<'a, f32>,
    /// `[T, D]`, written; none for the loss alone.
    pub dx: Option<S::ViewMut<'a, T>>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
    /// `[T, D]`, normalised hidden states.
    pub x: S::View<'a, T>,
    /// `W[V, D]`.
    pub head: &'a S::Matrix,
    /// `[n]`, ascending, each below T: the rows whose next token is supervised.
    pub rows: &'a [u32],
    /// `[n]`, each below V.
    pub targets: &'a [u32],
    /// T.
    pub tokens: usize,
    /// Multiplies the gradient: 1 / supervised tokens of the step.
    pub weight: f32,
}

impl<S: Store, T: Real> CrossEntropy<'_, S, T> {
    /// Compares the sizes; returns `(V, D)`.
    pub fn check(&self) -> Result<(usize, usize)> {
        const OP: &str = "cross_entropy";
        let (v, d) = self.head.size();
        let n = ("n", self.rows.len());
        holds_rows::<S>(OP, "x", &self.x, &[("T", self.tokens)], &[("D", d)])?;
        holds(OP, "nll", &self.nll, &[n])?;
        holds(OP, "targets", &self.targets, &[n])?;
        if let Some(dx) = &self.dx {
            holds_rows::<S>(OP, "dx", dx, &[("T", self.tokens)], &[("D", d)])?;
        }
        let ascending = self.rows.windows(2).all(|w| w[0] < w[1]);
        let inside = self.rows.last().is_none_or(|&r| (r as usize) < self.tokens);
        ensure(OP, ascending && inside, || format!("rows are not ascending within T = {}", self.tokens))?;
        ensure(OP, self.targets.iter().all(|&t| (t as usize) < v), || {
            format!("a target is not below V = {v}")
        })?;
        Ok((v, d))
    }
}

/// The definition of [`CrossEntropy`].
pub fn reference<T: Real>(op: CrossEntropy<'_, Host, T>) -> Result<()> {
    let (v, d) = op.check()?;
    let CrossEntropy { nll, mut dx, x, head, rows, targets, weight, .. } = op;
    let mut w = vec![0f32; v * d];
    head.rows::<T>(&mut w, 0..v);
    let w: Vec<f64> = w.into_iter().map(f64::from).collect();
    if let Some(dx) = &mut dx {
        dx.fill(T::zeroed());
    }
    for ((nll, &row), &target) in nll.iter_mut().zip(rows).zip(targets) {
        let (row, target) = (row as usize, target as usize);
        let x = wide(&x[row * d..][..d]);
        let logits: Vec<f64> =
            (0..v).map(|id| dot(x.iter().copied().zip(w[id * d..][..d].iter().copied()))).collect();
        let lse = log_sum_exp(&logits);
        *nll = (lse - logits[target]) as f32;
        let Some(dx) = &mut dx else { continue };
        let mut sums = vec![0f64; d];
        for (id, logit) in logits.iter().enumerate() {
            let hit = if id == target { 1.0 } else { 0.0 };
            let g = f64::from(weight) * ((logit - lse).exp() - hit);
            let g = f64::from(T::round(g as f32));
            sums.iter_mut().zip(&w[id * d..][..d]).for_each(|(sum, w)| *sum += g * w);
        }
        narrow(&mut dx[row * d..][..d], &sums);
    }
    Ok(())
}

/// `ln Σ eˣ`.
pub(super) fn log_sum_exp(x: &[f64]) -> f64 {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + x.iter().map(|x| (x - most).exp()).sum::<f64>().ln()
}
