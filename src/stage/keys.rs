//! `keys new`: a pair of keys, the secret one for its owner alone.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::keys::{PublicKey, SecretKey};
use crate::error::Result;

/// A new pair.
#[derive(Clone, Debug, Serialize)]
pub struct KeysReport {
    /// The secret key's file, mode 0600.
    pub secret: PathBuf,
    /// The public key's file.
    pub public: PathBuf,
    /// The public key.
    pub key: PublicKey,
}

/// Makes a pair of keys: the secret one in `path`, the public one in `path.pub`. What is there is never replaced.
pub fn new(path: &Path) -> Result<KeysReport> {
    let key = SecretKey::generate()?;
    let public = key.write(path)?;
    Ok(KeysReport { secret: path.to_path_buf(), public, key: key.public() })
}
