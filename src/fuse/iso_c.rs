//! `iso-c`: Iso-C (Marczak et al., *No Task Left Behind*, ICML 2025) on the directions that the sum has.
//!
//! `Σ wₑDₑ = U S Vᵀ` with R singular values that are not zero; `ΔW = λ (Σ S / R) U Vᵀ`. The dense method averages S
//! over `min(O, I)` values, nearly all of them zero for adapters, and gives that mean to null directions too, whose
//! vectors are arbitrary; neither is done here.

use crate::error::Result;
use crate::fuse::core::{Core, balanced};
use crate::fuse::factors::Frame;
use crate::fuse::grams::Grams;
use crate::fuse::linear::Pair;

/// What makes the factors `B[O, R]`, `A[R, I]`, R at most `min(P, O, I)`.
pub fn pair(frame: &Frame, grams: &Grams, lambda: f64) -> Result<Pair> {
    let c = frame.along_rank(&frame.weights);
    let core = Core::of(grams.b.as_ref(), grams.a.as_ref(), &c)?;
    let r = core.sigma.len();
    let mean = core.sigma.iter().sum::<f64>() / r.max(1) as f64;
    Ok(balanced(core.left.as_ref(), &vec![lambda * mean; r], core.right.as_ref()))
}
