//! The command line: what was typed ([`args`]), what it means (`plan`), what is printed.

pub mod args;
pub mod size;
