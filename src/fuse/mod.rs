//! Fusing the updates of several adapters: conflict resolution, one file a method, and the certificate.
//!
//! Everything works on the factors of `ΔWₑ = Bₑ Aₑ` (the scale folded into B) in f64; no `[O, I]` update is formed.
//! Methods that are defined on entries make them in f32, a tile at a time ([`elementwise`]), and are approximated by
//! factors where a rank is asked for ([`low_rank`]).
//! For a few modules at once: [`Batch`] → [`compare::compare`] → [`Fusion::fuse`] → [`Outcome::write`]. Comparing goes
//! [`Stacks`] → [`Grams`] → [`LoraCr::resolve`]; the passes over the factors and the eigenproblems are a back end's, but
//! for modules whose Grams would be larger than the factors.
//!
//! Where a result is linear in the factors ([`Linear`]), it is written without being formed, nor are resolved factors that
//! are maps of those read: one pass makes a few columns of it, rounds them to the file's dtype and measures what that did,
//! while they are in the cache.

mod cat_merging;
pub mod certificate;
pub mod compare;
pub mod conflict;
mod core;
mod coverage;
pub mod dare;
mod direction;
pub mod elementwise;
mod factors;
mod fedavg;
mod fedex;
mod fedsa;
pub mod ffa;
mod ffa_lsq;
mod grams;
pub mod input_gram;
pub mod inputs;
mod iso_c;
mod knots_ties;
mod linear;
mod lora_cr;
mod lora_lego;
pub mod low_rank;
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
mod select;
pub mod spd;
mod stacks;
mod task_arithmetic;
pub mod ties;
pub mod truncate;
mod tsv;
pub mod weights;
mod wide;
mod written;

pub use direction::Direction;
pub use factors::{Batch, Factors, Frame, Kept, Rows};
pub use grams::Grams;
pub use linear::{Linear, Made, Pair};
pub use lora_cr::{LoraCr, Resolution};
pub(crate) use method::goes_with;
pub use method::{Fused, Fusion};
pub use pipeline::{Outcome, Recipe};
pub use stacks::Stacks;
pub use written::Written;
