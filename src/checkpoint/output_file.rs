//! Single output files that appear whole or not at all.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::place;
use crate::error::{Error, Result};

/// A file being written under a hidden name beside its own. Dropped without [`OutputFile::finish`], it is removed; what
/// a killed run left is removed by the next run that writes the same file.
#[derive(Debug)]
pub struct OutputFile {
    out: PathBuf,
    hidden: PathBuf,
    /// Open and locked: tells the file of a running process from a leftover.
    lock: File,
    force: bool,
    done: bool,
}

impl OutputFile {
    /// Begins the file `out`. A file that is there is replaced only under `force`, and only if this program made it: its
    /// first 64 KiB name it.
    pub fn begin(out: &Path, force: bool) -> Result<OutputFile> {
        OutputFile::begin_with(out, force, made_here)
    }

    /// As [`OutputFile::begin`], with another way to tell from its first 64 KiB whether this program made a file.
    pub fn begin_with(out: &Path, force: bool, made_here: impl Fn(&[u8]) -> bool) -> Result<OutputFile> {
        let out = place::resolve(out)?;
        allowed(&out, force, made_here)?;
        let dir = place::parent(&out);
        let name = out.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let prefix = format!(".{name}.anabranch-");
        remove_leftovers(dir, &prefix)?;
        let hidden = dir.join(format!("{prefix}{}", std::process::id()));
        let lock = File::options().write(true).create_new(true).open(&hidden).map_err(Error::io(&out))?;
        let file = OutputFile { out, hidden, lock, force, done: false };
        file.lock.try_lock().map_err(|e| Error::io(&file.hidden)(e.into()))?;
        Ok(file)
    }

    /// Fails where [`OutputFile::begin_with`] would because of what is there, and makes nothing.
    pub fn look_ahead(out: &Path, force: bool, made_here: impl Fn(&[u8]) -> bool) -> Result<()> {
        allowed(&place::resolve(out)?, force, made_here)
    }

    /// The file to write: it is there, empty.
    pub fn path(&self) -> &Path {
        &self.hidden
    }

    /// Makes the file durable and puts it in its place.
    pub fn finish(mut self) -> Result<()> {
        self.lock.sync_all().map_err(Error::io(&self.out))?;
        let flags = if self.force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        match renameat_with(CWD, &self.hidden, CWD, &self.out, flags) {
            // A file system that cannot rename without replacing.
            Err(Errno::INVAL | Errno::NOSYS) if !self.out.exists() => {
                std::fs::rename(&self.hidden, &self.out)
            }
            other => other.map_err(Into::into),
        }
        .map_err(Error::io(&self.out))?;
        self.done = true;
        place::sync_dir(place::parent(&self.out))
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if !self.done
            && let Err(e) = place::remove_file(&self.hidden)
        {
            tracing::warn!("an unfinished file was left behind: {e}");
        }
    }
}

/// Whether the start of a file names this program.
pub fn made_here(start: &[u8]) -> bool {
    start.windows(9).any(|w| w == b"anabranch")
}

/// An error where `out` is there and may not be replaced.
fn allowed(out: &Path, force: bool, made_here: impl Fn(&[u8]) -> bool) -> Result<()> {
    match std::fs::metadata(out) {
        Ok(m) if !m.is_file() => {
            let why = format!("{} is a folder or a device, expected a file", out.display());
            return Err(Error::Usage(why));
        }
        Ok(_) if !force => {
            return Err(Error::Usage(format!("{} exists: --force replaces it", out.display())));
        }
        Ok(_) => {
            let mut start = Vec::new();
            let file = File::open(out).map_err(Error::io(out))?;
            file.take(65536).read_to_end(&mut start).map_err(Error::io(out))?;
            if !start.is_empty() && !made_here(&start) {
                return Err(Error::Usage(format!(
                    "{} exists and was not made by this program: choose another name or move it away",
                    out.display()
                )));
            }
        }
        Err(_) => {}
    }
    Ok(())
}

/// Removes the files in `dir` whose name is `prefix` and a number and that no process holds.
fn remove_leftovers(dir: &Path, prefix: &str) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix(prefix));
        if !number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            continue;
        }
        let free = File::open(entry.path()).is_ok_and(|f| f.try_lock().is_ok());
        if free {
            place::remove_file(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("f.json");
        let f = OutputFile::begin(&out, false).unwrap();
        std::fs::write(f.path(), "half").unwrap();
        assert!(!out.exists());
        drop(f);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let f = OutputFile::begin(&out, false).unwrap();
        std::fs::write(f.path(), "by anabranch").unwrap();
        f.finish().unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "by anabranch");
        assert!(OutputFile::begin(&out, false).unwrap_err().to_string().contains("exists: --force"));
        let f = OutputFile::begin(&out, true).unwrap();
        std::fs::write(f.path(), "new").unwrap();
        f.finish().unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "new");
        assert!(
            OutputFile::begin(&out, true).unwrap_err().to_string().contains("was not made by this program")
        );
        assert!(OutputFile::begin_with(&out, true, |s| s == b"new").is_ok());
        assert!(
            OutputFile::begin(dir.path(), true).unwrap_err().to_string().contains("is a folder or a device")
        );
        assert!(OutputFile::begin(Path::new("."), true).unwrap_err().to_string().contains("name of its own"));
        assert!(
            OutputFile::begin(&dir.path().join("none/f"), false)
                .unwrap_err()
                .to_string()
                .contains("No such file")
        );
    }

    #[test]
    fn a_file_that_came_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("f");
        let f = OutputFile::begin(&out, false).unwrap();
        std::fs::write(&out, "mine").unwrap();
        assert!(f.finish().unwrap_err().to_string().contains("File exists"));
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "mine");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_of_killed_runs_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let name = |n: &str| dir.path().join(n);
        for n in [".f.anabranch-999999", ".f.anabranch-x", ".f.anabranch-", ".g.anabranch-1", "f.anabranch-1"]
        {
            std::fs::write(name(n), "").unwrap();
        }
        let held = File::create(name(".f.anabranch-77")).unwrap();
        held.try_lock().unwrap();
        drop(OutputFile::begin(&name("f"), false).unwrap());
        assert!(!name(".f.anabranch-999999").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
    }

    #[test]
    fn a_full_disk_is_an_error_with_the_path() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            eprintln!("skipped: /dev/full is absent");
            return;
        }
        let err = super::super::digest::write_file(full, b"x").unwrap_err().to_string();
        assert!(err.contains("/dev/full: No space left on device"), "{err}");
    }
}
