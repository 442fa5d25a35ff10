//! Cases of [`crate::ops::rms_norm`].

use super::device::{flat, rows, same_on, unwritten, unwritten_rows};
use super::{assert_close, normal, rounding};
use crate::backend::Backend;
use crate::host::Host;
use crate::ops::rms_norm::{RmsNorm, RmsNormBwd, reference, reference_bwd};
use crate::tensor::Real;

const SIZES: [(usize, usize); 11] = [
    (1, 1),
    (3, 7),
    (5, 31),
    (5, 32),
    (7, 33),
    (2, 63),
    (2, 65),
    (2, 1024),
    (70, 512),
    (1, 5734),
    (2, (1 << 14) + 1),
];

/// Forward and backward against the reference on each of `backends`, which must agree to the byte.
pub fn conforms<B: Backend, T: Real>(backends: &[B]) {
    for (tokens, width) in SIZES {
        let n = tokens * width;
        let (x, w) = (normal::<T>(1, n, 2.0), normal::<f32>(2, width, 1.0));
        let (dy, past) = (normal::<T>(3, n, 1.0), normal::<T>(4, n, 1.0));
        let (mut y_want, mut rstd_want) = (vec![T::zeroed(); n], vec![0.0; tokens]);
        let op = RmsNorm::<Host, T> {
            y: &mut y_want,
            rstd: &mut rstd_want,
            x: &x,
            w: &w,
            tokens,
            width,
            eps: 1e-5,
        };
        reference(op).expect("reference");

        let (y, rstd) = same_on(backends, |b| {
            let (x, w) = (rows(b, &x, width), flat(b, &w));
            let (mut y, mut rstd) = (unwritten_rows::<B, T>(b, tokens, width), unwritten(b, tokens));
            b.rms_norm::<T>(RmsNorm {
                y: y.view_mut(),
                rstd: rstd.view_mut(),
                x: x.view(),
                w: w.view(),
                tokens,
                width,
                eps: 1e-5,
            })
            .expect("rms_norm");
            (y.done(b), rstd.done(b))
        });
        assert_close("y", &y, &y_want, 2.0 * rounding::<T>() + 5e-7, 0.0);
        assert_close("rstd", &rstd, &rstd_want, 5e-7, 0.0);

        for residual in [None, Some(&past[..])] {
            let mut dx_want = vec![T::zeroed(); n];
            let op = RmsNormBwd::<Host, T> {
                dx: &mut dx_want,
                dy: &dy,
                residual,
                x: &x,
                rstd: &rstd,
                w: &w,
                tokens,
                width,
            };
            reference_bwd(op).expect("reference");
            let dx = same_on(backends, |b| {
                let [dy, x] = [&dy, &x].map(|x| rows(b, x, width));
                let residual = residual.map(|r| rows(b, r, width));
                let (rstd, w) = (flat(b, &rstd), flat(b, &w));
                let mut dx = unwritten_rows::<B, T>(b, tokens, width);
                b.rms_norm_bwd::<T>(RmsNormBwd {
                    dx: dx.view_mut(),
                    dy: dy.view(),
                    residual: residual.as_ref().map(|r| r.view()),
                    x: x.view(),
                    rstd: rstd.view(),
                    w: w.view(),
                    tokens,
                    width,
                })
                .expect("rms_norm_bwd");
                dx.done(b)
            });
            assert_close("dx", &dx, &dx_want, 2.0 * rounding::<T>() + 5e-7, 3e-6);
        }
    }
}
