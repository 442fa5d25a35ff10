//! See [`crate::ops::linear::Below::SwiGlu`]; the forward pass has it in its products.

use super::Cuda;
use super::launch::{Grid, Kernel, Pointer, int};
use super::store::DeviceMemory;
use crate::error::Result;
use crate::tensor::MemoryLayout;

const BACKWARD: Kernel = Kernel { file: "swiglu", name: "swiglu_bwd" };
const THREADS: usize = 256;

/// Of dx, gate and up, `[T, F]` each: x, dgate and dup where they lie.
///
/// # Safety
/// There are `tokens` rows of `width` at each pointer.
pub(super) unsafe fn swiglu_bwd(
    cuda: &Cuda,
    [dx, gate, up]: [Pointer; 3],
    tokens: usize,
    width: usize,
) -> Result<()> {
    // A thread computes eight columns of one row.
    let threads = width.div_ceil(8).next_multiple_of(32).clamp(32, THREADS);
    let grid = Grid { blocks: [tokens, width.div_ceil(8 * threads), 1], threads, more_shared: 0 };
    let (f, ld) = (int("F", width)?, int("the row of F", DeviceMemory::row(width))?);
    // SAFETY: as the caller says.
    unsafe { cuda.launch(BACKWARD, grid, &[("T", tokens), ("F", width)], (dx, gate, up, f, ld)) }
}
