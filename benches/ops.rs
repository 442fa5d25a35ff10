//! One case per operation, at the shapes of a 157 M-parameter model (T 1024, D 1024, F 2816) and of the demo.
//!
//! `cargo bench --bench ops -- attention` runs the cases whose names contain `attention`.

mod ops {
    pub mod rows;
}

use criterion::{criterion_group, criterion_main};

criterion_group!(
    all,
    ops::rows::embed,
    ops::rows::rms_norm,
    ops::rows::rope,
    ops::rows::swiglu,
    ops::rows::attention,
    ops::rows::optimizer
);
criterion_main!(all);
