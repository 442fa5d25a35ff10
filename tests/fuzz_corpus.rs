//! Replays the corpus of the fuzz targets: every file as it is, cut short, with bytes changed, and with changes by seed
//! that know the structure of JSON, of lines and of safetensors headers. Errors are fine; panics, and inputs that take
//! ten seconds, are not.
//!
//! `ANABRANCH_FUZZ=N cargo test --test fuzz_corpus` makes N changes by seed of every file, 40 without it; more of them
//! find more. An input that fails is stored in `target/tmp/fuzz/<target>-<hash>`: it belongs into the corpus.

#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/parse.rs"]
mod parse;

use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use anabranch::checkpoint::digest::sha256;

/// Cuts of each file, and places where its bytes are changed.
const PLACES: usize = 24;
const SLOW: Duration = Duration::from_secs(10);

/// Runs inputs of one target and keeps those that fail.
struct Replay {
    name: &'static str,
    run: fn(&[u8]),
    failed: Vec<String>,
}

impl Replay {
    fn one(&mut self, data: &[u8]) {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
        let now = dir.join(format!("{}-now", self.name));
        std::fs::create_dir_all(&dir).expect("the target folder can be written");
        // Where the process is ended, by its stack or its memory, this is what ended it.
        std::fs::write(&now, data).expect("the target folder can be written");
        let (start, run) = (Instant::now(), self.run);
        let why = match catch_unwind(|| run(data)) {
            Err(_) => "panics",
            Ok(()) if start.elapsed() > SLOW => "is slow",
            Ok(()) => return,
        };
        let kept = dir.join(format!("{}-{}", self.name, &sha256(data)[..12]));
        std::fs::rename(&now, &kept).expect("the target folder can be written");
        self.failed.push(format!("{} {why}", kept.display()));
    }
}

fn replay(name: &'static str) {
    let (_, run) = parse::ALL.into_iter().find(|(n, _)| *n == name).expect("a target");
    let changes: u64 = std::env::var("ANABRANCH_FUZZ").map_or(40, |n| n.parse().expect("a number"));
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(&dir).expect("a corpus").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    let inputs: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).expect("a file")).collect();
    assert!(!inputs.is_empty(), "{} is empty", dir.display());
    let mut replay = Replay { name, run, failed: Vec::new() };
    for (n, data) in inputs.iter().enumerate() {
        replay.one(data);
        for at in (0..data.len()).step_by(data.len().div_ceil(PLACES).max(1)) {
            replay.one(&data[..at]);
            for value in [b'"', b'9', 0xff] {
                let mut changed = data.clone();
                changed[at] = value;
                replay.one(&changed);
            }
        }
        for change in 0..changes {
            let other = &inputs[(n + change as usize) % inputs.len()];
            replay.one(&mutate::mutate(data, other, change * 1000 + n as u64));
        }
    }
    assert!(replay.failed.is_empty(), "{} inputs:\n{}", replay.failed.len(), replay.failed.join("\n"));
}

#[test]
fn adapters() {
    replay("adapter");
}

#[test]
fn chat_templates() {
    replay("chat_template");
}

#[test]
fn checkpoints() {
    replay("checkpoint");
}

#[test]
fn configs() {
    replay("config");
}

#[test]
fn crossed_questions() {
    replay("cross");
}

#[test]
fn flows() {
    replay("flow");
}

#[test]
fn json_lines() {
    replay("jsonl");
}

#[test]
fn pruning_plans() {
    replay("pruning");
}

#[test]
fn reports() {
    replay("report");
}

#[test]
fn signatures() {
    replay("signature");
}

#[test]
fn tokenizers() {
    replay("tokenizer");
}

#[test]
fn weights() {
    replay("weights");
}
