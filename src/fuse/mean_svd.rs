//! `mean-svd`: the best approximation of `Σ wᵢBᵢAᵢ` at rank q, by default the largest rank of the inputs.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::mean;
use crate::fuse::truncate::truncate;

/// q where none is asked for.
pub fn default_rank(frame: &Frame) -> usize {
    frame.ranks().into_iter().max().unwrap_or(0)
}

/// The mean truncated to rank q, and the share of its energy that is kept.
pub fn fuse(batch: &Batch, q: usize) -> Result<(Factors, f64)> {
    truncate(mean::fuse(batch)?, q)
}
