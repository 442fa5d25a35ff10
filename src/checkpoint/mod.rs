//! Files: checkpoints, adapters, pruning plans, output folders.

pub mod bytes;
#[allow(clippy::module_inception)]
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod digest;
pub mod fields;
pub mod header;
pub mod json;
pub mod module;
mod pruned_config;
pub mod rope;
pub mod sizes;
pub mod weights;
pub mod writer;
