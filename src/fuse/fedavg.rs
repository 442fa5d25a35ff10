//! `fedavg`: `ΔW = (Σ wᵢBᵢ)(Σ wᵢAᵢ)`, the paper's Eq. 20, with cross terms `wᵢwⱼBᵢAⱼ`.

use crate::fuse::factors::Frame;
use crate::fuse::linear::{Linear, Pair};

/// The averaged factors, `B[O, R]`, `A[R, I]`; the ranks must be equal.
pub fn pair(frame: &Frame) -> Pair {
    let mean = || Linear::sum(frame, &frame.weights);
    Pair { bt: mean(), a: mean() }
}
