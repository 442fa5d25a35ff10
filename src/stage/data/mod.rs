//! `data`: data sets made, cut, judged by people, and given to other programs.

pub mod cross;
pub mod export;
pub mod import;
pub mod review;
pub mod split;
