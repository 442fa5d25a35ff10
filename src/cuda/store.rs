//! Device memory as a store: buffers, views of their parts, and frozen weights in bf16 with padded rows.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::launch::Pointer;
use super::memory::Block;
use crate::cuda_sizes::CudaSizes;
use crate::tensor::{DType, Elem, Frozen, Length, MemoryLayout, Store};

/// Memory of a CUDA device.
#[derive(Debug)]
pub struct DeviceMemory;

/// As the plan of an edge has it.
impl MemoryLayout for DeviceMemory {
    const ALIGN: u64 = CudaSizes::ALIGN;

    fn matrix_bytes(size: (usize, usize)) -> u64 {
        CudaSizes::matrix_bytes(size)
    }

    fn row(width: usize) -> usize {
        CudaSizes::row(width)
    }
}

/// Elements on the device.
pub struct Buffer<T> {
    /// None for a buffer of no elements.
    block: Option<Block>,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Elem> Buffer<T> {
    /// `len` elements at the start of `block`.
    pub(super) fn new(block: Option<Block>, len: usize) -> Buffer<T> {
        Buffer { block, len, elements: PhantomData }
    }

    fn at(&self, range: &Range<usize>) -> u64 {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        self.block.as_ref().map_or(0, |b| b.pointer() + (range.start * size_of::<T>()) as u64)
    }
}

/// Elements on the device, to read.
#[repr(C)]
#[derive(Debug)]
pub struct View<'a, T> {
    /// First, so that a view is a kernel's argument.
    pointer: u64,
    len: usize,
    elements: PhantomData<&'a [T]>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

/// Elements on the device, to write.
#[repr(C)]
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    /// First, so that a view is a kernel's argument.
    pointer: u64,
    len: usize,
    elements: PhantomData<&'a mut [T]>,
}

impl<T> View<'_, T> {
    /// Where the first element lies.
    pub(super) fn pointer(&self) -> Pointer {
        Pointer(self.pointer)
    }
}

impl<T> ViewMut<'_, T> {
    /// What was written, to read.
    pub(super) fn reborrow(&self) -> View<'_, T> {
        View { pointer: self.pointer, len: self.len, elements: PhantomData }
    }

    /// Where the first element lies.
    pub(super) fn pointer(&self) -> Pointer {
        Pointer(self.pointer)
    }
}

impl ViewMut<'_, f32> {
    /// A part of scratch: `len` elements of another type from element `start` on.
    pub(super) fn part<T: Elem>(&self, start: usize, len: usize) -> ViewMut<'_, T> {
        let (from, bytes) = (start * size_of::<f32>(), len * size_of::<T>());
        assert!(from.is_multiple_of(size_of::<T>()) && from + bytes <= self.len * size_of::<f32>());
        ViewMut { pointer: self.pointer + from as u64, len, elements: PhantomData }
    }
}

/// Where the first element lies, or null.
pub(super) fn or_null<T>(view: Option<View<'_, T>>) -> Pointer {
    view.map_or(Pointer::NULL, |v| v.pointer())
}

impl<T> Length for View<'_, T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl<T> Length for ViewMut<'_, T> {
    fn len(&self) -> usize {
        self.len
    }
}

/// A frozen weight `W[O, I]` in bf16, rows padded with zeros.
pub struct Matrix {
    pub(super) elements: Buffer<bf16>,
    pub(super) size: (usize, usize),
}

impl Matrix {
    /// Where the first element lies.
    pub(super) fn pointer(&self) -> Pointer {
        DeviceMemory::view(&self.elements, 0..self.elements.len).pointer()
    }

    /// Elements from one row to the next.
    pub(super) fn row(&self) -> usize {
        CudaSizes::row(self.size.1)
    }
}

impl Frozen for Matrix {
    fn size(&self) -> (usize, usize) {
        self.size
    }
    fn dtype(&self) -> DType {
        DType::BF16
    }
}

impl Store for DeviceMemory {
    type Buf<T: Elem> = Buffer<T>;
    type View<'a, T: Elem> = View<'a, T>;
    type ViewMut<'a, T: Elem> = ViewMut<'a, T>;
    type Matrix = Matrix;

    fn view<T: Elem>(buf: &Buffer<T>, range: Range<usize>) -> View<'_, T> {
        View { pointer: buf.at(&range), len: range.len(), elements: PhantomData }
    }
    fn view_mut<T: Elem>(buf: &mut Buffer<T>, range: Range<usize>) -> ViewMut<'_, T> {
        ViewMut { pointer: buf.at(&range), len: range.len(), elements: PhantomData }
    }
    fn len<T: Elem>(buf: &Buffer<T>) -> usize {
        buf.len
    }
}
