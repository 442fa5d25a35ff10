//! See [`super::linear`]: the launch of `kernels/linear_sm90.cu`, for Hopper.

use super::Cuda;
use super::launch::{Arg, Grid, Pointer, int};
use super::linear::{OUTPUTS, Placed, Product, kernel};
use super::lora::{Table, after};
use super::store::DeviceMemory;
use super::tensor_map::{MatrixAt, TensorMap};
use super::tile::Tile;
use crate::cuda_sizes::thin_row;
use crate::error::Result;
use crate::tensor::MemoryLayout;

/// Groups of rows with an adapter in all outputs of a launch.
const GROUPS: usize = 12;
/// Rows of the boxes that x, W, t and s·B are copied by.
const BOX: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Output {
    y: Pointer,
    bias: Pointer,
    width: i32,
    ld: i32,
    groups_end: i32,
    tiles_end: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Rows {
    start: i32,
    end: i32,
    rank: i32,
    unused: i32,
}

#[repr(C)]
struct Task {
    x: TensorMap,
    w: Table<TensorMap, OUTPUTS>,
    t: Table<TensorMap, GROUPS>,
    factor: Table<TensorMap, GROUPS>,
    residual: Pointer,
    h: Pointer,
    tokens: i32,
    copies: i32,
    inner: i32,
    across: i32,
    output: Table<Output, OUTPUTS>,
    group: Table<Rows, GROUPS>,
    unused: [u64; 4],
}

// SAFETY: `struct Task` of linear_sm90.cu.
unsafe impl Arg for Task {
    const SIZE: usize = size_of::<Task>();
}

/// Whether the kernel makes a product over `inner` with this many groups; else it is the other kernels'.
pub(super) fn fits(inner: usize, groups: usize) -> bool {
    inner > 0 && groups <= GROUPS
}

/// Starts the product of `outputs`, which have at most `GROUPS` groups.
///
/// # Safety
/// The views hold what the sizes say.
pub(super) unsafe fn launch(cuda: &Cuda, product: &Product, outputs: &[Placed]) -> Result<()> {
    let Product { tokens, inner, pair, .. } = *product;
    let copies = product.rows / tokens;
    let map =
        |data, rows, columns, ld| TensorMap::new(&cuda.driver, MatrixAt { data, rows, columns, ld }, BOX);
    let ld = DeviceMemory::row(inner);
    let columns = Tile::Hopper.columns() / if pair { 2 } else { 1 };
    let (mut w, mut t, mut factor, mut table, mut groups) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut across, mut out) = (0, 0);
    for placed in outputs {
        let of = &placed.output;
        let (width, ld_t) = (of.width as usize, of.ld_t as usize);
        w.push(map(of.w, width, inner, ld)?);
        for g in &placed.groups {
            let (start, end, rank) = (g.start as usize, g.end as usize, g.rank as usize);
            t.push(map(after(of.t, start * ld_t, 2), end - start, rank, ld_t)?);
            factor.push(map(g.factor, width, rank, thin_row(rank))?);
            groups.push(Rows { start: g.start, end: g.end, rank: g.rank, unused: 0 });
        }
        across += width.div_ceil(columns);
        out += width;
        table.push(Output {
            y: of.y,
            bias: of.bias,
            width: of.width,
            ld: of.ld,
            groups_end: int("groups", groups.len())?,
            tiles_end: int("tiles", across)?,
        });
    }
    if pair {
        across /= 2;
    }
    let tiles = copies * tokens.div_ceil(Tile::Hopper.rows()) * across;
    int("tiles", tiles)?;
    let task = Task {
        x: map(product.x, tokens, inner, ld)?,
        w: Table::new(&w),
        t: Table::new(&t),
        factor: Table::new(&factor),
        residual: product.residual,
        h: product.h,
        tokens: int("T", tokens)?,
        copies: int("C", copies)?,
        inner: int("I", inner)?,
        across: int("tiles", across)?,
        output: Table::new(&table),
        group: Table::new(&groups),
        unused: [0; 4],
    };
    let grid = Grid::line(tiles.min(cuda.driver.multiprocessors), Tile::Hopper.threads());
    let sizes = [("T", product.rows), ("I", inner), ("O", out)];
    // SAFETY: the caller answers for the views.
    unsafe { cuda.launch(kernel(Tile::Hopper, pair), grid, &sizes, (task,)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_adapters_are_for_the_other_kernels() {
        assert!(fits(4096, 0) && fits(1, 12));
        assert!(!fits(4096, 13) && !fits(0, 1));
    }
}
