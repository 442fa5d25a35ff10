//! Operands of test cases on any back end: rows padded as it pads them, the padding NaN, outputs between guard zones.

use std::fmt::Debug;

use crate::backend::Backend;
use crate::tensor::{Elem, MemoryLayout, Real, Store};

/// A buffer of a back end.
pub type Buf<B, T> = <<B as Backend>::Store as Store>::Buf<T>;
/// A view of a back end's buffer.
pub type View<'a, B, T> = <<B as Backend>::Store as Store>::View<'a, T>;
/// A view of a back end's buffer, to write.
pub type ViewMut<'a, B, T> = <<B as Backend>::Store as Store>::ViewMut<'a, T>;

/// Elements before and after an output that must not be written; a multiple of every alignment.
const ZONE: usize = 128;

/// An input: `x` on the device.
pub struct Input<B: Backend, T: Elem> {
    buf: Buf<B, T>,
    len: usize,
}

/// `x` as it is.
pub fn flat<B: Backend, T: Elem>(b: &B, x: &[T]) -> Input<B, T> {
    let mut buf = b.alloc::<T>("input", x.len()).expect("input");
    b.upload(B::Store::view_mut(&mut buf, 0..x.len()), x).expect("upload");
    Input { buf, len: x.len() }
}

/// `x[n, width]` in rows of activations, NaN between them.
pub fn rows<B: Backend, T: Real>(b: &B, x: &[T], width: usize) -> Input<B, T> {
    flat(b, &padded::<B, T>(x, width))
}

impl<B: Backend, T: Elem> Input<B, T> {
    /// All of it.
    pub fn view(&self) -> View<'_, B, T> {
        B::Store::view(&self.buf, 0..self.len)
    }
}

/// An output between two zones that must not be written.
pub struct Output<B: Backend, T: Elem> {
    buf: Buf<B, T>,
    /// Elements of the output, with padding.
    len: usize,
    width: usize,
    row: usize,
    zone: T,
}

/// An output that holds `content`, as it is.
pub fn holding<B: Backend, T: Elem>(b: &B, content: &[T], zone: T) -> Output<B, T> {
    let mut all = vec![zone; content.len() + 2 * ZONE];
    all[ZONE..ZONE + content.len()].copy_from_slice(content);
    let mut buf = b.alloc::<T>("output", all.len()).expect("output");
    b.upload(B::Store::view_mut(&mut buf, 0..all.len()), &all).expect("upload");
    let len = content.len();
    Output { buf, len, width: len.max(1), row: len.max(1), zone }
}

/// An output that holds `content[n, width]` in rows of activations.
pub fn holding_rows<B: Backend, T: Real>(b: &B, content: &[T], width: usize) -> Output<B, T> {
    let out = holding(b, &padded::<B, T>(content, width), T::from_f32(-77.0));
    Output { width: width.max(1), row: B::Store::row(width).max(1), ..out }
}

/// `n` times NaN.
pub fn unwritten<B: Backend>(b: &B, n: usize) -> Output<B, f32> {
    holding(b, &vec![f32::NAN; n], -77.0)
}

/// `[count, width]` of NaN in rows of activations.
pub fn unwritten_rows<B: Backend, T: Real>(b: &B, count: usize, width: usize) -> Output<B, T> {
    holding_rows(b, &vec![T::from_f32(f32::NAN); count * width], width)
}

impl<B: Backend, T: Elem> Output<B, T> {
    /// The part to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, B, T> {
        B::Store::view_mut(&mut self.buf, ZONE..ZONE + self.len)
    }

    /// What was written, without padding, if the zones are whole.
    pub fn done(self, b: &B) -> Vec<T> {
        let mut all = vec![self.zone; self.len + 2 * ZONE];
        let whole = 0..all.len();
        b.download(&mut all, B::Store::view(&self.buf, whole)).expect("download");
        let (before, rest) = all.split_at(ZONE);
        let (out, after) = rest.split_at(self.len);
        let same = |x: &T| bytemuck::bytes_of(x) == bytemuck::bytes_of(&self.zone);
        assert!(before.iter().all(same) && after.iter().all(same), "written outside of the output");
        out.chunks(self.row).flat_map(|row| row[..self.width].to_vec()).collect()
    }
}

fn padded<B: Backend, T: Real>(x: &[T], width: usize) -> Vec<T> {
    let row = B::Store::row(width);
    let mut all = vec![T::from_f32(f32::NAN); x.len() / width.max(1) * row];
    for (to, from) in all.chunks_mut(row.max(1)).zip(x.chunks(width.max(1))) {
        to[..width].copy_from_slice(from);
    }
    all
}

/// Runs `f` on every back end, twice on the first; all results must be the same bytes. Returns one.
pub fn same_on<B: Backend, R: PartialEq + Debug>(backends: &[B], f: impl Fn(&B) -> R) -> R {
    let one = f(&backends[0]);
    for (n, b) in backends.iter().enumerate() {
        assert!(f(b) == one, "another result on back end {n}");
    }
    one
}
