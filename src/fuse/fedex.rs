//! `fedex`: FedEx-LoRA (Singhal et al., 2024): FedAvg's factors, and what they miss of the exact mean, as one adapter.
//!
//! `Σ wₑBₑAₑ = B̄ Ā + Σ wₑ (Bₑ − B̄)(Aₑ − Ā)`. As `Σ wₑ (Aₑ − Ā) = 0`, the last adapter's B can stand for B̄ in the
//! second term, and its own summand vanishes: `B̄ Ā` takes R rows and the residual P − R. The first R rows are FedAvg's
//! adapter, the rest is what FedEx-LoRA adds to the base.

use faer::Mat;

use crate::error::Result;
use crate::fuse::compare::Maps;
use crate::fuse::factors::{Batch, Factors, Frame, Rows};

/// `B = [B̄, w₁(B₁ − B_E), …]`, `A = [Ā; A₁ − Ā; …]`, rank P.
///
/// Of mixed ranks the rows that all adapters have are averaged; the others are stacked, as in `mean`.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    let (bt, a) = (batch.stack.rows_bt(), batch.stack.rows_a());
    Factors::new(side(&batch.frame, bt, true), side(&batch.frame, a, false))
}

/// What [`fuse`] does to the factors, as maps: what it makes of the identity.
pub fn maps(frame: &Frame) -> Maps {
    let one = Rows::from(Mat::identity(frame.rank(), frame.rank()));
    let of = |is_b: bool| side(frame, &one, is_b);
    Maps { left: Some(of(true).get().transpose().to_owned()), right: Some(of(false).get().to_owned()) }
}

/// Column by column: the mean of the rows that all have, then of each adapter how they differ, and what others lack.
fn side(frame: &Frame, x: &Rows, is_b: bool) -> Rows {
    let (edges, rank) = (frame.edges(), frame.rank());
    let shared = frame.ranks().into_iter().min().unwrap_or(0);
    let last = frame.block(edges - 1).start;
    let (mut out, mut mean) = (Vec::with_capacity(x.numbers().len()), vec![0.0; shared]);
    for column in x.numbers().chunks_exact(rank) {
        mean.fill(0.0);
        for (e, w) in frame.weights.iter().enumerate() {
            mean.iter_mut().zip(&column[frame.block(e)]).for_each(|(mean, x)| *mean += w * x);
        }
        out.extend_from_slice(&mean);
        let from = if is_b { &column[last..][..shared] } else { &mean[..] };
        for (e, &w) in frame.weights.iter().enumerate() {
            let (own, w) = (&column[frame.block(e)], if is_b { w } else { 1.0 });
            if e + 1 < edges {
                out.extend(own.iter().zip(from).map(|(x, from)| w * (x - from)));
            }
            out.extend(own[shared..].iter().map(|x| w * x));
        }
    }
    Rows::new(out, rank)
}
