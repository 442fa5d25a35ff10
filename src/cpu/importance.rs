//! See [`crate::ops::importance`].
//!
//! By tiles of W: each sample's `dYᵀ X` is one product into the tile, added to g and, squared, to F; then the tile's
//! scores are added along its rows and columns in f64, and the tiles' sums in the order of the tiles.

#![allow(unsafe_code)]

use std::ops::Range;

use super::operand::{Source, Term, depth};
use super::product::{End, Shared, TileMut};
use super::simd::{self, Isa, Kernel};
use super::tiles::{Grid, Rooms, enough};
use crate::error::Result;
use crate::host::Host;
use crate::ops::importance::{Importance, Score};
use crate::tensor::{DType, Real};

/// Tiles of W: by its size alone.
fn grid(out: usize, inner: usize) -> Grid {
    Grid::new(out, inner, 512)
}

/// Room of one thread: g, and F and a sample's product where needed; a row of W; dY and X widened.
fn room<T: Real>(out: usize, inner: usize, scores: &[Score]) -> usize {
    let (m, n) = Grid::most(out, inner);
    let tiles = if scores.iter().any(|s| s.needs_second()) { 3 } else { 1 };
    let panels = if T::DTYPE == DType::F32 { 0 } else { (m + n) * depth(usize::MAX) };
    tiles * m * n + n + panels
}

/// f64 sums of all tiles, along rows and along columns.
fn partial(out: usize, inner: usize, scores: &[Score]) -> (usize, usize) {
    let (down, across) = grid(out, inner).count();
    (across * scores.len() * out, down * scores.len() * inner)
}

/// f32 elements of scratch that [`importance`] uses on `threads` threads: the tiles' sums (two elements each, and one
/// to align them), and the rooms.
pub fn importance_scratch<T: Real>(out: usize, inner: usize, scores: &[Score], threads: usize) -> usize {
    let (rows, cols) = partial(out, inner, scores);
    2 * (rows + cols) + 1 + threads * room::<T>(out, inner, scores)
}

/// Computes [`Importance`].
pub fn importance<T: Real>(op: Importance<'_, Host, T>) -> Result<()> {
    let (o, i) = op.check()?;
    let Importance { row_sums, col_sums, scratch, dy, x, w, samples, scores, .. } = op;
    let need = importance_scratch::<T>(o, i, scores, rayon::current_num_threads());
    enough("importance", scratch, need)?;
    let (rows, cols) = partial(o, i, scores);
    let (sums, scratch) = scratch.split_at_mut(2 * (rows + cols) + 1);
    let (_, sums, _) = bytemuck::pod_align_to_mut::<f32, f64>(sums);
    let (by_row, by_col) = sums[..rows + cols].split_at_mut(rows);
    let rooms = Rooms::new(scratch, room::<T>(o, i, scores));

    let second = scores.iter().any(|s| s.needs_second());
    let total: usize = samples.iter().map(|s| s.supervised).sum();
    let counted = samples.iter().filter(|s| s.supervised > 0).count().max(1);
    // Without F, samples that follow one another are one product.
    let mut runs: Vec<(Range<usize>, f32)> = Vec::new();
    for sample in samples.iter().filter(|s| !s.rows.is_empty()) {
        match runs.last_mut() {
            Some((run, _)) if !second && run.end == sample.rows.start => run.end = sample.rows.end,
            _ => {
                let weight =
                    if sample.supervised > 0 { total as f64 / sample.supervised as f64 } else { 0.0 };
                runs.push((sample.rows.clone(), weight as f32));
            }
        }
    }

    let grid = grid(o, i);
    let (down, across) = grid.count();
    let (row_parts, col_parts) = (Shared::new(by_row), Shared::new(by_col));
    rooms.each(grid.len(), |at, room| {
        let (m, n) = grid.at(at);
        let area = m.len() * n.len();
        let (weights, room) = room.split_at_mut(n.len());
        let (g, room) = room.split_at_mut(area);
        let (f, room) = room.split_at_mut(if second { area } else { 0 });
        let (acc, room) = room.split_at_mut(if second { area } else { 0 });
        g.fill(0.0);
        f.fill(0.0);
        for (rows, weight) in &runs {
            let product = Term {
                left: Source::Real { data: &dy[rows.start * o..rows.end * o], stride: o }.by_rows(),
                right: Source::Real { data: &x[rows.start * i..rows.end * i], stride: i }.by_rows(),
                k: rows.len(),
            };
            if second {
                product.tile(
                    &mut TileMut::new(acc, m.len(), n.len()),
                    false,
                    m.clone(),
                    n.clone(),
                    room,
                    End::default(),
                );
                simd::run(Add { g, f, acc, weight: *weight });
            } else {
                product.tile(
                    &mut TileMut::new(g, m.len(), n.len()),
                    true,
                    m.clone(),
                    n.clone(),
                    room,
                    End::default(),
                );
            }
        }
        let (tile_row, tile_col) = (at % down, at / down);
        for (s, &score) in scores.iter().enumerate() {
            // SAFETY: each tile has its own part of both sums.
            let (mut rows, mut cols) = unsafe {
                (
                    row_parts.tile((tile_col * scores.len() + s) * o + m.start, 1, m.len(), m.len()),
                    col_parts.tile((tile_row * scores.len() + s) * i + n.start, 1, n.len(), n.len()),
                )
            };
            let (rows, cols) = (rows.row(0), cols.row(0));
            cols.fill(0.0);
            for (r, row) in m.clone().enumerate() {
                let w = Source::<T>::Weight(w).block(row..row + 1, n.clone(), weights);
                let part = r * n.len()..(r + 1) * n.len();
                let f = f.get(part.clone()).unwrap_or(&[]);
                rows[r] =
                    simd::run(Sums { cols, w: w.row(0), g: &g[part], f, counted: counted as f64, score });
            }
        }
    });
    add(row_sums, by_row, across, scores.len() * o);
    add(col_sums, by_col, down, scores.len() * i);
    Ok(())
}

/// `out = Σ parts`, of `count` parts of `len` sums.
fn add(out: &mut [f64], parts: &[f64], count: usize, len: usize) {
    out.fill(0.0);
    for part in parts.chunks(len.max(1)).take(count) {
        out.iter_mut().zip(part).for_each(|(out, part)| *out += part);
    }
}

/// `g += acc`, `f += (weight · acc)²`.
struct Add<'a> {
    g: &'a mut [f32],
    f: &'a mut [f32],
    acc: &'a [f32],
    weight: f32,
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for ((g, f), acc) in self.g.iter_mut().zip(self.f).zip(self.acc) {
            *g += acc;
            let own = self.weight * acc;
            *f += own * own;
        }
    }
}

/// Adds a row's scores to the columns' sums; their sum.
struct Sums<'a> {
    cols: &'a mut [f64],
    w: &'a [f32],
    g: &'a [f32],
    /// Empty if the score does not need it.
    f: &'a [f32],
    counted: f64,
    score: Score,
}

impl Kernel for Sums<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let Sums { cols, w, g, f, counted, score } = self;
        let mut sum = 0f64;
        let mut one = |col: &mut f64, value: f64| {
            *col += value;
            sum += value;
        };
        let pairs = cols.iter_mut().zip(w).zip(g).map(|((col, &w), &g)| (col, f64::from(w), f64::from(g)));
        match score {
            Score::AbsFirst | Score::First => pairs.for_each(|(col, w, g)| one(col, score.of(w, g, 0.0))),
            Score::Second | Score::AbsMix => {
                let f = f.iter().map(|&f| f64::from(f) / counted);
                pairs.zip(f).for_each(|((col, w, g), f)| one(col, score.of(w, g, f)));
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cpu::tests::on_threads;
    use crate::ops::cases::importance::conforms;
    use crate::tensor::DType;

    #[test]
    fn as_the_reference() {
        conforms::<_, f32>(&on_threads(), &[DType::F32, DType::BF16]);
        conforms::<_, bf16>(&on_threads(), &[DType::BF16, DType::F32]);
    }
}
