//! Asking memory for what is read next, while there is something to compute.

use faer::MatRef;

use crate::cpu::simd::prefetch;

/// Numbers of a line of the caches.
const LINE: usize = 8;

/// Columns to ask for, a share at a time.
pub(super) struct Ahead<'a> {
    x: MatRef<'a, f64>,
    /// What is asked for next.
    at: (usize, usize),
    share: usize,
}

impl<'a> Ahead<'a> {
    /// The columns of `x`, all of them once [`Ahead::ask`] was called `calls` times.
    #[inline(always)]
    pub(super) fn of(x: MatRef<'a, f64>, calls: usize) -> Ahead<'a> {
        let lines = x.nrows().div_ceil(LINE) * x.ncols();
        Ahead { x, at: (0, 0), share: lines.div_ceil(calls.max(1)) }
    }

    /// Asks for the next share.
    #[inline(always)]
    pub(super) fn ask(&mut self) {
        for _ in 0..self.share {
            let (row, column) = self.at;
            if column >= self.x.ncols() {
                return;
            }
            prefetch(self.x.ptr_at(row, column));
            self.at = if row + LINE < self.x.nrows() { (row + LINE, column) } else { (0, column + 1) };
        }
    }
}
