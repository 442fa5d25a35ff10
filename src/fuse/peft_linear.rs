//! `peft-linear`: PEFT's `linear`, `ΔW = (Σ √|wₑsₑ| Bₑ)(Σ sgn(wₑsₑ) √|wₑsₑ| Aₑ)`, cross terms included.
//!
//! With weights 1/E of equal scales it is E times `fedavg`: the square root of a mean's weight is on each factor.

use crate::fuse::factors::Frame;
use crate::fuse::linear::{Linear, Pair};

/// `B[O, R]`, `A[R, I]`; the ranks must be equal. B and s are those of the adapters' files.
pub fn pair(frame: &Frame) -> Pair {
    let both = || frame.weights.iter().zip(&frame.scales);
    let a: Vec<f64> = both().map(|(w, s)| (w * s).signum() * (w * s).abs().sqrt()).collect();
    // The stack's B carries the scale; one of scale 0 is all zeros and stays so.
    let b: Vec<f64> = both().map(|(w, s)| if *s == 0.0 { 0.0 } else { (w * s).abs().sqrt() / s }).collect();
    Pair { bt: Linear::sum(frame, &b), a: Linear::sum(frame, &a) }
}
