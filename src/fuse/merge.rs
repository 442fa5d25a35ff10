//! An update written into a weight: `W' = W + δ`, rounded once to the weight's dtype.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::backend::Backend;
use crate::checkpoint::convert;
use crate::checkpoint::weights::TensorRef;
use crate::cpu::entries::{dot, lost};
use crate::error::Result;
use crate::fuse::factors::Factors;
use crate::ops::merge::{Merge, ROWS, Update};
use crate::tensor::{DType, Real, Store};

/// Bytes of W that are on the device at a time, unless sixteen rows are more.
const AT_ONCE: usize = 64 << 20;
/// Rows of W that a thread works on at once, where what is added is made row by row.
const BLOCK_ROWS: usize = 64;
/// Numbers of W that are rounded at once.
const NUMBERS: usize = 2048;

/// A merged weight.
#[derive(Clone, Debug)]
pub struct Merged {
    /// `W'[O, I]` in W's dtype, row by row, little-endian.
    pub bytes: Vec<u8>,
    /// `‖(W' − W) − δ‖ / ‖δ‖`: what rounding to the dtype did to the update; `‖W' − W‖` where the update is 0.
    pub error: f64,
}

/// `W'[O, I] = round(W[O, I] + B[O, R] A[R, I])` with B and A rounded to f32; sums in f64, one rounding to W's dtype.
///
/// W goes to the device a few rows at a time. An error, naming the tensor, where W is not `[O, I]`, or W or W' holds NaN or
/// infinity.
pub fn merge<B: Backend>(backend: &B, w: &TensorRef<'_>, update: &Factors) -> Result<Merged> {
    check_shape(w, update.size())?;
    w.check_finite()?;
    let merged = match w.dtype() {
        DType::BF16 => merge_in::<B, bf16>(backend, w, update)?,
        DType::F16 => merge_in::<B, f16>(backend, w, update)?,
        DType::F32 => merge_in::<B, f32>(backend, w, update)?,
    };
    if convert::first_non_finite(&merged.bytes, w.dtype()).is_some() {
        return Err(w.error(format!("and its update add up to more than {} holds", w.dtype())));
    }
    Ok(merged)
}

/// [`merge`] of a weight whose elements are `T`.
fn merge_in<B: Backend, T: Real>(backend: &B, w: &TensorRef<'_>, update: &Factors) -> Result<Merged> {
    let ((o, i), rank) = (update.size(), update.rank());
    let on_device = |name: &str, factor: &[f64]| -> Result<<B::Store as Store>::Buf<f32>> {
        let factor: Vec<f32> = factor.iter().map(|x| *x as f32).collect();
        let mut buf = backend.alloc::<f32>(name, factor.len())?;
        backend.upload(B::Store::view_mut(&mut buf, 0..factor.len()), &factor)?;
        Ok(buf)
    };
    let (a, b) = (on_device("lora_A", &update.a_rows())?, on_device("lora_B", update.b_rows())?);
    let rows = (AT_ONCE / (i * size_of::<T>()).max(1)).next_multiple_of(ROWS).clamp(1, o.max(1));
    let mut part = backend.alloc::<T>(w.name(), rows * i)?;
    let mut sums = backend.alloc::<f64>("what rounding does", 2 * rows.div_ceil(ROWS))?;
    let mut bytes = Vec::with_capacity(w.bytes().len());
    let (mut lost, mut size) = (0.0, 0.0);
    let mut host = vec![T::from_f32(0.0); rows * i];
    for first in (0..o).step_by(rows) {
        let out = rows.min(o - first);
        let (len, count) = (out * i, 2 * out.div_ceil(ROWS));
        let from = &w.bytes()[first * i * size_of::<T>()..][..len * size_of::<T>()];
        let from: Cow<'_, [T]> = match bytemuck::try_cast_slice(from) {
            Ok(aligned) => Cow::Borrowed(aligned),
            Err(_) => {
                let mut own = vec![T::from_f32(0.0); len];
                bytemuck::cast_slice_mut(&mut own).copy_from_slice(from);
                Cow::Owned(own)
            }
        };
        backend.upload(B::Store::view_mut(&mut part, 0..len), &from)?;
        backend.merge::<T>(Merge {
            w: B::Store::view_mut(&mut part, 0..len),
            sums: B::Store::view_mut(&mut sums, 0..count),
            updates: vec![Update {
                a: B::Store::view(&a, 0..rank * i),
                b: B::Store::view(&b, first * rank..(first + out) * rank),
                rank,
                scale: 1.0,
            }],
            out,
            inner: i,
        })?;
        backend.download(&mut host[..len], B::Store::view(&part, 0..len))?;
        bytes.extend_from_slice(bytemuck::cast_slice(&host[..len]));
        let mut found = vec![0.0; count];
        backend.download(&mut found, B::Store::view(&sums, 0..count))?;
        for pair in found.chunks_exact(2) {
            (lost, size) = (lost + pair[0], size + pair[1]);
        }
    }
    Ok(Merged { bytes, error: if size > 0.0 { (lost / size).sqrt() } else { lost.sqrt() } })
}

fn check_shape(w: &TensorRef<'_>, (o, i): (usize, usize)) -> Result<()> {
    if w.shape() == [o, i] {
        return Ok(());
    }
    Err(w.error(format!("has shape {:?}, the update needs {:?}", w.shape(), [o, i])))
}

/// `W'[O, I] = round(W[O, I] + δ[O, I])`, δ from `rows`, which puts the rows it is asked for where it is told and gives
/// what it has to say about them, in the order of the rows; the sum in f32, one rounding to W's dtype.
///
/// An error, naming the tensor, where W is not `[O, I]`, or W or W' holds NaN or infinity; and the first of `rows`.
pub fn merge_rows<S: Send>(
    w: &TensorRef<'_>,
    (o, i): (usize, usize),
    rows: impl Fn(Range<usize>, &mut [f32]) -> Result<S> + Sync,
) -> Result<(Merged, Vec<S>)> {
    check_shape(w, (o, i))?;
    let (dtype, row) = (w.dtype(), i * w.dtype().size());
    let mut bytes = vec![0; o * row];
    let blocks: Vec<Result<(Block, S)>> = bytes
        .par_chunks_mut(BLOCK_ROWS * row)
        .zip(w.bytes().par_chunks(BLOCK_ROWS * row))
        .enumerate()
        .map_init(Vec::new, |delta, (block, (out, w))| {
            let first = block * BLOCK_ROWS;
            delta.resize(out.len() / dtype.size(), 0.0);
            let said = rows(first..first + out.len() / row, delta)?;
            Ok((Block::round(out, w, delta, dtype), said))
        })
        .collect();
    // Gathered before the first error is looked for, so that it is always the same one.
    let (blocks, said): (Vec<Block>, Vec<S>) =
        blocks.into_iter().collect::<Result<Vec<_>>>()?.into_iter().unzip();
    if blocks.iter().any(|b| b.bad) {
        w.check_finite()?;
        return Err(w.error(format!("and its update add up to more than {dtype} holds")));
    }
    let (lost, size) = blocks.iter().fold((0.0, 0.0), |s, b| (s.0 + b.lost, s.1 + b.size));
    let error = if size > 0.0 { (lost / size).sqrt() } else { lost.sqrt() };
    Ok((Merged { bytes, error }, said))
}

/// `‖(W' − W) − δ‖²` of the rows `rows` of a merged weight, with their numbers in δ.
pub fn lost_rows(w: &TensorRef<'_>, merged: &Merged, rows: Range<usize>, delta: &[f32]) -> f64 {
    let (dtype, bytes) = (w.dtype(), NUMBERS * w.dtype().size());
    let first = rows.start * (delta.len() / rows.len().max(1)) * dtype.size();
    let (mut old, mut new) = ([0f32; NUMBERS], [0f32; NUMBERS]);
    let pieces = w.bytes()[first..].chunks(bytes).zip(merged.bytes[first..].chunks(bytes));
    let one = |((w, merged), delta): ((&[u8], &[u8]), &[f32])| {
        let size = delta.len() * dtype.size();
        convert::widen(&mut old[..delta.len()], &w[..size], dtype);
        convert::widen(&mut new[..delta.len()], &merged[..size], dtype);
        lost(&new[..delta.len()], &old[..delta.len()], delta)
    };
    pieces.zip(delta.chunks(NUMBERS)).map(one).sum()
}

/// A few rows of a merged weight.
#[derive(Default)]
struct Block {
    /// `‖(W' − W) − δ‖²`.
    lost: f64,
    /// `‖δ‖²`.
    size: f64,
    /// W or W' holds NaN or infinity.
    bad: bool,
}

impl Block {
    /// `out = round(w + delta)`.
    fn round(out: &mut [u8], w: &[u8], delta: &[f32], dtype: DType) -> Block {
        let mut block = Block::default();
        let (mut old, mut new) = ([0f32; NUMBERS], [0f32; NUMBERS]);
        let mut rounded = Vec::with_capacity(NUMBERS * dtype.size());
        let bytes = NUMBERS * dtype.size();
        for ((out, w), delta) in out.chunks_mut(bytes).zip(w.chunks(bytes)).zip(delta.chunks(NUMBERS)) {
            let (old, new) = (&mut old[..delta.len()], &mut new[..delta.len()]);
            convert::widen(old, w, dtype);
            for ((new, old), delta) in new.iter_mut().zip(&*old).zip(delta) {
                *new = old + delta;
            }
            rounded.clear();
            convert::narrow(&mut rounded, new, dtype);
            out.copy_from_slice(&rounded);
            convert::widen(new, out, dtype);
            block.lost += lost(new, old, delta);
            block.size += dot(delta, delta);
            // An infinite or unknown number in W stays one in W'.
            block.bad |= convert::first_non_finite(out, dtype).is_some();
        }
        block
    }
}
