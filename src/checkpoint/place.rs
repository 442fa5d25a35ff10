//! Where an output may go: the checks on `--out` before anything is made, and the small file operations of outputs.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use super::provenance::{self, PROVENANCE, Provenance};
use crate::error::{Error, Result};

/// The path that `out` means: a link is followed, so that what it points to is replaced and the link stays. It is an
/// error if it names no entry of a folder of its own (`.`, `..`, `/`), is the folder that the command runs in, a mount
/// point, or a link to nothing.
pub fn resolve(out: &Path) -> Result<PathBuf> {
    let usage = |why: &str| Error::Usage(format!("--out {}: {why}", out.display()));
    let bytes = out.as_os_str().as_bytes();
    let dot = bytes == b"." || bytes.ends_with(b"/.");
    if dot || !matches!(out.components().next_back(), Some(Component::Normal(_))) {
        return Err(usage("the output is a new folder or file and needs a name of its own"));
    }
    let meta = match std::fs::symlink_metadata(out) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(out.to_path_buf()),
        Err(e) => return Err(Error::io(out)(e)),
    };
    let real = match meta.is_symlink() {
        false => out.to_path_buf(),
        true => std::fs::canonicalize(out).map_err(|_| usage("is a link to nothing"))?,
    };
    if is_mount_point(&real)? {
        return Err(usage("is a mount point, which cannot be replaced in one step: name a folder in it"));
    }
    let here = std::env::current_dir().and_then(std::fs::canonicalize);
    if here.is_ok_and(|h| std::fs::canonicalize(&real).is_ok_and(|r| r == h)) {
        return Err(usage("is the folder that the command runs in"));
    }
    Ok(real)
}

/// Whether another file system (or a part of one) is mounted at `path`.
fn is_mount_point(path: &Path) -> Result<bool> {
    let stat = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .map_err(|e| Error::io(path)(e.into()))?;
    if stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    }
    let parent = statx(CWD, parent(path), AtFlags::empty(), StatxFlags::BASIC_STATS)
        .map_err(|e| Error::io(path)(e.into()))?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor) != (parent.stx_dev_major, parent.stx_dev_minor))
}

/// The folder that `path` is in.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// `path` with `suffix` after its name: `OUT.partial`.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    // Without the slash that completion puts after a folder's name.
    let mut s = OsString::from(path.components().as_path());
    s.push(suffix);
    PathBuf::from(s)
}

/// Makes the folder that `path` is in; gives the folders that were not there, innermost first.
pub fn make_parents(path: &Path) -> Result<Vec<PathBuf>> {
    let dir = parent(path);
    let made =
        dir.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).map(PathBuf::from).collect();
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    Ok(made)
}

/// What lies at the path of an output folder.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A folder without entries.
    Empty,
    /// A folder that this program made.
    Ours,
    /// A folder that this program made and others put files into, and which.
    Shared(String),
    /// Anything else, and why it is taken for that.
    Foreign(String),
}

/// What lies at `path`; a folder is ours if it has an `anabranch.json` and no file that this does not name.
pub fn look(path: &Path) -> Result<Found> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(e) => return Err(Error::io(path)(e)),
    };
    if !meta.is_dir() {
        return Ok(Found::Foreign("is no folder".into()));
    }
    let names = provenance::list_all(path)?;
    if names.is_empty() {
        let folders = std::fs::read_dir(path).map_err(Error::io(path))?.next().is_some();
        return Ok(if folders { Found::Foreign("has folders in it".into()) } else { Found::Empty });
    }
    let provenance = match Provenance::open(path) {
        Ok(Some(p)) => p,
        Ok(None) => return Ok(Found::Foreign(format!("has no {PROVENANCE}"))),
        Err(e) => return Ok(Found::Foreign(format!("has an {PROVENANCE} that is not this program's ({e})"))),
    };
    let known = |n: &str| provenance.files.contains_key(n) || provenance::NOT_HASHED.contains(&n);
    match names.into_iter().find(|n| !known(n)) {
        Some(name) => Ok(Found::Shared(format!("has {name}, which this program did not put there"))),
        None => Ok(Found::Ours),
    }
}

/// Empties the folder `dir`; the entries named in `last` go last, so that a folder that was half emptied is still
/// recognised.
pub fn empty(dir: &Path, last: &[&str]) -> Result<()> {
    clear(dir, last)?;
    last.iter().try_for_each(|l| remove_file(&dir.join(l)))
}

/// Empties the folder `dir` but for the entries in `kept`.
pub fn clear(dir: &Path, kept: &[&str]) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        if kept.iter().any(|k| entry.file_name() == *k) {
            continue;
        }
        let path = entry.path();
        let is_dir = entry.file_type().map_err(Error::io(&path))?.is_dir();
        if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }
            .map_err(Error::io(&path))?;
    }
    Ok(())
}

/// Removes the file at `path`, if there is one.
pub fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Locks `file`, open at `path`, as long as it is open; false if another run holds it.
pub fn lock(file: &File, path: &Path) -> Result<bool> {
    // A program that this process is just starting shares its open files for a moment, and with them a lock let go of.
    for patience in (0..20).rev() {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if patience > 0 => std::thread::sleep(Duration::from_millis(10)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(e)) => return Err(Error::io(path)(e)),
        }
    }
    Ok(false)
}

/// Makes the entries of the folder `dir` durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io(dir))
}

/// Makes every file and folder under `dir` durable.
pub fn sync_tree(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io(&path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io(&path))?;
        }
    }
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_a_folder_with_a_slash_after_its_name() {
        for (path, expected) in
            [("a/out", "a/out.partial"), ("a/out/", "a/out.partial"), ("./out//", "./out.partial")]
        {
            assert_eq!(beside(Path::new(path), ".partial"), Path::new(expected));
        }
    }
}
