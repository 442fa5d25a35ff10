//! `metrics.jsonl`: a line a step, and the process's memory.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::json;
use crate::checkpoint::provenance::METRICS;
use crate::error::{Error, Result};

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Counted from 1.
    pub step: u64,
    /// Tokens that went through the model in this step.
    pub tokens: u64,
    /// Mean over the step's supervised tokens.
    pub loss: f64,
    /// Step size.
    pub learning_rate: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Tokens by seconds, of this step.
    pub tokens_per_second: f64,
    /// The most anonymous memory of the process so far.
    pub peak_memory_bytes: u64,
    /// Mean over the validation data, where it was made after this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
}

/// The file, being appended to.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file in `dir`, cut back to the lines of steps up to `step`.
    pub fn open(dir: &Path, step: u64) -> Result<MetricsFile> {
        let path = dir.join(METRICS);
        let kept = keep(&path, step)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|f| f.set_len(kept).map(|()| f))
            .map_err(Error::io(&path))?;
        Ok(MetricsFile { path, file })
    }

    /// Appends one line.
    pub fn write(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.file.write_all(&json::line(&self.path, metrics)?).map_err(Error::io(&self.path))
    }
}

/// Reads all lines of the file in `dir`; none where there is no file.
pub fn read(dir: &Path) -> Result<Vec<StepMetrics>> {
    let path = dir.join(METRICS);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    text.lines()
        .enumerate()
        .map(|(n, line)| {
            serde_json::from_str(line).map_err(|e| Error::file(&path, format!("line {}: {e}", n + 1)))
        })
        .collect()
}

/// Bytes of the whole lines of steps up to `step` at the start of the file.
fn keep(path: &Path, step: u64) -> Result<u64> {
    if !path.exists() {
        return Ok(0);
    }
    let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let (mut kept, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(Error::io(path))?;
        // A line that was cut off by a kill, or of a later step, ends what is kept.
        let whole = serde_json::from_slice::<StepMetrics>(&line);
        match whole {
            Ok(m) if m.step <= step && line.ends_with(b"\n") => kept += read as u64,
            _ => return Ok(kept),
        }
    }
}

/// Anonymous memory of this process now, in bytes, as the kernel counts it; none where it does not say.
pub fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            tokens: 3,
            loss: 0.5,
            learning_rate: 1e-3,
            grad_norm: 1.0,
            tokens_per_second: 9.0,
            peak_memory_bytes: 1,
            val_loss: None,
        }
    }

    #[test]
    fn resuming_cuts_back_to_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = MetricsFile::open(dir.path(), 0).unwrap();
        for step in 1..=5 {
            file.write(&line(step)).unwrap();
        }
        drop(file);
        let path = dir.path().join(METRICS);
        let mut text = std::fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"step\":6,\"tok");
        std::fs::write(&path, text).unwrap();
        let mut file = MetricsFile::open(dir.path(), 3).unwrap();
        file.write(&line(4)).unwrap();
        let steps: Vec<u64> = read(dir.path()).unwrap().iter().map(|m| m.step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        let own = anonymous_bytes();
        assert!(own.is_some_and(|b| b > 4096), "{own:?}");
    }
}
