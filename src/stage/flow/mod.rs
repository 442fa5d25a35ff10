//! What a flow makes.

pub mod results;
