//! Rows and columns that only some edges kept: what a mean over the edges divides by.

use crate::fuse::factors::{Batch, Kept};
use crate::fuse::options::Coverage;

/// The batch whose sums are means over the edges that kept a row or column, under `present`; the batch itself under
/// `zero`.
///
/// Row o of every B, and column i of every A, is multiplied by `Σ w / Σ_{kept} w`, so that the weights of the edges that
/// kept it count as all there are. One that no edge kept stays as it is.
pub fn covered(batch: &Batch, coverage: Coverage) -> Batch {
    let (o, i) = batch.frame.size;
    let rows = factors(batch, o, |k| k.rows.as_deref());
    let columns = factors(batch, i, |k| k.columns.as_deref());
    match coverage {
        Coverage::Present if rows.is_some() || columns.is_some() => {
            batch.with_stack(batch.stack.scaled(rows.as_deref(), columns.as_deref()))
        }
        _ => batch.clone(),
    }
}

/// `Σ w / Σ_{kept} w` along one axis of size `n`; none where every edge kept everything.
fn factors(batch: &Batch, n: usize, axis: impl Fn(&Kept) -> Option<&[usize]>) -> Option<Vec<f64>> {
    if batch.frame.kept.iter().all(|k| axis(k).is_none()) {
        return None;
    }
    let total: f64 = batch.frame.weights.iter().sum();
    let mut covered = vec![0.0; n];
    for (kept, w) in batch.frame.kept.iter().zip(&batch.frame.weights) {
        match axis(kept) {
            None => covered.iter_mut().for_each(|c| *c += w),
            Some(at) => at.iter().filter(|&&i| i < n).for_each(|&i| covered[i] += w),
        }
    }
    Some(covered.into_iter().map(|c| if c > 0.0 { total / c } else { 1.0 }).collect())
}
