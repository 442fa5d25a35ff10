//! `eval`: accuracy on multiple-choice tasks, or how well a text is predicted, for several adapters at once.

pub mod accuracy;
pub mod score;
pub mod text;
