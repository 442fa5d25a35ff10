//! How an output is cut into tiles, by its shape alone, and the room that each thread has while it makes one.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Rows of a tile at most: with [`COLS`], a tile and its operands lie in the second-level cache of common processors.
const ROWS: usize = 512;
/// Columns of a tile at most.
const COLS: usize = 256;
/// Tiles that are enough to keep threads busy.
const MANY: usize = 8;
/// Multiplications of a tile that are too few to be cut again.
const FEW: usize = 1 << 22;

/// An output `[rows, cols]` cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    rows: usize,
    cols: usize,
    tile: (usize, usize),
}

impl Grid {
    /// Tiles for a product over `inner`: as large as the caches like, smaller where there would be few.
    pub(super) fn new(rows: usize, cols: usize, inner: usize) -> Grid {
        // Parts of nearly one size, a multiple of the micro-kernels' widths.
        let even = |n: usize, most: usize, step: usize| {
            let part = n.div_ceil(n.div_ceil(most).max(1)).max(1);
            part.next_multiple_of(step).min(n.max(1))
        };
        let (mut r, mut c) = (ROWS, COLS);
        let mut grid = Grid { rows, cols, tile: (even(rows, r, 8), even(cols, c, 64)) };
        while grid.len() < MANY && grid.tile.0 * grid.tile.1 * inner > FEW {
            if grid.tile.0 > grid.tile.1.max(96) {
                r = grid.tile.0 / 2;
            } else if grid.tile.1 > 64 {
                c = grid.tile.1 / 2;
            } else {
                break;
            }
            grid.tile = (even(rows, r, 8), even(cols, c, 64));
        }
        grid
    }

    /// Tiles.
    pub(super) fn len(&self) -> usize {
        let (down, across) = self.count();
        down * across
    }

    /// Rows and columns that no tile exceeds, of any output of at most `cols` columns.
    pub(super) fn most(rows: usize, cols: usize) -> (usize, usize) {
        (rows.min(ROWS), cols.min(COLS))
    }

    /// Rows of tiles and columns of tiles.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.rows.div_ceil(self.tile.0), self.cols.div_ceil(self.tile.1))
    }

    /// Rows and columns of tile `i`; tiles of the same columns follow one another.
    pub(super) fn at(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let (down, _) = self.count();
        let (r, c) = (i % down * self.tile.0, i / down * self.tile.1);
        (r..(r + self.tile.0).min(self.rows), c..(c + self.tile.1).min(self.cols))
    }
}

/// Scratch, one part a thread.
pub(super) struct Rooms<'a>(Vec<Mutex<&'a mut [f32]>>);

impl<'a> Rooms<'a> {
    /// Cuts `scratch` into a part of `size` elements for each thread of the pool.
    pub(super) fn new(scratch: &'a mut [f32], size: usize) -> Rooms<'a> {
        let parts = scratch.chunks_mut(size.max(1)).take(rayon::current_num_threads());
        Rooms(parts.map(Mutex::new).collect())
    }

    /// Calls `f` for each of `0..n`, on all threads, with the thread's part of the scratch.
    pub(super) fn each(&self, n: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let one = |i: usize| match self.0.get(rayon::current_thread_index().unwrap_or(0)) {
            Some(room) => f(i, &mut room.lock().unwrap_or_else(PoisonError::into_inner)),
            None => f(i, &mut []),
        };
        if n == 1 {
            one(0);
        } else {
            (0..n).into_par_iter().with_max_len(1).for_each(one);
        }
    }
}

/// Fails unless `scratch` holds `need` elements.
pub(super) fn enough(op: &'static str, scratch: &[f32], need: usize) -> Result<()> {
    if scratch.len() >= need {
        return Ok(());
    }
    Err(Error::Op { op, why: format!("scratch holds {} elements, expected at least {need}", scratch.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_output_once() {
        for (rows, cols, inner) in [
            (1, 1, 1),
            (1, 5000, 64),
            (1024, 1024, 1024),
            (1500, 192, 192),
            (513, 257, 4096),
            (7, 32000, 9),
            (0, 3, 3),
        ] {
            let grid = Grid::new(rows, cols, inner);
            let mut seen = vec![0u8; rows * cols];
            let most = Grid::most(rows, cols);
            for i in 0..grid.len() {
                let (r, c) = grid.at(i);
                assert!(!r.is_empty() && !c.is_empty() && r.len() <= most.0 && c.len() <= most.1);
                for r in r {
                    seen[r * cols..][c.clone()].iter_mut().for_each(|s| *s += 1);
                }
            }
            assert!(seen.iter().all(|&s| s == 1), "{rows} × {cols}");
        }
        assert!(Grid::new(1024, 1024, 1024).len() >= MANY);
        assert!(Grid::new(1500, 192, 192).len() >= MANY);
        assert_eq!(Grid::new(16, 16, 16).len(), 1);
    }
}
