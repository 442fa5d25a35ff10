//! See [`crate::ops::merge`].

use rayon::prelude::*;

use super::simd::{self, Isa, Kernel};
use crate::error::Result;
use crate::host::Host;
use crate::ops::merge::{Merge, ROWS, Update};
use crate::tensor::Real;

/// Rows that share a load of A.
const SHARE: usize = 4;
/// Columns of a row's sums that stay in registers.
const LANES: usize = 16;

pub fn merge<T: Real>(op: Merge<'_, Host, T>) -> Result<()> {
    op.check()?;
    let Merge { w, sums, updates, out, inner } = op;
    sums.fill(0.0);
    let rows = w.par_chunks_mut((ROWS * inner).max(1)).zip(sums.par_chunks_exact_mut(2)).enumerate();
    rows.for_each(|(block, (w, sums))| {
        let first = block * ROWS;
        let count = ROWS.min(out - first);
        let b: Vec<Vec<f64>> = updates.iter().map(|u| scaled(u, first, count)).collect();
        simd::run(Block { w, sums, updates: &updates, b: &b, inner });
    });
    Ok(())
}

/// `f32(s B)` of `count` rows, those of one column one after the other, up to [`ROWS`].
fn scaled(update: &Update<'_, Host>, first: usize, count: usize) -> Vec<f64> {
    let r = update.rank;
    let mut out = vec![0.0; r * ROWS];
    for (row, b) in update.b[first * r..(first + count) * r].chunks_exact(r.max(1)).enumerate() {
        b.iter().enumerate().for_each(|(k, b)| out[k * ROWS + row] = f64::from(update.scale * b));
    }
    out
}

/// Up to [`ROWS`] rows.
struct Block<'a, 'b, T> {
    w: &'a mut [T],
    sums: &'a mut [f64],
    updates: &'a [Update<'b, Host>],
    b: &'a [Vec<f64>],
    inner: usize,
}

impl<T: Real> Kernel for Block<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let rows = self.w.len() / self.inner;
        for first in (0..rows).step_by(SHARE) {
            for column in (0..self.inner).step_by(LANES) {
                let some = LANES.min(self.inner - column);
                let update = if some == LANES {
                    self.update::<I, LANES>(first, column)
                } else {
                    // Column by column, so that nothing past the end is read.
                    let mut update = [[0.0; LANES]; SHARE];
                    for at in 0..some {
                        let one = self.update::<I, 1>(first, column + at);
                        update.iter_mut().zip(one).for_each(|(row, [one])| row[at] = one);
                    }
                    update
                };
                for (r, update) in update.iter().enumerate().take(rows - first) {
                    let start = (first + r) * self.inner + column;
                    self.write(start..start + some, update);
                }
            }
        }
    }
}

impl<T: Real> Block<'_, '_, T> {
    /// The updates of [`SHARE`] rows from `first` on and `L` columns.
    #[inline(always)]
    fn update<I: Isa, const L: usize>(&self, first: usize, column: usize) -> [[f64; L]; SHARE] {
        let mut sums = [[0.0; L]; SHARE];
        for (u, b) in self.updates.iter().zip(self.b) {
            for (b, a) in b.chunks_exact(ROWS).zip(u.a.chunks_exact(self.inner)) {
                let a: [f64; L] = std::array::from_fn(|l| f64::from(a[column..column + L][l]));
                for (b, sums) in b[first..first + SHARE].iter().zip(&mut sums) {
                    for (sum, a) in sums.iter_mut().zip(&a) {
                        // The product is exact: fused or not is the same.
                        *sum = if I::FMA { b.mul_add(*a, *sum) } else { b * a + *sum };
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn write(&mut self, at: std::ops::Range<usize>, update: &[f64]) {
        let (mut lost, mut size) = (0.0, 0.0);
        for (w, &update) in self.w[at].iter_mut().zip(update) {
            let old = f64::from(w.to_f32());
            *w = T::from_f64(old + update);
            let missing = f64::from(w.to_f32()) - old - update;
            lost += missing * missing;
            size += update * update;
        }
        self.sums[0] += lost;
        self.sums[1] += size;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::merge::conforms(&crate::cpu::tests::on_threads());
    }
}
