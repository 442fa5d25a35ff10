//! See [`crate::ops::rope`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::rope::Rope;
use crate::tensor::Real;

pub fn rope<T: Real>(op: Rope<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "rope", why: "not written yet".into() })
}
