//! `peft-cat`: PEFT's `cat`, `ΔW = Σ wₑsₑBₑAₑ` by stacking, weight and scale on A.

use crate::fuse::factors::Frame;
use crate::fuse::linear::{Linear, Pair};

/// `B = [B₁ … B_E]` as in the adapters' files, `A = [w₁s₁A₁; …; w_Es_EA_E]`, rank P.
pub fn pair(frame: &Frame) -> Pair {
    // The stack's B carries the scale; one of scale 0 is all zeros and has none to take off.
    let b: Vec<f64> = frame.scales.iter().map(|s| if *s == 0.0 { 1.0 } else { 1.0 / s }).collect();
    let a: Vec<f64> = frame.weights.iter().zip(&frame.scales).map(|(w, s)| w * s).collect();
    Pair { bt: Linear::scaled(frame.along_rank(&b)), a: Linear::scaled(frame.along_rank(&a)) }
}
