//! The bytes of a file, mapped or read, and handles on a part of them.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};

/// Whoever keeps bytes alive: a mapping, or memory they were read into.
pub type Owner = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A part of a file's bytes that stays valid as long as the handle lives. Cloning it copies nothing.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes of `owner` in `range`; none where the range does not lie within them.
    pub fn new(owner: Owner, range: Range<usize>) -> Option<Bytes> {
        (*owner).as_ref().get(range.clone())?;
        Some(Bytes { owner, range })
    }

    /// The owner and the range in it, for a back end that keeps both.
    pub fn into_parts(self) -> (Owner, Range<usize>) {
        (self.owner, self.range)
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Bytes {
        let range = 0..v.len();
        Bytes { owner: Arc::new(v), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
}

/// Memory that holds a file, aligned like the widest element.
struct Read64 {
    words: Vec<u64>,
    len: usize,
}

impl AsRef<[u8]> for Read64 {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

/// The mapping of a whole file.
struct Mapped(memmap2::Mmap);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Opens the file at `path`; gives its length too. A folder is an error, and so is a device or a pipe, which may have no
/// end, or keep whoever opens it waiting.
pub fn open(path: &Path) -> Result<(File, u64)> {
    let meta = std::fs::metadata(path).map_err(Error::io(path))?;
    if !meta.is_file() {
        let found = if meta.is_dir() { "a folder" } else { "no regular file" };
        return Err(Error::file(path, format!("is {found}, expected a file")));
    }
    Ok((File::open(path).map_err(Error::io(path))?, meta.len()))
}

/// The whole file at `path`, mapped, or read into memory where `no_mmap` asks for it.
pub fn load(path: &Path, no_mmap: bool) -> Result<Owner> {
    let (mut file, len) = open(path)?;
    if no_mmap {
        return read(path, &mut file, len);
    }
    #[allow(unsafe_code)]
    // SAFETY: the mapping is private and read only. Another process that truncates the file meanwhile ends this one
    // with SIGBUS, one that writes to it changes numbers; neither breaks Rust's rules for this process's own code, and
    // `--no-mmap` is there for files that may change.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
    Ok(Arc::new(Mapped(map)))
}

fn read(path: &Path, file: &mut File, len: u64) -> Result<Owner> {
    let len = usize::try_from(len)
        .map_err(|_| Error::file(path, format!("has {len} bytes, too many for this machine")))?;
    let mut words: Vec<u64> = Vec::new();
    words
        .try_reserve_exact(len.div_ceil(8))
        .map_err(|_| Error::file(path, format!("has {len} bytes, for which there is no memory")))?;
    words.resize(len.div_ceil(8), 0);
    file.read_exact(&mut bytemuck::cast_slice_mut(&mut words)[..len]).map_err(Error::io(path))?;
    Ok(Arc::new(Read64 { words, len }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_and_read_are_equal_and_aligned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let content: Vec<u8> = (0..1003u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        for no_mmap in [false, true] {
            let owner = load(&path, no_mmap).unwrap();
            assert_eq!((*owner).as_ref(), &content[..]);
            assert_eq!((*owner).as_ref().as_ptr() as usize % 8, 0);
            let part = Bytes::new(owner.clone(), 10..20).unwrap();
            assert_eq!(&part[..], &content[10..20]);
            assert!(Bytes::new(owner.clone(), 10..1004).is_none());
            #[allow(clippy::reversed_empty_ranges)]
            let reversed = 20..10;
            assert!(Bytes::new(owner, reversed).is_none());
        }
    }

    #[test]
    fn a_folder_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let err = load(dir.path(), false).err().unwrap().to_string();
        assert!(err.contains("is a folder, expected a file"), "{err}");
        assert!(load(&dir.path().join("none"), true).err().unwrap().to_string().contains("No such file"));
    }
}
