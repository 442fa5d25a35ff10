//! See [`crate::ops::rms_norm`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::rms_norm::{RmsNorm, RmsNormBwd};
use crate::tensor::Real;

pub fn rms_norm<T: Real>(op: RmsNorm<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "rms_norm", why: "not written yet".into() })
}

pub fn rms_norm_bwd<T: Real>(op: RmsNormBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "rms_norm_bwd", why: "not written yet".into() })
}
