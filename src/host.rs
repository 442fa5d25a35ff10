//! Host memory as a store: vectors, slices, and weights used where the file mapping has them.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::Pass;
use crate::cpu::packed::Packed;
use crate::error::{Error, Result};
use crate::tensor::{DType, Elem, Frozen, MemoryLayout, Real, Store};

/// Bytes that stay where they are while anybody holds them: a file mapping, or a buffer.
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Bytes of the system's memory that could be taken now, as the kernel says; none where it does not.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Vectors and slices.
#[derive(Debug)]
pub struct Host;

/// Rows lie one right after the other.
impl MemoryLayout for Host {
    const ALIGN: u64 = 1;

    fn matrix_bytes(_: (usize, usize)) -> u64 {
        0
    }
    fn row(width: usize) -> usize {
        width
    }
}

impl Store for Host {
    type Buf<T: Elem> = Vec<T>;
    type View<'a, T: Elem> = &'a [T];
    type ViewMut<'a, T: Elem> = &'a mut [T];
    type Matrix = HostMatrix;

    fn view<T: Elem>(buf: &Vec<T>, range: Range<usize>) -> &[T] {
        &buf[range]
    }
    fn view_mut<T: Elem>(buf: &mut Vec<T>, range: Range<usize>) -> &mut [T] {
        &mut buf[range]
    }
    fn len<T: Elem>(buf: &Vec<T>) -> usize {
        buf.len()
    }
    const HOST: bool = true;
    fn view_of<'a, T: Elem>(own: &'a [T], _: &'a Vec<T>) -> &'a [T] {
        own
    }
    fn view_mut_of<'a, T: Elem>(own: &'a mut [T], _: &'a mut Vec<T>) -> &'a mut [T] {
        own
    }
}

/// A weight as a file holds it: `size.0 × size.1` elements of `dtype`, row-major, at `range` of `bytes`.
#[derive(Clone)]
pub struct MatrixSource {
    /// The tensor's name, for errors and plans.
    pub name: String,
    /// The mapping or buffer.
    pub bytes: Bytes,
    /// Where in `bytes` the elements lie.
    pub range: Range<usize>,
    /// Their type.
    pub dtype: DType,
    /// `(O, I)`.
    pub size: (usize, usize),
}

/// A frozen weight in host memory, in the dtype of its file, and its packed copies.
pub struct HostMatrix {
    bytes: Bytes,
    range: Range<usize>,
    dtype: DType,
    size: (usize, usize),
    /// Forward, backward.
    packed: [Option<Packed>; 2],
}

/// The elements of a [`HostMatrix`], typed.
#[derive(Clone, Copy)]
pub enum Elements<'a> {
    /// bfloat16.
    BF16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
    /// IEEE single.
    F32(&'a [f32]),
}

impl HostMatrix {
    /// Keeps the weight where it is; one that is not aligned to its element size is copied.
    ///
    /// Fails where the range does not hold `O · I` elements.
    pub fn new(source: MatrixSource) -> Result<HostMatrix> {
        let MatrixSource { name, bytes, range, dtype, size } = source;
        let need = size.0.checked_mul(size.1).and_then(|n| n.checked_mul(dtype.size()));
        let held = (*bytes).as_ref().get(range.clone());
        match held {
            Some(held) if Some(held.len()) == need => {
                if (held.as_ptr() as usize).is_multiple_of(dtype.size()) {
                    return Ok(HostMatrix { bytes, range, dtype, size, packed: [None, None] });
                }
                let mut words = vec![0u64; held.len().div_ceil(8)];
                bytemuck::cast_slice_mut(&mut words)[..held.len()].copy_from_slice(held);
                let range = 0..held.len();
                let bytes = Arc::new(Words(words));
                Ok(HostMatrix { bytes, range, dtype, size, packed: [None, None] })
            }
            _ => Err(Error::Op {
                op: "matrix",
                why: format!(
                    "{name} lies at bytes {}..{} of {}, expected {} × {} elements of {dtype}",
                    range.start,
                    range.end,
                    (*bytes).as_ref().len(),
                    size.0,
                    size.1
                ),
            }),
        }
    }

    /// The copy for products of a pass, if it was packed.
    pub(crate) fn packed(&self, pass: Pass) -> Option<&Packed> {
        self.packed[pass as usize].as_ref()
    }

    /// Keeps a packed copy for products of a pass.
    pub(crate) fn keep_packed(&mut self, pass: Pass, packed: Packed) {
        self.packed[pass as usize] = Some(packed);
    }

    /// All elements, row-major.
    pub fn elements(&self) -> Elements<'_> {
        let bytes = &(*self.bytes).as_ref()[self.range.clone()];
        // Alignment and length were checked in `new`.
        match self.dtype {
            DType::BF16 => Elements::BF16(bytemuck::cast_slice(bytes)),
            DType::F16 => Elements::F16(bytemuck::cast_slice(bytes)),
            DType::F32 => Elements::F32(bytemuck::cast_slice(bytes)),
        }
    }

    /// Rows `rows` widened to f32 and rounded as precision `T` asks: under bf16, F32 and F16 weights round to bf16.
    ///
    /// `out` holds `rows.len() · I` elements.
    pub fn rows<T: Real>(&self, out: &mut [f32], rows: Range<usize>) {
        let i = self.size.1;
        let range = rows.start * i..rows.end * i;
        match self.elements() {
            Elements::BF16(w) => widen(out, &w[range], |x| x.to_f32()),
            Elements::F16(w) => widen(out, &w[range], |x| T::round(x.to_f32())),
            Elements::F32(w) => widen(out, &w[range], T::round),
        }
    }
}

fn widen<U: Copy>(out: &mut [f32], from: &[U], f: impl Fn(U) -> f32) {
    for (o, &x) in out.iter_mut().zip(from) {
        *o = f(x);
    }
}

impl Frozen for HostMatrix {
    fn size(&self) -> (usize, usize) {
        self.size
    }
    fn dtype(&self) -> DType {
        self.dtype
    }
}

/// An aligned copy.
struct Words(Vec<u64>);

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
