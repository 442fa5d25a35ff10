//! See [`crate::ops::adamw`].

use rayon::prelude::*;

use super::parts::ELEMENTS;
use super::simd::{self, Isa, Kernel, fma};
use crate::error::Result;
use crate::host::Host;
use crate::ops::adamw::{AdamW, Factors};

pub fn adamw(op: AdamW<'_, Host>) -> Result<()> {
    op.check()?;
    let factors = op.hyper.factors(op.step, op.norm_sq[0]);
    let state = op.m.par_chunks_mut(ELEMENTS).zip(op.v.par_chunks_mut(ELEMENTS));
    op.params
        .par_chunks_mut(ELEMENTS)
        .zip(state)
        .zip(op.grads.par_chunks(ELEMENTS))
        .for_each(|((params, (m, v)), grads)| simd::run(Update { params, m, v, grads, factors }));
    Ok(())
}

struct Update<'a> {
    params: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grads: &'a [f32],
    factors: Factors,
}

impl Kernel for Update<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let f = self.factors;
        let state = self.m.iter_mut().zip(self.v);
        for ((p, (m, v)), g) in self.params.iter_mut().zip(state).zip(self.grads) {
            let g = g * f.clip;
            *m = fma::<I>(f.new1, g - *m, *m);
            *v = fma::<I>(f.new2 * g, g, f.old2 * *v);
            *p = *p * f.decay + (f.step * *m) / (v.sqrt() / f.root + f.eps);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::adamw::{Hyper, reference};
    use crate::ops::cases::{Guarded, assert_close, bits, normal, same_on_threads};

    const HYPER: Hyper =
        Hyper { lr: 3e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, max_norm: 0.05 };

    /// Parameters, first and second moment after `steps` steps of `update`.
    fn run(
        n: usize,
        steps: u64,
        hyper: Hyper,
        update: fn(AdamW<'_, Host>) -> Result<()>,
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let mut params = Guarded::new(&normal::<f32>(1, n, 0.1), -77.0);
        let (mut m, mut v) = (Guarded::new(&vec![0.0; n], -77.0), Guarded::new(&vec![0.0; n], -77.0));
        for step in 1..=steps {
            let grads = normal::<f32>(step + 1, n, 1e-2);
            let norm_sq = [grads.iter().map(|&g| f64::from(g) * f64::from(g)).sum()];
            update(AdamW {
                params: params.out(),
                m: m.out(),
                v: v.out(),
                grads: &grads,
                norm_sq: &norm_sq,
                hyper,
                step,
            })
            .expect("an update");
        }
        (params.done(), m.done(), v.done())
    }

    #[test]
    fn as_the_reference() {
        for n in [1, 13, ELEMENTS - 1, ELEMENTS, ELEMENTS + 1, 3 * ELEMENTS + 7] {
            for max_norm in [0.0, 0.05, 1e9] {
                let hyper = Hyper { max_norm, ..HYPER };
                let (p, m, v) = run(n, 3, hyper, adamw);
                let (want_p, want_m, want_v) = run(n, 3, hyper, reference);
                assert_close("params", &p, &want_p, 1e-6, 1e-8);
                assert_close("m", &m, &want_m, 1e-6, 1e-9);
                assert_close("v", &v, &want_v, 1e-6, 1e-12);
            }
        }
    }

    #[test]
    fn same_bytes_on_any_number_of_threads() {
        same_on_threads(|| {
            let (p, m, v) = run(2 * ELEMENTS + 5, 2, HYPER, adamw);
            (bits(&p), bits(&m), bits(&v))
        });
    }

    /// Three steps of `torch.optim.AdamW` 2.15 on a CPU with fused multiply-adds, gradients clipped at norm 0.05.
    #[test]
    fn as_pytorch() {
        let mut params = [0.1f32, -0.2, 0.3, -0.4, 0.5];
        let (mut m, mut v) = ([0f32; 5], [0f32; 5]);
        for (step, scale) in [(1u64, 0.01f32), (2, -0.02), (3, 0.03)] {
            let grads: [f32; 5] = std::array::from_fn(|i| scale * (i as f32 + 1.0));
            let norm_sq = [grads.iter().map(|&g| f64::from(g) * f64::from(g)).sum()];
            adamw(AdamW {
                params: &mut params,
                m: &mut m,
                v: &mut v,
                grads: &grads,
                norm_sq: &norm_sq,
                hyper: HYPER,
                step,
            })
            .expect("an update");
        }
        assert_close("params", &params, &PYTORCH[0], 2e-7, 0.0);
        assert_close("m", &m, &PYTORCH[1], 2e-7, 0.0);
        assert_close("v", &v, &PYTORCH[2], 2e-7, 0.0);
    }

    const PYTORCH: [[f32; 5]; 3] = [
        [9.606232e-02, -2.0366777e-01, 2.9588237e-01, -4.0348786e-01, 4.9570245e-01],
        [6.1351556e-04, 1.2270311e-03, 1.8405468e-03, 2.4540622e-03, 3.0675777e-03],
        [1.362251e-07, 5.449004e-07, 1.2260258e-06, 2.1796016e-06, 3.4056266e-06],
    ];
}
