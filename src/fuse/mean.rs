//! `mean`: `ΔW = Σ wᵢBᵢAᵢ`, exact: the factors are stacked, the rank is their sum.

use crate::algebra::scale_columns;
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};

/// `B = [w₁B₁ … w_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    stack(batch, &batch.frame.weights)
}

/// `B = [c₁B₁ … c_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn stack(batch: &Batch, c: &[f64]) -> Result<Factors> {
    let b = scale_columns(batch.stack.b(), &batch.frame.along_rank(c));
    Factors::new(b.transpose().to_owned(), batch.stack.a().to_owned())
}
