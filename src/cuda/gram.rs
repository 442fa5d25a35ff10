//! See [`crate::ops::gram`].

use super::Cuda;
use super::launch::{Grid, Kernel, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::error::{Error, Result};
use crate::ops::gram::{Gram, Stack};

const GRAM: Kernel = Kernel { file: "gram", name: "gram" };
const THREADS: usize = 256;

/// Rows and columns of a tile.
pub(super) fn side(rank: usize) -> usize {
    rank.next_power_of_two().clamp(16, 64)
}

/// The kernels' table of `stacks`, and the blocks of all: `blocks` says how many one has.
pub(super) fn table(
    op: &'static str,
    stacks: &[Stack],
    blocks: impl Fn(&Stack) -> usize,
) -> Result<(Vec<u32>, usize)> {
    let (mut table, mut numbers, mut squares, mut first) = (Vec::new(), 0u64, 0u64, 0);
    for stack in stacks {
        for long in [numbers, squares] {
            table.extend([long as u32, (long >> 32) as u32]);
        }
        for short in [first, stack.rows, stack.rank, side(stack.rank)] {
            let why = format!("{stack:?} in {first} blocks is more than kernels count");
            table.push(int("", short).map_err(|_| Error::Op { op, why })? as u32);
        }
        numbers += (stack.rows * stack.rank) as u64;
        squares += (stack.rank * stack.rank) as u64;
        first += blocks(stack);
    }
    Ok((table, first))
}

/// Tiles on and below the diagonal.
fn tiles(stack: &Stack) -> usize {
    let n = stack.rank.div_ceil(side(stack.rank));
    n * (n + 1) / 2
}

pub fn gram(cuda: &Cuda, op: Gram<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let (table, blocks) = table("gram", op.stacks, tiles)?;
    let table = cuda.list(Kind::Segments, &table)?;
    let count = op.stacks.len();
    let args = (op.out, op.x, table.view(), int("stacks", count)?);
    // SAFETY: `check` compared the views with the stacks, one after the other as in the table.
    unsafe { cuda.launch(GRAM, Grid::line(blocks, THREADS), &[("stacks", count)], args) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        if let Some(cuda) = crate::cuda::tests::device() {
            crate::ops::cases::gram::conforms(&[cuda]);
        }
    }
}
