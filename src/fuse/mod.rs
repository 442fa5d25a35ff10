//! Fusing the updates of several adapters: conflict resolution, one file a method, and the certificate.
//!
//! Everything works on the factors of `ΔWₑ = Bₑ Aₑ` (the scale folded into B) in f64; no `[O, I]` update is formed.
//! For one module: [`Batch`] → [`Grams`] → [`LoraCr::resolve`] → [`Fusion::fuse`] → [`measure::measure`].

pub mod algebra;
pub mod certificate;
pub mod conflict;
mod coverage;
mod factors;
mod fedavg;
mod fedsa;
pub mod ffa;
mod ffa_lsq;
mod gate;
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
mod subspace;
mod task_arithmetic;
pub mod truncate;
pub mod weights;

pub use factors::{Batch, Factors, Frame, Kept};
pub use gate::Direction;
pub use grams::Grams;
pub use lora_cr::{LoraCr, Resolution};
pub use method::{Fused, Fusion};
pub use pipeline::{Outcome, Recipe};
