//! Files: checkpoints, adapters, pruning plans, output folders.

pub mod bytes;
pub mod convert;
pub mod digest;
pub mod header;
pub mod json;
pub mod module;
pub mod weights;
pub mod writer;
