//! From text to tokens: tokenizers, training data and its packing, tasks and their prompts.

pub mod tokenizer;

#[cfg(test)]
pub(crate) mod fixture;
