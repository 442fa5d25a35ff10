//! Data sets: questions that need two domains, and people's judgement of them.

pub mod cross;
pub mod review;
