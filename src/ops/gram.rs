//! Gram matrices of the stacked factors of adapters.

use super::{ensure, holds};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::Store;

/// One factor of all adapters of a module: n rows of P numbers, `[B₁ … B_E]` or `[A₁; …; A_E]ᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    /// n: O or I.
    pub rows: usize,
    /// P.
    pub rank: usize,
}

impl Stack {
    /// Numbers of all `stacks`, `Σ n P`; the largest number where that is larger than any memory.
    pub fn numbers(stacks: &[Stack]) -> usize {
        stacks.iter().fold(0, |sum: usize, s| sum.saturating_add(s.rows.saturating_mul(s.rank)))
    }

    /// Numbers of a square matrix for each of `stacks`, `Σ P²`; saturating as [`Stack::numbers`] is.
    pub fn squares(stacks: &[Stack]) -> usize {
        stacks.iter().fold(0, |sum: usize, s| sum.saturating_add(s.rank.saturating_mul(s.rank)))
    }
}

/// `out = xᵀ x` of each stack, exactly symmetric; sums in f64.
pub struct Gram<'a, S: Store> {
    /// `[P, P]` of each stack, written.
    pub out: S::ViewMut<'a, f64>,
    /// `[n, P]` of each stack.
    pub x: S::View<'a, f64>,
    /// One after the other in both.
    pub stacks: &'a [Stack],
}

impl<S: Store> Gram<'_, S> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        check_ranks("gram", self.stacks)?;
        holds("gram", "out", &self.out, &[("Σ P²", Stack::squares(self.stacks))])?;
        holds("gram", "x", &self.x, &[("Σ n P", Stack::numbers(self.stacks))])
    }
}

/// Fails unless every stack has a column.
pub(super) fn check_ranks(op: &'static str, stacks: &[Stack]) -> Result<()> {
    let empty = stacks.iter().position(|s| s.rank == 0);
    ensure(op, empty.is_none(), || format!("stack {} has rank 0", empty.unwrap_or(0)))
}

/// The definition.
pub fn reference(op: Gram<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut out, mut x) = (op.out, op.x);
    for stack in op.stacks {
        let p = stack.rank;
        for i in 0..p {
            for j in 0..p {
                out[i * p + j] = (0..stack.rows).map(|n| x[n * p + i] * x[n * p + j]).sum();
            }
        }
        (out, x) = (&mut out[p * p..], &x[stack.rows * p..]);
    }
    Ok(())
}
