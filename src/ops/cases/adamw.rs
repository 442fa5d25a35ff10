//! Cases of [`crate::ops::adamw`].

use super::device::{flat, holding, same_on};
use super::{assert_close, bits, normal};
use crate::backend::Backend;
use crate::ops::adamw::{AdamW, Hyper, reference};

/// Constants of a run.
pub const HYPER: Hyper =
    Hyper { lr: 3e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, max_norm: 0.05 };

const PART: usize = 1 << 14;
const STEPS: u64 = 3;

fn gradients(n: usize, step: u64) -> (Vec<f32>, f64) {
    let grads = normal::<f32>(step + 1, n, 1e-2);
    let norm_sq = grads.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
    (grads, norm_sq)
}

/// Three steps against the reference on each of `backends`, which must agree to the byte.
pub fn conforms<B: Backend>(backends: &[B]) {
    for n in [1, 3, 13, PART - 1, PART, PART + 1, 3 * PART + 7] {
        for max_norm in [0.0, 0.05, 1e9] {
            let hyper = Hyper { max_norm, ..HYPER };
            let start = normal::<f32>(1, n, 0.1);
            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
            for step in 1..=STEPS {
                let (grads, norm_sq) = gradients(n, step);
                let (params, norm_sq) = (&mut p, [norm_sq]);
                let (m, v) = (&mut m, &mut v);
                reference(AdamW { params, m, v, grads: &grads, norm_sq: &norm_sq, hyper, step })
                    .expect("an update");
            }
            let got = same_on(backends, |b| {
                let zeros = vec![0f32; n];
                let [mut p, mut m, mut v] = [&start, &zeros, &zeros].map(|x| holding(b, x, -77.0));
                for step in 1..=STEPS {
                    let (grads, norm_sq) = gradients(n, step);
                    let (grads, norm_sq) = (flat(b, &grads), flat(b, &[norm_sq]));
                    b.adamw(AdamW {
                        params: p.view_mut(),
                        m: m.view_mut(),
                        v: v.view_mut(),
                        grads: grads.view(),
                        norm_sq: norm_sq.view(),
                        hyper,
                        step,
                    })
                    .expect("an update");
                }
                [p, m, v].map(|x| bits(&x.done(b)))
            });
            let [got_p, got_m, got_v] = got.map(|x| x.into_iter().map(f32::from_bits).collect::<Vec<_>>());
            assert_close("params", &got_p, &p, 1e-6, 1e-8);
            assert_close("m", &got_m, &m, 1e-6, 1e-9);
            assert_close("v", &got_v, &v, 1e-6, 1e-12);
        }
    }
}
