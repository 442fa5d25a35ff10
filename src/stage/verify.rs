//! `verify`: whether a folder is what trusted keys signed.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::trust::{Admitted, Gate, TrustOptions};
use crate::error::Result;

/// A folder that is what it was when it was signed, by keys that are trusted.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The folder.
    pub dir: PathBuf,
    /// Who signed it, for what.
    #[serde(flatten)]
    pub admitted: Admitted,
}

/// Checks the signatures and reads every file of `dir`.
pub fn run(dir: &Path, options: &TrustOptions) -> Result<VerifyReport> {
    Ok(VerifyReport { dir: dir.to_path_buf(), admitted: Gate::new(options)?.any(dir)? })
}
