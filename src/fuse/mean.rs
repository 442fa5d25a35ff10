//! `mean`: `ΔW = Σ wᵢBᵢAᵢ`, exact: the factors are stacked, the rank is their sum.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors, Rows};

/// `B = [w₁B₁ … w_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    stack(batch, &batch.frame.weights)
}

/// `B = [c₁B₁ … c_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn stack(batch: &Batch, c: &[f64]) -> Result<Factors> {
    let along = batch.frame.along_rank(c);
    let numbers = batch.stack.rows_bt().numbers();
    let mut bt = Vec::with_capacity(numbers.len());
    for column in numbers.chunks_exact(along.len()) {
        bt.extend(column.iter().zip(&along).map(|(b, c)| b * c));
    }
    Factors::new(Rows::new(bt, along.len()), batch.stack.rows_a().clone())
}
