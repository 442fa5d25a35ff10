//! Buffers that are only noted: how a plan is made without the memory that it asks for.

use std::marker::PhantomData;
use std::ops::Range;

use super::memory::{Allocator, Part, Plan, sum};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::Module;
use crate::error::{Error, Result};
use crate::tensor::{DType, Elem, Frozen, Length, MemoryLayout, Store};

/// Notes buffers in a plan, as `M` lays them.
#[derive(Debug)]
pub struct Paper<M> {
    /// What was noted.
    pub plan: Plan,
    rows: PhantomData<fn() -> M>,
}

impl<M> Paper<M> {
    /// Goes on with `plan`.
    pub fn new(plan: Plan) -> Paper<M> {
        Paper { plan, rows: PhantomData }
    }
}

impl<M: MemoryLayout> Paper<M> {
    /// Notes the [`weights`](Self::weights) of `checkpoint`, and copies of those that would be used from their files but
    /// lie there at no multiple of an element's size.
    pub fn model(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.weights(checkpoint.config());
        let copied = if M::matrix_bytes((1, 1)) == 0 { checkpoint.unaligned_bytes()? } else { 0 };
        if copied > 0 {
            self.plan.add(Part::Weights, "copies of unaligned weights", copied);
        }
        Ok(())
    }

    /// Notes the weights of `config`, matrices with padded rows, norms and biases in f32, where they do not stay in
    /// their files.
    pub fn weights(&mut self, config: &ModelConfig) {
        let aligned = |bytes: u64| bytes.checked_next_multiple_of(M::ALIGN).unwrap_or(u64::MAX);
        let table = aligned(M::matrix_bytes((config.vocab, config.hidden)));
        if table == 0 {
            return;
        }
        let vector = |len: usize| aligned(4 * len as u64);
        self.plan.add(Part::Weights, "embedding", table);
        for layer in 0..config.layers {
            let modules = config.modules_of(layer).into_iter().map(|Module { target, .. }| {
                let (o, i) = config.dims(target, layer);
                let bias = if config.has_bias(target) { vector(o) } else { 0 };
                aligned(M::matrix_bytes((o, i))).saturating_add(bias)
            });
            let bytes = sum(modules).saturating_add(2 * vector(config.hidden));
            self.plan.add(Part::Weights, format!("layer {layer} weights"), bytes);
        }
        self.plan.add(Part::Weights, "last norm", vector(config.hidden));
        if !config.tied {
            self.plan.add(Part::Weights, "head", table);
        }
    }
}

impl<M: MemoryLayout + 'static> Allocator for Paper<M> {
    type Store = Noted<M>;
    fn take<T: Elem>(&mut self, part: Part, name: &str, len: usize) -> Result<usize> {
        let bytes = (len as u64)
            .checked_mul(size_of::<T>() as u64)
            .and_then(|bytes| bytes.checked_next_multiple_of(M::ALIGN))
            .ok_or_else(|| Error::Memory(format!("{name} of {len} elements is larger than any memory")))?;
        self.plan.add(part, name, bytes);
        Ok(len)
    }
}

/// Buffers that only have a length, as `M` lays them.
#[derive(Debug)]
pub struct Noted<M>(PhantomData<fn() -> M>);

/// A view of a buffer that only has a length.
#[derive(Clone, Copy, Debug)]
pub struct NotedView<'a, T>(usize, PhantomData<&'a T>);

impl<T> Length for NotedView<'_, T> {
    fn len(&self) -> usize {
        self.0
    }
}

/// A weight that only has a size.
#[derive(Debug)]
pub struct NotedMatrix {
    /// `(O, I)`.
    pub size: (usize, usize),
    /// How it would be stored.
    pub dtype: DType,
}

impl Frozen for NotedMatrix {
    fn size(&self) -> (usize, usize) {
        self.size
    }
    fn dtype(&self) -> DType {
        self.dtype
    }
}

impl<M: MemoryLayout> MemoryLayout for Noted<M> {
    const ALIGN: u64 = M::ALIGN;

    fn matrix_bytes(size: (usize, usize)) -> u64 {
        M::matrix_bytes(size)
    }
    fn row(width: usize) -> usize {
        M::row(width)
    }
}

impl<M: MemoryLayout + 'static> Store for Noted<M> {
    type Buf<T: Elem> = usize;
    type View<'a, T: Elem> = NotedView<'a, T>;
    type ViewMut<'a, T: Elem> = NotedView<'a, T>;
    type Matrix = NotedMatrix;

    fn view<T: Elem>(_: &usize, range: Range<usize>) -> NotedView<'_, T> {
        NotedView(range.len(), PhantomData)
    }
    fn view_mut<T: Elem>(_: &mut usize, range: Range<usize>) -> NotedView<'_, T> {
        NotedView(range.len(), PhantomData)
    }
    fn len<T: Elem>(buf: &usize) -> usize {
        *buf
    }
}
