//! People's judgement of written questions: decisions, how far reviewers agree, what is accepted in the end.

pub mod agreement;
pub mod decisions;
