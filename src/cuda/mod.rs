//! The CUDA back end: kernels of our own on one device, driven through the driver's interface.
//!
//! Activations are bf16 and rows of them padded; weights are bf16 whatever their file holds. Kernels are on one stream,
//! copies from the host on another, each after what it needs of the other: an operation that returns is queued, and
//! `download` waits. What fails on the device is told by a later call, with the kernels that were launched last.

// Calls of the driver, each with the reason why it is sound.
#![allow(unsafe_code)]

mod adamw;
mod apply;
mod attention;
mod choice;
mod cross_entropy;
mod driver;
mod eigh;
mod embed;
mod gate;
mod gram;
mod head;
mod images;
mod importance;
mod launch;
mod linear;
mod linear_bwd;
mod linear_bwd_sm90;
mod linear_sm90;
mod lists;
mod loading;
mod lora;
mod memory;
mod merge;
mod rms_norm;
mod rope;
mod rsvd;
mod scatter;
mod store;
mod sum_sq;
mod swiglu;
mod tensor_map;
mod tile;
mod timing;

use std::sync::Arc;

use cudarc::driver::result;

pub use store::{Buffer, DeviceMemory, Matrix, View, ViewMut};

use self::driver::{After, Driver};
use self::launch::{Args, Grid, Kernel};
use self::lists::{Kind, List, Lists};
use self::loading::Ring;
use self::memory::Memory;
use self::tile::Tile;
use crate::backend::{Backend, LinearSize, Scratch};
use crate::cuda_sizes::CudaSizes;
use crate::error::{Error, Result};
use crate::host::{HostMatrix, MatrixSource};
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
use crate::tensor::{DType, Elem, Frozen, Length, Real, Store};

/// One CUDA device.
pub struct Cuda {
    lists: Lists,
    ring: Ring,
    memory: Arc<Memory>,
    driver: Arc<Driver>,
    /// The tile of all products, wherever it can be: small shapes would only ever see the small one.
    #[cfg(test)]
    pinned: Option<Tile>,
}

/// What a machine and this build have for CUDA.
#[derive(Debug)]
pub struct Found {
    /// The CUDA version that the driver is for, and its devices; or why there is none.
    pub driver: Result<((i32, i32), usize)>,
    /// The oldest driver that this build runs on, as a CUDA version; none without kernels.
    pub least: Option<(i32, i32)>,
    /// Files of kernels in this build.
    pub kernels: usize,
    /// The architectures that they have code for.
    pub architectures: &'static str,
}

/// Looks for a driver and kernels.
pub fn find() -> Found {
    let kernels = images::all().len();
    Found {
        driver: driver::probe(),
        least: (kernels > 0).then(driver::least),
        kernels,
        architectures: images::architectures(),
    }
}

impl Cuda {
    /// Device `ordinal`, of whose memory at most `limit` bytes are taken.
    ///
    /// Fails without a driver, with one that is too old, without the device, and without kernels in this build.
    pub fn new(ordinal: usize, limit: Option<u64>) -> Result<Cuda> {
        let driver = Arc::new(Driver::new(ordinal)?);
        let memory = Arc::new(Memory::new(driver.clone(), limit));
        Ok(Cuda {
            lists: Lists::new(driver.clone())?,
            ring: Ring::new(driver.clone())?,
            memory,
            driver,
            #[cfg(test)]
            pinned: None,
        })
    }

    /// What the driver calls the device.
    pub fn name(&self) -> &str {
        &self.driver.name
    }

    /// Major and minor compute capability.
    pub fn capability(&self) -> (i32, i32) {
        self.driver.capability
    }

    /// Whether the device shares the system's memory.
    pub fn unified(&self) -> bool {
        self.driver.unified
    }

    /// Free and total bytes of the device's memory.
    pub fn free_and_total(&self) -> Result<(u64, u64)> {
        self.driver.memory()
    }

    /// Bytes of buffers and weights that are taken.
    pub fn held(&self) -> u64 {
        self.memory.held()
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }

    /// The tile of a product of so many copies of so many tokens, with outputs of `widths`; `fits`: whether Hopper's kernel
    /// does what is asked for.
    fn tile(&self, rows: (usize, usize), widths: impl Iterator<Item = usize> + Clone, fits: bool) -> Tile {
        let hopper = fits && self.driver.hopper;
        #[cfg(test)]
        if let Some(tile) = self.pinned.filter(|&tile| tile != Tile::Hopper || hopper) {
            return tile;
        }
        Tile::choose(rows, widths, hopper)
    }

    /// Starts a kernel; see [`Driver::launch`].
    ///
    /// # Safety
    /// With these arguments the kernel touches only what the views among them hold.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: Grid,
        sizes: &[(&'static str, usize)],
        args: impl Args,
    ) -> Result<()> {
        // SAFETY: the caller answers for the arguments.
        unsafe { self.driver.launch(kernel, grid, sizes, args) }
    }

    /// `content` on the device until the result is dropped.
    fn list(&self, kind: Kind, content: &[u32]) -> Result<List<'_>> {
        self.lists.put(&self.ring, kind, content)
    }

    fn take<T: Elem>(&self, name: &str, len: usize) -> Result<Buffer<T>> {
        let bytes = (len as u64).checked_mul(size_of::<T>() as u64);
        let bytes = bytes
            .ok_or_else(|| Error::Memory(format!("{name} of {len} elements is larger than any memory")))?;
        let block = if len > 0 { Some(self.memory.take(name, bytes)?) } else { None };
        Ok(Buffer::new(block, len))
    }
}

/// Fails unless activations are bf16.
fn bf16_only<T: Real>(op: &'static str) -> Result<()> {
    if T::DTYPE == DType::BF16 {
        return Ok(());
    }
    let why =
        format!("activations are {}, the CUDA back end computes in BF16; use --precision bf16", T::DTYPE);
    Err(Error::Op { op, why })
}

fn same_length(op: &'static str, dst: usize, src: usize) -> Result<()> {
    if dst == src {
        return Ok(());
    }
    Err(Error::Op { op, why: format!("the target holds {dst} elements, the source {src}") })
}

impl Scratch for Cuda {
    fn linear_scratch<T: Real>(&self, size: LinearSize) -> usize {
        CudaSizes.linear_scratch::<T>(size)
    }
    fn linear_bwd_scratch<T: Real>(&self, size: LinearSize) -> usize {
        CudaSizes.linear_bwd_scratch::<T>(size)
    }
    fn attention_bwd_scratch(&self, tokens: usize, heads: usize) -> usize {
        CudaSizes.attention_bwd_scratch(tokens, heads)
    }
    fn cross_entropy_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, dtype: DType) -> usize {
        CudaSizes.cross_entropy_scratch::<T>(rows, vocab, width, dtype)
    }
    fn choice_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, dtype: DType) -> usize {
        CudaSizes.choice_scratch::<T>(rows, vocab, width, dtype)
    }
    fn importance_scratch<T: Real>(&self, out: usize, inner: usize, scores: &[Score]) -> usize {
        CudaSizes.importance_scratch::<T>(out, inner, scores)
    }
    fn rsvd_scratch(&self, weights: usize, size: (usize, usize), sketch: &Sketch) -> usize {
        CudaSizes.rsvd_scratch(weights, size, sketch)
    }
    fn kept_bytes(&self, head_dim: usize) -> usize {
        CudaSizes.kept_bytes(head_dim)
    }
}

impl Backend for Cuda {
    type Store = DeviceMemory;

    fn device_free(&self) -> Result<Option<u64>> {
        self.synchronize()?;
        Ok(Some(self.free_and_total()?.0))
    }

    fn shares_memory(&self) -> bool {
        self.unified()
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        self.memory.reserve(bytes)
    }

    fn alloc<T: Elem>(&self, name: &str, len: usize) -> Result<Buffer<T>> {
        let mut buffer = self.take(name, len)?;
        self.zero(DeviceMemory::view_mut(&mut buffer, 0..len))?;
        Ok(buffer)
    }

    fn upload<T: Elem>(&self, dst: ViewMut<'_, T>, src: &[T]) -> Result<()> {
        same_length("upload", dst.len(), src.len())?;
        self.ring.copy(dst.pointer().0, After::Kernels, bytemuck::cast_slice(src))
    }

    fn download<T: Elem>(&self, dst: &mut [T], src: View<'_, T>) -> Result<()> {
        same_length("download", dst.len(), src.len())?;
        if dst.is_empty() {
            return Ok(());
        }
        // SAFETY: the view and `dst` hold as many elements; the copy is done when `synchronize` returns.
        let copy = |stream| unsafe { result::memcpy_dtoh_async(dst, src.pointer().0, stream) };
        let copied = self.driver.compute(|| "copying from the device".into(), copy);
        let waited = self.driver.synchronize();
        copied.and(waited)
    }

    fn copy<T: Elem>(&self, dst: ViewMut<'_, T>, src: View<'_, T>) -> Result<()> {
        same_length("copy", dst.len(), src.len())?;
        if src.is_empty() {
            return Ok(());
        }
        let bytes = src.len() * size_of::<T>();
        // SAFETY: the views hold as many elements.
        let copy =
            |stream| unsafe { result::memcpy_dtod_async(dst.pointer().0, src.pointer().0, bytes, stream) };
        self.driver.compute(|| "copying on the device".into(), copy)
    }

    fn zero<T: Elem>(&self, dst: ViewMut<'_, T>) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        let bytes = dst.len() * size_of::<T>();
        // SAFETY: the view holds as many bytes, and zero bytes are an element.
        let fill = |stream| unsafe { result::memset_d8_async(dst.pointer().0, 0, bytes, stream) };
        self.driver.compute(|| "setting memory to zero".into(), fill)
    }

    fn matrix(&self, source: MatrixSource) -> Result<Matrix> {
        let name = source.name.clone();
        let host = HostMatrix::new(source)?;
        let size = host.size();
        let row = <DeviceMemory as crate::tensor::MemoryLayout>::row(size.1);
        let len = size.0.checked_mul(row);
        let len = len.ok_or_else(|| Error::Memory(format!("{name} is larger than any memory")))?;
        let mut matrix = Matrix { elements: self.take(&name, len)?, size };
        self.ring.matrix(&mut matrix, &host)?;
        Ok(matrix)
    }

    fn embed<T: Real>(&self, op: Embed<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("embed")?;
        embed::embed(self, op)
    }
    fn rms_norm<T: Real>(&self, op: RmsNorm<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("rms_norm")?;
        rms_norm::rms_norm(self, op)
    }
    fn rms_norm_bwd<T: Real>(&self, op: RmsNormBwd<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("rms_norm_bwd")?;
        rms_norm::rms_norm_bwd(self, op)
    }
    fn linear<T: Real>(&self, op: Linear<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("linear")?;
        linear::linear(self, op)
    }
    fn linear_bwd<T: Real>(&self, op: LinearBwd<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("linear_bwd")?;
        linear_bwd::linear_bwd(self, op)
    }
    fn rope<T: Real>(&self, op: Rope<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("rope")?;
        rope::rope(self, op)
    }
    fn attention<T: Real>(&self, op: Attention<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("attention")?;
        attention::attention(self, op)
    }
    fn attention_bwd<T: Real>(&self, op: AttentionBwd<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("attention_bwd")?;
        attention::attention_bwd(self, op)
    }
    fn cross_entropy<T: Real>(&self, op: CrossEntropy<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("cross_entropy")?;
        cross_entropy::cross_entropy(self, op)
    }
    fn choice<T: Real>(&self, op: Choice<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("choice")?;
        choice::choice(self, op)
    }
    fn importance<T: Real>(&self, op: Importance<'_, DeviceMemory, T>) -> Result<()> {
        bf16_only::<T>("importance")?;
        importance::importance(self, op)
    }
    fn scatter(&self, op: Scatter<'_, DeviceMemory>) -> Result<()> {
        scatter::scatter(self, op)
    }
    fn gram(&self, op: Gram<'_, DeviceMemory>) -> Result<()> {
        gram::gram(self, op)
    }
    fn eigh(&self, op: Eigh<'_, DeviceMemory>) -> Result<()> {
        eigh::eigh(self, op)
    }
    fn gate(&self, op: Gate<'_, DeviceMemory>) -> Result<()> {
        gate::gate(self, op)
    }
    fn apply(&self, op: Apply<'_, DeviceMemory>) -> Result<()> {
        apply::apply(self, op)
    }
    fn rsvd(&self, op: Rsvd<'_, DeviceMemory>) -> Result<()> {
        rsvd::rsvd(self, op)
    }
    fn merge<T: Real>(&self, op: Merge<'_, DeviceMemory, T>) -> Result<()> {
        merge::merge(self, op)
    }
    fn sum_sq(&self, op: SumSq<'_, DeviceMemory>) -> Result<()> {
        sum_sq::sum_sq(self, op)
    }
    fn adamw(&self, op: AdamW<'_, DeviceMemory>) -> Result<()> {
        adamw::adamw(self, op)
    }
}

#[cfg(test)]
pub(crate) mod tests;
