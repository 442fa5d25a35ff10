//! `ffa-lsq`: `ΔW = (Σ wᵢBᵢAᵢ) A₀⁺ A₀`, the B that, times a given A, is closest to the exact mean.

use crate::algebra::{gram, product, pseudo_inverse, scale_columns};
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors, Rows};

/// The least-squares B beside the frozen A, or beside the first adapter's where none is declared.
///
/// `batch` has its coverage applied, `raw` not. A frozen A₀ is put together from the columns that the edges kept.
pub fn fuse(batch: &Batch, raw: &Batch) -> Result<Factors> {
    let mut a = raw.a(0).to_owned();
    if raw.frame.frozen {
        let (r, width) = (a.nrows(), a.ncols());
        for (e, kept) in raw.frame.kept.iter().enumerate() {
            for &i in kept.columns.iter().flatten().filter(|&&i| i < width) {
                (0..r).for_each(|k| a[(k, i)] = raw.a(e)[(k, i)]);
            }
        }
    }
    project(batch, a)
}

/// `B = Σ wᵢBᵢ (Aᵢ Aᵀ)(A Aᵀ)⁺` beside `a`.
pub fn project(batch: &Batch, a: impl Into<Rows>) -> Result<Factors> {
    let a: Rows = a.into();
    let inverse = pseudo_inverse(gram(a.get()).as_ref())?;
    let onto = product(product(batch.stack.a(), a.get().transpose()).as_ref(), inverse.as_ref());
    let weighted = scale_columns(onto.transpose(), &batch.frame.along_rank(&batch.frame.weights));
    Factors::new(product(weighted.as_ref(), batch.stack.bt()), a)
}
