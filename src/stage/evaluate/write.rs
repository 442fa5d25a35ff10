//! Predictions and results as files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::{EvalReport, Prediction};
use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::output_file::OutputFile;
use crate::checkpoint::provenance::Provenance;
use crate::error::{Error, Result};
use crate::stage::common::Common;

/// Predictions in an output folder.
const PREDICTIONS: &str = "predictions.jsonl";
/// The report in an output folder.
const RESULTS: &str = "results.json";

/// Writes one JSON line per item and column to the file `path`.
pub fn predictions(path: &Path, report: &EvalReport, common: &Common) -> Result<()> {
    let work = OutputFile::begin_with(path, common.force, |head| head.starts_with(b"{\"task\":"))?;
    lines(work.path(), &report.predictions)?;
    work.finish()
}

/// Writes `results.json` and `predictions.jsonl` into the output folder `out`.
pub fn folder(out: &Path, report: &EvalReport, common: &Common) -> Result<()> {
    let text = serde_json::to_string(report).map_err(|e| Error::file(out, e.to_string()))?;
    let mut hash = Hasher::default();
    hash.update(text.as_bytes());
    let output = match Output::begin(out, "eval", &hash.finish(), common.output())? {
        Begun::Finished => return Ok(()),
        Begun::Work(output) => output,
    };
    digest::write_json(&output.dir().join(RESULTS), report)?;
    lines(&output.dir().join(PREDICTIONS), &report.predictions)?;
    Provenance::new("eval").seal(output.dir(), Default::default())?;
    output.finish()
}

fn lines(path: &Path, predictions: &[Prediction]) -> Result<()> {
    let mut file = BufWriter::new(File::create(path).map_err(Error::io(path))?);
    for prediction in predictions {
        let line = serde_json::to_string(prediction).map_err(|e| Error::file(path, e.to_string()))?;
        writeln!(file, "{line}").map_err(Error::io(path))?;
    }
    file.flush().map_err(Error::io(path))
}
