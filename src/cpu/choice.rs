//! See [`crate::ops::choice`]: distinct rows in chunks, their logits in tiles that are reduced where they are made.

use super::head::{Head, score_scratch};
use super::tiles::enough;
use crate::error::Result;
use crate::host::Host;
use crate::ops::choice::Choice;
use crate::tensor::{DType, Frozen, Real};

/// f32 elements of scratch that [`choice`] uses on `threads` threads.
pub fn choice_scratch<T: Real>(
    rows: usize,
    vocab: usize,
    width: usize,
    dtype: DType,
    threads: usize,
) -> usize {
    score_scratch::<T>(rows, vocab, width, dtype, threads)
}

/// Computes [`Choice`].
pub fn choice<T: Real>(op: Choice<'_, Host, T>) -> Result<()> {
    let (v, d) = op.check()?;
    let Choice { out, scratch, x, head, rows, ids, .. } = op;
    let need = choice_scratch::<T>(rows.len(), v, d, head.dtype(), rayon::current_num_threads());
    enough("choice", scratch, need)?;
    Head { w: head, x }.score(out, &mut scratch[..need], rows, ids, 1.0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cpu::tests::on_threads;
    use crate::ops::cases::choice::conforms;

    #[test]
    fn as_the_reference_on_shared_cases() {
        conforms::<_, f32>(&on_threads());
        conforms::<_, bf16>(&on_threads());
    }
}
