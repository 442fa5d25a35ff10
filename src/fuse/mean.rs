//! `mean`: `ΔW = Σ wᵢBᵢAᵢ`, exact: the factors are stacked, the rank is their sum.

use faer::Mat;

use crate::error::Result;
use crate::fuse::compare::Maps;
use crate::fuse::factors::{Batch, Factors, Frame, Rows};

/// `B = [w₁B₁ … w_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    stack(batch, &batch.frame.weights)
}

/// What [`stack`] does to the factors, as maps.
pub fn maps(frame: &Frame, c: &[f64]) -> Maps {
    let along = frame.along_rank(c);
    let mut left = Mat::zeros(along.len(), along.len());
    along.iter().enumerate().for_each(|(k, c)| left[(k, k)] = *c);
    Maps { left: Some(left), right: None }
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
