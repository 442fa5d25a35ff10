//! See [`crate::ops::rms_norm`].

use rayon::prelude::*;

use super::parts;
use super::product::dot::dot;
use super::simd::{self, Isa, Kernel};
use crate::error::Result;
use crate::host::Host;
use crate::ops::rms_norm::{RmsNorm, RmsNormBwd};
use crate::tensor::Real;

/// Numbers of a row whose gradients are scaled at a time.
const PART: usize = 512;

pub fn rms_norm<T: Real>(op: RmsNorm<'_, Host, T>) -> Result<()> {
    op.check()?;
    let rows = parts::rows(op.width);
    let part = rows * op.width.max(1);
    let (w, width, eps) = (op.w, op.width, op.eps);
    op.rstd
        .par_chunks_mut(rows)
        .zip(op.y.par_chunks_mut(part))
        .zip(op.x.par_chunks(part))
        .for_each(|((rstd, y), x)| simd::run(Forward { y, rstd, x, w, width, eps }));
    Ok(())
}

pub fn rms_norm_bwd<T: Real>(op: RmsNormBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    let rows = parts::rows(op.width);
    let (w, width, residual) = (op.w, op.width, op.residual);
    let part = rows * width.max(1);
    op.dx.par_chunks_mut(part).enumerate().for_each(|(n, dx)| {
        let at = n * part..n * part + dx.len();
        simd::run(Backward {
            dy: &op.dy[at.clone()],
            x: &op.x[at.clone()],
            residual: residual.map(|r| &r[at]),
            rstd: &op.rstd[n * rows..],
            dx,
            w,
            width,
        });
    });
    Ok(())
}

struct Forward<'a, T> {
    y: &'a mut [T],
    rstd: &'a mut [f32],
    x: &'a [T],
    w: &'a [f32],
    width: usize,
    eps: f32,
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let rows = self.y.chunks_exact_mut(self.width).zip(self.x.chunks_exact(self.width));
        for ((y, x), rstd) in rows.zip(self.rstd) {
            let mean = f64::from(dot::<I, T, T>(x, x)) / self.width as f64;
            let r = (1.0 / (mean + f64::from(self.eps)).sqrt()) as f32;
            *rstd = r;
            for ((y, x), w) in y.iter_mut().zip(x).zip(self.w) {
                *y = T::from_f32(x.to_f32() * r * w);
            }
        }
    }
}

struct Backward<'a, T> {
    dx: &'a mut [T],
    dy: &'a [T],
    residual: Option<&'a [T]>,
    x: &'a [T],
    rstd: &'a [f32],
    w: &'a [f32],
    width: usize,
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let width = self.width;
        let rows = self.dx.chunks_exact_mut(width).zip(self.rstd);
        for (t, (dx, &r)) in rows.enumerate() {
            let at = t * width..(t + 1) * width;
            let (dy, x) = (&self.dy[at.clone()], &self.x[at.clone()]);
            let mut sum = 0f64;
            for ((dy, x), w) in dy.chunks(PART).zip(x.chunks(PART)).zip(self.w.chunks(PART)) {
                let mut scaled = [0f32; PART];
                let terms = dy.iter().zip(w);
                scaled.iter_mut().zip(terms).for_each(|(s, (dy, w))| *s = dy.to_f32() * w);
                sum += f64::from(dot::<I, f32, T>(&scaled[..x.len()], x));
            }
            // mean(w∘dy∘x̂) · rstd, so that x itself can follow.
            let c = (sum * f64::from(r) * f64::from(r) / width as f64) as f32;
            let slope = |dy: &T, x: &T, w: &f32| r * (dy.to_f32() * w - x.to_f32() * c);
            let terms = dy.iter().zip(x).zip(self.w);
            match self.residual {
                Some(residual) => {
                    for ((dx, ((dy, x), w)), past) in dx.iter_mut().zip(terms).zip(&residual[at]) {
                        *dx = T::from_f32(past.to_f32() + slope(dy, x, w));
                    }
                }
                None => {
                    for (dx, ((dy, x), w)) in dx.iter_mut().zip(terms) {
                        *dx = T::from_f32(slope(dy, x, w));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cpu::tests::on_threads;
    use crate::ops::cases::rms_norm::conforms;

    #[test]
    fn as_the_reference_in_f32() {
        conforms::<_, f32>(&on_threads());
    }

    #[test]
    fn as_the_reference_in_bf16() {
        conforms::<_, bf16>(&on_threads());
    }
}
