//! Federated LoRA for models that are larger than the devices that hold the data.
//!
//! A large language model lives in the cloud, the data that would make it better lives on edge devices and may not
//! leave them, and the devices are too small for the model. This crate prunes the model to a device's memory, trains
//! a LoRA adapter on the pruned model, recovers the adapter to the full dimensions, resolves conflicts between the
//! adapters of several devices, fuses them, and evaluates the result.
//!
//! # Letters
//! T tokens in a packed batch · N sequences · D model width · H query heads · G key/value heads · K head width ·
//! F MLP width · V vocabulary · L layers · R LoRA rank · O, I a linear's out and in · E edges (adapters) ·
//! P sum of ranks. `W[O, I]`, `y = x Wᵀ`, `A[R, I]`, `B[O, R]`, `ΔW = s B A`.
//!
//! # Layers
//! An arrow goes to the right only:
//! `main ─ cli ─ stage ─ { fuse, prune, model, data } ─ checkpoint ─ backend ─ ops ─ tensor ─ error`.
//! `cpu` and `cuda` implement `backend`; only `cli::plan` names them. `cuda_sizes` is what a CUDA device needs, as
//! numbers that any machine can work out.

pub mod algebra;
pub mod backend;
pub mod checkpoint;
pub mod cli;
pub mod cpu;
pub mod cuda;
pub mod cuda_sizes;
pub mod data;
pub mod error;
pub mod fuse;
pub mod host;
pub mod model;
pub mod ops;
pub mod prune;
pub mod random;
pub mod stage;
pub mod subspace;
pub mod tensor;

pub use error::{Error, Result};
