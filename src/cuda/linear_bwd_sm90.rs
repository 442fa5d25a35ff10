//! See [`super::linear_bwd`]: the launch of `kernels/linear_bwd_sm90.cu`, for Hopper.

use super::Cuda;
use super::launch::{Arg, Grid, Pointer};
use super::linear_bwd::{OUTPUTS, Task as Portable, kernel};
use super::lora::{Mask, Table};
use super::tensor_map::{MatrixAt, TensorMap};
use super::tile::Tile;
use crate::error::Result;

/// Rows of the boxes that u and dy, and that A and W are copied by.
const BOX: u32 = 128;
const BOX_ACROSS: u32 = 64;

#[repr(C)]
struct Task {
    u: TensorMap,
    a: TensorMap,
    dy: Table<TensorMap, OUTPUTS>,
    w: Table<TensorMap, OUTPUTS>,
    dx: Pointer,
    tokens: i32,
    inner: i32,
    ld_x: i32,
    ranks: i32,
    outputs: i32,
    drops: i32,
    width: Table<i32, OUTPUTS>,
    dropout: Mask,
    unused: [u64; 7],
}

// SAFETY: `struct Task` of linear_bwd_sm90.cu.
unsafe impl Arg for Task {
    const SIZE: usize = size_of::<Task>();
}

/// Starts what `of` asks the other kernels for; `sizes` are told in errors.
///
/// # Safety
/// Its matrices hold what the sizes say.
pub(super) unsafe fn launch(cuda: &Cuda, of: &Portable, sizes: &[(&'static str, usize)]) -> Result<()> {
    let map = |data, rows: i32, columns: i32, ld: i32, box_rows| {
        let (rows, columns, ld) = (rows as usize, columns as usize, ld as usize);
        TensorMap::new(&cuda.driver, MatrixAt { data, rows, columns, ld }, box_rows)
    };
    let (mut dy, mut w, mut width) = (vec![], vec![], vec![]);
    for output in &of.output.0[..of.outputs as usize] {
        dy.push(map(output.dy, of.tokens, output.width, output.ld, BOX)?);
        w.push(map(output.w, output.width, of.inner, of.ld_w, BOX_ACROSS)?);
        width.push(output.width);
    }
    let task = Task {
        u: map(of.u, of.tokens, of.ranks, of.ld_u, BOX)?,
        a: map(of.a, of.ranks, of.inner, of.ld_a, BOX_ACROSS)?,
        dy: Table::new(&dy),
        w: Table::new(&w),
        dx: of.dx,
        tokens: of.tokens,
        inner: of.inner,
        ld_x: of.ld_x,
        ranks: of.ranks,
        outputs: of.outputs,
        drops: of.drops,
        width: Table::new(&width),
        dropout: of.dropout,
        unused: [0; 7],
    };
    let tiles = Tile::Hopper.count(of.tokens as usize, std::iter::once(of.inner as usize));
    let grid = Grid::line(tiles.min(cuda.driver.multiprocessors), Tile::Hopper.threads());
    // SAFETY: the caller answers for the matrices.
    unsafe { cuda.launch(kernel(Tile::Hopper), grid, sizes, (task,)) }
}
