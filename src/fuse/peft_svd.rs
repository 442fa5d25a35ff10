//! `peft-svd`: PEFT's `svd`, the best approximation of `Σ wₑDₑ` at rank q, by default the largest rank of the inputs.
//!
//! The same update as `mean-svd` in PEFT's form: `B = U S`, `A = Vᵀ`.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::mean;
use crate::fuse::truncate::Svd;

/// `B = U_q S_q`, `A = V_qᵀ`, and the share of the energy that is kept.
pub fn fuse(batch: &Batch, q: usize) -> Result<(Factors, f64)> {
    let svd = Svd::of(&mean::fuse(batch)?, q)?;
    let kept = svd.energy_kept;
    Ok((svd.factors(|s| (s, 1.0))?, kept))
}
