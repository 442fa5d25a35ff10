//! See [`crate::ops::rsvd`].
//!
//! A pass goes over a weight in panels of 16 MiB: `Y = A Z` reads a panel from memory, `Aᵀ Y` finds it in the second-level
//! cache. The products are those of adapters, with Z and Y as three bf16 terms side by side. Everything of the size of l
//! is one launch for all weights.

use super::apply::apply;
use super::eigh::{LIMIT, eigh};
use super::gram::gram;
use super::launch::{Grid, Kernel, Pointer, int};
use super::lists::Kind;
use super::lora::{Span, Wide, after};
use super::store::{DeviceMemory, View, ViewMut};
use super::{Cuda, Matrix};
use crate::backend::Backend;
use crate::cuda_sizes::{ENERGY_ROWS, RsvdSizes, partial_row, thin_row};
use crate::error::Result;
use crate::ops::apply::Apply;
use crate::ops::eigh::Eigh;
use crate::ops::ensure;
use crate::ops::gram::{Gram, Stack};
use crate::ops::rsvd::{CUT, DEPENDENT, Rsvd, orthonormal};
use crate::tensor::Length;

const OP: &str = "rsvd";
const START: Kernel = Kernel { file: "rsvd", name: "rsvd_start" };
const TERMS: Kernel = Kernel { file: "rsvd", name: "rsvd_terms" };
const SPLIT: Kernel = Kernel { file: "rsvd", name: "rsvd_split" };
const GATHER: Kernel = Kernel { file: "rsvd", name: "rsvd_gather" };
const ENERGY: Kernel = Kernel { file: "rsvd", name: "rsvd_energy" };
const ORTHONORMAL: Kernel = Kernel { file: "rsvd", name: "rsvd_orthonormal" };
const VALUES: Kernel = Kernel { file: "rsvd", name: "rsvd_values" };
const FINISH: Kernel = Kernel { file: "rsvd", name: "rsvd_finish" };

/// `count` threads for each of `weights`.
fn threads(count: usize, weights: usize) -> Grid {
    Grid { blocks: [count.div_ceil(256), weights, 1], threads: 256, more_shared: 0 }
}

/// A search that is under way: the parts of its scratch.
struct Search<'a> {
    cuda: &'a Cuda,
    scratch: &'a ViewMut<'a, f32>,
    at: RsvdSizes,
    n: usize,
    o: usize,
    i: usize,
    l: usize,
}

pub fn rsvd(cuda: &Cuda, op: Rsvd<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let (n, (o, i)) = (op.a.len(), op.size());
    if n == 0 {
        return Ok(());
    }
    let (k, l) = (op.sketch.values((o, i)), op.sketch.width((o, i)));
    let at = RsvdSizes::new(n, (o, i), l);
    let held = op.scratch.len();
    ensure(OP, held >= at.len, || format!("scratch holds {held} elements, expected {}", at.len))?;
    let search = Search { cuda, scratch: &op.scratch, at, n, o, i, l };
    let keys: Vec<u32> = op.tensors.iter().flat_map(|&t| op.sketch.start(t).key()).collect();
    search.start(&keys)?;
    search.pass(op.a, true)?;
    for _ in 0..op.sketch.iterations {
        search.orthonormal(2)?;
        search.pass(op.a, false)?;
    }
    search.values(&op.values, &op.energy, k)?;
    let vectors =
        op.vectors.as_ref().map_or((Pointer::NULL, Pointer::NULL), |(u, v)| (u.pointer(), v.pointer()));
    search.finish(&op.residuals, vectors, &op.values, k)
}

impl Search<'_> {
    /// Part `which` of those of `[I, l]`: Z, what becomes it, `Aᵀ Y`.
    fn inner(&self, which: usize) -> ViewMut<'_, f64> {
        self.scratch.part(self.at.inner[which], self.n * self.i * self.l)
    }
    /// Part `which` of those of `[O, l]`: Y, `Y V / √λ`.
    fn outer(&self, which: usize) -> ViewMut<'_, f64> {
        self.scratch.part(self.at.outer[which], self.n * self.o * self.l)
    }
    /// Part `which` of those of `[l, l]`.
    fn square(&self, which: usize) -> ViewMut<'_, f64> {
        self.scratch.part(self.at.square[which], self.n * self.l * self.l)
    }
    fn pointer(&self, start: usize) -> Pointer {
        self.scratch.part::<f32>(start, 0).pointer()
    }
    fn stacks(&self, rows: usize) -> Vec<Stack> {
        vec![Stack { rows, rank: self.l }; self.n]
    }
    fn sizes(&self) -> [(&'static str, usize); 4] {
        [("weights", self.n), ("O", self.o), ("I", self.i), ("l", self.l)]
    }

    /// Random Z, orthonormal.
    fn start(&self, keys: &[u32]) -> Result<()> {
        let count = self.i * self.l;
        let keys = self.cuda.list(Kind::Segments, keys)?;
        let args = (self.inner(0), keys.view(), count as i64);
        // SAFETY: Z has `count` numbers for each key.
        unsafe { self.cuda.launch(START, threads(count.div_ceil(4), self.n), &self.sizes(), args)? };
        drop(keys);
        self.orthonormal(0)
    }

    /// `Z = orth(X)` of part `from`.
    fn orthonormal(&self, from: usize) -> Result<()> {
        let stacks = self.stacks(self.i);
        for (from, to) in [(from, 1), (1, 0)] {
            let (g, w) = (self.square(0), self.square(1));
            let x = self.inner(from);
            gram(self.cuda, Gram { out: self.square(0), x: x.reborrow(), stacks: &stacks })?;
            self.orthonormal_map(&w, g.reborrow())?;
            apply(
                self.cuda,
                Apply { out: self.inner(to), x: x.reborrow(), w: w.reborrow(), stacks: &stacks },
            )?;
        }
        Ok(())
    }

    /// What makes columns with Gram matrices `g` orthonormal. More than a block's shared memory holds is done on the host,
    /// which waits for them.
    fn orthonormal_map(&self, w: &ViewMut<'_, f64>, g: View<'_, f64>) -> Result<()> {
        let l = self.l;
        if l > LIMIT {
            let mut host = vec![0.0; g.len()];
            self.cuda.download(&mut host, g)?;
            let maps: Vec<f64> = host.chunks(l * l).flat_map(|g| orthonormal(g, l)).collect();
            return self.cuda.upload(self.square(1), &maps);
        }
        let more_shared = 2 * l * (l + 1) * size_of::<f64>();
        let grid = Grid { blocks: [self.n, 1, 1], threads: 64, more_shared };
        let args = (w.pointer(), g, int("l", l)?, DEPENDENT);
        // SAFETY: both have l × l numbers for each weight.
        unsafe { self.cuda.launch(ORTHONORMAL, grid, &self.sizes(), args) }
    }

    /// `Y = A Z` and `Aᵀ Y`, and, if `energy`, sums of squares.
    fn pass(&self, a: &[&Matrix], energy: bool) -> Result<()> {
        let (o, i, l, at) = (self.o, self.i, self.l, &self.at);
        let (sizes, ranks) = (self.sizes(), 3 * l);
        let (rank, inner, row) = (int("l", l)?, int("I", i)?, a[0].row());
        let (ld, ld_partial) = (int("the row of I", row)?, int("R", partial_row(ranks))?);
        let (z_terms, y_terms) = (self.pointer(at.z_terms), self.pointer(at.y_terms));
        let (partial, sums) = (self.pointer(at.partial), self.pointer(at.energy));
        let args = (z_terms, self.inner(0), inner, rank, ld);
        // SAFETY: the parts of the scratch are as large as `RsvdSizes` says, for these sizes.
        unsafe { self.cuda.launch(TERMS, threads(i * l, self.n), &sizes, args)? };
        for (m, a) in a.iter().enumerate() {
            let factor = after(z_terms, m * ranks * row, 2);
            let back = after(self.inner(2).pointer(), m * i * l, 8);
            for first in (0..o).step_by(at.panel) {
                let rows = at.panel.min(o - first);
                let wide = Wide { data: after(a.pointer(), first * row, 2), width: i, ld: row };
                let (count, y) = (int("O", rows)?, after(self.outer(0).pointer(), (m * o + first) * l, 8));
                if energy {
                    let at = after(sums, m * o.div_ceil(ENERGY_ROWS) + first / ENERGY_ROWS, 8);
                    let grid = Grid::line(rows.div_ceil(ENERGY_ROWS), 256);
                    // SAFETY: the weight has the rows, and the sums a place for each block.
                    unsafe { self.cuda.launch(ENERGY, grid, &sizes, (at, wide.data, count, inner, ld))? };
                }
                let span = Span { first: 0, rows, tokens: rows };
                // SAFETY: the terms have the weight's leading dimension; there is room for the partial sums.
                let splits = unsafe { self.cuda.thin_partial(partial, wide, factor, ranks, span, None)? };
                let ld_terms = thin_row(ranks);
                let args = (
                    y,
                    y_terms,
                    partial,
                    count,
                    rank,
                    int("splits", splits)?,
                    ld_partial,
                    int("the row of R", ld_terms)?,
                );
                // SAFETY: as above.
                unsafe { self.cuda.launch(SPLIT, threads(rows * l, 1), &sizes, args)? };
                let thin = Wide { data: y_terms, width: ranks, ld: ld_terms };
                // SAFETY: as above.
                let spans = unsafe { self.cuda.gradient_partial(partial, None, wide, thin, rows, None)? };
                let add = i32::from(first > 0);
                let args = (back, partial, inner, rank, int("spans", spans)?, ld_partial, add);
                // SAFETY: as above.
                unsafe { self.cuda.launch(GATHER, threads(i * l, 1), &sizes, args)? };
            }
        }
        Ok(())
    }

    /// Values, and the maps to their vectors.
    fn values(&self, values: &ViewMut<'_, f64>, energy: &ViewMut<'_, f64>, k: usize) -> Result<()> {
        let (l, y) = (self.l, self.outer(0));
        let lambda: ViewMut<'_, f64> = self.scratch.part(self.at.lambda, self.n * l);
        let (g, vectors) = (self.square(0), self.square(1));
        gram(self.cuda, Gram { out: self.square(0), x: y.reborrow(), stacks: &self.stacks(self.o) })?;
        let sizes = vec![l; self.n];
        let pairs = (self.scratch.part(self.at.lambda, self.n * l), self.square(1));
        eigh(self.cuda, Eigh { values: pairs.0, vectors: pairs.1, a: g.reborrow(), sizes: &sizes })?;
        let args = (
            values.pointer(),
            energy.pointer(),
            self.square(2),
            self.square(3),
            lambda,
            vectors,
            self.pointer(self.at.energy),
            int("k", k)?,
            int("l", l)?,
            int("O", self.o.div_ceil(ENERGY_ROWS))?,
            CUT,
        );
        // SAFETY: `check` compared values and energy, and the parts of the scratch are made for these sizes.
        unsafe { self.cuda.launch(VALUES, Grid::line(self.n, 64), &self.sizes(), args) }
    }

    /// Residuals, and vectors where they are wanted.
    fn finish(
        &self,
        residuals: &ViewMut<'_, f64>,
        (u, v): (Pointer, Pointer),
        values: &ViewMut<'_, f64>,
        k: usize,
    ) -> Result<()> {
        let (outer, inner) = (self.stacks(self.o), self.stacks(self.i));
        // Z is not needed once v is made of it.
        let products = [
            (self.outer(1), self.outer(0), 2, &outer),
            (self.inner(1), self.inner(0), 3, &inner),
            (self.inner(0), self.inner(2), 2, &inner),
        ];
        for (out, x, map, stacks) in products {
            apply(self.cuda, Apply { out, x: x.reborrow(), w: self.square(map).reborrow(), stacks })?;
        }
        let args = (
            residuals.pointer(),
            u,
            v,
            values.pointer(),
            self.outer(1),
            self.inner(1),
            self.inner(0),
            int("O", self.o)?,
            int("I", self.i)?,
            int("k", k)?,
            int("l", self.l)?,
        );
        let grid = Grid { blocks: [k, self.n, 1], threads: 256, more_shared: 0 };
        // SAFETY: `check` compared the outputs.
        unsafe { self.cuda.launch(FINISH, grid, &self.sizes(), args) }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        if let Some(cuda) = crate::cuda::tests::device() {
            crate::ops::cases::rsvd::conforms(&[cuda]);
        }
    }
}
