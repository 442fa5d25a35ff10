//! Cases of [`crate::ops::cross_entropy`].

use std::sync::Arc;

use super::device::{holding_rows, rows, same_on, unwritten};
use super::{assert_close, bits, normal, rounding};
use crate::backend::Backend;
use crate::host::{Host, HostMatrix, MatrixSource};
use crate::ops::cross_entropy::{CrossEntropy, reference};
use crate::tensor::Real;

/// `W[V, D]` of numbers that `T` holds, so that logits are of size 1.
pub fn head<T: Real>(vocab: usize, width: usize) -> MatrixSource {
    let w = normal::<T>(2, vocab * width, 1.0 / (width as f32).sqrt());
    let bytes = bytemuck::cast_slice(&w).to_vec();
    let range = 0..bytes.len();
    MatrixSource { name: "head".into(), bytes: Arc::new(bytes), range, dtype: T::DTYPE, size: (vocab, width) }
}

/// Loss and gradient, and the loss alone, against the reference on each of `backends`, which must agree to the byte.
pub fn conforms<B: Backend, T: Real>(backends: &[B]) {
    for (tokens, n, vocab, width) in
        [(1, 1, 3, 1), (7, 5, 131, 72), (9, 0, 11, 8), (150, 131, 300, 200), (5, 3, 1100, 100)]
    {
        let x = normal::<T>(1, tokens * width, 2.0);
        let supervised: Vec<u32> = (0..n).map(|i| (i * tokens / n) as u32).collect();
        let targets: Vec<u32> = (0..n).map(|i| ((i * 37 + vocab - 1) % vocab) as u32).collect();
        let weight = 1.0 / (n.max(1) as f32);
        let host = HostMatrix::new(head::<T>(vocab, width)).expect("a head");
        let (mut nll_want, mut dx_want) = (vec![f32::NAN; n], vec![T::zeroed(); tokens * width]);
        reference(CrossEntropy::<Host, T> {
            nll: &mut nll_want,
            dx: Some(&mut dx_want),
            scratch: &mut [],
            x: &x,
            head: &host,
            rows: &supervised,
            targets: &targets,
            tokens,
            weight,
        })
        .expect("reference");
        for gradient in [true, false] {
            let (nll, dx) = same_on(backends, |b| {
                let head = b.matrix(head::<T>(vocab, width)).expect("a head");
                let x = rows(b, &x, width);
                let mut nll = unwritten(b, n);
                let mut dx = holding_rows(b, &vec![T::from_f32(f32::NAN); tokens * width], width);
                let mut scratch = unwritten(b, b.cross_entropy_scratch::<T>(n, vocab, width, T::DTYPE));
                b.cross_entropy::<T>(CrossEntropy {
                    nll: nll.view_mut(),
                    dx: gradient.then(|| dx.view_mut()),
                    scratch: scratch.view_mut(),
                    x: x.view(),
                    head: &head,
                    rows: &supervised,
                    targets: &targets,
                    tokens,
                    weight,
                })
                .expect("cross_entropy");
                scratch.done(b);
                (bits(&nll.done(b)), bits(&dx.done(b)))
            });
            let nll: Vec<f32> = nll.into_iter().map(f32::from_bits).collect();
            assert_close(&format!("nll of {n} × {vocab} × {width}"), &nll, &nll_want, 1e-6, 1e-5);
            if gradient {
                let dx: Vec<T> = dx.into_iter().map(|x| T::from_f32(f32::from_bits(x))).collect();
                // One rounding of dx, and of each gradient of a logit, whose squares add up to less than weight².
                let eps = rounding::<T>();
                let absolute = (2.0 * eps + 2e-6) * f64::from(weight);
                assert_close(&format!("dx of {n} × {vocab} × {width}"), &dx, &dx_want, 2.0 * eps, absolute);
            }
        }
    }
}
