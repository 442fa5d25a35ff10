//! See [`crate::ops::embed`].

use super::Cuda;
use super::launch::{Grid, Kernel, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::embed::Embed;
use crate::tensor::Real;

const FORWARD: Kernel = Kernel { file: "embed", name: "embed" };

/// A block a row; a thread copies eight columns at a time.
fn grid(tokens: usize, width: usize) -> Grid {
    Grid::line(tokens, width.div_ceil(8).next_multiple_of(32).clamp(32, 1024))
}

pub fn embed<T: Real>(cuda: &Cuda, op: Embed<'_, DeviceMemory, T>) -> Result<()> {
    let (tokens, width) = op.check()?;
    let ids = cuda.list(Kind::Ids, op.ids)?;
    let (d, ld) = (int("D", width)?, int("the row of D", op.table.row())?);
    let args = (op.y, op.table.pointer(), ids.view(), d, ld);
    // SAFETY: `check` compared y with T rows of D, and each id with V; rows of y and of the table are padded alike.
    unsafe { cuda.launch(FORWARD, grid(tokens, width), &[("T", tokens), ("D", width)], args) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::tests::device;
    use crate::ops::cases::embed::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda]);
        }
    }

    #[test]
    fn a_block_a_token() {
        assert_eq!(grid(7, 4096), Grid::line(7, 512));
        assert_eq!((grid(1, 1).threads, grid(1, 100_000).threads), (32, 1024));
    }
}
