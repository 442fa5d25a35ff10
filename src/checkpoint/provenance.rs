//! `anabranch.json`: where an output folder comes from, and the SHA-256 of each of its files.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::manifest::{MANIFEST, SIGNATURE};
use super::{digest, json};
use crate::error::{Error, Result};

/// The file's name.
pub const PROVENANCE: &str = "anabranch.json";
const FORMAT: &str = "anabranch/1";
/// Metrics of a run: they hold times, lie outside every hash, and stay at home.
pub const METRICS: &str = "metrics.jsonl";
/// Files of an output folder that are not hashed: this one cannot hold its own hash, metrics hold times, and a signature
/// comes after all else.
pub const NOT_HASHED: [&str; 4] = [PROVENANCE, METRICS, MANIFEST, SIGNATURE];

/// Where an output folder comes from: no paths, host names, user names or text of the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// `anabranch/1`.
    pub format: String,
    /// The command that made it: `train`, `prune`, `fuse`, …
    pub command: String,
    /// The version of this program that did.
    pub version: String,
    /// The full model's fingerprint; what `fuse` compares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_fingerprint: Option<String>,
    /// The fingerprint of the model that it was made on or that it is; after `recover` the full model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_fingerprint: Option<String>,
    /// The seed of the common A₀.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_seed: Option<u64>,
    /// Whether A was kept as it was drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_a: Option<bool>,
    /// The seed of everything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Optimizer steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Training samples; what `--weights samples` weighs by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<u64>,
    /// Losses by name: `first`, `last`, `validation`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub losses: BTreeMap<String, f64>,
    /// The data's keyed fingerprint, where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_fingerprint: Option<String>,
    /// The command's options that change its result.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub options: Map<String, Value>,
    /// What else a command has to say, and fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
    /// SHA-256 of each file by its path inside the folder.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

/// What `verify` found about one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Its bytes are those that were written.
    Same,
    /// Its bytes are others.
    Changed,
    /// It is not there.
    Missing,
    /// It is there, and `anabranch.json` does not know it.
    Unknown,
}

impl Provenance {
    /// Nothing but the command's name and this program's version.
    pub fn new(command: &str) -> Provenance {
        Provenance {
            format: FORMAT.into(),
            command: command.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            base_fingerprint: None,
            model_fingerprint: None,
            init_seed: None,
            freeze_a: None,
            seed: None,
            steps: None,
            samples: None,
            losses: BTreeMap::new(),
            data_fingerprint: None,
            options: Map::new(),
            other: Map::new(),
            files: BTreeMap::new(),
        }
    }

    /// Reads `anabranch.json` in `dir`; none where there is no such file.
    pub fn open(dir: &Path) -> Result<Option<Provenance>> {
        let path = dir.join(PROVENANCE);
        if !path.exists() {
            return Ok(None);
        }
        Provenance::parse(&path, &json::read_bounded(&path)?).map(Some)
    }

    /// Reads `text`; `path` is for the errors' text.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Provenance> {
        json::typed(path, json::parse_format(path, text, FORMAT)?)
    }

    /// Writes `anabranch.json` in `dir`, the last file of an output folder: hashes of all files there, those in `known`
    /// taken as they are.
    pub fn seal(mut self, dir: &Path, mut known: BTreeMap<String, String>) -> Result<()> {
        self.files.clear();
        for name in list(dir)? {
            let hash = match known.remove(&name) {
                Some(hash) => hash,
                None => digest::sha256_file(&dir.join(&name))?,
            };
            self.files.insert(name, hash);
        }
        if let Some((name, _)) = known.into_iter().next() {
            return Err(Error::file(dir.join(name), "was written and is gone"));
        }
        digest::write_json(&dir.join(PROVENANCE), &self)?;
        Ok(())
    }

    /// Reads every byte of the folder `dir` and compares with the stored hashes, file by file in the order of names. An
    /// error where there is no `anabranch.json` to compare with.
    pub fn verify(dir: &Path) -> Result<BTreeMap<String, Verdict>> {
        let provenance = Provenance::open(dir)?.ok_or_else(|| {
            Error::file(dir, format!("has no {PROVENANCE}: there are no hashes to verify against"))
        })?;
        let mut out: BTreeMap<_, _> = list(dir)?.into_iter().map(|name| (name, Verdict::Unknown)).collect();
        for (name, hash) in &provenance.files {
            let verdict = match out.contains_key(name) {
                false => Verdict::Missing,
                true if digest::sha256_file(&dir.join(name))? == *hash => Verdict::Same,
                true => Verdict::Changed,
            };
            out.insert(name.clone(), verdict);
        }
        Ok(out)
    }
}

/// The files of `dir` that are hashed, by path inside it with `/`, sorted. Names that start with a dot are left out:
/// the marker of work in progress is one.
pub fn list(dir: &Path) -> Result<Vec<String>> {
    let hidden = |name: &str| name.split('/').any(|part| part.starts_with('.'));
    let mut out = list_all(dir)?;
    out.retain(|name| !hidden(name) && !NOT_HASHED.contains(&name.as_str()));
    Ok(out)
}

/// All files of `dir`, by path inside it with `/`, sorted.
pub fn list_all(dir: &Path) -> Result<Vec<String>> {
    let mut out = Vec::new();
    walk(dir, "", &mut out)?;
    out.sort();
    Ok(out)
}

fn walk(dir: &Path, prefix: &str, out: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| Error::file(&path, "has a name that is no UTF-8"))?;
        let name = format!("{prefix}{name}");
        if entry.file_type().map_err(Error::io(&path))?.is_dir() {
            walk(&path, &format!("{name}/"), out)?;
        } else {
            out.push(name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sealed_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        assert!(Provenance::verify(d).unwrap_err().to_string().contains("there are no hashes"));
        std::fs::create_dir(d.join("sub")).unwrap();
        for name in ["a", "b", "sub/c", "metrics.jsonl", ".lock"] {
            std::fs::write(d.join(name), name).unwrap();
        }
        let mut p = Provenance::new("train");
        p.losses.insert("last".into(), 0.1);
        p.other.insert("certificate".into(), serde_json::json!({"x": 1}));
        p.clone().seal(d, BTreeMap::from([("a".to_string(), digest::sha256(b"a"))])).unwrap();
        let back = Provenance::open(d).unwrap().unwrap();
        assert_eq!(back.files.keys().collect::<Vec<_>>(), ["a", "b", "sub/c"]);
        assert_eq!((back.losses["last"], &back.other["certificate"]["x"]), (0.1, &1.into()));
        assert!(Provenance::verify(d).unwrap().values().all(|v| *v == Verdict::Same));
        std::fs::write(d.join("a"), "A").unwrap();
        std::fs::remove_file(d.join("b")).unwrap();
        std::fs::write(d.join("new"), "").unwrap();
        let v = Provenance::verify(d).unwrap();
        let found: Vec<_> = v.iter().map(|(n, v)| (n.as_str(), v.clone())).collect();
        assert_eq!(
            found,
            [
                ("a", Verdict::Changed),
                ("b", Verdict::Missing),
                ("new", Verdict::Unknown),
                ("sub/c", Verdict::Same)
            ]
        );
    }

    #[test]
    fn a_file_of_another_format_is_refused() {
        let p = Path::new("anabranch.json");
        assert!(Provenance::parse(p, b"{}").unwrap_err().to_string().contains("has no format"));
        assert!(Provenance::parse(p, br#"{"format":"x"}"#).unwrap_err().to_string().contains("\"x\""));
        let err = Provenance::parse(p, br#"{"format":"anabranch/1","command":3}"#).unwrap_err().to_string();
        assert!(err.contains("invalid type: integer `3`"), "{err}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Provenance::parse(Path::new("p"), &text);
        }
    }
}
