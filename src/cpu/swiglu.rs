//! See [`crate::ops::swiglu`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::swiglu::{SwiGlu, SwiGluBwd};
use crate::tensor::Real;

pub fn swiglu<T: Real>(op: SwiGlu<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "swiglu", why: "not written yet".into() })
}

pub fn swiglu_bwd<T: Real>(op: SwiGluBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "swiglu_bwd", why: "not written yet".into() })
}
