//! See [`crate::ops::sum_sq`].

use super::Cuda;
use super::launch::{Grid, Kernel};
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::ensure;
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
    let aligned = op.x.pointer().0.is_multiple_of(16);
    ensure("sum_sq", aligned, || "x does not start at a multiple of four elements".into())?;
    let (n, blocks) = (op.x.len(), blocks(op.x.len()));
    // SAFETY: the kernel reads n elements of x.
    unsafe { cuda.launch(PARTS, Grid::line(blocks, THREADS), &[("n", n)], (op.x, n as i64))? };
    // SAFETY: `out` has one element; the first kernel left as many sums as blocks.
    unsafe { cuda.launch(TOTAL, Grid::line(1, THREADS), &[("n", n)], (op.out, blocks as i32)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::cuda::tests::device;
    use crate::ops::cases::sum_sq::conforms;
    use crate::tensor::Store;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms(&[cuda]);
        }
    }

    #[test]
    fn a_view_that_starts_between_vectors_is_refused() {
        let Some(cuda) = device() else { return };
        let x = cuda.alloc::<f32>("x", 12).expect("x");
        let mut out = cuda.alloc::<f64>("out", 1).expect("out");
        let mut of = |start: usize| {
            let (out, x) = (DeviceMemory::view_mut(&mut out, 0..1), DeviceMemory::view(&x, start..12));
            cuda.sum_sq(SumSq { out, x }).map_err(|why| why.to_string())
        };
        assert_eq!(of(4), Ok(()));
        assert_eq!(of(1), Err("sum_sq: x does not start at a multiple of four elements".into()));
    }

    #[test]
    fn blocks_by_length() {
        assert_eq!([0, 1, 4096, 4097, 1 << 30].map(blocks), [1, 1, 1, 2, MOST]);
    }
}
