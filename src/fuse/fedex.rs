//! `fedex`: FedEx-LoRA (Singhal et al., 2024): FedAvg's factors, and what they miss of the exact mean, as one adapter.
//!
//! `Σ wₑBₑAₑ = B̄ Ā + Σ wₑ (Bₑ − B̄)(Aₑ − Ā)`. As `Σ wₑ (Aₑ − Ā) = 0`, the last adapter's B can stand for B̄ in the
//! second term, and its own summand vanishes: `B̄ Ā` takes R rows and the residual P − R. The first R rows are FedAvg's
//! adapter, the rest is what FedEx-LoRA adds to the base.

use faer::{Mat, MatRef};

use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};

/// `B = [B̄, w₁(B₁ − B_E), …]`, `A = [Ā; A₁ − Ā; …]`, rank P.
///
/// Of mixed ranks the rows that all adapters have are averaged; the others are stacked, as in `mean`.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    let (frame, bt, a) = (&batch.frame, batch.stack.bt(), batch.stack.a());
    let shared = frame.ranks().into_iter().min().unwrap_or(0);
    let last = frame.block(frame.edges() - 1).start;
    let mean = |x: MatRef<'_, f64>| {
        Mat::from_fn(shared, x.ncols(), |k, j| {
            (0..frame.edges()).map(|e| frame.weights[e] * x[(frame.block(e).start + k, j)]).sum::<f64>()
        })
    };
    let (mean_b, mean_a) = (mean(bt), mean(a));
    let mut rows: Vec<Row> = (0..shared).map(Row::Mean).collect();
    for e in 0..frame.edges() {
        let (start, weight) = (frame.block(e).start, frame.weights[e]);
        if start != last {
            rows.extend((0..shared).map(|k| Row::Residual { at: start + k, k, weight }));
        }
        rows.extend((shared..frame.block(e).len()).map(|k| Row::Own { at: start + k, weight }));
    }
    let b_row = |r: usize, o: usize| match rows[r] {
        Row::Mean(k) => mean_b[(k, o)],
        Row::Residual { at, k, weight } => weight * (bt[(at, o)] - bt[(last + k, o)]),
        Row::Own { at, weight } => weight * bt[(at, o)],
    };
    let a_row = |r: usize, i: usize| match rows[r] {
        Row::Mean(k) => mean_a[(k, i)],
        Row::Residual { at, k, .. } => a[(at, i)] - mean_a[(k, i)],
        Row::Own { at, .. } => a[(at, i)],
    };
    Factors::new(Mat::from_fn(rows.len(), bt.ncols(), b_row), Mat::from_fn(rows.len(), a.ncols(), a_row))
}

/// A row of the result.
enum Row {
    /// Row k of the averaged factors.
    Mean(usize),
    /// `w (Bₑ − B_E)` and `Aₑ − Ā` of row k, which is row `at` of the stack.
    Residual { at: usize, k: usize, weight: f64 },
    /// A row that not all adapters have.
    Own { at: usize, weight: f64 },
}
