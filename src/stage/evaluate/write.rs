//! What an evaluation leaves behind: a file of predictions, a folder with results.

use std::path::Path;

use super::harness;
use super::items::Items;
use super::{EvalOptions, EvalReport, Prediction};
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::output_file::OutputFile;
use crate::checkpoint::provenance::Provenance;
use crate::checkpoint::{digest, json};
use crate::data::lines;
use crate::error::{Error, Result};
use crate::stage::common::Common;
use crate::tensor::DType;

/// The file in the folder that holds one JSON line for each item and column.
pub const PREDICTIONS: &str = "predictions.jsonl";
/// The file in the folder that holds the report.
pub const REPORT: &str = "report.json";

/// The outputs of a run, begun before any work so that a refusal costs nothing.
#[derive(Debug)]
pub struct Outputs {
    predictions: Option<OutputFile>,
    folder: Option<Output>,
}

impl Outputs {
    /// Begins what `options` name; none if the run to resume is finished. Where its end was cut short the predictions
    /// are put in their place, from the folder.
    pub fn begin(options: &EvalOptions, precision: DType, common: &Common) -> Result<Option<Outputs>> {
        let folder = match &options.out {
            None => None,
            Some(out) => {
                let fingerprint = digest::sha256(format!("{precision} {options:?}").as_bytes());
                match Output::begin_anew(out, "eval", &fingerprint, common.output())? {
                    Begun::Finished => {
                        if let Some(path) = options.predictions.as_deref().filter(|path| !path.exists()) {
                            let file = OutputFile::begin_with(path, common.force, made_here)?;
                            // None of a text's.
                            let written = out.join(PREDICTIONS);
                            if written.exists() {
                                std::fs::copy(&written, file.path()).map_err(Error::io(&written))?;
                            }
                            file.finish()?;
                        }
                        return Ok(None);
                    }
                    Begun::Work(output) => Some(output),
                }
            }
        };
        let begin = |path| OutputFile::begin_with(path, common.force, made_here);
        let predictions = options.predictions.as_deref().map(begin).transpose()?;
        Ok(Some(Outputs { predictions, folder }))
    }

    /// Writes the report on `items` and puts everything in its place.
    pub fn finish(
        self,
        report: &EvalReport,
        items: &Items,
        options: &EvalOptions,
        precision: DType,
    ) -> Result<()> {
        if let Some(folder) = self.folder {
            let mut known = harness::write(folder.dir(), report, items, options, precision)?;
            known.insert(REPORT.to_string(), digest::write_json(&folder.dir().join(REPORT), report)?);
            if !report.predictions.is_empty() {
                let path = folder.dir().join(PREDICTIONS);
                known.insert(PREDICTIONS.into(), lines::write(&path, &report.predictions)?);
            }
            Provenance::new("eval").seal(folder.dir(), known)?;
            folder.finish()?;
        }
        if let Some(file) = self.predictions {
            lines::write(file.path(), &report.predictions)?;
            file.finish()?;
        }
        Ok(())
    }
}

/// The report in the finished folder `out`; its predictions stay in their file.
pub fn read(out: &Path) -> Result<EvalReport> {
    let path = out.join(REPORT);
    json::typed(&path, json::parse(&path, &json::read_bounded(&path)?)?)
}

/// Whether a file begins with a prediction.
pub fn made_here(start: &[u8]) -> bool {
    let first = start.split(|&b| b == b'\n').next().unwrap_or_default();
    serde_json::from_slice::<Prediction>(first).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    fn prediction(id: &str) -> Prediction {
        Prediction {
            task: "t".into(),
            adapter: None,
            id: id.into(),
            gold: 1,
            predicted: 0,
            logprobs: vec![-0.5, -1.25],
        }
    }

    #[test]
    fn outputs_appear_whole_and_only_own_files_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let options = EvalOptions {
            predictions: Some(dir.path().join("p.jsonl")),
            out: Some(dir.path().join("out")),
            ..EvalOptions::default()
        };
        let report =
            EvalReport { predictions: vec![prediction("a"), prediction("b")], ..EvalReport::default() };
        let items = Items::load(&[], &fixture::tokenizer(true, &[]), None, 9).unwrap();
        let begin = |common: &Common| Outputs::begin(&options, DType::F32, common);
        let file = dir.path().join("p.jsonl");
        let first = begin(&Common::default()).unwrap().unwrap();
        assert!(!file.exists());
        drop(first);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        begin(&Common::default()).unwrap().unwrap().finish(&report, &items, &options, DType::F32).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let line = r#"{"task":"t","adapter":null,"id":"a","gold":1,"predicted":0,"logprobs":[-0.5,-1.25]}"#;
        assert_eq!(text.lines().next(), Some(line));
        assert_eq!(text, std::fs::read_to_string(dir.path().join("out").join(PREDICTIONS)).unwrap());
        assert!(Provenance::verify(&dir.path().join("out")).is_ok());
        assert_eq!(read(&dir.path().join("out")).unwrap().columns, report.columns);
        assert!(dir.path().join("out").join(harness::RESULTS).exists());

        assert!(begin(&Common::default()).is_err());
        let force = Common { force: true, ..Common::default() };
        begin(&force).unwrap().unwrap().finish(&report, &items, &options, DType::F32).unwrap();
        std::fs::write(&file, "somebody's notes").unwrap();
        assert!(begin(&force).is_err());
        let resume = Common { resume: true, ..Common::default() };
        assert!(begin(&resume).unwrap().is_none());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "somebody's notes");
        std::fs::remove_file(&file).unwrap();
        assert!(begin(&resume).unwrap().is_none());
        assert_eq!(
            std::fs::read_to_string(&file).unwrap(),
            text,
            "the folder was whole and the file not there yet"
        );
        // Of a run that was killed nothing is left in what the next one makes.
        let out = dir.path().join("out");
        std::fs::remove_file(&file).unwrap();
        std::fs::remove_dir_all(&out).unwrap();
        let mut killed = begin(&Common::default()).unwrap().unwrap().folder.unwrap();
        std::fs::write(killed.dir().join("samples_old.jsonl"), "{").unwrap();
        killed.keep();
        drop(killed);
        begin(&resume).unwrap().unwrap().finish(&report, &items, &options, DType::F32).unwrap();
        assert!(out.join(REPORT).exists() && !out.join("samples_old.jsonl").exists());
    }
}
