//! See [`crate::ops::rope`].

use super::Cuda;
use super::launch::{Grid, Kernel, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::rope::Rope;
use crate::tensor::{MemoryLayout, Real};

const ROTATE: Kernel = Kernel { file: "rope", name: "rope" };

/// A block a token; a thread rotates eight pairs at a time where K divides by 16, else one.
fn grid(tokens: usize, heads: usize, dim: usize) -> Grid {
    let pairs = heads * dim / 2;
    let steps = if dim.is_multiple_of(16) { pairs / 8 } else { pairs };
    Grid::line(tokens, steps.next_multiple_of(32).clamp(32, 1024))
}

pub fn rope<T: Real>(cuda: &Cuda, op: Rope<'_, DeviceMemory, T>) -> Result<()> {
    op.check()?;
    let (tokens, heads, dim) = (op.rows.len(), op.heads, op.head_dim);
    let rows = cuda.list(Kind::Rows, op.rows)?;
    let ld = int("the row of H·K", DeviceMemory::row(heads * dim))?;
    let sign = if op.inverse { -1.0f32 } else { 1.0 };
    let args = (op.x, op.cos, op.sin, rows.view(), int("heads", heads)?, int("K", dim)?, ld, sign);
    let sizes = [("T", tokens), ("heads", heads), ("K", dim)];
    // SAFETY: `check` compared x with T rows of heads · K, and each row of the tables with P.
    unsafe { cuda.launch(ROTATE, grid(tokens, heads, dim), &sizes, args) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::tests::device;
    use crate::ops::cases::rope::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda]);
        }
    }

    #[test]
    fn a_block_a_token() {
        assert_eq!(grid(7, 32, 128), Grid::line(7, 256));
        assert_eq!(grid(7, 3, 6), Grid::line(7, 32));
        assert_eq!(grid(7, 32, 100).threads, 1024);
    }
}
