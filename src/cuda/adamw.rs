//! See [`crate::ops::adamw`].

use super::Cuda;
use super::launch::{Grid, Kernel};
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::adamw::AdamW;
use crate::ops::ensure;
use crate::tensor::Length;

const UPDATE: Kernel = Kernel { file: "adamw", name: "adamw" };
const THREADS: usize = 256;

/// Each thread takes four elements at a time, and up to eight times four in turn.
fn grid(n: usize) -> Grid {
    let fours = n.div_ceil(4);
    let turns = fours.div_ceil(THREADS * 2048).clamp(1, 8);
    Grid::line(fours.div_ceil(THREADS * turns), THREADS)
}

pub fn adamw(cuda: &Cuda, op: AdamW<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let n = op.params.len();
    let starts = [op.params.pointer(), op.m.pointer(), op.v.pointer(), op.grads.pointer()];
    let aligned = starts.iter().all(|start| start.0.is_multiple_of(16));
    ensure("adamw", aligned, || "a view does not start at a multiple of four elements".into())?;
    // The squared norm is on the device, where the kernel makes the clipping factor from it.
    let f = op.hyper.factors(op.step, 0.0);
    let args = (
        op.params,
        op.m,
        op.v,
        op.grads,
        op.norm_sq,
        n as i64,
        op.hyper.max_norm,
        f.decay,
        f.new1,
        f.old2,
        f.new2,
        f.step,
        f.root,
        f.eps,
    );
    // SAFETY: `check` compared m, v and grads with the n parameters, and norm_sq with one number.
    unsafe { cuda.launch(UPDATE, grid(n), &[("n", n)], args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::device;
    use crate::ops::cases::adamw::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms(&[cuda]);
        }
    }

    #[test]
    fn every_element_has_a_thread() {
        assert_eq!([1, 1024, 1025].map(|n| grid(n).blocks[0]), [1, 1, 2]);
        assert_eq!(grid(20_971_520), Grid::line(2560, THREADS));
    }
}
