//! The journal of unfinished work: a JSON line for each part of it that is done. It is gone when all of it is.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::checkpoint::adapter_writer::{PairSpec, PairWriter};
use crate::checkpoint::json;
use crate::error::{Error, Result};
use crate::fuse::certificate::ModuleCertificate;

/// The journal of a fusion's modules.
const MODULES: &str = "modules.jsonl";

/// A module that is in the file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Line {
    /// Of the bytes of A and B together.
    pub sha256: String,
    /// What is known of it.
    pub certificate: ModuleCertificate,
}

/// A journal, open behind its last line.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

/// The file `name` in the folder `dir` and its journal, behind the modules that an earlier run finished, whose
/// certificates come with them.
///
/// A line that was torn by the end of that run, or whose bytes are not in the file, and all that come after it, do not
/// count.
pub(super) fn open(
    dir: &Path,
    name: &str,
    specs: Vec<PairSpec>,
) -> Result<(PairWriter, Journal, Vec<ModuleCertificate>)> {
    let path = dir.join(MODULES);
    let mut lines = lines::<Line>(&path)?;
    let hashes: Vec<&str> = lines.iter().map(|(line, _)| line.sha256.as_str()).collect();
    let (pairs, kept) = PairWriter::resume(&dir.join(name), specs, &hashes)?;
    lines.truncate(kept);
    let journal = Journal::behind(&path, lines.last().map_or(0, |(_, end)| *end))?;
    Ok((pairs, journal, lines.into_iter().map(|(line, _)| line.certificate).collect()))
}

/// The lines of the journal at `path` and where each ends, up to the first that is torn; none where there is no file.
fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<(T, u64)>> {
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        other => other.map_err(Error::io(path))?,
    };
    let mut end = 0;
    let whole = text.split_inclusive(|b| *b == b'\n').filter(|line| line.ends_with(b"\n"));
    let read = whole.map_while(|line| {
        end += line.len() as u64;
        Some((serde_json::from_slice(line).ok()?, end))
    });
    Ok(read.collect())
}

impl Journal {
    /// The journal at `path`, behind the lines that an earlier run wrote, as far as `counts` takes a line and its number.
    pub fn resume<T: DeserializeOwned>(
        path: &Path,
        counts: impl Fn(usize, &T) -> bool,
    ) -> Result<(Journal, Vec<T>)> {
        let mut lines = lines::<T>(path)?;
        let kept = lines.iter().enumerate().take_while(|(n, (line, _))| counts(*n, line)).count();
        lines.truncate(kept);
        let journal = Journal::behind(path, lines.last().map_or(0, |(_, end)| *end))?;
        Ok((journal, lines.into_iter().map(|(line, _)| line).collect()))
    }

    /// The journal at `path` without what comes after `end`.
    fn behind(path: &Path, end: u64) -> Result<Journal> {
        let mut file =
            File::options().create(true).truncate(false).write(true).open(path).map_err(Error::io(path))?;
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(Error::io(path))?;
        Ok(Journal { path: path.to_path_buf(), file })
    }

    /// A part of the work is done.
    pub fn append(&mut self, line: &impl Serialize) -> Result<()> {
        self.file.write_all(&json::line(&self.path, line)?).map_err(Error::io(&self.path))
    }

    /// The work is done.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(Error::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_and_unwanted_lines_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let (mut journal, old) = Journal::resume::<u32>(&path, |_, _| true).unwrap();
        assert!(old.is_empty());
        for n in [5u32, 6, 7] {
            journal.append(&n).unwrap();
        }
        let mut text = std::fs::read(&path).unwrap();
        text.extend(b"8");
        std::fs::write(&path, text).unwrap();
        let (_, old) = Journal::resume::<u32>(&path, |_, _| true).unwrap();
        assert_eq!(old, [5, 6, 7]);
        let (mut journal, old) =
            Journal::resume::<u32>(&path, |n, line| *line == 5 + n as u32 && n < 2).unwrap();
        assert_eq!(old, [5, 6]);
        journal.append(&9u32).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "5\n6\n9\n");
        journal.remove().unwrap();
        assert!(!path.exists());
    }
}
