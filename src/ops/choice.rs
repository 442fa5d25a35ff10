//! Log-probabilities of chosen tokens.

use super::cross_entropy::log_sum_exp;
use super::{dot, ensure, holds, holds_rows, wide};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Frozen, Real, Store};

/// `out[n] = x[rows[n]]·W[tokens[n]] − lse(x[rows[n]] Wᵀ)`; a row may be asked for several tokens.
///
/// The log-sum-exp is over all of V, made in chunks; logits and sums in f32.
pub struct Choice<'a, S: Store, T: Real> {
    /// `[n]`, written.
    pub out: S::ViewMut<'a, f32>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
    /// `[T, D]`, normalised hidden states.
    pub x: S::View<'a, T>,
    /// `W[V, D]`.
    pub head: &'a S::Matrix,
    /// `[n]`, not descending, each below T.
    pub rows: &'a [u32],
    /// `[n]`, each below V.
    pub ids: &'a [u32],
    /// T.
    pub tokens: usize,
}

impl<S: Store, T: Real> Choice<'_, S, T> {
    /// Compares the sizes; returns `(V, D)`.
    pub fn check(&self) -> Result<(usize, usize)> {
        const OP: &str = "choice";
        let (v, d) = self.head.size();
        let n = ("n", self.rows.len());
        holds_rows::<S>(OP, "x", &self.x, &[("T", self.tokens)], &[("D", d)])?;
        holds(OP, "out", &self.out, &[n])?;
        holds(OP, "ids", &self.ids, &[n])?;
        let ascending = self.rows.windows(2).all(|w| w[0] <= w[1]);
        let inside = self.rows.last().is_none_or(|&r| (r as usize) < self.tokens);
        ensure(OP, ascending && inside, || format!("rows are not ascending within T = {}", self.tokens))?;
        ensure(OP, self.ids.iter().all(|&t| (t as usize) < v), || format!("an id is not below V = {v}"))?;
        Ok((v, d))
    }
}

/// The definition of [`Choice`].
pub fn reference<T: Real>(op: Choice<'_, Host, T>) -> Result<()> {
    let (v, d) = op.check()?;
    let mut w = vec![0f32; v * d];
    op.head.rows::<T>(&mut w, 0..v);
    for ((out, &row), &id) in op.out.iter_mut().zip(op.rows).zip(op.ids) {
        let x = wide(&op.x[row as usize * d..][..d]);
        let logit = |w: &[f32]| dot(x.iter().copied().zip(w.iter().map(|&w| f64::from(w))));
        let logits: Vec<f64> = w.chunks(d.max(1)).map(logit).collect();
        *out = (logits[id as usize] - log_sum_exp(&logits)) as f32;
    }
    Ok(())
}
