//! SHA-256 of files, as they are written and as they lie there.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{bytes, json};
use crate::error::{Error, Result};

/// A running SHA-256.
#[derive(Clone, Debug, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Takes more bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest, 64 hexadecimal digits.
    pub fn finish(self) -> String {
        hex::encode(self.0.finalize())
    }
}

/// A file being written a piece at a time, with its SHA-256.
#[derive(Debug)]
pub struct HashedFile {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Hasher,
}

impl HashedFile {
    /// Creates the file at `path`.
    pub fn create(path: &Path) -> Result<HashedFile> {
        let file = BufWriter::new(File::create(path).map_err(Error::io(path))?);
        Ok(HashedFile { path: path.to_path_buf(), file, hasher: Hasher::default() })
    }

    /// Writes the next bytes.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Makes the file durable; gives its SHA-256.
    pub fn finish(mut self) -> Result<String> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(Error::io(&self.path))?;
        Ok(self.hasher.finish())
    }
}

/// SHA-256 of `bytes`, 64 hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    let mut h = Hasher::default();
    h.update(bytes);
    h.finish()
}

/// SHA-256 of the file at `path`, 64 hexadecimal digits.
pub fn sha256_file(path: &Path) -> Result<String> {
    let (mut file, _) = bytes::open(path)?;
    let mut hasher = Hasher::default();
    let mut buf = vec![0; 1 << 20];
    loop {
        match file.read(&mut buf) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(n) => hasher.update(&buf[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(path)(e)),
        }
    }
}

/// Writes `bytes` to the file at `path` and makes them durable; gives their SHA-256.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<String> {
    let mut file = HashedFile::create(path)?;
    file.put(bytes)?;
    file.finish()
}

/// Writes `value` as indented JSON with a last line feed; gives the file's SHA-256.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<String> {
    write_file(path, &json::pretty(path, value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_digest() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        assert_eq!(write_file(&path, b"abc").unwrap(), sha256(b"abc"));
        assert_eq!(sha256_file(&path).unwrap(), sha256(b"abc"));
        let mut file = HashedFile::create(&path).unwrap();
        for piece in ["a", "", "bc"] {
            file.put(piece.as_bytes()).unwrap();
        }
        assert_eq!((file.finish().unwrap(), sha256_file(&path).unwrap()), (sha256(b"abc"), sha256(b"abc")));
    }
}
