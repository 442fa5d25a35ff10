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
    use crate::cpu::tests::on_threads;
    use crate::ops::cases::adamw::{HYPER, conforms};
    use crate::ops::cases::assert_close;

    #[test]
    fn as_the_reference() {
        conforms(&on_threads());
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
