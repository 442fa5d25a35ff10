//! `sign`: a manifest of a folder's files, and its signature.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::common::Common;
use crate::checkpoint::keys::{PublicKey, SecretKey};
use crate::checkpoint::manifest::{Manifest, Occasion};
use crate::error::{Error, Result};

/// With which key something is signed, and for what.
#[derive(Clone, Debug)]
pub struct SignOptions {
    /// The secret key's file.
    pub key: PathBuf,
    /// The run and the round.
    pub occasion: Occasion,
}

/// What was signed.
#[derive(Clone, Debug, Serialize)]
pub struct SignReport {
    /// The folder.
    pub dir: PathBuf,
    /// Files that the manifest lists.
    pub files: usize,
    /// By whom.
    pub key: PublicKey,
    /// For which run and round.
    pub occasion: Occasion,
}

/// A key that was read, before the work whose result it will sign.
#[derive(Debug)]
pub struct Signer {
    key: SecretKey,
    occasion: Occasion,
}

impl Signer {
    /// Reads the key.
    pub fn new(options: &SignOptions) -> Result<Signer> {
        options.occasion.check()?;
        Ok(Signer { key: SecretKey::read(&options.key)?, occasion: options.occasion.clone() })
    }

    /// Whose signature it will be.
    pub fn key(&self) -> PublicKey {
        self.key.public()
    }

    /// What of it changes the bytes of a result, for the fingerprint of a command.
    pub fn fingerprint(&self) -> serde_json::Value {
        serde_json::json!([self.key(), self.occasion])
    }

    /// Signs all files in `dir`; a signature that is there is replaced only under `force`.
    pub fn sign(&self, dir: &Path, force: bool) -> Result<SignReport> {
        let manifest = Manifest::of(dir, self.occasion.clone())?;
        manifest.sign(dir, &self.key, force)?;
        Ok(SignReport {
            dir: dir.to_path_buf(),
            files: manifest.files.len(),
            key: self.key(),
            occasion: manifest.occasion,
        })
    }
}

/// Signs the folder `dir`.
pub fn run(dir: &Path, options: &SignOptions, common: &Common) -> Result<SignReport> {
    let signer = Signer::new(options)?;
    if !std::fs::metadata(dir).map_err(Error::io(dir))?.is_dir() {
        return Err(Error::file(dir, "is a file, expected a folder to sign"));
    }
    signer.sign(dir, common.force)
}
