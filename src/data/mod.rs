//! From text to tokens: tokenizers, training data and its packing, tasks and their prompts; data sets that are written
//! and reviewed.

pub mod batch;
pub mod calibration;
pub mod chat;
pub mod cross;
pub mod date;
pub mod documents;
mod foreign;
pub mod grove;
pub mod lines;
pub mod lm_eval;
pub mod mmlu;
pub mod prefix_tree;
pub mod review;
pub mod schedule;
pub mod tasks;
pub mod template;
pub mod tokenizer;

#[cfg(test)]
pub(crate) mod fixture;
