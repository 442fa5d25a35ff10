//! See [`crate::ops::attention`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::attention::{Attention, AttentionBwd};
use crate::tensor::Real;

pub fn attention<T: Real>(op: Attention<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "attention", why: "not written yet".into() })
}

pub fn attention_bwd<T: Real>(op: AttentionBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "attention_bwd", why: "not written yet".into() })
}
