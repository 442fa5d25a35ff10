//! How much room numbers and operations take on a CUDA device: what an edge needs is planned on any machine.

use crate::backend::{LinearSize, Scratch};
use crate::ops::importance::Score;
use crate::ops::rsvd::Sketch;
use crate::tensor::{DType, MemoryLayout, Real};

/// Elements that a row is padded to: 128 bytes, so that every row is aligned for the tensor memory accelerator and
/// every tile along it is full.
const PAD: usize = 64;
/// The slice of narrow rows.
const SLICE: usize = 16;
/// f32 elements that each part of scratch is rounded up to: 256 bytes.
const SCRATCH_PART: usize = 64;
/// Blocks that keep the largest device busy with a thin product; the K of one is split until there are as many.
const THIN_BLOCKS: usize = 256;
/// Rows and columns of a block of a thin product.
const THIN_TILE: usize = 64;
/// The least K of a split.
const THIN_DEPTH: usize = 512;
/// Tokens that are summed at a time for a gradient of an adapter; the sums of such spans are added in their order.
pub(crate) const SPAN: usize = 512;
/// Columns of a block that makes a gradient of an adapter.
pub(crate) const GRADIENT_COLUMNS: usize = 256;
/// Rows of logits that exist at a time.
pub const CHUNK: usize = 128;
/// Tiles of the gradient's product with the head, over slices of the vocabulary: two a multiprocessor of a large device.
const HEAD_TILES: usize = 256;
/// Slices at most, and words of one at least.
const SLICES: (usize, usize) = (16, 512);
/// Bytes of a weight that the two products of a search for singular values go over before the next ones: the second
/// finds them in the second-level cache.
const PANEL: usize = 16 << 20;
/// Rows of a weight of a sum of squares.
pub(crate) const ENERGY_ROWS: usize = 16;
/// Rows and columns of an output tile of the importance product.
const TILE: usize = 128;

/// Sizes of the CUDA back end's buffers and, in f32 elements, of its scratch. Weights are resident in bf16, whatever their file holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaSizes;

/// Rows are padded to 64 elements; those of up to 64, like `x Aᵀ` of an adapter, to the slice of 16.
impl MemoryLayout for CudaSizes {
    const ALIGN: u64 = 256;

    fn matrix_bytes((out, inner): (usize, usize)) -> u64 {
        2 * (out as u64).saturating_mul(Self::row(inner) as u64)
    }

    fn row(width: usize) -> usize {
        width.next_multiple_of(if width > PAD { PAD } else { SLICE })
    }
}

/// How the loss and the choices cut a head `[vocab, width]`: a function of these two alone, since slices are an order of
/// sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSizes {
    /// f32 elements from one row of logits to the next.
    pub words: usize,
    /// f32 elements from one row of partial sums of dx to the next.
    pub columns: usize,
    /// Slices of the vocabulary.
    pub slices: usize,
    /// Words of a slice, the last one's but for what is missing.
    pub slice: usize,
}

impl HeadSizes {
    /// Cuts a head.
    pub fn new(vocab: usize, width: usize) -> HeadSizes {
        let most = (HEAD_TILES / width.div_ceil(TILE).max(1)).clamp(1, SLICES.0);
        let slices = most.min(vocab.div_ceil(SLICES.1)).max(1);
        let slice = vocab.div_ceil(slices).next_multiple_of(32).max(32);
        HeadSizes {
            words: vocab.next_multiple_of(8),
            columns: width.next_multiple_of(8),
            slices: vocab.div_ceil(slice).max(1),
            slice,
        }
    }

    /// f32 elements of the logits of a chunk of `rows` rows.
    pub fn logits(&self, rows: usize) -> usize {
        (rows.min(CHUNK) * self.words).next_multiple_of(PAD)
    }

    /// f32 elements of scratch for the scores of `rows` rows.
    pub fn score(&self, rows: usize) -> usize {
        self.logits(rows)
    }

    /// f32 elements of scratch for the loss of `rows` rows and its gradient.
    pub fn loss(&self, rows: usize) -> usize {
        self.logits(rows) + self.slices * rows.min(CHUNK) * self.columns
    }
}

/// Where the parts of the scratch of a search for singular values begin, in f32 elements. The first are f64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RsvdSizes {
    /// Rows of a weight that are worked on at a time.
    pub panel: usize,
    /// `Z`, what becomes it, and `Aᵀ Y`: `[I, l]` of each weight.
    pub inner: [usize; 3],
    /// `Y` and `Y V / √λ`: `[O, l]`.
    pub outer: [usize; 2],
    /// A Gram, its eigenvectors, and the maps made of either: `[l, l]`.
    pub square: [usize; 4],
    /// λ: `[l]`.
    pub lambda: usize,
    /// Sums of squares: `⌈O / 16⌉`.
    pub energy: usize,
    /// Z's terms: `[3 l, I]` of each weight, bf16.
    pub z_terms: usize,
    /// Y's terms: `[panel, 3 l]`, bf16.
    pub y_terms: usize,
    /// Partial sums of a panel.
    pub partial: usize,
    /// All of it.
    pub len: usize,
}

impl RsvdSizes {
    /// For `n` weights of size `(O, I)` and l directions.
    pub fn new(n: usize, (o, i): (usize, usize), l: usize) -> RsvdSizes {
        let row = CudaSizes::row(i);
        let panel = (PANEL / (2 * row.max(1)) / SPAN * SPAN).clamp(SPAN, o.next_multiple_of(SPAN).max(SPAN));
        let rows = panel.min(o);
        let mut len = 0;
        let mut next = |elements: usize| {
            let start = len;
            len += part(elements);
            start
        };
        let gradients = rows.div_ceil(SPAN) * i * partial_row(3 * l);
        RsvdSizes {
            panel,
            inner: std::array::from_fn(|_| next(2 * n * i * l)),
            outer: std::array::from_fn(|_| next(2 * n * o * l)),
            square: std::array::from_fn(|_| next(2 * n * l * l)),
            lambda: next(2 * n * l),
            energy: next(2 * n * o.div_ceil(ENERGY_ROWS)),
            z_terms: next(halves(n * 3 * l * row)),
            y_terms: next(halves(rows * thin_row(3 * l))),
            partial: next(thin_partial(rows, 3 * l, i).max(gradients)),
            len,
        }
    }
}

/// Two bf16 elements an f32.
fn halves(bf16: usize) -> usize {
    bf16.div_ceil(2)
}

/// f32 elements of a part of scratch that holds `elements`.
pub(crate) fn part(elements: usize) -> usize {
    elements.next_multiple_of(SCRATCH_PART)
}

/// The same of bf16 elements.
pub(crate) fn bf16_part(elements: usize) -> usize {
    part(halves(elements))
}

/// f32 elements from row to row of partial sums of `columns`.
pub(crate) fn partial_row(columns: usize) -> usize {
    columns.next_multiple_of(4)
}

/// bf16 elements from row to row of s·B of `rank`, and of u of all ranks.
pub(crate) fn thin_row(rank: usize) -> usize {
    rank.next_multiple_of(8)
}

/// Into how many parts the K of `x Aᵀ` is cut, and how long they are: a multiple of 32.
pub(crate) fn thin_splits(rows: usize, columns: usize, inner: usize) -> (usize, usize) {
    let blocks = (rows.div_ceil(THIN_TILE) * columns.div_ceil(THIN_TILE)).max(1);
    let splits = THIN_BLOCKS.div_ceil(blocks).min(inner.div_ceil(THIN_DEPTH)).max(1);
    let length = inner.div_ceil(splits).next_multiple_of(32).max(32);
    (inner.div_ceil(length), length)
}

/// How many tiles of W the importance product has down and across: of 128 × 128, or 128 × 64 where F is needed.
pub(crate) fn importance_tiles(out: usize, inner: usize, scores: &[Score]) -> (usize, usize) {
    let columns = if scores.iter().any(|s| s.needs_second()) { TILE / 2 } else { TILE };
    (out.div_ceil(TILE), inner.div_ceil(columns))
}

/// The most partial sums of `x Aᵀ` of up to `rows` rows: `splits · rows` is within both bounds, see [`thin_splits`].
fn thin_partial(rows: usize, columns: usize, inner: usize) -> usize {
    let most = (rows * inner.div_ceil(THIN_DEPTH)).min(rows + THIN_BLOCKS * THIN_TILE);
    most.max(rows) * partial_row(columns)
}

impl Scratch for CudaSizes {
    /// A and s·B of each adapter as bf16, and partial sums of `x Aᵀ`; 0 without an adapter.
    fn linear_scratch<T: Real>(&self, size: LinearSize) -> usize {
        if size.rank == 0 {
            return 0;
        }
        let factors = size.rank * Self::row(size.inner) + size.out * thin_row(size.rank);
        let partial = thin_partial(size.tokens * size.copies, size.rank, size.inner);
        bf16_part(size.adapters.max(1) * factors) + part(partial)
    }

    /// A and (s·B)ᵀ as bf16, `u[T, R]` in bf16, and partial sums: of the larger of dA and dB per 512 tokens, and of u per
    /// 256 columns of dy. 0 without an adapter.
    fn linear_bwd_scratch<T: Real>(&self, size: LinearSize) -> usize {
        if size.rank == 0 {
            return 0;
        }
        let factors = size.rank * (Self::row(size.inner) + size.out + PAD);
        let row = partial_row(size.rank);
        let gradients = size.tokens.div_ceil(SPAN) * size.out.max(size.inner) * row;
        let u = size.out.div_ceil(GRADIENT_COLUMNS) * size.tokens * row;
        bf16_part(factors) + bf16_part(size.tokens * thin_row(size.rank)) + part(gradients) + part(u)
    }

    /// `Σ_k do∘o` of each query and head.
    fn attention_bwd_scratch(&self, tokens: usize, heads: usize) -> usize {
        tokens * heads
    }

    /// Logits of 128 rows in f32, and their dx from each slice of the vocabulary.
    fn cross_entropy_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, _: DType) -> usize {
        HeadSizes::new(vocab, width).loss(rows)
    }

    /// Logits of 128 rows in f32.
    fn choice_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, _: DType) -> usize {
        HeadSizes::new(vocab, width).score(rows)
    }

    /// Sums over rows and over columns of each tile, in f64.
    fn importance_scratch<T: Real>(&self, out: usize, inner: usize, scores: &[Score]) -> usize {
        let (down, across) = importance_tiles(out, inner, scores);
        2 * scores.len() * (out * across + inner * down)
    }

    /// See [`RsvdSizes`].
    fn rsvd_scratch(&self, weights: usize, size: (usize, usize), sketch: &Sketch) -> usize {
        RsvdSizes::new(weights, size, sketch.width(size)).len
    }

    /// None: every kernel is our own.
    fn kept_bytes(&self, _: usize) -> usize {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_of_heads() {
        let llama = HeadSizes::new(128_256, 4096);
        assert_eq!((llama.slices, llama.slice), (8, 16_032));
        assert_eq!(llama.loss(8192), 128 * 128_256 + 8 * 128 * 4096);
        for (vocab, width) in [(1, 1), (5, 3), (511, 64), (513, 64), (32_000, 2048), (151_936, 896)] {
            let s = HeadSizes::new(vocab, width);
            assert!(
                s.slice.is_multiple_of(32) && (s.slices - 1) * s.slice < vocab && s.slices * s.slice >= vocab
            );
        }
    }
}
