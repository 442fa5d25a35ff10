//! See [`crate::ops::linear`].
//!
//! The adapters' `t = x Aᵀ` first, by rows; then the outputs, by tiles: base product, adapters' part, bias, residual and
//! rounding are made one after another while the tile is in the cache. An adapter of all rows is part of the base
//! product's last step, and what comes after it follows each strip of that.

#![allow(unsafe_code)]

use std::ops::Range;

use super::dropout::Mask;
use super::operand::{Source, Term, add, add_to, depth, narrow, weight_in_place};
use super::product::{DEPTH, Done, End, More, Shared, TileMut};
use super::swiglu::Gate;
use super::thin::{Factor, Lines, Thin, multiply};
use super::tiles::{Grid, Rooms, enough};
use crate::backend::LinearSize;
use crate::error::Result;
use crate::host::{Host, HostMatrix};
use crate::ops::linear::{Epilogue, Linear, LinearOut, Lora, LoraRows};
use crate::tensor::{DType, Frozen, Real};

/// Rows of x that one task multiplies with the adapters' A.
pub(super) const THIN: usize = 128;

/// Room of one thread, see [`linear_scratch`].
fn room<T: Real>(size: LinearSize) -> usize {
    let single = T::DTYPE == DType::F32;
    let (thin, k) = (THIN.min(size.copies * size.tokens), depth(size.inner));
    // x widened, A packed, and sums of t.
    let x = if single && !size.dropout { 0 } else { thin * k };
    let sums = if single { 0 } else { thin * size.rank };
    let t = if size.rank == 0 { 0 } else { x + sums + Factor::new(k, size.rank).len() };
    let (m, n) = Grid::most(size.tokens, size.out);
    // The output's tile and the base's, widened operands, and sB packed.
    let tiles = 1 + usize::from(size.copies > 1);
    let base = if single { 0 } else { m * k } + if weight_in_place::<T>(size.dtype) { 0 } else { n * k };
    let widened = if single { 0 } else { m * size.rank };
    t.max(tiles * m * n + base + Factor::new(size.rank, n).len() + widened)
}

/// f32 elements of scratch that [`linear`] uses on `threads` threads.
pub fn linear_scratch<T: Real>(size: LinearSize, threads: usize) -> usize {
    threads * room::<T>(size)
}

/// Computes [`Linear`].
pub fn linear<T: Real>(op: Linear<'_, Host, T>) -> Result<()> {
    let inner = op.check()?;
    let Linear { mut outs, epilogue, scratch, x, params, tokens, copies, dropout } = op;
    let size = LinearSize {
        tokens,
        copies,
        out: outs.iter().map(|o| o.w.size().0).sum(),
        inner,
        rank: outs.iter().map(|o| width(o.groups)).sum(),
        adapters: outs.iter().map(|o| o.groups.len()).max().unwrap_or(0),
        dtype: widest(outs.iter().map(|o| o.w)),
        dropout: dropout.is_some(),
    };
    let need = room::<T>(size);
    enough("linear", scratch, need * rayon::current_num_threads())?;
    let rooms = Rooms::new(scratch, need);
    let mask = dropout.map(Mask::new);
    let x = Rows { data: x, inner, tokens, mask: mask.as_ref() };
    if size.rank > 0 {
        thin(&mut outs, &rooms, x, params, copies * tokens);
    }
    let outputs = outs.iter_mut().filter_map(|out| {
        let y = Shared::new(out.y.as_deref_mut()?);
        Some(Output { y, t: &*out.t, w: out.w, bias: out.bias, groups: out.groups })
    });
    Pass { outputs: outputs.collect(), x, params, copies }.run(epilogue, &rooms);
    Ok(())
}

/// R of the `t` of these groups.
fn width(groups: &[LoraRows]) -> usize {
    groups.iter().map(|g| g.lora.rank).max().unwrap_or(0)
}

/// The dtype of the weights; where they differ, one that needs room.
pub(super) fn widest<'a>(weights: impl Iterator<Item = &'a HostMatrix>) -> DType {
    let mut all = weights.map(|w| w.dtype());
    all.find(|&d| d != DType::F32).unwrap_or(DType::F32)
}

/// `A[R, I]`.
pub(super) fn a(params: &[f32], l: Lora, inner: usize) -> Lines<'_, f32> {
    Lines { data: &params[l.a..][..l.rank * inner], stride: inner }
}

/// `B[O, R]`.
pub(super) fn b(params: &[f32], l: Lora, o: usize) -> Lines<'_, f32> {
    Lines { data: &params[l.b..][..o * l.rank], stride: l.rank }
}

/// x, and what dropout leaves of it.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) inner: usize,
    pub(super) tokens: usize,
    pub(super) mask: Option<&'a Mask>,
}

impl<'a, T: Real> Rows<'a, T> {
    /// The base's operand.
    pub(super) fn base(&self) -> Source<'a, T> {
        Source::Real { data: self.data, stride: self.inner }
    }

    /// The adapters' operand, without the division by 1 − p.
    pub(super) fn adapters(&self) -> Source<'a, T> {
        match self.mask {
            None => self.base(),
            Some(mask) => Source::Masked { data: self.data, stride: self.inner, mask },
        }
    }

    /// 1 / (1 − p).
    pub(super) fn scale(&self) -> f32 {
        self.mask.map_or(1.0, |m| m.scale)
    }
}

/// `t = (m∘x) Aᵀ / (1 − p)` of all outputs: one pass over x, by blocks of rows.
fn thin<T: Real>(
    outs: &mut [LinearOut<'_, Host, T>],
    rooms: &Rooms<'_>,
    x: Rows<'_, T>,
    params: &[f32],
    rows: usize,
) {
    // Blocks do not cross from one copy of x to the next.
    let blocks = x.tokens.div_ceil(THIN);
    let rank: usize = outs.iter().map(|out| width(out.groups)).sum();
    let ts: Vec<_> =
        outs.iter_mut().map(|out| (width(out.groups), Shared::new(&mut *out.t), out.groups)).collect();
    let (source, step) = (x.adapters(), depth(x.inner).max(1));
    rooms.each(blocks * (rows / x.tokens.max(1)), |i, room| {
        let (copy, start) = (i / blocks * x.tokens, i % blocks * THIN);
        let of_x = start..(start + THIN).min(x.tokens);
        let single = T::DTYPE == DType::F32;
        let (sums, room) = room.split_at_mut(if single { 0 } else { of_x.len() * rank });
        let (xs, room) = room.split_at_mut(if source.in_place() { 0 } else { of_x.len() * step });
        let mut pieces = pieces(&ts, copy + of_x.start..copy + of_x.end, sums);
        // Once where there is no x either.
        for start in (0..x.inner.max(1)).step_by(step) {
            let xs = source.wide(of_x.clone(), start..(start + step).min(x.inner), xs);
            for Piece { sums, local, lora, .. } in &mut pieces {
                let a = Thin::Rows(a(params, *lora, x.inner).from(0, start));
                xs.multiply::<T>(&mut sums.columns(lora.rank), start > 0, local.clone(), a, 1.0, room);
            }
        }
        pieces.into_iter().for_each(|piece| piece.finish(x.scale()));
    });
}

/// Rows of one group's t in one block of rows.
struct Piece<'t, T> {
    /// Its sums, all columns of t.
    sums: TileMut<'t, f32>,
    /// Where they are rounded to; none where they are made in t itself.
    t: Option<TileMut<'t, T>>,
    /// Its rows in the block.
    local: Range<usize>,
    lora: Lora,
}

/// What the rows `block` of each output's t consist of; sums of what is no f32 are made in `room`.
fn pieces<'t, T: Real>(
    ts: &'t [(usize, Shared<'_, T>, &[LoraRows])],
    block: Range<usize>,
    mut room: &'t mut [f32],
) -> Vec<Piece<'t, T>> {
    let mut pieces = Vec::new();
    for (width, t, groups) in ts {
        for LoraRows { rows, lora } in *groups {
            let (rows, lora) = (rows.start.max(block.start)..rows.end.min(block.end), *lora);
            if rows.is_empty() {
                continue;
            }
            let local = rows.start - block.start..rows.end - block.start;
            // SAFETY: a row of t belongs to one group and one block of rows.
            let t = unsafe { t.tile(rows.start * width, rows.len(), *width, *width) };
            pieces.push(match t.into_single() {
                Ok(sums) => Piece { sums, t: None, local, lora },
                Err(t) => {
                    let sums;
                    (sums, room) = room.split_at_mut(rows.len() * width);
                    Piece { sums: TileMut::new(sums, rows.len(), *width), t: Some(t), local, lora }
                }
            });
        }
    }
    pieces
}

impl<T: Real> Piece<'_, T> {
    /// Scales the sums, rounds them into t, and makes its columns beyond the rank zeros.
    fn finish(mut self, scale: f32) {
        let rank = self.lora.rank;
        for r in 0..self.sums.size().0 {
            let (sums, beyond) = self.sums.row(r).split_at_mut(rank);
            sums.iter_mut().for_each(|sum| *sum *= scale);
            match &mut self.t {
                None => beyond.fill(0.0),
                Some(t) => {
                    let (t, beyond) = t.row(r).split_at_mut(rank);
                    narrow(t, sums);
                    beyond.fill(T::zeroed());
                }
            }
        }
    }
}

/// One output that has a second pass.
struct Output<'a, T> {
    y: Shared<'a, T>,
    t: &'a [T],
    w: &'a HostMatrix,
    bias: Option<&'a [f32]>,
    groups: &'a [LoraRows],
}

/// The second pass: the outputs by tiles.
struct Pass<'a, T> {
    outputs: Vec<Output<'a, T>>,
    x: Rows<'a, T>,
    params: &'a [f32],
    copies: usize,
}

impl<T: Real> Pass<'_, T> {
    fn run(&self, epilogue: Epilogue<'_, Host, T>, rooms: &Rooms<'_>) {
        let grid = |out: &Output<'_, T>| Grid::new(self.x.tokens, out.w.size().0, self.x.inner);
        match epilogue {
            Epilogue::SwiGlu(h) => {
                let f = self.outputs[0].w.size().0;
                let (h, grid) = (Shared::new(h), grid(&self.outputs[0]));
                rooms.each(grid.len(), |i, room| {
                    let ((m, n), mut gated) = (grid.at(i), Gate::new());
                    self.outputs.iter().for_each(|out| self.tile(out, None, m.clone(), n.clone(), room));
                    for copy in 0..self.copies {
                        let start = (copy * self.x.tokens + m.start) * f + n.start;
                        // SAFETY: tiles of a grid are disjoint, and so are copies.
                        let [mut h, mut gate, mut up] = [&h, &self.outputs[0].y, &self.outputs[1].y]
                            .map(|all| unsafe { all.tile(start, m.len(), n.len(), f) });
                        (0..m.len()).for_each(|r| gated.forward(h.row(r), gate.row(r), up.row(r)));
                    }
                });
            }
            Epilogue::None | Epilogue::Residual(_) => {
                let residual =
                    if let Epilogue::Residual(residual) = epilogue { Some(residual) } else { None };
                let grids: Vec<_> = self.outputs.iter().map(|out| (out, grid(out))).collect();
                rooms.each(grids.iter().map(|(_, grid)| grid.len()).sum(), |mut i, room| {
                    for (out, grid) in &grids {
                        if i < grid.len() {
                            let (m, n) = grid.at(i);
                            return self.tile(out, residual, m, n, room);
                        }
                        i -= grid.len();
                    }
                });
            }
        }
    }

    /// `t (sB)ᵀ` of some rows of y and the columns `n`, as operands, with room for what is packed and widened.
    fn adapter<'r>(
        &'r self,
        out: &'r Output<'_, T>,
        l: Lora,
        rows: Range<usize>,
        n: Range<usize>,
        packed: &'r mut [f32],
        widened: &'r mut [f32],
    ) -> More<'r> {
        let (b, factor) = (b(self.params, l, out.w.size().0).from(n.start, 0), Factor::new(l.rank, n.len()));
        let b = factor.matrix(factor.pack_transposed::<T>(packed, b, l.scale));
        let t = Source::Real { data: out.t, stride: width(out.groups) };
        More { a: t.block(rows, 0..l.rank, widened), b }
    }

    /// Rows `m` of x, columns `n` of one output, all copies.
    fn tile(
        &self,
        out: &Output<'_, T>,
        residual: Option<&[T]>,
        m: Range<usize>,
        n: Range<usize>,
        room: &mut [f32],
    ) {
        let (o, inner) = out.w.size();
        let area = m.len() * n.len();
        let (base, room) = room.split_at_mut(if self.copies > 1 { area } else { 0 });
        let (sums, room) = room.split_at_mut(area);
        let product =
            Term { left: self.x.base().by_columns(), right: Source::Weight(out.w).by_columns(), k: inner };
        let rank = width(out.groups);
        let (packed, room) = room.split_at_mut(Factor::new(rank, n.len()).len());
        let (widened, room) = room.split_at_mut(if T::DTYPE == DType::F32 { 0 } else { m.len() * rank });
        // Whether a part is added as the product's last step would, and the adapter of all rows, which is that step.
        let few = |l: &Lora| product.takes(l.rank, m.len());
        let whole = match out.groups {
            [group] if self.copies == 1 && group.rows == (0..self.x.tokens) => Some(group.lora).filter(few),
            _ => None,
        };
        if self.copies > 1 {
            let mut base = TileMut::new(base, m.len(), n.len());
            product.tile(&mut base, false, m.clone(), n.clone(), room, End::default());
        }
        for copy in 0..self.copies {
            let rows = copy * self.x.tokens + m.start..copy * self.x.tokens + m.end;
            // SAFETY: tiles of a grid are disjoint, and so are outputs and copies.
            let y = unsafe { out.y.tile(rows.start * o + n.start, m.len(), n.len(), o) };
            let (mut sum, y) = sums_of(y, sums, inner);
            let mut rounding = y.map(rounding);
            let mut done = |mut sums: TileMut<'_, f32>, (row, column): (usize, usize)| {
                let columns = n.start + column..n.start + column + sums.size().1;
                for r in 0..sums.size().0 {
                    if let Some(bias) = out.bias {
                        add_to(sums.row(r), &bias[columns.clone()]);
                    }
                    if let Some(residual) = residual {
                        add_to(sums.row(r), &residual[(rows.start + row + r) * o..][columns.clone()]);
                    }
                }
                if let Some(rounding) = &mut rounding {
                    rounding(sums, (row, column));
                }
            };
            // With the product, unless more comes after it.
            let at_once = self.copies == 1 && (whole.is_some() || out.groups.is_empty());
            if self.copies == 1 {
                let more = whole.map(|l| self.adapter(out, l, rows.clone(), n.clone(), packed, widened));
                let done = at_once.then_some(&mut done as Done<'_>);
                product.tile(&mut sum, false, m.clone(), n.clone(), room, End { more, done });
            } else {
                (0..m.len()).for_each(|r| sum.row(r).copy_from_slice(&base[r * n.len()..][..n.len()]));
            }
            for group in out.groups.iter().filter(|_| whole.is_none()) {
                let of_y = group.rows.start.max(rows.start)..group.rows.end.min(rows.end);
                if of_y.is_empty() {
                    continue;
                }
                let mut part = sum.part(of_y.start - rows.start..of_y.end - rows.start);
                let more = self.adapter(out, group.lora, of_y, n.clone(), packed, widened);
                match few(&group.lora) {
                    true => add::<T>(&mut part, more),
                    false => multiply(&mut part, true, more.a.lines(), more.b.lines(), group.lora.rank),
                }
            }
            if !at_once {
                done(sum, (0, 0));
            }
        }
    }
}

/// Where the sums of a tile of y are made: in y itself, or in `room`, and then y comes back too, for [`rounding`] to fill. In
/// `room` are those that are rounded, and those over several blocks of K, for rows of y may be a power of two apart and
/// push each other out of the caches meanwhile.
pub(super) fn sums_of<'t, T: Real>(
    y: TileMut<'t, T>,
    room: &'t mut [f32],
    k: usize,
) -> (TileMut<'t, f32>, Option<TileMut<'t, T>>) {
    let (rows, columns) = y.size();
    match if k <= DEPTH { y.into_single() } else { Err(y) } {
        Ok(y) => (y, None),
        Err(y) => (TileMut::new(room, rows, columns), Some(y)),
    }
}

/// Rounds sums into their places in `y`.
pub(super) fn rounding<T: Real>(mut y: TileMut<'_, T>) -> impl FnMut(TileMut<'_, f32>, (usize, usize)) {
    move |mut sums, (row, column)| {
        let (rows, columns) = sums.size();
        (0..rows).for_each(|r| narrow(&mut y.row(row + r)[column..][..columns], sums.row(r)));
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cpu::tests::on_threads;
    use crate::ops::cases::linear::forward_conforms;
    use crate::tensor::DType;

    const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

    #[test]
    fn as_the_reference_in_f32() {
        forward_conforms::<_, f32>(&on_threads(), &DTYPES);
    }

    #[test]
    fn as_the_reference_in_bf16() {
        forward_conforms::<_, bf16>(&on_threads(), &DTYPES);
    }
}
