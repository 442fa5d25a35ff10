//! See [`crate::ops::linear`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::linear::{Linear, LinearBwd};
use crate::tensor::Real;

pub fn linear<T: Real>(op: Linear<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "linear", why: "not written yet".into() })
}

pub fn linear_bwd<T: Real>(op: LinearBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "linear_bwd", why: "not written yet".into() })
}

pub fn linear_scratch<T: Real>(_: crate::backend::LinearSize) -> usize {
    0
}

pub fn linear_bwd_scratch<T: Real>(_: crate::backend::LinearSize) -> usize {
    0
}
