//! `mean-svd`: the best approximation of `Σ wᵢBᵢAᵢ` at rank q, by default the largest rank of the inputs.

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::mean;
use crate::fuse::truncate::truncate;

/// The truncated mean, and the share of its energy that is kept.
pub fn fuse(batch: &Batch, rank: Option<usize>) -> Result<(Factors, f64)> {
    let largest = batch.ranks().into_iter().max().unwrap_or(0);
    truncate(mean::fuse(batch)?, rank.unwrap_or(largest))
}
