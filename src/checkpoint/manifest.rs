//! `manifest.json` and `manifest.sig`: which files a folder holds, of which run and round, and who says so.
//!
//! What is signed are the bytes of `manifest.json` as they lie, after [`CONTEXT`], so that a signature made for anything
//! else never counts here. A recovered adapter keeps the manifest and signature of its edge in the folder `edge`, as
//! files like all others that its recoverer signs for: that is the [`Chain`].

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::keys::{PublicKey, SecretKey, from_hex};
use super::output_file::OutputFile;
use super::provenance::{self, METRICS};
use super::pruning::PRUNING;
use super::{digest, json};
use crate::error::{Error, Result};

/// The list of files.
pub const MANIFEST: &str = "manifest.json";
/// Its signature.
pub const SIGNATURE: &str = "manifest.sig";
/// The folder in a recovered adapter that keeps the manifest and signature of the adapter before.
pub const EDGE: &str = "edge";
const FORMAT: &str = "anabranch-manifest/1";
const SIGNATURE_FORMAT: &str = "anabranch-signature/1";
/// What stands before a manifest's bytes when they are signed.
pub const CONTEXT: &[u8] = b"anabranch-signature/1\0";
/// The most bytes of a manifest: its [`MAX_FILES`] with names of a usual length.
const MAX_MANIFEST: u64 = 1 << 20;
/// A signature's file is a few lines.
const MAX_SIGNATURE: u64 = 4096;
/// The most files of a signed folder; an adapter has about five, a model in shards some hundred.
pub const MAX_FILES: usize = 4096;
/// The most bytes of a file's name, and of a run's.
const MAX_NAME: usize = 255;
/// The files of work in progress, which are gone when an output is whole.
const PARTIAL: &str = ".anabranch-";

/// Which run a folder belongs to, and which round of it: an adapter that was signed for one is none of another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Occasion {
    /// The run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// The round in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round: Option<u64>,
}

impl Occasion {
    /// An error where the run's name is empty, long, or holds what a terminal would act on.
    pub fn check(&self) -> Result<()> {
        match &self.run {
            Some(run) if !plain(run) => Err(Error::Usage(format!(
                "--run is {run:?}, expected 1 to {MAX_NAME} bytes of plain text without quotes and backslashes"
            ))),
            _ => Ok(()),
        }
    }

    /// Whether `self` has the run and the round that `expected` names; why not, as a part of a sentence.
    pub fn meets(&self, expected: &Occasion) -> Result<(), String> {
        let run = expected.run.is_some() && self.run != expected.run;
        let round = expected.round.is_some() && self.round != expected.round;
        if run || round { Err(format!("is of {self}, expected {expected}")) } else { Ok(()) }
    }

    /// Whether neither is named.
    pub fn is_empty(&self) -> bool {
        *self == Occasion::default()
    }
}

impl std::fmt::Display for Occasion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.run, self.round) {
            (Some(run), Some(round)) => write!(f, "run {run:?} round {round}"),
            (Some(run), None) => write!(f, "run {run:?}"),
            (None, Some(round)) => write!(f, "round {round}"),
            (None, None) => f.write_str("no run"),
        }
    }
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    /// What it was made for.
    #[serde(default, skip_serializing_if = "Occasion::is_empty")]
    pub occasion: Occasion,
    /// SHA-256 of each file by its path inside the folder.
    pub files: BTreeMap<String, String>,
}

/// `manifest.sig`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignatureFile {
    format: String,
    public_key: String,
    signature: String,
}

/// A manifest whose signature is right, by a key of which nothing more is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// What was signed.
    pub manifest: Manifest,
    /// Who signed.
    pub key: PublicKey,
}

/// A text that a terminal shows as it is: no quotes, backslashes, control characters, or marks that turn the line around.
fn plain(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_NAME && format!("{text:?}").len() == text.len() + 2
}

/// Whether `name` is the path of a file inside a folder, in the one spelling that it has.
fn inside(name: &str) -> bool {
    let parts = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
    plain(name) && parts && name.split('/').all(|p| !p.is_empty() && p != ".")
}

impl Manifest {
    /// Reads `text`; `path` is for the errors' text.
    ///
    /// An error where a name is not that of a file inside the folder, is named twice, or is one that a manifest leaves
    /// out, where a digest is none, and where there are none or more than [`MAX_FILES`].
    pub fn parse(path: &Path, text: &[u8]) -> Result<Manifest> {
        let manifest: Manifest = json::typed(path, json::parse_format(path, text, FORMAT)?)?;
        let n = manifest.files.len();
        if n == 0 || n > MAX_FILES {
            return Err(Error::file(path, format!("names {n} files, expected 1 to {MAX_FILES}")));
        }
        manifest.occasion.check().map_err(|_| {
            Error::file(
                path,
                format!("names a run that is empty, longer than {MAX_NAME} bytes or no plain text"),
            )
        })?;
        for (name, hash) in &manifest.files {
            if !inside(name) {
                return Err(Error::file(
                    path,
                    format!("names {name:?}, which is no path of a file inside the folder"),
                ));
            }
            if left_out(name) {
                return Err(Error::file(path, format!("names {name}, which no manifest covers")));
            }
            if from_hex::<32>(hash).is_none() {
                return Err(Error::file(
                    path,
                    format!("gives {name} the SHA-256 {hash:?}, expected 64 hexadecimal digits"),
                ));
            }
        }
        Ok(manifest)
    }

    /// The manifest of the folder `dir` as it is: an error where something in it is no regular file.
    pub fn of(dir: &Path, occasion: Occasion) -> Result<Manifest> {
        occasion.check()?;
        let mut files = BTreeMap::new();
        for name in regular_files(dir)? {
            if name.split('/').any(|part| part.starts_with(PARTIAL)) {
                continue;
            }
            if !inside(&name) {
                return Err(Error::file(dir, format!("has the file {name:?}, a name that cannot be signed")));
            }
            let hash = digest::sha256_file(&dir.join(&name))?;
            files.insert(name, hash);
        }
        if files.is_empty() || files.len() > MAX_FILES {
            let why = format!("has {} files to sign, expected 1 to {MAX_FILES}", files.len());
            return Err(Error::file(dir, why));
        }
        Ok(Manifest { format: FORMAT.into(), occasion, files })
    }

    /// An error where a file of `dir` is not the one that the manifest names, is missing, is not named, or is no regular
    /// file.
    pub fn check_files(&self, dir: &Path) -> Result<()> {
        let here = regular_files(dir)?;
        if let Some(name) = here.iter().find(|n| !self.files.contains_key(*n)) {
            let why =
                format!("has {name:?}, which its {MANIFEST} does not list: it was put there after signing");
            return Err(Error::file(dir, why));
        }
        for (name, expected) in &self.files {
            let path = dir.join(name);
            if here.binary_search(name).is_err() {
                return Err(Error::file(path, format!("is missing, {MANIFEST} lists it")));
            }
            let found = digest::sha256_file(&path)?;
            if found != *expected {
                let why =
                    format!("has SHA-256 {found}, {MANIFEST} says {expected}: it was changed after signing");
                return Err(Error::file(path, why));
            }
        }
        Ok(())
    }

    /// Signs `self` with `key` into `dir`, where a signature is replaced only under `force`.
    pub fn sign(&self, dir: &Path, key: &SecretKey, force: bool) -> Result<()> {
        let (manifest, signature) = (dir.join(MANIFEST), dir.join(SIGNATURE));
        let text = json::pretty(&manifest, self)?;
        if text.len() as u64 > MAX_MANIFEST {
            return Err(Error::file(
                dir,
                format!("has names too long to sign: {MANIFEST} would exceed {MAX_MANIFEST} bytes"),
            ));
        }
        let signed = SignatureFile {
            format: SIGNATURE_FORMAT.into(),
            public_key: key.public().to_string(),
            signature: hex::encode(key.sign(&message(&text))),
        };
        let outputs = [OutputFile::begin(&manifest, force)?, OutputFile::begin(&signature, force)?];
        for (out, text) in outputs.into_iter().zip([text, json::pretty(&signature, &signed)?]) {
            digest::write_file(out.path(), &text)?;
            out.finish()?;
        }
        Ok(())
    }
}

/// The bytes that are signed for the manifest `text`.
fn message(text: &[u8]) -> Vec<u8> {
    [CONTEXT, text].concat()
}

/// Names of files that no manifest covers: the manifest itself, its signature, and metrics, which stay at home.
fn left_out(name: &str) -> bool {
    [MANIFEST, SIGNATURE, METRICS].contains(&name)
}

/// The files of `dir` that a manifest covers, sorted; an error where something in it is neither file nor folder.
fn regular_files(dir: &Path) -> Result<Vec<String>> {
    let mut names = provenance::list_all(dir)?;
    names.retain(|n| !left_out(n));
    for name in &names {
        regular(&dir.join(name))?;
    }
    Ok(names)
}

/// Whether there is a regular file at `path`; an error where there is something else.
fn regular(path: &Path) -> Result<bool> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io(path)(e)),
    };
    let what = if meta.is_symlink() { "a symbolic link" } else { "neither a file nor a folder" };
    if meta.is_file() {
        Ok(true)
    } else {
        Err(Error::file(path, format!("is {what}: a signed folder holds files only")))
    }
}

impl Signed {
    /// Checks the signature of the manifest `text`; paths are for the errors' text.
    pub fn parse(dir: &Path, text: &[u8], signature: &[u8]) -> Result<Signed> {
        let path = dir.join(SIGNATURE);
        let file: SignatureFile =
            json::typed(&path, json::parse_format(&path, signature, SIGNATURE_FORMAT)?)?;
        let key = PublicKey::from_hex(&file.public_key)
            .ok_or_else(|| Error::file(&path, "public_key is no ed25519 key of 64 hexadecimal digits"))?;
        let signature = from_hex::<64>(&file.signature)
            .ok_or_else(|| Error::file(&path, "signature is not 128 hexadecimal digits in lower case"))?;
        // Before the manifest is looked into: nothing in it is believed, or parsed, unsigned.
        if !key.verifies(&message(text), &signature) {
            let why =
                format!("is no signature of {MANIFEST} by key {}: one of the two was changed", key.short());
            return Err(Error::file(&path, why));
        }
        Ok(Signed { manifest: Manifest::parse(&dir.join(MANIFEST), text)?, key })
    }

    /// Reads and checks the manifest and the signature in `dir`, not the files that they name; none where neither is
    /// there, an error where one of them is.
    pub fn open(dir: &Path) -> Result<Option<Signed>> {
        let (manifest, signature) = (dir.join(MANIFEST), dir.join(SIGNATURE));
        match (regular(&manifest)?, regular(&signature)?) {
            (false, false) => Ok(None),
            (true, false) => {
                Err(Error::file(dir, format!("has {MANIFEST} but no {SIGNATURE}: its signature is lost")))
            }
            (false, true) => {
                Err(Error::file(dir, format!("has {SIGNATURE} but no {MANIFEST}: what was signed is lost")))
            }
            (true, true) => {
                let text = json::read_at_most(&manifest, MAX_MANIFEST)?;
                Signed::parse(dir, &text, &json::read_at_most(&signature, MAX_SIGNATURE)?).map(Some)
            }
        }
    }
}

/// Who had a hand in a folder, each with a signature that is right. Whether they are trusted is another question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chain {
    /// Who signed the folder.
    pub signer: PublicKey,
    /// Who signed the adapter that this one was recovered from, where the folder keeps that.
    pub edge: Option<PublicKey>,
    /// The run and the round that all of them name.
    pub occasion: Occasion,
    /// Files that the manifest lists.
    pub files: usize,
    /// Whether the folder holds a pruning plan: an adapter of a pruned model, or one that was recovered from it.
    pub pruned: bool,
}

impl Chain {
    /// Checks every signature and every file in `dir`; none where it is not signed.
    pub fn open(dir: &Path) -> Result<Option<Chain>> {
        std::fs::metadata(dir).map_err(Error::io(dir))?;
        let Some(outer) = Signed::open(dir)? else { return Ok(None) };
        outer.manifest.check_files(dir)?;
        let files = &outer.manifest.files;
        let kept = dir.join(EDGE);
        let inner = match files.keys().any(|n| n.starts_with("edge/")) {
            false => None,
            true => {
                Some(Signed::open(&kept)?.ok_or_else(|| Error::file(&kept, format!("has no {MANIFEST}")))?)
            }
        };
        if let Some(inner) = &inner {
            if inner.manifest.occasion != outer.manifest.occasion {
                let why = format!(
                    "is of {}, the folder around it is signed for {}: an adapter of one round is none of another",
                    inner.manifest.occasion, outer.manifest.occasion
                );
                return Err(Error::file(kept.join(MANIFEST), why));
            }
            let (then, now) = (inner.manifest.files.get(PRUNING), files.get(PRUNING));
            if then.is_none() || then != now {
                let why = "is not the one that the edge signed: the adapter was recovered by another plan";
                return Err(Error::file(dir.join(PRUNING), why));
            }
        }
        Ok(Some(Chain {
            signer: outer.key,
            edge: inner.map(|s| s.key),
            files: files.len(),
            pruned: files.contains_key(PRUNING),
            occasion: outer.manifest.occasion,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn occasion(run: &str, round: u64) -> Occasion {
        Occasion { run: Some(run.into()), round: Some(round) }
    }

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in files {
            std::fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        dir
    }

    fn sign(dir: &Path, key: &SecretKey, occasion: Occasion) {
        Manifest::of(dir, occasion).unwrap().sign(dir, key, false).unwrap();
    }

    fn refused(dir: &Path) -> String {
        Chain::open(dir).unwrap_err().to_string()
    }

    #[test]
    fn signed_and_checked() {
        let dir = folder(&["a", "sub/b", ".hidden", "metrics.jsonl", ".anabranch-partial"]);
        let (d, key) = (dir.path(), SecretKey::generate().unwrap());
        assert_eq!(Chain::open(d).unwrap(), None);
        sign(d, &key, occasion("r", 3));
        std::fs::remove_file(d.join(".anabranch-partial")).unwrap();
        let chain = Chain::open(d).unwrap().unwrap();
        assert_eq!((chain.signer, chain.edge, chain.files, chain.pruned), (key.public(), None, 3, false));
        assert_eq!(chain.occasion, occasion("r", 3));
        // Metrics stay at home, or come along: they are no part of it.
        std::fs::remove_file(d.join("metrics.jsonl")).unwrap();
        Chain::open(d).unwrap();
        let again = Manifest::of(d, Occasion::default()).unwrap();
        assert!(again.sign(d, &key, false).unwrap_err().to_string().contains("exists: --force"));
        again.sign(d, &key, true).unwrap();
        assert!(Chain::open(d).unwrap().unwrap().occasion.is_empty());
    }

    #[test]
    fn what_was_changed_after_signing() {
        let key = SecretKey::generate().unwrap();
        let made = || {
            let dir = folder(&["a", "sub/b"]);
            sign(dir.path(), &key, Occasion::default());
            dir
        };
        let attack = |how: &dyn Fn(&Path)| {
            let dir = made();
            how(dir.path());
            refused(dir.path())
        };
        let put = |name: &'static str, text: &'static str| {
            move |d: &Path| std::fs::write(d.join(name), text).unwrap()
        };
        assert!(attack(&put("a", "b")).contains("it was changed after signing"));
        assert!(attack(&put("c", "")).contains("has \"c\", which its manifest.json does not list"));
        assert!(attack(&put("sub/.c", "")).contains("sub/.c"));
        assert!(attack(&|d| std::fs::remove_file(d.join("sub/b")).unwrap()).contains("sub/b: is missing"));
        assert!(attack(&|d| std::fs::remove_file(d.join(SIGNATURE)).unwrap()).contains("no manifest.sig"));
        assert!(attack(&|d| std::fs::remove_file(d.join(MANIFEST)).unwrap()).contains("no manifest.json"));
        assert!(attack(&put(SIGNATURE, "{}")).contains("has no format"));
        let replace = |name: &'static str, from: &'static str, to: &'static str| {
            move |d: &Path| {
                let text = std::fs::read_to_string(d.join(name)).unwrap();
                assert!(text.contains(from), "{text}");
                std::fs::write(d.join(name), text.replace(from, to)).unwrap();
            }
        };
        assert!(attack(&replace(MANIFEST, "sub/b", "sub/c")).contains("one of the two was changed"));
        assert!(attack(&replace(MANIFEST, "\n}", "\n }")).contains("one of the two was changed"));
        assert!(
            attack(&replace(SIGNATURE, "\"signature\": \"", "\"signature\": \"00"))
                .contains("128 hexadecimal")
        );
        // A link in a file's place, even to the same bytes.
        let link = |d: &Path| {
            std::fs::rename(d.join("a"), d.join(METRICS)).unwrap();
            symlink(METRICS, d.join("a")).unwrap();
        };
        assert!(attack(&link).contains("a: is a symbolic link"));
        assert!(attack(&|d| symlink("/etc", d.join("etc")).unwrap()).contains("etc: is a symbolic link"));
        let linked = |d: &Path| {
            std::fs::rename(d.join(MANIFEST), d.join("sub/m")).unwrap();
            symlink("sub/m", d.join(MANIFEST)).unwrap();
        };
        assert!(attack(&linked).contains("manifest.json: is a symbolic link"));
        // The signature of another folder, and one by another key under this key's name.
        let other = folder(&["z"]);
        sign(other.path(), &key, Occasion::default());
        let swap = |d: &Path| {
            std::fs::copy(other.path().join(SIGNATURE), d.join(SIGNATURE)).unwrap();
        };
        assert!(attack(&swap).contains("one of the two was changed"));
        let dir = folder(&["a"]);
        symlink("a", dir.path().join("l")).unwrap();
        assert!(
            Manifest::of(dir.path(), Occasion::default()).unwrap_err().to_string().contains("symbolic link")
        );
        assert!(Manifest::of(tempfile::tempdir().unwrap().path(), Occasion::default()).is_err());
    }

    #[test]
    fn a_signature_for_anything_else_does_not_count() {
        let dir = folder(&["a"]);
        let (d, key) = (dir.path(), SecretKey::generate().unwrap());
        sign(d, &key, Occasion::default());
        let text = std::fs::read(d.join(MANIFEST)).unwrap();
        // The manifest's own bytes, without the context.
        let file = serde_json::json!({
            "format": SIGNATURE_FORMAT, "public_key": key.public().to_string(), "signature": hex::encode(key.sign(&text)),
        });
        std::fs::write(d.join(SIGNATURE), file.to_string()).unwrap();
        assert!(refused(d).contains("one of the two was changed"));
    }

    #[test]
    fn a_recovered_folder_keeps_its_edge() {
        let (edge, cloud) = (SecretKey::generate().unwrap(), SecretKey::generate().unwrap());
        let made = |inner: Occasion, outer: Occasion, plan: &str| {
            let before = folder(&["adapter", PRUNING]);
            sign(before.path(), &edge, inner);
            let after = folder(&["adapter", PRUNING]);
            std::fs::write(after.path().join(PRUNING), plan).unwrap();
            std::fs::create_dir(after.path().join(EDGE)).unwrap();
            for name in [MANIFEST, SIGNATURE] {
                std::fs::copy(before.path().join(name), after.path().join(EDGE).join(name)).unwrap();
            }
            sign(after.path(), &cloud, outer);
            after
        };
        let good = made(occasion("r", 1), occasion("r", 1), PRUNING);
        let chain = Chain::open(good.path()).unwrap().unwrap();
        assert_eq!((chain.signer, chain.edge, chain.pruned), (cloud.public(), Some(edge.public()), true));
        assert!(
            refused(made(occasion("r", 1), occasion("r", 2), PRUNING).path()).contains("is none of another")
        );
        assert!(refused(made(occasion("r", 1), occasion("r", 1), "x").path()).contains("by another plan"));
        std::fs::remove_dir_all(good.path().join(EDGE)).unwrap();
        assert!(refused(good.path()).contains("edge/manifest.json: is missing"));
    }

    #[test]
    fn manifests_of_strangers() {
        let p = Path::new(MANIFEST);
        let hash = "0".repeat(64);
        let parse = |text: String| {
            Manifest::parse(p, text.as_bytes()).map(|_| "fine".into()).unwrap_or_else(|e| e.to_string())
        };
        let one =
            |name: &str| parse(serde_json::json!({"format": FORMAT, "files": {name: hash}}).to_string());
        assert_eq!((one("a"), one("a b/é.json")), ("fine".to_string(), "fine".to_string()));
        for name in [
            "",
            ".",
            "..",
            "../a",
            "a/..",
            "a/../b",
            "/a",
            "a/",
            "a//b",
            "./a",
            "a/./b",
            "a\\b",
            "a\nb",
            "a\0b",
            "\u{1b}[2J",
            "\u{202e}a",
            "a\"b",
            &"a".repeat(256),
        ] {
            assert!(one(name).contains("no path of a file inside the folder"), "{name:?}: {}", one(name));
        }
        for name in [MANIFEST, SIGNATURE, METRICS] {
            assert!(one(name).contains("no manifest covers"));
        }
        for (text, expected) in [
            (format!(r#"{{"format":"{FORMAT}","files":{{"a":"{hash}","a":"{hash}"}}}}"#), "key \"a\" twice"),
            (format!(r#"{{"format":"{FORMAT}","files":{{}}}}"#), "names 0 files"),
            (format!(r#"{{"format":"{FORMAT}","files":{{"a":"x"}}}}"#), "SHA-256 \"x\""),
            (format!(r#"{{"format":"{FORMAT}","files":{{"a":"{}"}}}}"#, "A".repeat(64)), "expected 64"),
            (format!(r#"{{"format":"{FORMAT}","files":{{"a":"{hash}"}},"x":1}}"#), "unknown field"),
            (format!(r#"{{"format":"{FORMAT}","files":[]}}"#), "files: invalid type"),
            (r#"{"files":{}}"#.into(), "has no format"),
            ("[".repeat(500_000), "recursion limit"),
            (
                format!(r#"{{"format":"{FORMAT}","occasion":{{"run":"a\n"}},"files":{{"a":"{hash}"}}}}"#),
                "names a run that is empty",
            ),
            (
                format!(r#"{{"format":"{FORMAT}","occasion":{{"round":-1}},"files":{{"a":"{hash}"}}}}"#),
                "occasion.round: invalid value",
            ),
        ] {
            let found = parse(text);
            assert!(found.contains(expected), "{expected}: {found}");
        }
        let many: BTreeMap<String, &str> = (0..=MAX_FILES).map(|n| (n.to_string(), hash.as_str())).collect();
        assert!(
            parse(serde_json::json!({"format": FORMAT, "files": many}).to_string()).contains("4097 files")
        );
        let dir = folder(&["a"]);
        sign(dir.path(), &SecretKey::generate().unwrap(), Occasion::default());
        std::fs::write(dir.path().join(MANIFEST), vec![b' '; MAX_MANIFEST as usize + 1]).unwrap();
        assert!(refused(dir.path()).contains("has more than 1048576 bytes"));
    }

    #[test]
    fn occasions() {
        let one = occasion("r", 1);
        assert!(one.meets(&Occasion::default()).is_ok() && one.meets(&one).is_ok());
        assert!(one.meets(&Occasion { run: None, round: Some(1) }).is_ok());
        let err = one.meets(&occasion("r", 2)).unwrap_err();
        assert_eq!(err, "is of run \"r\" round 1, expected run \"r\" round 2");
        assert!(Occasion::default().meets(&one).unwrap_err().contains("is of no run, expected"));
        for bad in ["", "a\u{7}", &"a".repeat(256)] {
            assert!(occasion(bad, 0).check().is_err());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Signed::parse(Path::new("d"), &text, &text);
            let _ = Manifest::parse(Path::new("m"), &text);
        }
    }
}
