//! See [`crate::ops::embed`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::embed::Embed;
use crate::tensor::Real;

pub fn embed<T: Real>(op: Embed<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "embed", why: "not written yet".into() })
}
