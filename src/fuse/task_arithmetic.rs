//! `task-arithmetic`: `ΔW = λ Σ wᵢBᵢAᵢ`, the weights as they are given; with all of them 1 the exact sum.

use crate::error::Result;
use crate::fuse::compare::Maps;
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::mean;

/// The stacked factors, B times λ; rank P.
pub fn fuse(batch: &Batch, lambda: f64) -> Result<Factors> {
    mean::stack(batch, &scaled(&batch.frame, lambda))
}

/// What [`fuse`] does to the factors, as maps.
pub fn maps(frame: &Frame, lambda: f64) -> Maps {
    mean::maps(frame, &scaled(frame, lambda))
}

fn scaled(frame: &Frame, lambda: f64) -> Vec<f64> {
    frame.weights.iter().map(|w| lambda * w).collect()
}
