//! See [`crate::ops::linear::LinearBwd`].
//!
//! A and (s·B)ᵀ become bf16 in scratch; one pass over each dy makes dB and u; dx is one product whose K is all ranks and
//! then all outputs; where x is made again, it takes the place of dx; one pass over x makes every dA.

use super::Cuda;
use super::launch::{Arg, Grid, Kernel, Pointer, int};
use super::linear_bwd_sm90;
use super::lora::{Factor, GradientPart, Mask, Part, Table, Wide, after};
use super::store::DeviceMemory;
use super::swiglu::swiglu_bwd;
use super::tile::Tile;
use crate::cuda_sizes::{GRADIENT_COLUMNS, SPAN, bf16_part, part, partial_row, thin_row};
use crate::error::Result;
use crate::ops::ensure;
use crate::ops::linear::{Below, LinearBwd, Lora};
use crate::tensor::{Frozen, Length, MemoryLayout, Real};

const OP: &str = "linear_bwd";
/// Outputs of one launch.
pub(super) const OUTPUTS: usize = 4;

pub(super) fn kernel(tile: Tile) -> Kernel {
    let (file, name) = match tile {
        Tile::Small => ("linear_bwd", "linear_bwd_64"),
        Tile::Square => ("linear_bwd", "linear_bwd_128"),
        Tile::Wide => ("linear_bwd", "linear_bwd_256"),
        Tile::Hopper => ("linear_bwd_sm90", "linear_bwd_sm90"),
    };
    Kernel { file, name }
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Gradient {
    pub dy: Pointer,
    pub w: Pointer,
    pub width: i32,
    pub ld: i32,
}

#[repr(C)]
pub(super) struct Task {
    pub dx: Pointer,
    pub u: Pointer,
    pub a: Pointer,
    pub tokens: i32,
    pub inner: i32,
    pub ld_x: i32,
    pub ld_w: i32,
    pub ranks: i32,
    pub ld_u: i32,
    pub ld_a: i32,
    pub outputs: i32,
    pub drops: i32,
    pub dropout: Mask,
    pub unused: u32,
    pub output: Table<Gradient, OUTPUTS>,
}

// SAFETY: `struct Task` of linear_bwd.cu.
unsafe impl Arg for Task {
    const SIZE: usize = size_of::<Task>();
}

pub fn linear_bwd<T: Real>(cuda: &Cuda, op: LinearBwd<'_, DeviceMemory, T>) -> Result<()> {
    let inner = op.check()?;
    let tokens = op.tokens;
    ensure(OP, op.outs.len() <= OUTPUTS, || {
        format!("{} outputs of one x, at most {OUTPUTS}", op.outs.len())
    })?;
    if tokens == 0 || inner == 0 {
        return Ok(());
    }
    let ld = DeviceMemory::row(inner);
    let width = |j: usize| op.outs[j].w.size().0;
    // With the adapters before them.
    let mut ranks = 0;
    let mut adapted: Vec<(usize, Lora, usize)> = Vec::new();
    for (j, out) in op.outs.iter().enumerate() {
        if let Some(l) = out.lora.filter(|l| l.rank > 0 && width(j) > 0) {
            adapted.push((j, l, ranks));
            ranks += l.rank;
        }
    }

    // Scratch: A, the outputs' (s·B)ᵀ, u, and partial sums of one gradient and one u at a time.
    let most = |f: &dyn Fn(usize, usize) -> usize| {
        adapted.iter().map(|&(j, l, _)| f(width(j), l.rank)).max().unwrap_or(0)
    };
    let a_len = ranks * ld;
    let b_len: usize = adapted.iter().map(|&(j, l, _)| l.rank * DeviceMemory::row(width(j))).sum();
    let spans = tokens.div_ceil(SPAN);
    let gradients = most(&|o, r| spans * o * partial_row(r));
    let gradients = gradients.max(spans * inner * partial_row(ranks));
    let thin = most(&|o, r| o.div_ceil(GRADIENT_COLUMNS) * tokens * partial_row(r));
    let (factors_len, u_len) = (bf16_part(a_len + b_len), bf16_part(tokens * thin_row(ranks)));
    let need = factors_len + u_len + part(gradients) + part(thin);
    ensure(OP, adapted.is_empty() || op.scratch.len() >= need, || {
        format!("scratch holds {} elements, expected {need}", op.scratch.len())
    })?;
    let a = op.scratch.pointer();
    let u = after(a, factors_len, 4);
    let partial = after(u, u_len, 4);
    let thin_partial = after(partial, part(gradients), 4);

    let (params, grads) = (op.params.pointer(), op.grads.pointer());
    let mut jobs = Vec::with_capacity(2 * adapted.len());
    let mut b = after(a, a_len, 2);
    let mut passes = Vec::with_capacity(adapted.len());
    let (i, row_i, row_u) =
        (int("I", inner)?, int("the row of I", ld)?, int("the row of R", thin_row(ranks))?);
    for &(j, l, first) in &adapted {
        let (o, row) = (width(j), DeviceMemory::row(width(j)));
        let (columns, rank) = (int("O", o)?, int("R", l.rank)?);
        let from = |at: usize| after(params, at, 4);
        let out = after(a, first * ld, 2);
        jobs.push(Factor {
            out,
            from: from(l.a),
            rows: rank,
            columns: i,
            ld: row_i,
            step_row: i,
            step_column: 1,
            scale: 1.0,
        });
        let row_o = int("the row of O", row)?;
        jobs.push(Factor {
            out: b,
            from: from(l.b),
            rows: rank,
            columns,
            ld: row_o,
            step_row: 1,
            step_column: rank,
            scale: l.scale,
        });
        let db = GradientPart {
            grad: after(grads, l.b, 4),
            first: 0,
            rank,
            step_column: rank,
            step_rank: 1,
            scale: l.scale,
            unused: 0,
        };
        let u = Part { t: after(u, first, 2), ld: row_u, first: 0, rank, width: rank };
        let dy = Wide { data: op.outs[j].dy.pointer(), width: o, ld: row };
        let t = Wide { data: op.outs[j].t.pointer(), width: l.rank, ld: DeviceMemory::row(l.rank) };
        passes.push((db, u, b, dy, t));
        b = after(b, l.rank * row, 2);
    }
    let (x, dx) = match &op.below {
        Below::Kept { x, dx } => (x.pointer(), dx.as_ref().map(|dx| dx.pointer())),
        Below::SwiGlu { x, .. } => (x.pointer(), Some(x.pointer())),
    };
    let needs_u = dx.is_some() || !op.freeze_a;
    // SAFETY: `check` found every A and B within the parameters; scratch has room for all.
    unsafe { cuda.factors(&jobs)? };
    for (db, u, b, dy, t) in passes {
        let u = needs_u.then_some((u, thin_partial, b));
        // SAFETY: `check` compared dy and t with T rows; partial sums have room, as counted above.
        unsafe { cuda.gradient(&[db], u, partial, dy, t, tokens, None)? };
    }
    if let Some(dx) = dx {
        let mut outputs = Vec::with_capacity(op.outs.len());
        for out in op.outs.iter().filter(|out| out.w.size().0 > 0) {
            let o = out.w.size().0;
            let (width, ld) = (int("O", o)?, int("the row of O", DeviceMemory::row(o))?);
            outputs.push(Gradient { dy: out.dy.pointer(), w: out.w.pointer(), width, ld });
        }
        let task = Task {
            dx,
            u,
            a,
            tokens: int("T", tokens)?,
            inner: i,
            ld_x: row_i,
            ld_w: row_i,
            ranks: int("R", ranks)?,
            ld_u: row_u,
            ld_a: row_i,
            outputs: int("outputs", outputs.len())?,
            drops: i32::from(op.dropout.is_some() && ranks > 0),
            dropout: Mask::new(op.dropout),
            unused: 0,
            output: Table::new(&outputs),
        };
        let o: usize = (0..op.outs.len()).map(width).sum();
        // SAFETY: `check` compared all views with T rows of I and of the outputs.
        unsafe { products(cuda, task, &[("T", tokens), ("I", inner), ("O", o), ("R", ranks)])? };
    }
    if let Below::SwiGlu { x, gate, up } = &op.below {
        let lie = [x, gate, up].map(|x| x.pointer());
        // SAFETY: `check` compared all three with T rows of I.
        unsafe { swiglu_bwd(cuda, lie, tokens, inner)? };
    }
    if !op.freeze_a && !adapted.is_empty() {
        let scale = Mask::new(op.dropout).scale;
        let mut parts = Vec::with_capacity(adapted.len());
        for &(_, l, first) in &adapted {
            let (first, rank) = (int("R", first)?, int("R", l.rank)?);
            let grad = after(grads, l.a, 4);
            parts.push(GradientPart { grad, first, rank, step_column: 1, step_rank: i, scale, unused: 0 });
        }
        let x = Wide { data: x, width: inner, ld };
        let u = Wide { data: u, width: ranks, ld: thin_row(ranks) };
        // SAFETY: x and u have T rows; partial sums have room, as counted above.
        unsafe { cuda.gradient(&parts, None, partial, x, u, tokens, op.dropout)? };
    }
    Ok(())
}

/// Launches what makes dx.
///
/// # Safety
/// As of [`Cuda::launch`], of `task`; `sizes` are its T, I, O and R.
unsafe fn products(cuda: &Cuda, task: Task, sizes: &[(&'static str, usize); 4]) -> Result<()> {
    let [(_, tokens), (_, inner), ..] = *sizes;
    let tile = cuda.tile((tokens, 1), std::iter::once(inner), true);
    if tile == Tile::Hopper {
        // SAFETY: as the caller says.
        return unsafe { linear_bwd_sm90::launch(cuda, &task, sizes) };
    }
    let grid = Grid::line(tile.count(tokens, std::iter::once(inner)), tile.threads());
    // SAFETY: as the caller says.
    unsafe { cuda.launch(kernel(tile), grid, sizes, (task,)) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::tests::{device, device_with_tile};
    use crate::ops::cases::linear::backward_conforms;
    use crate::tensor::DType;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            backward_conforms::<_, bf16>(&[cuda], &[DType::BF16, DType::F32]);
        }
    }

    #[test]
    fn as_the_reference_with_any_tile() {
        for tile in [Tile::Square, Tile::Wide, Tile::Hopper] {
            if let Some(cuda) = device_with_tile(tile) {
                backward_conforms::<_, bf16>(&[cuda], &[DType::BF16]);
            }
        }
    }
}
