//! See [`crate::ops::sum_sq`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::sum_sq::SumSq;

pub fn sum_sq(op: SumSq<'_, Host>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "sum_sq", why: "not written yet".into() })
}
