//! Rows of the embedding table.

use super::{ensure, holds_rows};
use crate::error::Result;
use crate::host::{Elements, Host};
use crate::tensor::{Frozen, Real, Store};

/// `y[t] = E[ids[t]]`, rounded once to `T`.
pub struct Embed<'a, S: Store, T: Real> {
    /// `[T, D]`, written.
    pub y: S::ViewMut<'a, T>,
    /// `E[V, D]`.
    pub table: &'a S::Matrix,
    /// `[T]`, each below V.
    pub ids: &'a [u32],
}

impl<S: Store, T: Real> Embed<'_, S, T> {
    /// Compares the sizes; returns `(T, D)`.
    pub fn check(&self) -> Result<(usize, usize)> {
        let (v, d) = self.table.size();
        holds_rows::<S>("embed", "y", &self.y, &[("T", self.ids.len())], &[("D", d)])?;
        let over = self.ids.iter().position(|&i| i as usize >= v);
        ensure("embed", over.is_none(), || {
            let t = over.unwrap_or(0);
            format!("token {t} has id {}, expected an id below V = {v}", self.ids[t])
        })?;
        Ok((self.ids.len(), d))
    }
}

/// The definition: element by element.
pub fn reference<T: Real>(op: Embed<'_, Host, T>) -> Result<()> {
    let (tokens, d) = op.check()?;
    for t in 0..tokens {
        for k in 0..d {
            let at = op.ids[t] as usize * d + k;
            op.y[t * d + k] = T::from_f32(match op.table.elements() {
                Elements::BF16(e) => e[at].to_f32(),
                Elements::F16(e) => e[at].to_f32(),
                Elements::F32(e) => e[at],
            });
        }
    }
    Ok(())
}
