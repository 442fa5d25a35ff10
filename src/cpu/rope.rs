//! See [`crate::ops::rope`].

use rayon::prelude::*;

use super::parts;
use super::simd::{self, Isa, Kernel};
use crate::error::Result;
use crate::host::Host;
use crate::ops::rope::Rope;
use crate::tensor::Real;

pub fn rope<T: Real>(op: Rope<'_, Host, T>) -> Result<()> {
    op.check()?;
    let width = op.heads * op.head_dim;
    if width == 0 {
        return Ok(());
    }
    let rows = parts::rows(width);
    let (cos, sin, dim) = (op.cos, op.sin, op.head_dim);
    let sign = if op.inverse { -1.0 } else { 1.0 };
    op.x.par_chunks_mut(rows * width)
        .zip(op.rows.par_chunks(rows))
        .for_each(|(x, rows)| simd::run(Rotate { x, cos, sin, rows, width, dim, sign }));
    Ok(())
}

struct Rotate<'a, T> {
    x: &'a mut [T],
    cos: &'a [f32],
    sin: &'a [f32],
    rows: &'a [u32],
    width: usize,
    dim: usize,
    /// −1 rotates back.
    sign: f32,
}

impl<T: Real> Kernel for Rotate<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let half = self.dim / 2;
        for (x, &row) in self.x.chunks_exact_mut(self.width).zip(self.rows) {
            let at = row as usize * half..(row as usize + 1) * half;
            let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
            for head in x.chunks_exact_mut(self.dim) {
                let (low, high) = head.split_at_mut(half);
                for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let (x, y, sin) = (a.to_f32(), b.to_f32(), self.sign * sin);
                    // Products rounded on their own, as transformers does.
                    *a = T::from_f32(x * cos - y * sin);
                    *b = T::from_f32(y * cos + x * sin);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ops::cases::{Guarded, assert_close, normal, rounding, same_on_threads};
    use crate::ops::rope::reference;

    fn check<T: Real>() {
        for (tokens, heads, dim) in [(1, 1, 2), (3, 2, 6), (37, 5, 64), (130, 16, 80), (2, 9, 4096)] {
            let x = normal::<T>(1, tokens * heads * dim, 1.0);
            let places = tokens + 3;
            let angle = normal::<f32>(2, places * dim / 2, 2.0);
            let (cos, sin): (Vec<f32>, Vec<f32>) = angle.iter().map(|a| (a.cos(), a.sin())).unzip();
            let rows: Vec<u32> = (0..tokens).map(|t| ((t * 5) % places) as u32).collect();
            let run = |f: fn(Rope<'_, Host, T>) -> Result<()>, x: &[T], inverse: bool| {
                let mut got = Guarded::new(x, T::from_f32(-77.0));
                let x = got.out();
                f(Rope { x, cos: &cos, sin: &sin, rows: &rows, heads, head_dim: dim, inverse }).expect("x");
                got.done()
            };
            for inverse in [false, true] {
                let got = same_on_threads(|| run(rope, &x, inverse));
                assert_close("x", &got, &run(reference, &x, inverse), 2.0 * rounding::<T>(), 1e-6);
                let back = run(rope, &got, !inverse);
                assert_close("there and back", &back, &x, 4.0 * rounding::<T>(), 10.0 * rounding::<T>());
            }
        }
    }

    #[test]
    fn as_the_reference_in_f32() {
        check::<f32>();
    }

    #[test]
    fn as_the_reference_in_bf16() {
        check::<bf16>();
    }
}
