#![no_main]

#[allow(dead_code)]
#[path = "../parse.rs"]
mod parse;

libfuzzer_sys::fuzz_target!(|data: &[u8]| parse::cross(data));
