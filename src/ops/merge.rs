//! Updates of adapters written into a weight.

use super::{ensure, exact, holds};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Real, Store};

/// Rows whose sums are one entry of [`Merge::sums`].
pub const ROWS: usize = 16;

/// One adapter's update of a weight, `scale B A`.
pub struct Update<'a, S: Store> {
    /// `A[R, I]`.
    pub a: S::View<'a, f32>,
    /// `B[O, R]`.
    pub b: S::View<'a, f32>,
    /// R; 0 is an update of nothing.
    pub rank: usize,
    /// s.
    pub scale: f32,
}

/// `w = round(w + Σᵤ f32(sᵤ Bᵤ) Aᵤ)`, rounded once to w's type, ties to even.
///
/// s B is rounded to f32; the products are exact and are summed in f64, updates in their order and each in the order of its
/// rank: every device gets the same bytes.
pub struct Merge<'a, S: Store, T: Real> {
    /// `[O, I]`, overwritten.
    pub w: S::ViewMut<'a, T>,
    /// `[⌈O / 16⌉, 2]`, written: of each sixteen rows `Σ (w' − w − update)²`, what rounding did, and `Σ update²`.
    pub sums: S::ViewMut<'a, f64>,
    /// At least one.
    pub updates: Vec<Update<'a, S>>,
    /// O.
    pub out: usize,
    /// I.
    pub inner: usize,
}

impl<S: Store, T: Real> Merge<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let (o, i) = (("O", self.out), ("I", self.inner));
        ensure("merge", !self.updates.is_empty(), || "no update, expected one or more".into())?;
        holds("merge", "w", &self.w, &[o, i])?;
        holds("merge", "sums", &self.sums, &[("O / 16", self.out.div_ceil(ROWS)), ("2", 2)])?;
        for update in &self.updates {
            let r = ("R", update.rank);
            holds("merge", "A", &update.a, &[r, i])?;
            holds("merge", "B", &update.b, &[o, r])?;
        }
        Ok(())
    }
}

/// The definition.
pub fn reference<T: Real>(op: Merge<'_, Host, T>) -> Result<()> {
    op.check()?;
    op.sums.fill(0.0);
    for o in 0..op.out {
        for i in 0..op.inner {
            let mut update = 0.0;
            for u in &op.updates {
                for r in 0..u.rank {
                    update += f64::from(u.scale * u.b[o * u.rank + r]) * f64::from(u.a[r * op.inner + i]);
                }
            }
            let w = &mut op.w[o * op.inner + i];
            let old = exact(w);
            *w = T::from_f64(old + update);
            op.sums[o / ROWS * 2] += (exact(w) - old - update).powi(2);
            op.sums[o / ROWS * 2 + 1] += update.powi(2);
        }
    }
    Ok(())
}
