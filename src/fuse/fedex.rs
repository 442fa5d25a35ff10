//! `fedex`: FedEx-LoRA (Singhal et al., 2024): FedAvg's factors, and what they miss of the exact mean, as one adapter.
//!
//! `Σ wₑBₑAₑ = B̄ Ā + Σ wₑ (Bₑ − B̄)(Aₑ − Ā)`. As `Σ wₑ (Aₑ − Ā) = 0`, the last adapter's B can stand for B̄ in the
//! second term, and its own summand vanishes: `B̄ Ā` takes R rows and the residual P − R. The first R rows are FedAvg's
//! adapter, the rest is what FedEx-LoRA adds to the base.

use crate::fuse::factors::Frame;
use crate::fuse::linear::{Linear, Pair};

/// `B = [B̄, w₁(B₁ − B_E), …]`, `A = [Ā; A₁ − Ā; …]`, rank P.
///
/// Of mixed ranks the rows that all adapters have are averaged; the others are stacked, as in `mean`.
pub fn pair(frame: &Frame) -> Pair {
    Pair { bt: side(frame, true), a: side(frame, false) }
}

/// Column by column: the mean of the rows that all have, then of each adapter how they differ, and what others lack.
fn side(frame: &Frame, is_b: bool) -> Linear {
    let (edges, weights) = (frame.edges(), frame.weights.clone());
    let blocks: Vec<_> = (0..edges).map(|e| frame.block(e)).collect();
    let shared = frame.ranks().into_iter().min().unwrap_or(0);
    Linear::columns(frame.rank(), move |column, out| {
        let (mean, mut rest) = out.split_at_mut(shared);
        mean.fill(0.0);
        for (at, w) in blocks.iter().zip(&weights) {
            mean.iter_mut().zip(&column[at.clone()]).for_each(|(mean, x)| *mean += w * x);
        }
        let from = if is_b { &column[blocks[edges - 1].start..][..shared] } else { &*mean };
        for (e, (at, &w)) in blocks.iter().zip(&weights).enumerate() {
            let (own, w) = (&column[at.clone()], if is_b { w } else { 1.0 });
            let differ = if e + 1 < edges { shared } else { 0 };
            let (here, after) = { rest }.split_at_mut(differ + own.len() - shared);
            let (first, lacked) = here.split_at_mut(differ);
            first.iter_mut().zip(own).zip(from).for_each(|((out, x), from)| *out = w * (x - from));
            lacked.iter_mut().zip(&own[shared..]).for_each(|(out, x)| *out = w * x);
            rest = after;
        }
    })
}
