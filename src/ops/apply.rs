//! New factors of adapters from the old ones: a small map on the rank side of each stack.

use super::gram::{Stack, check_ranks};
use super::holds;
use crate::error::Result;
use crate::host::Host;
use crate::tensor::Store;

/// `out = x w` of each stack; sums in f64.
pub struct Apply<'a, S: Store> {
    /// `[n, P]` of each stack, written.
    pub out: S::ViewMut<'a, f64>,
    /// `[n, P]` of each stack.
    pub x: S::View<'a, f64>,
    /// `[P, P]` of each stack.
    pub w: S::View<'a, f64>,
    /// One after the other in all three.
    pub stacks: &'a [Stack],
}

impl<S: Store> Apply<'_, S> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        check_ranks("apply", self.stacks)?;
        let (numbers, squares) = (Stack::numbers(self.stacks), Stack::squares(self.stacks));
        holds("apply", "out", &self.out, &[("Σ n P", numbers)])?;
        holds("apply", "x", &self.x, &[("Σ n P", numbers)])?;
        holds("apply", "w", &self.w, &[("Σ P²", squares)])
    }
}

/// The definition.
pub fn reference(op: Apply<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut out, mut x, mut w) = (op.out, op.x, op.w);
    for stack in op.stacks {
        let p = stack.rank;
        for n in 0..stack.rows {
            for j in 0..p {
                out[n * p + j] = (0..p).map(|k| x[n * p + k] * w[k * p + j]).sum();
            }
        }
        (out, x, w) = (&mut out[stack.rows * p..], &x[stack.rows * p..], &w[p * p..]);
    }
    Ok(())
}
