//! See [`crate::ops::sum_sq`].

use super::Cuda;
use super::launch::{Grid, Kernel};
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::sum_sq::SumSq;
use crate::tensor::Length;

const PARTS: Kernel = Kernel { file: "sum_sq", name: "sum_sq" };
const TOTAL: Kernel = Kernel { file: "sum_sq", name: "sum_sq_total" };
const THREADS: usize = 256;
/// Sums that the kernel has room for.
const MOST: usize = 1024;

/// Blocks of the first kernel: each thread takes at least 16 elements, where there are as many. A function of the length
/// alone, since it is the order of the sum.
fn blocks(n: usize) -> usize {
    n.div_ceil(16 * THREADS).clamp(1, MOST)
}

pub fn sum_sq(cuda: &Cuda, op: SumSq<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let (n, blocks) = (op.x.len(), blocks(op.x.len()));
    // SAFETY: the kernel reads n elements of x.
    unsafe { cuda.launch(PARTS, Grid::line(blocks, THREADS), &[("n", n)], (op.x, n as i64))? };
    // SAFETY: `out` has one element; the first kernel left as many sums as blocks.
    unsafe { cuda.launch(TOTAL, Grid::line(1, THREADS), &[("n", n)], (op.out, blocks as i32)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::device;
    use crate::ops::cases::sum_sq::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms(&[cuda]);
        }
    }

    #[test]
    fn blocks_by_length() {
        assert_eq!([0, 1, 4096, 4097, 1 << 30].map(blocks), [1, 1, 1, 2, MOST]);
    }
}
