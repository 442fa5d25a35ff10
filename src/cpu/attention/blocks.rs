//! How attention is cut into blocks, and how operands come into a thread's own room.

use std::cell::RefCell;
use std::ops::Range;

use crate::cpu::product::block::SIDE;
use crate::ops::attention::{Heads, Segment};

/// (query, head) pairs of a block, at most.
pub(super) const PAIRS: usize = 64;
/// Keys of a block, at most.
pub(super) const KEYS: usize = 64;

/// Columns of a block of scores that are worked on together, and what their number is rounded up to.
pub(super) const LANES: usize = 16;

/// Numbers that are worked on together.
pub(super) type Lanes = [f32; LANES];

/// A number of each pair, in vectors.
pub(super) type PerPair = [Lanes; PAIRS / LANES];

/// `x` for each pair.
pub(super) fn per_pair(x: f32) -> PerPair {
    [[x; LANES]; PAIRS / LANES]
}

/// Matrices of 64 rows or columns and K others, padded, that one block needs, and matrices of 64 × 64.
const WIDE: usize = 6;
const SQUARE: usize = 2;

/// K as the rooms have it: squares of sums are whole.
fn wide(dim: usize) -> usize {
    dim.next_multiple_of(SIDE)
}

/// Elements of a thread's room for heads of `dim` columns.
fn room_len(dim: usize) -> usize {
    WIDE * PAIRS * wide(dim) + SQUARE * PAIRS * KEYS
}

/// Bytes that a thread keeps for attention of heads of `dim` columns.
pub(in crate::cpu) fn room_bytes(dim: usize) -> usize {
    room_len(dim) * size_of::<f32>()
}

/// A thread's room: matrices of 64 rows or columns and K others, padded, and matrices of 64 × 64. Their content is what the
/// last block left.
pub(super) struct Room<'a> {
    pub wide: [&'a mut [f32]; WIDE],
    pub square: [&'a mut [f32]; SQUARE],
}

/// Calls `f` with the calling thread's room. `f` must not wait for other tasks.
pub(super) fn with_room<R>(dim: usize, f: impl FnOnce(Room<'_>) -> R) -> R {
    thread_local! {
        static ROOM: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    ROOM.with_borrow_mut(|room| {
        if room.len() < room_len(dim) {
            room.resize(room_len(dim), 0.0);
        }
        let (wides, square) = room.split_at_mut(WIDE * PAIRS * wide(dim));
        let mut wides = wides.chunks_exact_mut(PAIRS * wide(dim));
        let mut square = square.chunks_exact_mut(PAIRS * KEYS);
        f(Room {
            wide: std::array::from_fn(|_| wides.next().unwrap_or_default()),
            square: std::array::from_fn(|_| square.next().unwrap_or_default()),
        })
    })
}

/// Whole rows of an output.
pub(super) struct Rows<'a, T> {
    pub x: &'a mut [T],
    pub width: usize,
}

impl<'a, T> Rows<'a, T> {
    fn split(self, row: usize) -> (Rows<'a, T>, Rows<'a, T>) {
        let (left, right) = self.x.split_at_mut(row * self.width);
        (Rows { x: left, width: self.width }, Rows { x: right, width: self.width })
    }
}

/// Calls `f(segment, queries, a, b)` for runs of about equal length of at most `step` queries of each segment, in
/// parallel. `a` and `b` are the rows of the outputs that belong to the run; the rows given here begin at `first`.
pub(super) fn each_run<A: Send, B: Send, F>(
    segments: &[Segment],
    first: usize,
    step: usize,
    a: Rows<'_, A>,
    b: Rows<'_, B>,
    f: &F,
) where
    F: Fn(&Segment, Range<usize>, Rows<'_, A>, Rows<'_, B>) + Sync,
{
    match segments {
        [] => {}
        [s] if s.q.is_empty() => {}
        [s] => {
            let (skip, len) = (s.q.start - first, s.q.len());
            let (a, b) = (a.split(skip).1.split(len).0, b.split(skip).1.split(len).0);
            halves(s, s.q.clone(), len.div_ceil(len.div_ceil(step)), a, b, f);
        }
        _ => {
            let (left, right) = segments.split_at(segments.len() / 2);
            let middle = right[0].q.start;
            let ((a1, a2), (b1, b2)) = (a.split(middle - first), b.split(middle - first));
            rayon::join(
                || each_run(left, first, step, a1, b1, f),
                || each_run(right, middle, step, a2, b2, f),
            );
        }
    }
}

fn halves<A: Send, B: Send, F>(
    s: &Segment,
    run: Range<usize>,
    step: usize,
    a: Rows<'_, A>,
    b: Rows<'_, B>,
    f: &F,
) where
    F: Fn(&Segment, Range<usize>, Rows<'_, A>, Rows<'_, B>) + Sync,
{
    let pieces = run.len().div_ceil(step);
    if pieces <= 1 {
        return f(s, run, a, b);
    }
    let skip = pieces / 2 * step;
    let middle = run.start + skip;
    let ((a1, a2), (b1, b2)) = (a.split(skip), b.split(skip));
    rayon::join(
        || halves(s, run.start..middle, step, a1, b1, f),
        || halves(s, middle..run.end, step, a2, b2, f),
    );
}

/// A run of queries and of heads that share one key/value head: pair `r` is query `r / heads`, head `r % heads`.
#[derive(Clone)]
pub(super) struct Pairs {
    pub queries: Range<usize>,
    pub heads: Range<usize>,
}

impl Pairs {
    pub fn len(&self) -> usize {
        self.queries.len() * self.heads.len()
    }
    pub fn query(&self, r: usize) -> usize {
        self.queries.start + r / self.heads.len()
    }
    /// Where pair `r`'s number lies among `[T, H]`.
    pub fn at(&self, r: usize, heads: Heads) -> usize {
        self.query(r) * heads.q + self.heads.start + r % self.heads.len()
    }
    /// Pair `r`'s row of `x[T, H·K]`.
    pub fn row<'a, T>(&self, x: &'a [T], r: usize, heads: Heads) -> &'a [T] {
        &x[self.at(r, heads) * heads.dim..][..heads.dim]
    }
    /// All their rows.
    pub fn rows<'a, T>(&'a self, x: &'a [T], heads: Heads) -> impl Iterator<Item = &'a [T]> + Clone {
        (0..self.len()).map(move |r| self.row(x, r, heads))
    }
}

/// Heads of key/value head `kv`, in runs of at most [`PAIRS`].
pub(super) fn head_runs(heads: Heads, kv: usize) -> impl Iterator<Item = Range<usize>> {
    let group = heads.q / heads.kv;
    let end = (kv + 1) * group;
    (kv * group..end).step_by(PAIRS).map(move |h| h..(h + PAIRS).min(end))
}

/// Queries of a block, so that the pairs of all heads of a group fit.
pub(super) fn queries(heads: Heads) -> usize {
    PAIRS / (heads.q / heads.kv).min(PAIRS)
}

/// Keys that the first query of `queries` does not see before its own: all of `past` and the segment's earlier rows.
pub(super) fn before(s: &Segment, queries: &Range<usize>) -> usize {
    s.past.iter().map(|p| p.len()).sum::<usize>() + (queries.start - s.q.start)
}

/// Rows of k and v of the keys `range`, counted over past and own rows, in runs.
#[inline(always)]
fn key_runs(s: &Segment, range: Range<usize>) -> impl Iterator<Item = Range<usize>> + Clone {
    let own = s.own..s.own + s.q.len();
    let (mut skip, mut left) = (range.start, range.len());
    s.past.iter().cloned().chain([own]).map(move |run| {
        let skipped = skip.min(run.len());
        let taken = left.min(run.len() - skipped);
        (skip, left) = (skip - skipped, left - taken);
        run.start + skipped..run.start + skipped + taken
    })
}

/// The rows of key/value head `kv` of `x[U, G·K]` that `keys` have.
#[inline(always)]
pub(super) fn rows_of_keys<'a, T>(
    x: &'a [T],
    s: &'a Segment,
    keys: Range<usize>,
    kv: usize,
    heads: Heads,
) -> impl Iterator<Item = &'a [T]> + Clone {
    key_runs(s, keys).flatten().map(move |u| &x[(u * heads.kv + kv) * heads.dim..][..heads.dim])
}
