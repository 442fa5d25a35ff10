//! `task-arithmetic`: `ΔW = λ Σ wᵢBᵢAᵢ`, the weights as they are given; with all of them 1 the exact sum.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::mean::stack;

/// The stacked factors, B times λ; rank P.
pub fn fuse(batch: &Batch, lambda: f64) -> Result<Factors> {
    let c: Vec<f64> = batch.frame.weights.iter().map(|w| lambda * w).collect();
    stack(batch, &c)
}
