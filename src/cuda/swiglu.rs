//! See [`crate::ops::swiglu`].

use super::Cuda;
use super::launch::{Grid, Kernel, int};
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::swiglu::{SwiGlu, SwiGluBwd};
use crate::tensor::{MemoryLayout, Real};

const FORWARD: Kernel = Kernel { file: "swiglu", name: "swiglu" };
const BACKWARD: Kernel = Kernel { file: "swiglu", name: "swiglu_bwd" };
const THREADS: usize = 256;

/// A thread computes eight columns of one row.
fn grid(tokens: usize, width: usize) -> Grid {
    let threads = width.div_ceil(8).next_multiple_of(32).clamp(32, THREADS);
    Grid { blocks: [tokens, width.div_ceil(8 * threads), 1], threads, more_shared: 0 }
}

pub fn swiglu<T: Real>(cuda: &Cuda, op: SwiGlu<'_, DeviceMemory, T>) -> Result<()> {
    op.check()?;
    let (tokens, width) = (op.tokens, op.width);
    let (f, ld) = (int("F", width)?, int("the row of F", DeviceMemory::row(width))?);
    let args = (op.h, op.gate, op.up, f, ld);
    // SAFETY: `check` compared the views with T rows of F.
    unsafe { cuda.launch(FORWARD, grid(tokens, width), &[("T", tokens), ("F", width)], args) }
}

pub fn swiglu_bwd<T: Real>(cuda: &Cuda, op: SwiGluBwd<'_, DeviceMemory, T>) -> Result<()> {
    op.check()?;
    let (tokens, width) = (op.tokens, op.width);
    let (f, ld) = (int("F", width)?, int("the row of F", DeviceMemory::row(width))?);
    let args = (op.gate, op.up, op.dh, f, ld);
    // SAFETY: `check` compared the views with T rows of F.
    unsafe { cuda.launch(BACKWARD, grid(tokens, width), &[("T", tokens), ("F", width)], args) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cuda::tests::device;
    use crate::ops::cases::swiglu::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda]);
        }
    }
}
