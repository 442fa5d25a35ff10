//! What a device must do: hold numbers and compute the operations of [`crate::ops`].
//!
//! Static dispatch; no operation allocates room for numbers (what threads keep between operations is the one exception,
//! and a row of the memory plan); scratch is an argument with a sister function for its size, in f32 elements.

use crate::error::Result;
use crate::host::MatrixSource;
use crate::ops::adamw::AdamW;
use crate::ops::apply::Apply;
use crate::ops::attention::{Attention, AttentionBwd};
use crate::ops::choice::Choice;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::eigh::Eigh;
use crate::ops::embed::Embed;
use crate::ops::gate::Gate;
use crate::ops::gram::Gram;
use crate::ops::importance::{Importance, Score};
use crate::ops::linear::{Linear, LinearBwd};
use crate::ops::merge::Merge;
use crate::ops::rms_norm::{RmsNorm, RmsNormBwd};
use crate::ops::rope::Rope;
use crate::ops::rsvd::{Rsvd, Sketch};
use crate::ops::scatter::Scatter;
use crate::ops::sum_sq::SumSq;
use crate::tensor::{DType, Elem, Real, Store};

/// Sizes that decide how much room [`Backend::linear`] and [`Backend::linear_bwd`] need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearSize {
    /// Rows of x.
    pub tokens: usize,
    /// Rows of y for each row of x.
    pub copies: usize,
    /// The outputs' widths, added up.
    pub out: usize,
    /// I.
    pub inner: usize,
    /// The outputs' ranks, added up.
    pub rank: usize,
    /// The most adapters that one output has, each with rows of its own.
    pub adapters: usize,
    /// How the weights are stored.
    pub dtype: DType,
    /// Whether dropout is on.
    pub dropout: bool,
}

/// What a product with a frozen weight is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// `x Wᵀ`.
    Forward,
    /// `dy W`.
    Backward,
}

/// How much room operations need besides their outputs; part of the memory plan, so it is asked without a device too.
pub trait Scratch: Send + Sync {
    /// Room for [`Backend::linear`].
    fn linear_scratch<T: Real>(&self, size: LinearSize) -> usize;
    /// Room for [`Backend::linear_bwd`].
    fn linear_bwd_scratch<T: Real>(&self, size: LinearSize) -> usize;
    /// Room for [`Backend::attention_bwd`] of `tokens` queries of `heads` heads.
    fn attention_bwd_scratch(&self, tokens: usize, heads: usize) -> usize;
    /// Room for [`Backend::cross_entropy`] of `rows` supervised rows and a head `[vocab, width]` of `dtype`.
    fn cross_entropy_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, dtype: DType) -> usize;
    /// Room for [`Backend::choice`] of `rows` pairs and a head `[vocab, width]` of `dtype`.
    fn choice_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, dtype: DType) -> usize;
    /// Room for [`Backend::importance`] of a weight `[out, inner]`.
    fn importance_scratch<T: Real>(&self, out: usize, inner: usize, scores: &[Score]) -> usize;
    /// Room for [`Backend::rsvd`] of `weights` weights of size `(O, I)`.
    fn rsvd_scratch(&self, weights: usize, size: (usize, usize), sketch: &Sketch) -> usize;
    /// Bytes that operations on heads of so many columns hold besides scratch, on all threads together.
    fn kept_bytes(&self, head_dim: usize) -> usize;
    /// Bytes that [`Backend::pack`] takes for a weight `[out, inner]`; 0 where products read weights as they are kept.
    fn packed_bytes<T: Real>(&self, size: (usize, usize), pass: Pass) -> usize {
        let _ = (size, pass);
        0
    }
}

/// A device.
pub trait Backend: Scratch {
    /// Where its numbers lie.
    type Store: Store;

    /// Free bytes of the device's own memory, as its driver says after all work; none where buffers are the process's.
    fn device_free(&self) -> Result<Option<u64>> {
        Ok(None)
    }
    /// Whether buffers are the system's memory, so that what the host holds besides counts against the same limit.
    fn shares_memory(&self) -> bool {
        true
    }
    /// Makes room for buffers and weights of `bytes` together, which are asked for next. Does nothing where the system
    /// gives memory as it is touched.
    fn reserve(&self, bytes: u64) -> Result<()> {
        let _ = bytes;
        Ok(())
    }
    /// Does work of many small operations where they are done, so that they need not be handed over one by one.
    fn within<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }
    /// Whether several small problems are best given to it at once by several threads, one each, rather than in one call.
    fn side_by_side(&self) -> bool {
        false
    }
    /// A buffer of `len` zeros. Called while a run is set up, never inside an operation.
    fn alloc<T: Elem>(&self, name: &str, len: usize) -> Result<<Self::Store as Store>::Buf<T>>;
    /// Host to device.
    fn upload<T: Elem>(&self, dst: <Self::Store as Store>::ViewMut<'_, T>, src: &[T]) -> Result<()>;
    /// Device to host; waits for what computes `src`.
    fn download<T: Elem>(&self, dst: &mut [T], src: <Self::Store as Store>::View<'_, T>) -> Result<()>;
    /// Device to device.
    fn copy<T: Elem>(
        &self,
        dst: <Self::Store as Store>::ViewMut<'_, T>,
        src: <Self::Store as Store>::View<'_, T>,
    ) -> Result<()>;
    /// Sets all elements to zero.
    fn zero<T: Elem>(&self, dst: <Self::Store as Store>::ViewMut<'_, T>) -> Result<()>;
    /// Makes a frozen weight usable, in its file's dtype.
    fn matrix(&self, source: MatrixSource) -> Result<<Self::Store as Store>::Matrix>;
    /// Lays a copy of a frozen weight as the products of a pass read it, so that none has to do so again; results are the
    /// same without. Does nothing where [`Scratch::packed_bytes`] is 0.
    fn pack<T: Real>(&self, w: &mut <Self::Store as Store>::Matrix, pass: Pass) -> Result<()> {
        let _ = (w, pass);
        Ok(())
    }

    /// See [`Embed`].
    fn embed<T: Real>(&self, op: Embed<'_, Self::Store, T>) -> Result<()>;
    /// See [`RmsNorm`].
    fn rms_norm<T: Real>(&self, op: RmsNorm<'_, Self::Store, T>) -> Result<()>;
    /// See [`RmsNormBwd`].
    fn rms_norm_bwd<T: Real>(&self, op: RmsNormBwd<'_, Self::Store, T>) -> Result<()>;
    /// See [`Linear`].
    fn linear<T: Real>(&self, op: Linear<'_, Self::Store, T>) -> Result<()>;
    /// See [`LinearBwd`].
    fn linear_bwd<T: Real>(&self, op: LinearBwd<'_, Self::Store, T>) -> Result<()>;
    /// See [`Rope`].
    fn rope<T: Real>(&self, op: Rope<'_, Self::Store, T>) -> Result<()>;
    /// See [`Attention`].
    fn attention<T: Real>(&self, op: Attention<'_, Self::Store, T>) -> Result<()>;
    /// See [`AttentionBwd`].
    fn attention_bwd<T: Real>(&self, op: AttentionBwd<'_, Self::Store, T>) -> Result<()>;
    /// See [`CrossEntropy`].
    fn cross_entropy<T: Real>(&self, op: CrossEntropy<'_, Self::Store, T>) -> Result<()>;
    /// See [`Choice`].
    fn choice<T: Real>(&self, op: Choice<'_, Self::Store, T>) -> Result<()>;
    /// See [`Importance`].
    fn importance<T: Real>(&self, op: Importance<'_, Self::Store, T>) -> Result<()>;
    /// See [`Scatter`].
    fn scatter(&self, op: Scatter<'_, Self::Store>) -> Result<()>;
    /// See [`Gram`].
    fn gram(&self, op: Gram<'_, Self::Store>) -> Result<()>;
    /// See [`Eigh`].
    fn eigh(&self, op: Eigh<'_, Self::Store>) -> Result<()>;
    /// See [`Gate`].
    fn gate(&self, op: Gate<'_, Self::Store>) -> Result<()>;
    /// See [`Apply`].
    fn apply(&self, op: Apply<'_, Self::Store>) -> Result<()>;
    /// See [`Rsvd`].
    fn rsvd(&self, op: Rsvd<'_, Self::Store>) -> Result<()>;
    /// See [`Merge`].
    fn merge<T: Real>(&self, op: Merge<'_, Self::Store, T>) -> Result<()>;
    /// See [`SumSq`].
    fn sum_sq(&self, op: SumSq<'_, Self::Store>) -> Result<()>;
    /// See [`AdamW`].
    fn adamw(&self, op: AdamW<'_, Self::Store>) -> Result<()>;
}
