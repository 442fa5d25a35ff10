//! `mean`: `ΔW = Σ wᵢBᵢAᵢ`, exact: the factors are stacked, the rank is their sum.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::linear::{Linear, Pair};

/// `B = [w₁B₁ … w_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn pair(frame: &Frame) -> Pair {
    stack(frame, &frame.weights)
}

/// `B = [c₁B₁ … c_EB_E]`, `A = [A₁; …; A_E]`, rank P.
pub fn stack(frame: &Frame, c: &[f64]) -> Pair {
    Pair { bt: Linear::scaled(frame.along_rank(c)), a: Linear::Same }
}

/// The mean's factors.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    pair(&batch.frame).factors(batch, batch)
}
