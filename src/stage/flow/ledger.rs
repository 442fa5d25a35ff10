//! What a flow has finished: each stage's folder and the fingerprint of its inputs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::json;
use crate::error::{Error, Result};

/// The file's name.
pub const LEDGER: &str = "ledger.json";

/// The ledger of one output folder.
#[derive(Debug)]
pub struct Ledger {
    dir: PathBuf,
    stages: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
struct Entry {
    inputs: String,
    /// None while the stage is at work.
    report: Option<Value>,
}

impl Ledger {
    /// Reads the ledger in `dir`, which is made if it is not there.
    pub fn open(dir: &Path) -> Result<Ledger> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join(LEDGER);
        let stages = if path.exists() {
            json::typed(&path, json::parse(&path, &json::read_bounded(&path)?)?)?
        } else {
            BTreeMap::new()
        };
        Ok(Ledger { dir: dir.to_path_buf(), stages })
    }

    /// The report of stage `name` if it was finished with these inputs and its folder is still there.
    pub fn finished(&self, name: &str, inputs: &str) -> Option<Value> {
        let entry = self.stages.get(name).filter(|e| e.inputs == inputs)?;
        self.dir.join(name).exists().then(|| entry.report.clone())?
    }

    /// Whether stage `name` was begun with these inputs.
    pub fn began(&self, name: &str, inputs: &str) -> bool {
        self.stages.get(name).is_some_and(|e| e.inputs == inputs)
    }

    /// Notes that a stage is at work.
    pub fn begin(&mut self, name: &str, inputs: String) -> Result<()> {
        self.stages.insert(name.to_string(), Entry { inputs, report: None });
        self.write()
    }

    /// Notes a finished stage.
    pub fn note(&mut self, name: &str, inputs: String, report: &impl Serialize) -> Result<Value> {
        let report = serde_json::to_value(report)
            .map_err(|e| Error::file(self.dir.join(LEDGER), format!("{name}: {e}")))?;
        self.stages.insert(name.to_string(), Entry { inputs, report: Some(report.clone()) });
        self.write()?;
        Ok(report)
    }

    fn write(&self) -> Result<()> {
        let fresh = self.dir.join(format!("{LEDGER}.new"));
        digest::write_json(&fresh, &self.stages)?;
        std::fs::rename(&fresh, self.dir.join(LEDGER)).map_err(Error::io(&fresh))
    }
}

/// The fingerprint of a stage: what it does, and the fingerprints of what it reads.
pub fn inputs(stage: &str, options: &str, read: &[&str]) -> String {
    let mut hash = Hasher::default();
    for part in [stage, options, env!("CARGO_PKG_VERSION")].iter().chain(read) {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_by_inputs_and_folder() {
        let dir = tempfile::tempdir().unwrap();
        let a = inputs("train", "{}", &["x", "y"]);
        assert_ne!(a, inputs("train", "{}", &["xy", ""]));
        let mut ledger = Ledger::open(dir.path()).unwrap();
        ledger.note("edge/a", a.clone(), &7).unwrap();
        assert_eq!(ledger.finished("edge/a", &a), None, "its folder is gone");
        std::fs::create_dir_all(dir.path().join("edge/a")).unwrap();
        ledger.begin("edge/b", "i".into()).unwrap();
        assert!(ledger.began("edge/b", "i") && ledger.finished("edge/b", "i").is_none());
        let again = Ledger::open(dir.path()).unwrap();
        assert_eq!(again.finished("edge/a", &a), Some(Value::from(7)));
        assert_eq!(again.finished("edge/a", "other"), None);
    }
}
