//! One case per operation, at the shapes of a 157 M-parameter model (T 1024, D 1024, F 2816, V 32000) and of the demo
//! (T 1500, D 192, F 512), rank 8; of whole weights at LLaMA-3-8B's. Of an operation with a frozen product, `Gelem/s` is
//! that product's GFLOP/s.
//!
//! `cargo bench --bench ops -- attention` runs the cases whose names contain `attention`.

mod ops {
    pub mod products;
    pub mod rows;
    pub mod weights;
}

use criterion::{criterion_group, criterion_main};

criterion_group!(
    all,
    ops::products::linear,
    ops::products::linear_bwd,
    ops::products::head,
    ops::products::importance,
    ops::rows::embed,
    ops::rows::rms_norm,
    ops::rows::rope,
    ops::rows::swiglu,
    ops::rows::attention,
    ops::rows::optimizer,
    ops::weights::rsvd,
    ops::weights::merge
);
criterion_main!(all);
