//! `data`: data sets made, cut, and given to other programs.

pub mod export;
pub mod import;
pub mod split;
