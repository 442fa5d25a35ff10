//! The frozen head's logits of a chunk of rows, which the loss and the choices share: how many rows and words exist at a
//! time, and where their parts of scratch lie.

use super::Cuda;
use super::launch::{Grid, Kernel, Pointer, int};
use super::store::{DeviceMemory, Matrix, View};
use crate::cuda_sizes::{CHUNK, HeadSizes};
use crate::error::Result;
use crate::tensor::{Frozen, MemoryLayout, Real};

const LOGITS: Kernel = Kernel { file: "cross_entropy", name: "cross_entropy_logits" };
const SCORES: Kernel = Kernel { file: "choice", name: "choice" };
/// Rows and columns of a block's tile.
pub const TILE: usize = 128;

/// A head and the hidden states that it reads.
#[derive(Clone, Copy)]
pub struct Head<'a, T> {
    pub w: &'a Matrix,
    pub x: View<'a, T>,
}

/// V, D and the distances of rows, as the kernels take them.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub vocab: i32,
    pub width: i32,
    pub ld_v: i32,
    pub ld_d: i32,
    pub ld_x: i32,
    pub ld_w: i32,
}

/// Blocks of 128 rows × 128 columns, `slices` times.
pub fn tiles(rows: usize, columns: usize, slices: usize) -> Grid {
    let blocks = [columns.div_ceil(TILE), rows.div_ceil(TILE), slices];
    Grid { blocks, threads: TILE, more_shared: 0 }
}

/// A block a row; a thread takes eight words at a time.
pub fn lines(rows: usize, vocab: usize) -> Grid {
    Grid::line(rows, vocab.div_ceil(8).next_multiple_of(32).clamp(32, 1024))
}

impl<T: Real> Head<'_, T> {
    pub fn sizes(&self) -> Result<Sizes> {
        let (vocab, width) = self.w.size();
        let of = HeadSizes::new(vocab, width);
        Ok(Sizes {
            vocab: int("V", vocab)?,
            width: int("D", width)?,
            ld_v: int("a row of logits", of.words)?,
            ld_d: int("a row of sums", of.columns)?,
            ld_x: int("the row of D", DeviceMemory::row(width))?,
            ld_w: int("a row of W", self.w.row())?,
        })
    }

    /// `logits[i] = x[rows[i]] Wᵀ` for the `count` rows of a list that starts at `rows`.
    pub fn logits(&self, cuda: &Cuda, logits: Pointer, rows: Pointer, count: usize) -> Result<()> {
        let (vocab, width) = self.w.size();
        let s = self.sizes()?;
        let n = int("rows", count)?;
        let args = (logits, self.x, self.w.pointer(), rows, n, s.vocab, s.width, s.ld_v, s.ld_x, s.ld_w);
        let sizes = [("rows", count), ("V", vocab), ("D", width)];
        // SAFETY: the callers' `check` compared the rows with T and x with T rows of D; scratch has room for a chunk.
        unsafe { cuda.launch(LOGITS, tiles(count, vocab, 1), &sizes, args) }
    }

    /// `out[p] = sign · (x[row of p]·W[ids[p]] − lse(x[row of p] Wᵀ))`, rows not descending, in chunks of distinct rows.
    ///
    /// `distinct` has the rows and then, from `count` on, where the pairs of each begin and where the last ones end.
    pub fn scores(
        &self,
        cuda: &Cuda,
        out: Pointer,
        scratch: Pointer,
        distinct: Pointer,
        ids: Pointer,
        count: usize,
        sign: f32,
    ) -> Result<()> {
        let vocab = self.w.size().0;
        let s = self.sizes()?;
        for start in (0..count).step_by(CHUNK) {
            let rows = CHUNK.min(count - start);
            self.logits(cuda, scratch, Pointer(distinct.0 + 4 * start as u64), rows)?;
            let starts = Pointer(distinct.0 + 4 * (count + start) as u64);
            let args = (out, scratch, ids, starts, s.vocab, s.ld_v, sign);
            // SAFETY: `starts` and `ids` are of as many pairs as `out` has, ids below V; scratch has the logits of these rows.
            unsafe { cuda.launch(SCORES, lines(rows, vocab), &[("rows", rows), ("V", vocab)], args)? };
        }
        Ok(())
    }
}

/// The distinct ones of `rows`, which do not descend, and where each begins, and their number.
pub fn distinct(rows: &[u32]) -> (Vec<u32>, usize) {
    let begins = |&i: &usize| i == 0 || rows[i] != rows[i - 1];
    let starts: Vec<usize> = (0..rows.len()).filter(begins).collect();
    let ends = starts.iter().copied().chain([rows.len()]);
    let list = starts.iter().map(|&i| rows[i]).chain(ends.map(|i| i as u32)).collect();
    (list, starts.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_rows_and_their_pairs() {
        assert_eq!(distinct(&[3, 3, 3, 5, 9, 9]), (vec![3, 5, 9, 0, 3, 4, 6], 3));
        assert_eq!(distinct(&[]), (vec![0], 0));
    }

    #[test]
    fn grids() {
        assert_eq!(tiles(129, 128_256, 8).blocks, [1002, 2, 8]);
        assert_eq!((lines(7, 128_256).threads, lines(7, 300).threads), (1024, 64));
    }
}
