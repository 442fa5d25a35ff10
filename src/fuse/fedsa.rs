//! `fedsa`: `Ā = Σ wᵢAᵢ` is shared; what stands for B is the user's choice.

use crate::error::{Error, Result};
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::ffa_lsq::project;
use crate::fuse::options::Fedsa;

/// `B[O, R]` of the choice beside `Ā[R, I]`; the ranks must be equal.
///
/// `batch` has its coverage applied, `raw` not: the B of one client, and the sum, are the clients' own. Fails where the
/// client does not have the module.
pub fn fuse(batch: &Batch, raw: &Batch, choice: Fedsa) -> Result<Factors> {
    let a = batch.sum_a(&batch.frame.weights);
    let bt = match choice {
        Fedsa::Mean => batch.sum_bt(&batch.frame.weights),
        Fedsa::Sum => raw.sum_bt(&vec![1.0; raw.frame.edges()]),
        Fedsa::Lsq => return project(batch, a),
        Fedsa::Client(j) => {
            let at = raw.frame.members.iter().position(|&e| e == j).ok_or_else(|| {
                Error::Usage(format!(
                    "--fedsa client:{j}: adapter {j} (counted from 0) does not have this module"
                ))
            })?;
            raw.bt(at).to_owned().into()
        }
    };
    Factors::new(bt, a)
}
