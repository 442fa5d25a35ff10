//! Structured pruning: which key/value heads (with their query heads) and MLP channels of each layer stay.

pub mod groups;
pub mod magnitude;
pub mod observer;
pub mod scores;
pub mod select;
pub mod slice;
pub mod write;
