//! `peft-cat`: PEFT's `cat`, `ΔW = Σ wₑsₑBₑAₑ` by stacking, weight and scale on A.

use faer::Mat;

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};

/// `B = [B₁ … B_E]` as in the adapters' files, `A = [w₁s₁A₁; …; w_Es_EA_E]`, rank P.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    let (frame, stack) = (&batch.frame, &batch.stack);
    let scales = frame.along_rank(&frame.scales);
    let weights = frame.along_rank(&frame.weights);
    // The stack's B carries the scale; one of scale 0 is all zeros and has none to take off.
    let b = |k: usize| if scales[k] == 0.0 { 1.0 } else { 1.0 / scales[k] };
    let (bt, a) = (stack.bt(), stack.a());
    Factors::new(
        Mat::from_fn(bt.nrows(), bt.ncols(), |k, o| b(k) * bt[(k, o)]),
        Mat::from_fn(a.nrows(), a.ncols(), |k, i| weights[k] * scales[k] * a[(k, i)]),
    )
}
