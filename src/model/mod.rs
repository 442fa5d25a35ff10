//! The transformer: weights, forward, backward, and the memory that they take.

pub mod adapters;
pub mod backward;
pub mod edge;
pub mod forward;
pub mod input;
pub mod inputs;
pub mod memory;
pub mod packing;
pub mod paper;
pub mod recompute;
pub mod room;
pub mod rope;
pub mod schedule;
pub mod session;
pub mod shape;
pub mod trainer;
pub mod weights;
