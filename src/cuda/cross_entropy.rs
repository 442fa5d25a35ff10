//! See [`crate::ops::cross_entropy`]: rows in chunks of 128; the gradient's product sums over slices of the vocabulary, since a
//! chunk alone has too few tiles to fill a device.

use super::Cuda;
use super::head::{Head, distinct, lines, tiles};
use super::launch::{Grid, Kernel, Pointer, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::backend::Backend;
use crate::cuda_sizes::{CHUNK, HeadSizes};
use crate::error::Result;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::ensure;
use crate::tensor::{Frozen, Length, Real};

const GRADIENT: Kernel = Kernel { file: "cross_entropy", name: "cross_entropy_gradient" };
const PRODUCT: Kernel = Kernel { file: "cross_entropy", name: "cross_entropy_product" };
const SUM: Kernel = Kernel { file: "cross_entropy", name: "cross_entropy_sum" };
const SUM_THREADS: usize = 64;

pub fn cross_entropy<T: Real>(cuda: &Cuda, op: CrossEntropy<'_, DeviceMemory, T>) -> Result<()> {
    const OP: &str = "cross_entropy";
    let (v, d) = op.check()?;
    let (sizes, n) = (HeadSizes::new(v, d), op.rows.len());
    let need = if op.dx.is_some() { sizes.loss(n) } else { sizes.score(n) };
    ensure(OP, op.scratch.len() >= need, || {
        format!("scratch holds {} elements, expected {need}", op.scratch.len())
    })?;
    let head = Head { w: op.head, x: op.x };
    let (nll, logits) = (op.nll.pointer(), op.scratch.pointer());
    let targets = cuda.list(Kind::Ids, op.targets)?;
    let targets = targets.view().pointer();
    let (list, count) = distinct(op.rows);
    let rows = cuda.list(Kind::Rows, &list)?;
    let rows = rows.view().pointer();
    match op.dx {
        // Rows ascend, so that each has one pair.
        None => head.scores(cuda, nll, logits, rows, targets, count, -1.0),
        Some(dx) => {
            let to = dx.pointer();
            cuda.zero(dx)?;
            let partial = Pointer(logits.0 + 4 * sizes.logits(n) as u64);
            for start in (0..n).step_by(CHUNK) {
                let at = |list: Pointer| Pointer(list.0 + 4 * start as u64);
                let count = CHUNK.min(n - start);
                let chunk = Chunk { rows: at(rows), targets: at(targets), nll: at(nll), count };
                chunk.run(cuda, &head, to, logits, partial, op.weight)?;
            }
            Ok(())
        }
    }
}

/// Rows whose logits exist at a time.
struct Chunk {
    rows: Pointer,
    targets: Pointer,
    nll: Pointer,
    count: usize,
}

impl Chunk {
    fn run<T: Real>(
        &self,
        cuda: &Cuda,
        head: &Head<'_, T>,
        dx: Pointer,
        logits: Pointer,
        partial: Pointer,
        weight: f32,
    ) -> Result<()> {
        let (v, d) = head.w.size();
        let (of, s, count) = (HeadSizes::new(v, d), head.sizes()?, self.count);
        let told = [("rows", count), ("V", v), ("D", d)];
        head.logits(cuda, logits, self.rows, count)?;
        let args = (self.nll, logits, self.targets, s.vocab, s.ld_v, weight);
        // SAFETY: scratch has the logits of these rows; targets are below V.
        unsafe { cuda.launch(GRADIENT, lines(count, v), &told, args)? };
        let (n, slice) = (int("rows", count)?, int("a slice", of.slice)?);
        let w = head.w.pointer();
        let args = (partial, logits, w, n, s.vocab, s.width, slice, s.ld_v, s.ld_d, s.ld_w);
        // SAFETY: scratch has the logits' gradients, and room for the sums of all slices.
        unsafe { cuda.launch(PRODUCT, tiles(count, d, of.slices), &told, args)? };
        let grid =
            Grid { blocks: [count, d.div_ceil(8 * SUM_THREADS), 1], threads: SUM_THREADS, more_shared: 0 };
        let args = (dx, partial, self.rows, s.width, int("slices", of.slices)?, s.ld_d, s.ld_x);
        // SAFETY: rows are below T, and dx has T rows.
        unsafe { cuda.launch(SUM, grid, &told, args) }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cuda::tests::device;
    use crate::ops::cases::cross_entropy::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda]);
        }
    }
}
