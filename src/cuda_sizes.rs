//! How much room numbers and operations take on a CUDA device: what an edge needs is planned on any machine.

use crate::backend::{LinearSize, Scratch};
use crate::ops::importance::Score;
use crate::tensor::{DType, MemoryLayout, Real};

/// Elements that a row is padded to: 128 bytes, so that every row is aligned for the tensor memory accelerator and
/// every tile along it is full.
const PAD: usize = 64;
/// The K slice of one matrix instruction on bf16: ranks are padded to it.
const SLICE: usize = 16;
/// Tokens of a tile of the products that sum over tokens; tiles are added up in a fixed order.
const TOKENS: usize = 512;
/// Rows of logits that exist at a time.
const CHUNK: usize = 128;
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

/// Two bf16 elements an f32.
fn halves(bf16: usize) -> usize {
    bf16.div_ceil(2)
}

/// A and s·B as bf16, `[R', I]` and `[O, R']`.
fn factors(size: LinearSize) -> usize {
    halves(size.rank.next_multiple_of(SLICE) * (size.inner + size.out))
}

impl Scratch for CudaSizes {
    /// `R' (I + O) / 2` with R' = R rounded up to 16: the factors as the product reads them; 0 without an adapter.
    fn linear_scratch<T: Real>(&self, size: LinearSize) -> usize {
        if size.rank == 0 { 0 } else { factors(size) }
    }

    /// The factors again, `u[T, R']` in bf16, and dA and dB of each tile of 512 tokens in f32.
    fn linear_bwd_scratch<T: Real>(&self, size: LinearSize) -> usize {
        if size.rank == 0 {
            return 0;
        }
        let rank = size.rank.next_multiple_of(SLICE);
        let partial = size.tokens.div_ceil(TOKENS) * rank * (size.inner + size.out);
        factors(size) + halves(size.tokens * rank) + partial
    }

    /// Logits of 128 rows in f32, their x and dx in bf16, and a maximum and a sum for each supervised row.
    fn cross_entropy_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, _: DType) -> usize {
        let chunk = rows.min(CHUNK);
        chunk * vocab + 2 * halves(chunk * width) + 2 * rows
    }

    /// As the loss without dx.
    fn choice_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, _: DType) -> usize {
        let chunk = rows.min(CHUNK);
        chunk * vocab + halves(chunk * width) + 2 * rows
    }

    /// Sums over rows and over columns of each 128 × 128 tile, in f64.
    fn importance_scratch<T: Real>(&self, out: usize, inner: usize, scores: &[Score]) -> usize {
        2 * scores.len() * (out * inner.div_ceil(TILE) + inner * out.div_ceil(TILE))
    }

    /// None: every kernel is our own.
    fn kept_bytes(&self) -> usize {
        0
    }
}
