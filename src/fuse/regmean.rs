//! `regmean`: RegMean (Jin et al., *Dataless knowledge fusion*, ICLR 2023): the update whose outputs on everybody's
//! inputs are closest to each one's own on theirs.
//!
//! `ΔW = Σ Bₑ [wₑ Aₑ Gₑ (Σ wⱼGⱼ)⁻¹]` with `Gₑ = XₑᵀXₑ / Tₑ` of e's inputs, what is off its diagonal times 0.9. It keeps
//! every B; a channel that no input uses has no part in it.

use faer::{Mat, Scale};

use crate::error::{Error, Result};
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::input_gram::times;

/// What entries off the diagonal of a Gram count: the sum of Grams of few tokens is singular, that of these is not.
const OFF_DIAGONAL: f64 = 0.9;

/// `B = [B₁ … B_E]`, `A` as above, rank P.
///
/// Fails where the batch has no input Grams, or one that is none.
pub fn fuse(batch: &Batch) -> Result<Factors> {
    let (frame, inputs) = (&batch.frame, batch.inputs()?);
    let factor = inputs.factored(&frame.weights, OFF_DIAGONAL).ok_or_else(|| {
        let names: Vec<_> = inputs.grams().iter().map(|g| g.error("").to_string()).collect();
        Error::Numeric(format!(
            "{}: the sum of the input Grams is not positive, so one of them is no Gram matrix: {}",
            frame.module,
            names.join(", ")
        ))
    })?;
    let mut a = Mat::zeros(frame.rank(), frame.size.1);
    for (e, gram) in inputs.grams().iter().enumerate() {
        let (weight, at) = (frame.weights[e], frame.block(e));
        let own = times(batch.a(e), gram, OFF_DIAGONAL);
        a.subrows_mut(at.start, at.len()).copy_from(Scale(weight) * &own);
    }
    factor.divide(&mut a);
    Factors::new(batch.stack.bt().to_owned(), a)
}
