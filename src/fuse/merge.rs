//! An update written into a weight: `W' = W + δ`, rounded once to the weight's dtype.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, Par};
use rayon::prelude::*;

use crate::checkpoint::convert;
use crate::checkpoint::weights::TensorRef;
use crate::cpu::entries::{dot, lost};
use crate::error::Result;
use crate::fuse::factors::Factors;
use crate::tensor::DType;

/// Rows of W that are worked on at once.
const ROWS: usize = 64;
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

/// `W'[O, I] = round(W[O, I] + B[O, R] A[R, I])`; sums and the product in f32, one rounding to W's dtype.
///
/// An error, naming the tensor, where W is not `[O, I]`, or W or W' holds NaN or infinity.
pub fn merge(w: &TensorRef<'_>, update: &Factors) -> Result<Merged> {
    let (o, i) = update.size();
    let b = Mat::from_fn(update.rank(), o, |k, x| update.bt()[(k, x)] as f32);
    let a = update.a().map(|x| *x as f32);
    let rows = |rows: Range<usize>, out: &mut [f32]| {
        let b = b.subcols(rows.start, rows.len()).transpose();
        let view = MatMut::from_row_major_slice_mut(out, rows.len(), i);
        matmul(view, Accum::Replace, b, a.as_ref(), 1.0, Par::Seq);
        Ok(())
    };
    Ok(merge_rows(w, (o, i), rows)?.0)
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
    if w.shape() != [o, i] {
        return Err(w.error(format!("has shape {:?}, the update needs {:?}", w.shape(), [o, i])));
    }
    let (dtype, row) = (w.dtype(), i * w.dtype().size());
    let mut bytes = vec![0; o * row];
    let blocks: Vec<Result<(Block, S)>> = bytes
        .par_chunks_mut(ROWS * row)
        .zip(w.bytes().par_chunks(ROWS * row))
        .enumerate()
        .map_init(Vec::new, |delta, (block, (out, w))| {
            let first = block * ROWS;
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
