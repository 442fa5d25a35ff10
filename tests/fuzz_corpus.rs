//! Replays the corpus of the fuzz targets, and every file of it cut short and with bytes changed.

#[path = "fuzz/parse.rs"]
mod parse;

use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut seen = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let data = std::fs::read(entry.unwrap().path()).unwrap();
        run(&data);
        seen += 1;
        let step = (data.len() / 60).max(1);
        for at in (0..data.len()).step_by(step) {
            run(&data[..at]);
            for value in [0, b'"', b'9', b'}', 0xff] {
                let mut changed = data.clone();
                changed[at] = value;
                run(&changed);
            }
        }
    }
    assert!(seen > 0, "{} is empty", dir.display());
}

#[test]
fn checkpoints() {
    replay("checkpoint", parse::checkpoint);
}

#[test]
fn adapters() {
    replay("adapter", parse::adapter);
}

#[test]
fn pruning_plans() {
    replay("pruning", parse::pruning);
}

#[test]
fn json_lines() {
    replay("jsonl", parse::jsonl);
}
