//! Questions that need two domains at once, written by a language model from pairs of questions of one domain each.
//!
//! The three stages of MMLU-CD's construction (arXiv 2605.23913, A.2.2): can the two be merged, what knowledge is
//! behind each, and the new question; a fourth, optional one drops what a single domain's knowledge suffices for.
//! Candidates are drawn in an order that the seed decides, and the first that pass make the set, whatever the order in
//! which answers come. Every answer goes to a ledger by the hash of what was asked, so nothing is asked twice.

pub mod answer;
pub mod client;
pub mod clock;
pub mod endpoint;
pub mod item;
pub mod leak;
pub mod ledger;
pub mod pairs;
pub mod pipeline;
pub mod prompts;
pub mod schedule;
pub mod sources;
