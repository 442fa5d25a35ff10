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

    use crate::cpu::tests::on_threads;
    use crate::ops::cases::rope::conforms;

    #[test]
    fn as_the_reference_in_f32() {
        conforms::<_, f32>(&on_threads());
    }

    #[test]
    fn as_the_reference_in_bf16() {
        conforms::<_, bf16>(&on_threads());
    }
}
