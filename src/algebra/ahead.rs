//! Asking memory for what is read next, while there is something to compute.

use faer::MatRef;

use crate::cpu::simd::prefetch;

/// Bytes of a line of the caches.
const LINE: usize = 64;

/// Columns to ask for, a share at a time.
pub(super) struct Ahead<'a, T> {
    x: MatRef<'a, T>,
    /// What is asked for next.
    at: (usize, usize),
    share: usize,
}

impl<'a, T> Ahead<'a, T> {
    /// Numbers of a line.
    const NUMBERS: usize = LINE / size_of::<T>();

    /// The columns of `x`, all of them once [`Ahead::ask`] was called `calls` times.
    #[inline(always)]
    pub(super) fn of(x: MatRef<'a, T>, calls: usize) -> Ahead<'a, T> {
        let lines = x.nrows().div_ceil(Self::NUMBERS) * x.ncols();
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
            self.at = if row + Self::NUMBERS < self.x.nrows() {
                (row + Self::NUMBERS, column)
            } else {
                (0, column + 1)
            };
        }
    }
}
