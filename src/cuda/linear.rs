//! See [`crate::ops::linear`].
//!
//! The adapters' A and s·B become bf16 in scratch; `t = x Aᵀ` of all outputs with groups of the same rows is one pass
//! over x; then all outputs are one launch, each adapter a segment of K of its own.

use std::ops::Range;

use super::Cuda;
use super::launch::{Arg, Grid, Kernel, Pointer, int};
use super::linear_sm90;
use super::lora::{Factor, Part, Span, Table, Wide, after};
use super::store::DeviceMemory;
use super::tile::Tile;
use crate::cuda_sizes::{bf16_part, part, partial_row, thin_row, thin_splits};
use crate::error::Result;
use crate::ops::ensure;
use crate::ops::linear::{Epilogue, Linear, Lora};
use crate::tensor::{Frozen, Length, MemoryLayout, Real};

const OP: &str = "linear";
/// Outputs and groups of one launch.
pub(super) const OUTPUTS: usize = 4;
const GROUPS: usize = 144;

/// The kernels of each tile: one output at a time, and gate and up.
pub(super) fn kernel(tile: Tile, pair: bool) -> Kernel {
    let (file, name) = match (tile, pair) {
        (Tile::Small, false) => ("linear", "linear_64"),
        (Tile::Square, false) => ("linear", "linear_128"),
        (Tile::Wide, false) => ("linear", "linear_256"),
        (Tile::Hopper, false) => ("linear_sm90", "linear_sm90"),
        (Tile::Small, true) => ("linear", "linear_swiglu_64"),
        (Tile::Square, true) => ("linear", "linear_swiglu_128"),
        (Tile::Wide, true) => ("linear", "linear_swiglu_256"),
        (Tile::Hopper, true) => ("linear_sm90", "linear_swiglu_sm90"),
    };
    Kernel { file, name }
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Rows {
    pub factor: Pointer,
    pub start: i32,
    pub end: i32,
    pub rank: i32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Output {
    pub y: Pointer,
    pub w: Pointer,
    pub t: Pointer,
    pub bias: Pointer,
    pub width: i32,
    pub ld: i32,
    pub ld_t: i32,
    pub groups_end: i32,
    pub tiles_end: i32,
    pub unused: u32,
}

#[repr(C)]
struct Task {
    x: Pointer,
    residual: Pointer,
    h: Pointer,
    rows: i32,
    tokens: i32,
    inner: i32,
    ld_x: i32,
    ld_w: i32,
    outputs: i32,
    across: i32,
    unused: u32,
    output: Table<Output, OUTPUTS>,
    group: Table<Rows, GROUPS>,
}

// SAFETY: `struct Task` of linear.cu.
unsafe impl Arg for Task {
    const SIZE: usize = size_of::<Task>();
}

/// An output whose adapters have their places.
pub(super) struct Placed {
    pub output: Output,
    pub groups: Vec<Rows>,
}

/// Adapters of the same rows: their A lie below one another.
struct Cluster {
    rows: Range<usize>,
    /// Output and adapter.
    members: Vec<(usize, Lora)>,
}

impl Cluster {
    fn rank(&self) -> usize {
        self.members.iter().map(|(_, l)| l.rank).sum()
    }
}

fn clusters<T: Real>(op: &Linear<'_, DeviceMemory, T>) -> Vec<Cluster> {
    let mut all: Vec<Cluster> = Vec::new();
    for (j, out) in op.outs.iter().enumerate() {
        for group in out.groups.iter().filter(|g| !g.rows.is_empty() && g.lora.rank > 0) {
            let member = (j, group.lora);
            match all.iter_mut().find(|c| c.rows == group.rows) {
                Some(cluster) => cluster.members.push(member),
                None => all.push(Cluster { rows: group.rows.clone(), members: vec![member] }),
            }
        }
    }
    all
}

pub fn linear<T: Real>(cuda: &Cuda, op: Linear<'_, DeviceMemory, T>) -> Result<()> {
    let inner = op.check()?;
    let rows = op.tokens * op.copies;
    if rows == 0 {
        return Ok(());
    }
    let clusters = clusters(&op);
    let ld = DeviceMemory::row(inner);
    let widths: Vec<usize> = op.outs.iter().map(|out| out.w.size().0).collect();
    let ranks: Vec<usize> =
        op.outs.iter().map(|out| out.groups.iter().map(|g| g.lora.rank).max().unwrap_or(0)).collect();

    // Scratch: A of each cluster, s·B of each group, partial sums of one cluster at a time.
    let members = || clusters.iter().flat_map(|c| &c.members);
    let a_len: usize = clusters.iter().map(|c| c.rank() * ld).sum();
    let b_len: usize = members().map(|(j, l)| widths[*j] * thin_row(l.rank)).sum();
    let partial =
        |c: &Cluster| thin_splits(c.rows.len(), c.rank(), inner).0 * c.rows.len() * partial_row(c.rank());
    let need = bf16_part(a_len + b_len) + part(clusters.iter().map(partial).max().unwrap_or(0));
    ensure(OP, clusters.is_empty() || op.scratch.len() >= need, || {
        format!("scratch holds {} elements, expected {need}", op.scratch.len())
    })?;
    let scratch = op.scratch.pointer();
    let partial = after(scratch, bf16_part(a_len + b_len), 4);

    let params = op.params.pointer();
    let (mut a, mut b) = (scratch, after(scratch, a_len, 2));
    let mut jobs = Vec::new();
    let mut placed = Vec::with_capacity(op.outs.len());
    for (j, out) in op.outs.iter().enumerate() {
        let output = Output {
            y: out.y.as_ref().map_or(Pointer::NULL, |y| y.pointer()),
            w: out.w.pointer(),
            t: out.t.pointer(),
            bias: super::store::or_null(out.bias),
            width: int("O", widths[j])?,
            ld: int("the row of O", DeviceMemory::row(widths[j]))?,
            ld_t: int("the row of R", DeviceMemory::row(ranks[j]))?,
            ..Output::default()
        };
        placed.push(Placed { output, groups: Vec::new() });
    }
    let mut passes = Vec::with_capacity(clusters.len());
    for cluster in &clusters {
        let (start, mut first) = (a, 0);
        let mut parts = Vec::with_capacity(cluster.members.len());
        for &(j, l) in &cluster.members {
            let (o, rank, row) = (int("O", widths[j])?, int("R", l.rank)?, thin_row(l.rank));
            let from = |at: usize| after(params, at, 4);
            let (i, ld) = (int("I", inner)?, int("the row of I", ld)?);
            jobs.push(Factor {
                out: a,
                from: from(l.a),
                rows: rank,
                columns: i,
                ld,
                step_row: i,
                step_column: 1,
                scale: 1.0,
            });
            let ld = int("the row of R", row)?;
            let steps = (rank, 1);
            jobs.push(Factor {
                out: b,
                from: from(l.b),
                rows: o,
                columns: rank,
                ld,
                step_row: steps.0,
                step_column: steps.1,
                scale: l.scale,
            });
            let out = &mut placed[j];
            out.groups.push(Rows {
                factor: b,
                start: int("T", cluster.rows.start)?,
                end: int("T", cluster.rows.end)?,
                rank,
                unused: 0,
            });
            parts.push(Part { t: out.output.t, ld: out.output.ld_t, first, rank, width: out.output.ld_t });
            (a, b, first) = (after(a, l.rank * ld_of(inner), 2), after(b, widths[j] * row, 2), first + rank);
        }
        passes.push((cluster, start, parts));
    }
    // SAFETY: `check` found every A and B within the parameters; scratch has room for all.
    unsafe { cuda.factors(&jobs)? };
    let x = Wide { data: op.x.pointer(), width: inner, ld };
    for (cluster, a, parts) in passes {
        let span = Span { first: cluster.rows.start, rows: cluster.rows.len(), tokens: op.tokens };
        // SAFETY: x has T rows, t has C · T, which the cluster's rows are among; partial has room, as counted above.
        unsafe { cuda.thin(&parts, partial, x, a, cluster.rank(), span, op.dropout)? };
    }

    let (residual, h) = match &op.epilogue {
        Epilogue::None => (Pointer::NULL, Pointer::NULL),
        Epilogue::Residual(r) => (r.pointer(), Pointer::NULL),
        Epilogue::SwiGlu(h) => (Pointer::NULL, h.pointer()),
    };
    let pair = matches!(op.epilogue, Epilogue::SwiGlu(_));
    let product = Product { x: op.x.pointer(), residual, h, rows, tokens: op.tokens, inner, pair };
    let made = placed.into_iter().zip(&op.outs).filter(|(_, out)| out.y.is_some());
    let placed: Vec<Placed> = made.map(|(placed, _)| placed).collect();
    let mut rest = &placed[..];
    while !rest.is_empty() {
        let mut groups = 0;
        let fits = |p: &&Placed| {
            groups += p.groups.len();
            groups <= GROUPS
        };
        let count = rest.iter().take(OUTPUTS).take_while(fits).count();
        let whole = if pair { count == rest.len() } else { count > 0 };
        ensure(OP, whole, || {
            format!("more than {} adapters at a time", if pair { GROUPS / 2 } else { GROUPS })
        })?;
        let (now, later) = rest.split_at(count);
        // SAFETY: `check` compared all views with C · T rows of x and the outputs.
        unsafe { product.launch(cuda, now)? };
        rest = later;
    }
    Ok(())
}

fn ld_of(width: usize) -> usize {
    DeviceMemory::row(width)
}

/// What all launches of a product share.
pub(super) struct Product {
    pub x: Pointer,
    pub residual: Pointer,
    pub h: Pointer,
    pub rows: usize,
    pub tokens: usize,
    pub inner: usize,
    pub pair: bool,
}

impl Product {
    /// The outputs in one launch.
    ///
    /// # Safety
    /// The views hold what the sizes say.
    unsafe fn launch(&self, cuda: &Cuda, outputs: &[Placed]) -> Result<()> {
        let widths = outputs.iter().map(|p| p.output.width as usize);
        let groups: usize = outputs.iter().map(|p| p.groups.len()).sum();
        let tile = cuda.tile(
            (self.tokens, self.rows / self.tokens),
            widths.clone(),
            linear_sm90::fits(self.inner, groups),
        );
        if tile == Tile::Hopper {
            // SAFETY: as here.
            return unsafe { linear_sm90::launch(cuda, self, outputs) };
        }
        let columns = if self.pair { tile.columns() / 2 } else { tile.columns() };
        let (mut across, mut groups) = (0, Vec::new());
        let mut table = Vec::with_capacity(outputs.len());
        for placed in outputs {
            let mut output = placed.output;
            groups.extend_from_slice(&placed.groups);
            across += (output.width as usize).div_ceil(columns);
            output.groups_end = int("groups", groups.len())?;
            output.tiles_end = int("tiles", across)?;
            table.push(output);
        }
        if self.pair {
            across /= 2;
        }
        let ld = int("the row of I", DeviceMemory::row(self.inner))?;
        let task = Task {
            x: self.x,
            residual: self.residual,
            h: self.h,
            rows: int("T", self.rows)?,
            tokens: int("T", self.tokens)?,
            inner: int("I", self.inner)?,
            ld_x: ld,
            ld_w: ld,
            outputs: int("outputs", outputs.len())?,
            across: int("tiles", across)?,
            unused: 0,
            output: Table::new(&table),
            group: Table::new(&groups),
        };
        let sizes = [("T", self.rows), ("I", self.inner), ("O", widths.sum())];
        let grid = Grid::line(self.rows.div_ceil(tile.rows()) * across, tile.threads());
        // SAFETY: the caller answers for the views.
        unsafe { cuda.launch(kernel(tile, self.pair), grid, &sizes, (task,)) }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::tests::{device, device_with_tile};
    use crate::ops::cases::linear::forward_conforms;
    use crate::tensor::DType;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            forward_conforms::<_, bf16>(&[cuda], &[DType::BF16, DType::F32]);
        }
    }

    #[test]
    fn as_the_reference_with_any_tile() {
        for tile in [Tile::Square, Tile::Wide, Tile::Hopper] {
            if let Some(cuda) = device_with_tile(tile) {
                forward_conforms::<_, bf16>(&[cuda], &[DType::BF16]);
            }
        }
    }
}
