//! Numbers and where they lie: element types and the storage of a back end.

use std::fmt;
use std::ops::Range;

use half::{bf16, f16};

/// Element types of files and buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 8 bits of exponent, 7 of fraction.
    BF16,
    /// 5 bits of exponent, 10 of fraction.
    F16,
    /// 8 bits of exponent, 23 of fraction.
    F32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::BF16 | DType::F16 => 2,
            DType::F32 => 4,
        }
    }

    /// The name in safetensors headers: `BF16`, `F16`, `F32`.
    pub fn name(self) -> &'static str {
        match self {
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            DType::F32 => "F32",
        }
    }

    /// The dtype of a safetensors header, if it is one that we read.
    pub fn from_name(name: &str) -> Option<DType> {
        [DType::BF16, DType::F16, DType::F32].into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a buffer can hold.
pub trait Elem: bytemuck::Pod + Send + Sync + fmt::Debug + PartialEq + 'static {}

impl Elem for f32 {}
impl Elem for f64 {}
impl Elem for bf16 {}
impl Elem for f16 {}
impl Elem for u32 {}
impl Elem for u8 {}

/// A real number that activations and weights are stored as.
pub trait Real: Elem {
    /// The dtype in files.
    const DTYPE: DType;
    /// The value, exactly.
    fn to_f32(self) -> f32;
    /// The nearest value, ties to even.
    fn from_f32(x: f32) -> Self;
    /// The nearest value, ties to even, rounded once.
    fn from_f64(x: f64) -> Self {
        Self::from_f32(to_odd(x))
    }
    /// `x` rounded to this type and widened again.
    fn round(x: f32) -> f32 {
        Self::from_f32(x).to_f32()
    }
}

/// `x` in f32, rounded to the neighbour with an odd last bit where it is not exact: a second rounding, to 16 bits, then
/// gives what one rounding of `x` would. (`half`'s own conversions from f64 drop the low 32 bits first.)
#[inline(always)]
fn to_odd(x: f64) -> f32 {
    let near = x as f32;
    let wide = f64::from(near);
    if wide == x || !near.is_finite() || near.to_bits() & 1 == 1 {
        return near;
    }
    // The neighbour on the other side of x: one step of the magnitude up or down; both neighbours of even are odd.
    if wide.abs() < x.abs() { f32::from_bits(near.to_bits() + 1) } else { f32::from_bits(near.to_bits() - 1) }
}

impl Real for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn from_f64(x: f64) -> f32 {
        x as f32
    }
}

impl Real for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    // To the bit what `half` has, without branches: loops over it become vector instructions.
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        let bits = x.to_bits();
        let (nearest, quiet) = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)), bits | 0x40_0000);
        bf16::from_bits(((if x.is_nan() { quiet } else { nearest }) >> 16) as u16)
    }
}

impl Real for f16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }
}

/// How many elements a view holds.
pub trait Length {
    /// Elements.
    fn len(&self) -> usize;
    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Length for &[T] {
    fn len(&self) -> usize {
        <[T]>::len(self)
    }
}

impl<T> Length for &mut [T] {
    fn len(&self) -> usize {
        <[T]>::len(self)
    }
}

/// The size of a frozen weight.
pub trait Frozen: Send + Sync {
    /// `(O, I)`.
    fn size(&self) -> (usize, usize);
    /// How it is stored.
    fn dtype(&self) -> DType;
}

/// How buffers and rows lie in memory.
pub trait MemoryLayout {
    /// Bytes that a buffer's size is rounded up to.
    const ALIGN: u64;
    /// Bytes that a frozen weight `[O, I]` takes; 0 where it is used from its file.
    fn matrix_bytes(size: (usize, usize)) -> u64;
    /// Elements from one row of `width` elements to the next. What lies between them is never read.
    fn row(width: usize) -> usize;
}

/// Where a back end keeps its numbers: owned buffers, shared and exclusive views of a part of one, and frozen weights.
pub trait Store: MemoryLayout + Sized + Send + Sync + 'static {
    /// An owned buffer.
    type Buf<T: Elem>: Send + Sync;
    /// A part of a buffer, to read.
    type View<'a, T: Elem>: Copy + Length + Send + Sync;
    /// A part of a buffer, to write.
    type ViewMut<'a, T: Elem>: Length + Send;
    /// A frozen weight `W[O, I]` in the dtype of its file.
    type Matrix: Frozen;

    /// The elements in `range`, to read.
    fn view<T: Elem>(buf: &Self::Buf<T>, range: Range<usize>) -> Self::View<'_, T>;
    /// The elements in `range`, to write.
    fn view_mut<T: Elem>(buf: &mut Self::Buf<T>, range: Range<usize>) -> Self::ViewMut<'_, T>;
    /// Elements of the buffer.
    fn len<T: Elem>(buf: &Self::Buf<T>) -> usize;
    /// Whether the device computes in the process's memory, so that nothing need be copied to it.
    const HOST: bool = false;
    /// All of `own`, to read, or of `copy`, which is then its copy on the device.
    fn view_of<'a, T: Elem>(own: &'a [T], copy: &'a Self::Buf<T>) -> Self::View<'a, T> {
        let _ = own;
        Self::view(copy, 0..Self::len(copy))
    }
    /// All of `own`, to write, or of `copy`, which then must be brought to it.
    fn view_mut_of<'a, T: Elem>(own: &'a mut [T], copy: &'a mut Self::Buf<T>) -> Self::ViewMut<'a, T> {
        let _ = own;
        let len = Self::len(copy);
        Self::view_mut(copy, 0..len)
    }

    /// The rows in `range` of a matrix of activations `width` wide, to read.
    fn rows<T: Real>(buf: &Self::Buf<T>, range: Range<usize>, width: usize) -> Self::View<'_, T> {
        let row = Self::row(width);
        Self::view(buf, range.start * row..range.end * row)
    }
    /// The rows in `range` of a matrix of activations `width` wide, to write.
    fn rows_mut<T: Real>(buf: &mut Self::Buf<T>, range: Range<usize>, width: usize) -> Self::ViewMut<'_, T> {
        let row = Self::row(width);
        Self::view_mut(buf, range.start * row..range.end * row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_that_of_half() {
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits);
            let (got, want) = (Real::to_f32(x), x.to_f32());
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{bits:#06x}");
        }
        // Every exponent, both signs, and what is halfway between two neighbours, a bit more and a bit less.
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                let (got, want) = (<bf16 as Real>::from_f32(x), bf16::from_f32(x));
                assert_eq!(got.to_bits(), want.to_bits(), "{:#010x}", x.to_bits());
            }
        }
    }
}
