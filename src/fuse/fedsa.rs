//! `fedsa`: `Ā = Σ wᵢAᵢ` is shared; what stands for B is the user's choice.

use crate::error::{Error, Result};
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::ffa_lsq::project;
use crate::fuse::linear::{Linear, Pair};
use crate::fuse::options::Fedsa;

/// `B[O, R]` of the choice beside `Ā[R, I]`; the ranks must be equal; none for [`Fedsa::Lsq`].
///
/// Fails where the client does not have the module.
pub fn pair(frame: &Frame, choice: Fedsa) -> Result<Option<Pair>> {
    let bt = match choice {
        Fedsa::Mean => Linear::sum(frame, &frame.weights),
        Fedsa::Sum => Linear::sum(frame, &vec![1.0; frame.edges()]),
        Fedsa::Lsq => return Ok(None),
        Fedsa::Client(j) => {
            let at = frame.members.iter().position(|&e| e == j).ok_or_else(|| {
                Error::Usage(format!(
                    "--fedsa client:{j}: adapter {j} (counted from 0) does not have this module"
                ))
            })?;
            Linear::rows(frame.block(at))
        }
    };
    Ok(Some(Pair { bt, a: Linear::sum(frame, &frame.weights) }))
}

/// The B that, times `Ā`, is closest to the exact mean.
pub fn lsq(batch: &Batch) -> Result<Factors> {
    let mean = Linear::sum(&batch.frame, &batch.frame.weights);
    project(batch, mean.factor(batch.stack.rows_a(), batch.frame.spread()))
}
