//! The journal of an unfinished fusion: a line for each module whose factors are in the file beside it.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::adapter_writer::{PairSpec, PairWriter};
use crate::error::{Error, Result};
use crate::fuse::certificate::ModuleCertificate;

/// The file's name; it is gone when the work is done.
const JOURNAL: &str = "modules.jsonl";

/// A module that is in the file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Line {
    /// Of the bytes of A and B together.
    pub sha256: String,
    /// What is known of it.
    pub certificate: ModuleCertificate,
}

/// The journal, open behind its last line.
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
    let path = dir.join(JOURNAL);
    let text = match std::fs::read(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        other => other.map_err(Error::io(&path))?,
    };
    let whole = text.split_inclusive(|b| *b == b'\n').filter(|line| line.ends_with(b"\n"));
    let (mut lines, mut ends): (Vec<Line>, Vec<u64>) = (Vec::new(), vec![0]);
    for text in whole {
        let Ok(line) = serde_json::from_slice(text) else { break };
        lines.push(line);
        ends.push(ends[ends.len() - 1] + text.len() as u64);
    }
    let hashes: Vec<&str> = lines.iter().map(|l| l.sha256.as_str()).collect();
    let (pairs, kept) = PairWriter::resume(&dir.join(name), specs, &hashes)?;
    let mut file =
        File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io(&path))?;
    file.set_len(ends[kept])
        .and_then(|()| file.seek(SeekFrom::Start(ends[kept])))
        .map_err(Error::io(&path))?;
    lines.truncate(kept);
    Ok((pairs, Journal { path, file }, lines.into_iter().map(|l| l.certificate).collect()))
}

impl Journal {
    /// A module came to be in the file.
    pub fn append(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line).map_err(|e| Error::file(&self.path, e.to_string()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(Error::io(&self.path))
    }

    /// The work is done.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(Error::io(&self.path))
    }
}
