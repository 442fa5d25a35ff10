//! A fused update written into a weight: `W' = W + B A`, rounded once to the weight's dtype.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, Par};
use rayon::prelude::*;

use crate::checkpoint::convert;
use crate::checkpoint::weights::TensorRef;
use crate::error::Result;
use crate::fuse::factors::Factors;

/// Rows of W that are worked on at once.
const ROWS: usize = 64;

/// A merged weight.
#[derive(Clone, Debug)]
pub struct Merged {
    /// `W'[O, I]` in W's dtype, row by row, little-endian.
    pub bytes: Vec<u8>,
    /// `‖(W' − W) − B A‖ / ‖B A‖`: what rounding to the dtype did to the update; `‖W' − W‖` where the update is 0.
    pub error: f64,
}

/// `W'[O, I] = round(W[O, I] + B[O, R] A[R, I])`; sums and the product in f32, one rounding to W's dtype.
///
/// An error, naming the tensor, where W is not `[O, I]`, or W or W' holds NaN or infinity.
pub fn merge(w: &TensorRef<'_>, update: &Factors) -> Result<Merged> {
    let (o, i) = update.size();
    if w.shape() != [o, i] {
        return Err(w.error(format!("has shape {:?}, the update needs {:?}", w.shape(), [o, i])));
    }
    w.check_finite()?;
    let dtype = w.dtype();
    let row = i * dtype.size();
    let b = Mat::from_fn(update.rank(), o, |k, x| update.bt()[(k, x)] as f32);
    let a = update.a().map(|x| *x as f32);
    let mut bytes = vec![0; o * row];
    let sums: Vec<(f64, f64)> = bytes
        .par_chunks_mut(ROWS * row)
        .zip(w.bytes().par_chunks(ROWS * row))
        .enumerate()
        .map(|(block, (out, w))| {
            let rows = out.len() / row;
            let mut delta = vec![0.0_f32; rows * i];
            let view = MatMut::from_row_major_slice_mut(&mut delta, rows, i);
            matmul(
                view,
                Accum::Replace,
                b.subcols(block * ROWS, rows).transpose(),
                a.as_ref(),
                1.0,
                Par::Seq,
            );
            let mut old = vec![0.0_f32; rows * i];
            convert::widen(&mut old, w, dtype);
            let sum: Vec<f32> = old.iter().zip(&delta).map(|(w, d)| w + d).collect();
            let mut rounded = Vec::with_capacity(out.len());
            convert::narrow(&mut rounded, &sum, dtype);
            out.copy_from_slice(&rounded);
            let mut new = sum;
            convert::widen(&mut new, out, dtype);
            let lost =
                |((n, w), d): ((&f32, &f32), &f32)| (f64::from(*n) - f64::from(*w) - f64::from(*d)).powi(2);
            (
                new.iter().zip(&old).zip(&delta).map(lost).sum::<f64>(),
                delta.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>(),
            )
        })
        .collect();
    if convert::first_non_finite(&bytes, dtype).is_some() {
        return Err(w.error(format!("and its update add up to more than {dtype} holds")));
    }
    let (lost, size) = sums.iter().fold((0.0, 0.0), |s, x| (s.0 + x.0, s.1 + x.1));
    Ok(Merged { bytes, error: if size > 0.0 { (lost / size).sqrt() } else { lost.sqrt() } })
}
