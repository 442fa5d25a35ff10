//! Fusing the updates of several adapters: conflict resolution, one file a method, and the certificate.
//!
//! Everything works on the factors of `ΔWₑ = Bₑ Aₑ` (the scale folded into B) in f64; no `[O, I]` update is formed.
//! For a few modules at once: [`Batch`] → [`Stacks`] → [`Grams`] → [`LoraCr::resolve`] → [`Fusion::fuse`] →
//! [`measure::measure`]; the passes over the factors and the eigenproblems are a back end's.

mod cat_merging;
pub mod certificate;
pub mod conflict;
mod core;
mod coverage;
mod direction;
mod factors;
mod fedavg;
mod fedex;
mod fedsa;
pub mod ffa;
mod ffa_lsq;
mod grams;
mod input_gram;
pub mod inputs;
mod iso_c;
mod knots_ties;
mod lora_cr;
mod lora_lego;
mod mean;
mod mean_svd;
pub mod measure;
pub mod merge;
mod method;
pub mod options;
pub mod outliers;
mod peft_cat;
mod peft_linear;
mod peft_svd;
mod pipeline;
mod regmean;
pub mod spd;
mod stacks;
mod task_arithmetic;
pub mod truncate;
mod tsv;
pub mod weights;

pub use direction::Direction;
pub use factors::{Batch, Factors, Frame, Kept};
pub use grams::Grams;
pub use lora_cr::{LoraCr, Resolution};
pub use method::{DENSITY, Fused, Fusion};
pub use pipeline::{Outcome, Recipe};
pub use stacks::Stacks;
