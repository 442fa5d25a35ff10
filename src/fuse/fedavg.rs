//! `fedavg`: `ΔW = (Σ wᵢBᵢ)(Σ wᵢAᵢ)`, the paper's Eq. 20, with cross terms `wᵢwⱼBᵢAⱼ`.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};

/// The averaged factors, `B[O, R]`, `A[R, I]`; the ranks must be equal.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    Factors::new(batch.sum_bt(&batch.frame.weights), batch.sum_a(&batch.frame.weights))
}
