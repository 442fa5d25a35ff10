//! Files: checkpoints, adapters, pruning plans, output folders.

pub mod adapter;
pub mod adapter_config;
pub mod adapter_writer;
pub mod bytes;
#[allow(clippy::module_inception)]
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod digest;
pub mod factor;
pub mod fields;
pub mod gguf;
pub mod header;
pub mod input_grams;
pub mod json;
pub mod keys;
pub mod manifest;
pub mod module;
pub mod output;
pub mod output_file;
pub mod place;
pub mod provenance;
mod pruned_config;
pub mod pruning;
pub mod rope;
pub mod sizes;
pub mod weights;
pub mod writer;
