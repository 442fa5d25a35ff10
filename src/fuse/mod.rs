//! Fusing the updates of several adapters: conflict resolution, one file a method, and the certificate.
//!
//! Everything works on the factors of `ΔWₑ = Bₑ Aₑ` (the scale folded into B) in f64; no `[O, I]` update is formed.
//! Methods that are defined on entries make them in f32, a tile at a time ([`elementwise`]).
//! For a few modules at once: [`Batch`] → [`Stacks`] → [`Grams`] → [`LoraCr::resolve`] → [`Fusion::fuse`] →
//! [`measure::measure`]; the passes over the factors and the eigenproblems are a back end's.

pub mod certificate;
pub mod conflict;
mod coverage;
pub mod dare;
mod direction;
pub mod elementwise;
mod factors;
mod fedavg;
mod fedsa;
pub mod ffa;
mod ffa_lsq;
mod grams;
pub mod inputs;
mod lora_cr;
mod mean;
mod mean_svd;
pub mod measure;
pub mod merge;
mod method;
pub mod options;
mod pipeline;
mod select;
mod stacks;
mod task_arithmetic;
pub mod ties;
pub mod truncate;
pub mod weights;

pub use direction::Direction;
pub use factors::{Batch, Factors, Frame, Kept};
pub use grams::Grams;
pub use lora_cr::{LoraCr, Resolution};
pub use method::{Fused, Fusion};
pub use pipeline::{Outcome, Recipe, Resolved};
pub use stacks::Stacks;
