//! Files: checkpoints, adapters, pruning plans, output folders.

pub mod module;
