//! Cases of [`crate::ops::sum_sq`].

use super::device::{flat, holding, same_on};
use super::normal;
use crate::backend::Backend;
use crate::ops::sum_sq::{SumSq, reference};

const PART: usize = 1 << 14;

/// Sums of few and many elements against the reference on each of `backends`, which must agree to the byte.
pub fn conforms<B: Backend>(backends: &[B]) {
    for n in [0, 1, 3, 31, 4097, PART - 1, PART, PART + 1, 5 * PART + 3] {
        let x = normal::<f32>(n as u64, n, 1.0);
        let mut want = [f64::NAN];
        reference(SumSq { out: &mut want, x: &x }).expect("a sum");
        let got = same_on(backends, |b| {
            let x = flat(b, &x);
            let mut out = holding(b, &[f64::NAN], -77.0);
            b.sum_sq(SumSq { out: out.view_mut(), x: x.view() }).expect("a sum");
            out.done(b)[0].to_bits()
        });
        let got = f64::from_bits(got);
        assert!((got - want[0]).abs() <= 1e-13 * want[0], "{n}: {got}, expected {}", want[0]);
    }
}
