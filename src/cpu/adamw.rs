//! See [`crate::ops::adamw`].

use crate::error::{Error, Result};
use crate::host::Host;
use crate::ops::adamw::AdamW;

pub fn adamw(op: AdamW<'_, Host>) -> Result<()> {
    op.check()?;
    Err(Error::Op { op: "adamw", why: "not written yet".into() })
}
