//! Cases of [`crate::ops::rope`].

use super::device::{flat, holding_rows, same_on};
use super::{assert_close, normal, rounding};
use crate::backend::Backend;
use crate::ops::rope::{Rope, reference};
use crate::tensor::Real;

/// Both directions against the reference on each of `backends`, and there and back.
pub fn conforms<B: Backend, T: Real>(backends: &[B]) {
    for (tokens, heads, dim) in [(1, 1, 2), (3, 2, 6), (37, 5, 64), (13, 16, 80), (5, 3, 100), (2, 9, 4096)] {
        let x = normal::<T>(1, tokens * heads * dim, 1.0);
        let places = tokens + 3;
        let angle = normal::<f32>(2, places * dim / 2, 2.0);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angle.iter().map(|a| (a.cos(), a.sin())).unzip();
        let rows: Vec<u32> = (0..tokens).map(|t| ((t * 5) % places) as u32).collect();
        let run = |b: &B, x: &[T], inverse: bool| {
            let mut got = holding_rows(b, x, heads * dim);
            let (cos, sin) = (flat(b, &cos), flat(b, &sin));
            b.rope::<T>(Rope {
                x: got.view_mut(),
                cos: cos.view(),
                sin: sin.view(),
                rows: &rows,
                heads,
                head_dim: dim,
                inverse,
            })
            .expect("x");
            got.done(b)
        };
        for inverse in [false, true] {
            let mut want = x.clone();
            reference(Rope {
                x: &mut want,
                cos: &cos,
                sin: &sin,
                rows: &rows,
                heads,
                head_dim: dim,
                inverse,
            })
            .expect("x");
            let got = same_on(backends, |b| run(b, &x, inverse));
            assert_close("x", &got, &want, 2.0 * rounding::<T>(), 1e-6);
            let back = run(&backends[0], &got, !inverse);
            assert_close("there and back", &back, &x, 4.0 * rounding::<T>(), 10.0 * rounding::<T>());
        }
    }
}
