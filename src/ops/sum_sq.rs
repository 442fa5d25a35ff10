//! The squared norm of a gradient.

use super::holds;
use crate::error::Result;
use crate::host::Host;
use crate::tensor::Store;

/// `out[0] = Σ x²` in f64, in a fixed order.
pub struct SumSq<'a, S: Store> {
    /// `[1]`, written.
    pub out: S::ViewMut<'a, f64>,
    /// `[n]`.
    pub x: S::View<'a, f32>,
}

impl<S: Store> SumSq<'_, S> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        holds("sum_sq", "out", &self.out, &[("1", 1)])
    }
}

/// The definition: one sum from the first element to the last.
pub fn reference(op: SumSq<'_, Host>) -> Result<()> {
    op.check()?;
    op.out[0] = op.x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    Ok(())
}
