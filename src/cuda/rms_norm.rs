//! See [`crate::ops::rms_norm`].

use super::Cuda;
use super::launch::{Grid, Kernel, int};
use super::store::{DeviceMemory, or_null};
use crate::error::Result;
use crate::ops::rms_norm::{RmsNorm, RmsNormBwd};
use crate::tensor::{MemoryLayout, Real};

const FORWARD: Kernel = Kernel { file: "rms_norm", name: "rms_norm" };
const BACKWARD: Kernel = Kernel { file: "rms_norm", name: "rms_norm_bwd" };

/// A block a row; a thread takes eight columns at a time, and at least two in turn where the row is wide.
fn grid(tokens: usize, width: usize) -> Grid {
    Grid::line(tokens, width.div_ceil(16).next_multiple_of(32).clamp(32, 1024))
}

pub fn rms_norm<T: Real>(cuda: &Cuda, op: RmsNorm<'_, DeviceMemory, T>) -> Result<()> {
    op.check()?;
    let (tokens, width) = (op.tokens, op.width);
    let (d, ld) = (int("D", width)?, int("the row of D", DeviceMemory::row(width))?);
    let args = (op.y, op.rstd, op.x, op.w, d, ld, op.eps);
    // SAFETY: `check` compared the views with T rows of D.
    unsafe { cuda.launch(FORWARD, grid(tokens, width), &[("T", tokens), ("D", width)], args) }
}

pub fn rms_norm_bwd<T: Real>(cuda: &Cuda, op: RmsNormBwd<'_, DeviceMemory, T>) -> Result<()> {
    op.check()?;
    let (tokens, width) = (op.tokens, op.width);
    let (d, ld) = (int("D", width)?, int("the row of D", DeviceMemory::row(width))?);
    let args = (op.dx, op.dy, or_null(op.residual), op.x, op.rstd, op.w, d, ld);
    // SAFETY: `check` compared the views with T rows of D.
    unsafe { cuda.launch(BACKWARD, grid(tokens, width), &[("T", tokens), ("D", width)], args) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cuda::tests::device;
    use crate::ops::cases::rms_norm::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda]);
        }
    }
}
