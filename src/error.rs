//! What can go wrong, said so that a reader knows what to do next.
//!
//! Messages are lower case, carry both numbers (found and expected) and the names of the file and the tensor.

use std::io;
use std::path::{Path, PathBuf};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything this crate fails with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The command asks for something that has no meaning: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The system refused to read or write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was found, what was expected, and why.
        why: String,
    },
    /// A tensor in a file does not hold what it should.
    #[error("{}: {tensor} {why}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What was found, what was expected, and why.
        why: String,
    },
    /// An operation was given views that do not fit one another.
    #[error("{op}: {why}")]
    Op {
        /// The operation.
        op: &'static str,
        /// Which view, what it holds and what it should.
        why: String,
    },
    /// The memory plan does not fit; the text is the plan's table.
    #[error("{0}")]
    Memory(String),
    /// A device or its driver refused, or a kernel failed.
    #[error("{0}")]
    Device(String),
    /// The computation gave a result that cannot be used (NaN, no supervised token).
    #[error("{0}")]
    Numeric(String),
    /// The result is not as good as the command asks for, and was not written.
    #[error("{0}")]
    NotGoodEnough(String),
    /// An endpoint on the network did not answer as it should, or may not be asked any more.
    #[error("{0}")]
    Endpoint(String),
    /// SIGINT or SIGTERM arrived and the work so far is saved: exit code 130.
    #[error("interrupted: {0}")]
    Interrupted(String),
}

/// `1536` as `1.5 KiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// The one of `known` that is most like `word`, and how much, from 0 to 1; none where nothing is known.
pub fn most_alike<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<(f64, &'a str)> {
    known.into_iter().map(|k| (strsim::jaro_winkler(k, word), k)).max_by(|a, b| a.0.total_cmp(&b.0))
}

/// The one of `known` that `word` was probably meant to be, if any is alike.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    most_alike(word, known).filter(|(likeness, _)| *likeness > 0.7).map(|(_, k)| k)
}

impl Error {
    /// Whether the same command may end well another time: a full disk, a device that failed and a signal pass, what
    /// the inputs hold does not.
    pub fn passes(&self) -> bool {
        matches!(self, Error::Io { .. } | Error::Device(_) | Error::Interrupted(_))
    }

    /// An error of the system about `path`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// An error about what the file at `path` holds.
    pub fn file(path: impl AsRef<Path>, why: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), why: why.into() }
    }

    /// An error about one tensor of the file at `path`.
    pub fn tensor(path: impl AsRef<Path>, tensor: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Tensor { path: path.as_ref().to_path_buf(), tensor: tensor.into(), why: why.into() }
    }

    /// The process's exit code: 2 wrong usage, 130 interrupted, 1 everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Interrupted(_) => 130,
            _ => 1,
        }
    }
}
