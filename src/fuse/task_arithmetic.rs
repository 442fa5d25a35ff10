//! `task-arithmetic`: `ΔW = λ Σ wᵢBᵢAᵢ`, the weights as they are given; with all of them 1 the exact sum.

use crate::fuse::factors::Frame;
use crate::fuse::linear::Pair;
use crate::fuse::mean;

/// The stacked factors, B times λ; rank P.
pub fn pair(frame: &Frame, lambda: f64) -> Pair {
    let c: Vec<f64> = frame.weights.iter().map(|w| lambda * w).collect();
    mean::stack(frame, &c)
}
