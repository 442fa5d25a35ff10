//! Rotary position embedding.

use super::{ensure, holds, holds_rows};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Length, Real, Store};

/// Rotates each head in place: with `(a, b) = (x[k], x[k + K/2])` and row `r = rows[t]` of the tables,
/// `x[k] = a·cos[r, k] − b·sin[r, k]`, `x[k + K/2] = b·cos[r, k] + a·sin[r, k]`.
///
/// `inverse` applies the transpose, which is the backward pass. Tables are f32 and made on the host as transformers
/// makes them, attention factor included. Computed in f32, rounded once.
pub struct Rope<'a, S: Store, T: Real> {
    /// `[T, heads · K]`, changed in place.
    pub x: S::ViewMut<'a, T>,
    /// `[P, K/2]`.
    pub cos: S::View<'a, f32>,
    /// `[P, K/2]`.
    pub sin: S::View<'a, f32>,
    /// `[T]`: each token's row of the tables, below P.
    pub rows: &'a [u32],
    /// Heads in a row of x: H or G.
    pub heads: usize,
    /// K, even.
    pub head_dim: usize,
    /// Rotate back.
    pub inverse: bool,
}

impl<S: Store, T: Real> Rope<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let half = self.head_dim / 2;
        ensure("rope", self.head_dim.is_multiple_of(2) && half > 0, || {
            format!("head width K is {}, expected an even number", self.head_dim)
        })?;
        holds_rows::<S>(
            "rope",
            "x",
            &self.x,
            &[("T", self.rows.len())],
            &[("heads", self.heads), ("K", self.head_dim)],
        )?;
        let p = self.cos.len() / half;
        holds("rope", "cos", &self.cos, &[("P", p), ("K/2", half)])?;
        holds("rope", "sin", &self.sin, &[("P", p), ("K/2", half)])?;
        let over = self.rows.iter().position(|&r| r as usize >= p);
        ensure("rope", over.is_none(), || {
            let t = over.unwrap_or(0);
            format!("token {t} is at table row {}, expected a row below P = {p}", self.rows[t])
        })
    }
}

/// The definition in f64.
pub fn reference<T: Real>(op: Rope<'_, Host, T>) -> Result<()> {
    op.check()?;
    let half = op.head_dim / 2;
    for t in 0..op.rows.len() {
        for h in 0..op.heads {
            for k in 0..half {
                let low = (t * op.heads + h) * op.head_dim + k;
                let at = op.rows[t] as usize * half + k;
                let (a, b) = (f64::from(op.x[low].to_f32()), f64::from(op.x[low + half].to_f32()));
                let (cos, sin) = (f64::from(op.cos[at]), f64::from(op.sin[at]));
                let sin = if op.inverse { -sin } else { sin };
                op.x[low] = T::from_f32((a * cos - b * sin) as f32);
                op.x[low + half] = T::from_f32((b * cos + a * sin) as f32);
            }
        }
    }
    Ok(())
}
