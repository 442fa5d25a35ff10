//! `mean`: `ΔW = Σ wᵢBᵢAᵢ`, exact: the factors are stacked, the rank is their sum.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};

/// `B = [w₁B₁ … w_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    stack(batch, &batch.frame.weights)
}

/// `B = [c₁B₁ … c_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn stack(batch: &Batch, c: &[f64]) -> Result<Factors> {
    let along = batch.frame.along_rank(c);
    let mut bt = batch.stack.rows_bt().clone();
    for column in bt.numbers_mut().chunks_exact_mut(along.len()) {
        column.iter_mut().zip(&along).for_each(|(b, c)| *b *= c);
    }
    Factors::new(bt, batch.stack.rows_a().clone())
}
