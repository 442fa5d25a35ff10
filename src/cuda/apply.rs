//! See [`crate::ops::apply`].

use super::Cuda;
use super::gram::{side, table};
use super::launch::{Grid, Kernel, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::apply::Apply;
use crate::ops::gram::Stack;

const APPLY: Kernel = Kernel { file: "apply", name: "apply" };
const THREADS: usize = 256;
/// Numbers of a tile.
const TILE: usize = 4096;

fn tiles(stack: &Stack) -> usize {
    let side = side(stack.rank);
    stack.rank.div_ceil(side) * stack.rows.div_ceil(TILE / side)
}

pub fn apply(cuda: &Cuda, op: Apply<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let (table, blocks) = table("apply", op.stacks, tiles)?;
    let table = cuda.list(Kind::Segments, &table)?;
    let count = op.stacks.len();
    let args = (op.out, op.x, op.w, table.view(), int("stacks", count)?);
    // SAFETY: `check` compared the views with the stacks, one after the other as in the table.
    unsafe { cuda.launch(APPLY, Grid::line(blocks, THREADS), &[("stacks", count)], args) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        if let Some(cuda) = crate::cuda::tests::device() {
            crate::ops::cases::apply::conforms(&[cuda]);
        }
    }
}
