//! See [`crate::ops::linear::LinearBwd`].
//!
//! First what passes over dy: `u = dy (sB)` by blocks of rows and `dB += s dyᵀ t` by blocks of columns. Then
//! `dx = Σ dy W + m∘(u A)/(1−p)` by tiles, the outputs one after another into the same tile, and `dA += uᵀ (m∘x)/(1−p)`
//! by blocks of columns. Where x is made again from gate and up, that is done with each strip of dx, which is not written
//! at all, and dA comes after it.

#![allow(unsafe_code)]

use std::ops::Range;

use super::dropout::Mask;
use super::linear::{Rows, THIN, a, b, rounding, sums_of, widest};
use super::operand::{Source, Term, depth, round, weight_in_place};
use super::product::{Done, End, Mat, More, Shared, TileMut};
use super::simd::fetch;
use super::swiglu::Gate;
use super::thin::{Factor, Lines, Thin, multiply};
use super::tiles::{Grid, Rooms, enough};
use crate::backend::LinearSize;
use crate::error::Result;
use crate::host::Host;
use crate::ops::linear::{Below, LinearBwd, LinearBwdOut, Lora};
use crate::tensor::{DType, Frozen, Real};

/// Rows of B or columns of A whose gradient one task makes.
const WIDE: usize = 256;

/// How many rows before they are used those of x, gate and up are asked for: in a tile they are too far apart for the
/// processor to see what comes.
const AHEAD: usize = 8;

/// Room of one thread, see [`linear_bwd_scratch`].
fn room<T: Real>(size: LinearSize) -> usize {
    let single = T::DTYPE == DType::F32;
    let (m, n) = Grid::most(size.tokens, size.inner);
    let (thin, k, wide) = (THIN.min(size.tokens), depth(size.out), depth(size.tokens));
    // dy widened and sB packed; dy widened and a block of dB.
    let u = Factor::new(k, size.rank).len() + if single { 0 } else { thin * k };
    let db = WIDE.min(size.out) * (size.rank + if single { 0 } else { wide });
    // Dy and W widened, A packed, and the tile.
    let base = if single { 0 } else { m * k } + if weight_in_place::<T>(size.dtype) { 0 } else { n * k };
    let dx = base + Factor::new(size.rank, n).len() + m * n;
    // A block of all dA, and x widened.
    let da = WIDE.min(size.inner) * (size.rank + if single && !size.dropout { 0 } else { wide });
    let thin = if size.rank == 0 { 0 } else { u.max(db).max(da) };
    thin.max(dx)
}

/// f32 elements of scratch that [`linear_bwd`] uses on `threads` threads: u and the threads' rooms.
pub fn linear_bwd_scratch<T: Real>(size: LinearSize, threads: usize) -> usize {
    size.tokens * size.rank + threads * room::<T>(size)
}

/// Computes [`LinearBwd`].
pub fn linear_bwd<T: Real>(op: LinearBwd<'_, Host, T>) -> Result<()> {
    let inner = op.check()?;
    let LinearBwd { below, grads, scratch, outs, params, tokens, dropout, freeze_a } = op;
    let size = LinearSize {
        tokens,
        copies: 1,
        out: outs.iter().map(|o| o.w.size().0).sum(),
        inner,
        rank: outs.iter().filter_map(|o| o.lora).map(|l| l.rank).sum(),
        adapters: 1,
        dtype: widest(outs.iter().map(|o| o.w)),
        dropout: dropout.is_some(),
    };
    let need = room::<T>(size);
    enough("linear_bwd", scratch, tokens * size.rank + need * rayon::current_num_threads())?;
    let (u, scratch) = scratch.split_at_mut(tokens * size.rank);
    let rooms = Rooms::new(scratch, need);
    let mask = dropout.map(Mask::new);
    let grads = Shared::new(grads);
    let needs_u = !freeze_a || !matches!(below, Below::Kept { dx: None, .. });
    let starts = outs.iter().scan(0, |at, out| {
        let start = *at;
        *at += tokens * out.lora.map_or(0, |l| l.rank);
        Some((start, out))
    });
    let adapted: Vec<_> = starts
        .filter_map(|(start, out)| Some(Adapted { start, out, lora: out.lora.filter(|l| l.rank > 0)? }))
        .collect();
    over_dy(u, &grads, &rooms, &adapted, params, tokens, needs_u);
    let (u, outs, adapted, mask) = (&*u, &outs[..], &adapted[..], mask.as_ref());
    let tiles = |to| {
        let grid = Grid::new(tokens, inner, size.out);
        Tiles { to, grid, inner, mask, outs, adapted, params, u }
    };
    let blocks = if freeze_a || adapted.is_empty() { 0 } else { inner.div_ceil(WIDE) };
    let rows = |data| Rows { data, inner, tokens, mask };
    match below {
        Below::Kept { x, dx: None } => {
            rooms.each(blocks, |i, room| gradient_of_a(&grads, i, u, adapted, rows(x), room));
        }
        Below::Kept { x, dx: Some(dx) } => {
            let tiles = tiles(To::Dx(Shared::new(dx)));
            rooms.each(tiles.grid.len() + blocks, |i, room| match i.checked_sub(tiles.grid.len()) {
                None => tiles.make(i, room),
                Some(i) => gradient_of_a(&grads, i, u, adapted, rows(x), room),
            });
        }
        Below::SwiGlu { x, gate, up } => {
            let tiles = tiles(To::SwiGlu([&mut *x, gate, up].map(Shared::new)));
            rooms.each(tiles.grid.len(), |i, room| tiles.make(i, room));
            rooms.each(blocks, |i, room| gradient_of_a(&grads, i, u, adapted, rows(&*x), room));
        }
    }
    Ok(())
}

/// An output with an adapter.
struct Adapted<'s, 'a, T: Real> {
    /// Where its `u[T, R]` starts.
    start: usize,
    out: &'s LinearBwdOut<'a, Host, T>,
    lora: Lora,
}

impl<T: Real> Adapted<'_, '_, T> {
    /// Its u from row `row` on.
    fn u<'u>(&self, u: &'u [f32], row: usize) -> Lines<'u, f32> {
        Lines { data: u, stride: self.lora.rank }.from(0, self.start + row * self.lora.rank)
    }
}

/// u and dB of all outputs.
fn over_dy<T: Real>(
    u: &mut [f32],
    grads: &Shared<'_, f32>,
    rooms: &Rooms<'_>,
    adapted: &[Adapted<'_, '_, T>],
    params: &[f32],
    tokens: usize,
    needs_u: bool,
) {
    let u = Shared::new(u);
    let blocks = if needs_u { tokens.div_ceil(THIN) } else { 0 };
    let tasks = |out: &Adapted<'_, '_, T>| blocks + out.out.w.size().0.div_ceil(WIDE);
    rooms.each(adapted.iter().map(tasks).sum(), |mut i, room| {
        for adapter in adapted {
            let count = tasks(adapter);
            if i >= count {
                i -= count;
                continue;
            }
            if i < blocks {
                let rows = i * THIN..(i * THIN + THIN).min(tokens);
                make_u(&u, adapter, params, rows, room);
            } else {
                let (o, start) = (adapter.out.w.size().0, (i - blocks) * WIDE);
                gradient_of_b(grads, adapter, start..(start + WIDE).min(o), tokens, room);
            }
            return;
        }
    });
}

/// Rows `rows` of `u = dy (sB)`, rounded to `T`.
fn make_u<T: Real>(
    u: &Shared<'_, f32>,
    adapter: &Adapted<'_, '_, T>,
    params: &[f32],
    rows: Range<usize>,
    room: &mut [f32],
) {
    let (o, l) = (adapter.out.w.size().0, adapter.lora);
    let dy = Source::Real { data: adapter.out.dy, stride: o };
    let step = depth(o).max(1);
    let (dys, room) = room.split_at_mut(if dy.in_place() { 0 } else { rows.len() * step });
    // SAFETY: each block of rows of each output's u is made by one task.
    let mut u = unsafe { u.tile(adapter.start + rows.start * l.rank, rows.len(), l.rank, l.rank) };
    // Once where there is no dy either.
    for start in (0..o.max(1)).step_by(step) {
        let ks = start..(start + step).min(o);
        let b = Thin::Columns(b(params, l, o).from(start, 0));
        let dy = dy.wide(rows.clone(), ks, dys);
        dy.multiply::<T>(&mut u, start > 0, 0..rows.len(), b, l.scale, room);
    }
    (0..rows.len()).for_each(|r| round::<T>(u.row(r)));
}

/// Rows `columns` of `dB += s dyᵀ t`.
fn gradient_of_b<T: Real>(
    grads: &Shared<'_, f32>,
    adapter: &Adapted<'_, '_, T>,
    columns: Range<usize>,
    tokens: usize,
    room: &mut [f32],
) {
    let (o, l) = (adapter.out.w.size().0, adapter.lora);
    let dy = Source::Real { data: adapter.out.dy, stride: o };
    let step = if dy.in_place() { tokens } else { depth(tokens) }.max(1);
    // Made as dBᵀ, whose rows are long.
    let (sums, room) = room.split_at_mut(l.rank * columns.len());
    sums.fill(0.0);
    for start in (0..tokens).step_by(step) {
        let rows = start..(start + step).min(tokens);
        let t = Lines { data: adapter.out.t, stride: l.rank }.from(start, 0);
        let dy = dy.wide(rows, columns.clone(), room);
        dy.outer(&mut TileMut::new(sums, l.rank, columns.len()), t);
    }
    // SAFETY: each block of each gradient is made by one task, and gradients are disjoint (`check`).
    let mut db = unsafe { grads.tile(l.b + columns.start * l.rank, columns.len(), l.rank, l.rank) };
    for c in 0..columns.len() {
        for (rho, db) in db.row(c).iter_mut().enumerate() {
            *db += l.scale * sums[rho * columns.len() + c];
        }
    }
}

/// dx by tiles.
struct Tiles<'s, 'a, T: Real> {
    to: To<'s, T>,
    grid: Grid,
    inner: usize,
    mask: Option<&'s Mask>,
    outs: &'s [LinearBwdOut<'a, Host, T>],
    adapted: &'s [Adapted<'s, 'a, T>],
    params: &'s [f32],
    u: &'s [f32],
}

/// Where dx goes.
enum To<'s, T> {
    Dx(Shared<'s, T>),
    /// x, gate and up.
    SwiGlu([Shared<'s, T>; 3]),
}

impl<'s, 'a, T: Real> Tiles<'s, 'a, T> {
    /// Tile `i`.
    fn make<'m>(&'m self, i: usize, room: &mut [f32]) {
        let (m, n) = self.grid.at(i);
        let (sums, room) = room.split_at_mut(m.len() * n.len());
        // SAFETY: tiles of a grid are disjoint.
        let tile = |all: &'m Shared<'s, T>| unsafe {
            all.tile(m.start * self.inner + n.start, m.len(), n.len(), self.inner)
        };
        match &self.to {
            To::Dx(dx) => {
                let k = self.outs.iter().map(|out| out.w.size().0).sum();
                let (mut sum, dx) = sums_of(tile(dx), sums, k);
                let mut rounding = dx.map(rounding);
                let done = rounding.as_mut().map(|done| done as Done<'_>);
                self.sums(&mut sum, done, m.clone(), n.clone(), room);
            }
            To::SwiGlu(all) => {
                let ([mut x, mut gate, mut up], mut gated) = (all.each_ref().map(tile), Gate::new());
                let mut done = |mut dx: TileMut<'_, f32>, (row, column): (usize, usize)| {
                    let (rows, columns) = dx.size();
                    for r in row..row + rows {
                        if r + AHEAD < m.len() {
                            for all in [&mut x, &mut gate, &mut up] {
                                fetch(&all.row(r + AHEAD)[column..][..columns]);
                            }
                        }
                        let [x, gate, up] =
                            [&mut x, &mut gate, &mut up].map(|all| &mut all.row(r)[column..][..columns]);
                        gated.backward(x, gate, up, dx.row(r - row));
                    }
                };
                let mut sum = TileMut::new(sums, m.len(), n.len());
                self.sums(&mut sum, Some(&mut done), m.clone(), n.clone(), room);
            }
        }
    }

    /// Rows `m`, columns `n`: each output's `dy W` and its adapter's part; the adapters' first, masked, where there is
    /// dropout.
    fn sums(
        &self,
        sum: &mut TileMut<'_, f32>,
        mut done: Option<Done<'_>>,
        m: Range<usize>,
        n: Range<usize>,
        room: &mut [f32],
    ) {
        // Its part is added with the product, but for dropout, which comes between.
        let with = |adapter: &&Adapted<'_, 'a, T>| {
            self.mask.is_none() && base(adapter.out).takes(adapter.lora.rank, m.len())
        };
        let mut keep = false;
        for adapter in self.adapted.iter().filter(|adapter| !with(adapter)) {
            let rank = adapter.lora.rank;
            let a = a(self.params, adapter.lora, self.inner).from(0, n.start);
            let a = Factor::new(rank, n.len()).pack::<T>(room, a, 1.0);
            multiply(sum, keep, adapter.u(self.u, m.start), a, rank);
            keep = true;
        }
        if let (Some(mask), true) = (self.mask, keep) {
            for (r, row) in m.clone().enumerate() {
                mask.apply(sum.row(r), (row * self.inner + n.start) as u64, mask.scale);
            }
        }
        for (at, out) in self.outs.iter().enumerate() {
            let adapter = self.adapted.iter().find(|adapter| std::ptr::eq(adapter.out, out)).filter(with);
            let factor = Factor::new(adapter.map_or(0, |adapter| adapter.lora.rank), n.len());
            let (packed, room) = room.split_at_mut(factor.len());
            let more = adapter.map(|adapter| {
                let (l, u) = (adapter.lora, adapter.u(self.u, m.start));
                let a = factor.pack::<T>(packed, a(self.params, l, self.inner).from(0, n.start), 1.0);
                More { a: Mat::new(u.data, (m.len(), l.rank), (u.stride, 1)), b: factor.matrix(a) }
            });
            let last = at + 1 == self.outs.len();
            let done = done.as_mut().filter(|_| last).map(|done| &mut **done as Done<'_>);
            base(out).tile(sum, keep, m.clone(), n.clone(), room, End { more, done });
            keep = true;
        }
    }
}

/// `dy W` of an output.
fn base<'o, T: Real>(out: &'o LinearBwdOut<'_, Host, T>) -> Term<'o, T> {
    let o = out.w.size().0;
    let dy = Source::Real { data: out.dy, stride: o };
    Term { left: dy.by_columns(), right: Source::Weight(out.w).by_rows(), k: o }
}

/// Block `i` of the columns of dA, of all outputs: one pass over x.
fn gradient_of_a<T: Real>(
    grads: &Shared<'_, f32>,
    i: usize,
    u: &[f32],
    adapted: &[Adapted<'_, '_, T>],
    x: Rows<'_, T>,
    room: &mut [f32],
) {
    let columns = i * WIDE..(i * WIDE + WIDE).min(x.inner);
    let source = x.adapters();
    let step = if source.in_place() { x.tokens } else { depth(x.tokens) }.max(1);
    let ranks = adapted.iter().map(|adapter| adapter.lora.rank).sum::<usize>();
    let (sums, room) = room.split_at_mut(ranks * columns.len());
    sums.fill(0.0);
    for start in (0..x.tokens).step_by(step) {
        let rows = start..(start + step).min(x.tokens);
        let xs = source.wide(rows.clone(), columns.clone(), room);
        let mut rest = &mut *sums;
        for adapter in adapted {
            let rank = adapter.lora.rank;
            let sums = rest.split_off_mut(..rank * columns.len()).unwrap_or_default();
            xs.outer(&mut TileMut::new(sums, rank, columns.len()), adapter.u(u, rows.start));
        }
    }
    let mut sums = sums.chunks_exact(columns.len());
    for Lora { a, rank, .. } in adapted.iter().map(|adapter| adapter.lora) {
        // SAFETY: each block of each gradient is made by one task, and gradients are disjoint (`check`).
        let mut da = unsafe { grads.tile(a + columns.start, rank, columns.len(), x.inner) };
        for (r, sums) in sums.by_ref().take(rank).enumerate() {
            da.row(r).iter_mut().zip(sums).for_each(|(da, sum)| *da += x.scale() * sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::backend::Backend;
    use crate::cpu::Cpu;
    use crate::cpu::tests::on_threads;
    use crate::host::Host;
    use crate::ops::cases::linear::{backward_conforms, source};
    use crate::ops::linear::{Below, LinearBwd, LinearBwdOut, Lora};
    use crate::tensor::DType;

    const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

    #[test]
    fn as_the_reference_in_f32() {
        backward_conforms::<_, f32>(&on_threads(), &DTYPES);
    }

    #[test]
    fn as_the_reference_in_bf16() {
        backward_conforms::<_, bf16>(&on_threads(), &DTYPES);
    }

    #[test]
    fn views_that_do_not_fit_are_refused() {
        let cpu = Cpu::new(1).unwrap();
        let w = Cpu::matrix(&cpu, source(&[1.0; 6], (3, 2), DType::BF16)).expect("w");
        let lora = Lora { a: 0, b: 2, rank: 1, scale: 1.0 };
        let run = |x: &[f32], params: &[f32], loras: &[Lora]| {
            let (dy, t) = ([1f32; 6], [1f32; 2]);
            let out = |&lora: &Lora| LinearBwdOut { dy: &dy[..], t: &t[..], w: &w, lora: Some(lora) };
            let op: LinearBwd<'_, Host, f32> = LinearBwd {
                below: Below::Kept { x, dx: None },
                grads: &mut params.to_vec(),
                scratch: &mut [],
                outs: loras.iter().map(out).collect(),
                params,
                tokens: 2,
                dropout: None,
                freeze_a: false,
            };
            cpu.linear_bwd(op).unwrap_err().to_string()
        };
        let found = run(&[0.0; 3], &[0.0; 5], &[lora]);
        assert_eq!(found, "linear_bwd: x holds 3 elements, expected T × I = 2 × 2");
        let found = run(&[0.0; 4], &[0.0; 4], &[lora]);
        assert_eq!(found, "linear_bwd: an adapter of rank 1 at 0 and 2 does not lie in an arena of 4");
        let found = run(&[0.0; 4], &[0.0; 5], &[lora, lora]);
        assert_eq!(found, "linear_bwd: two gradients share a place in the arena");
        let found = run(&[0.0; 4], &[0.0; 5], &[lora]);
        assert!(found.starts_with("linear_bwd: scratch holds 0 elements, expected at least "), "{found}");
        let op: LinearBwd<'_, Host, f32> = LinearBwd {
            below: Below::SwiGlu { x: &mut [0.0; 4], gate: &mut [0.0; 4], up: &mut [0.0; 3] },
            grads: &mut [],
            scratch: &mut [],
            outs: vec![LinearBwdOut { dy: &[1.0; 6], t: &[], w: &w, lora: None }],
            params: &[],
            tokens: 2,
            dropout: None,
            freeze_a: false,
        };
        let found = cpu.linear_bwd(op).unwrap_err().to_string();
        assert_eq!(found, "linear_bwd: up holds 3 elements, expected T × I = 2 × 2");
    }
}
