//! A training run that is killed, interrupted and resumed ends with the bytes of one that was not.

#[path = "common/kill.rs"]
mod kill;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const BIN: &str = env!("CARGO_BIN_EXE_anabranch");
const STEPS: &str = "12";

fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(name)
}

/// `train` on the built-in miniature, a checkpoint every step.
fn train(out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(BIN);
    command.env("CUDA_VISIBLE_DEVICES", "");
    command
        .args(["train", "--quiet", "--json", "--steps", STEPS, "--batch", "2", "--seq", "96", "--lr", "1e-3"])
        .args([
            "--lora-dropout",
            "0.1",
            "--rank",
            "4",
            "--grad-accum",
            "2",
            "--checkpoint-every",
            "1",
            "--model",
        ])
        .arg(asset("base"))
        .arg("--data")
        .arg(asset("harbour.train.jsonl"))
        .arg("--out")
        .arg(out)
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn adapter(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("adapter_model.safetensors")).expect("the adapter is there")
}

fn finish(child: Child) -> (Option<i32>, String) {
    let done = child.wait_with_output().expect("the process ends");
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
}

#[test]
fn killed_fifty_times_is_not_killed() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let (code, error) = finish(train(&whole, &[]).spawn().unwrap());
    assert_eq!(code, Some(0), "{error}");
    let expected = adapter(&whole);
    let config = std::fs::read(whole.join("adapter_config.json")).unwrap();

    let (mut kills, mut went_on, mut starts, mut run) = (0, 0, 0usize, 0);
    while kills < 50 {
        run += 1;
        let out = dir.path().join(format!("killed-{run}"));
        let partial = dir.path().join(format!("killed-{run}.partial"));
        let metrics = partial.join("metrics.jsonl");
        while !out.exists() {
            let resume: &[&str] = if partial.exists() { &["--resume"] } else { &[] };
            went_on += i32::from(partial.join("checkpoint.safetensors").exists());
            let threads = (1 + starts / 3 % 3).to_string();
            let child = train(&out, &[&["--threads", &threads][..], resume].concat()).spawn().unwrap();
            // Steps of this start, then up to an eighth of a second: some kills fall into the start, some into the
            // writing of a checkpoint, which comes after the step's line, some into the next step and the end.
            let (until, after) =
                (kill::lines(&metrics) + starts % 3, Duration::from_millis(1 << (starts % 8)));
            kills += i32::from(kill::at_lines(child, &metrics, until, after));
            starts += 1;
        }
        assert_eq!(adapter(&out), expected, "run {run} after {kills} kills");
        assert_eq!(std::fs::read(out.join("adapter_config.json")).unwrap(), config);
        let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count().to_string(), STEPS);
        assert!(!out.join("checkpoint.safetensors").exists(), "checkpoints stay at home");
    }
    assert!(went_on >= 20, "{went_on} of {starts} starts went on from a checkpoint");
}

#[test]
fn interrupted_saves_and_exits_130_and_threads_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let (code, error) = finish(train(&whole, &["--threads", "1"]).spawn().unwrap());
    assert_eq!(code, Some(0), "{error}");

    let out = dir.path().join("interrupted");
    let mut child = train(&out, &["--threads", "2"]).spawn().unwrap();
    let partial = dir.path().join("interrupted.partial");
    kill::wait(&mut child, &partial.join("metrics.jsonl"), 1);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let (code, error) = finish(child);
    assert_eq!(code, Some(130), "{error}");
    assert!(error.contains("--resume"), "{error}");
    assert!(!out.exists() && partial.exists());

    // Without --resume the leftover is an error that names both ways on.
    let (code, error) = finish(train(&out, &[]).spawn().unwrap());
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("--resume") && error.contains("--force"), "{error}");
    // Another command's leftover is refused.
    let (code, error) = finish(train(&out, &["--resume", "--seed", "5"]).spawn().unwrap());
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("another command"), "{error}");

    let (code, error) = finish(train(&out, &["--resume", "--threads", "3"]).spawn().unwrap());
    assert_eq!(code, Some(0), "{error}");
    assert_eq!(adapter(&out), adapter(&whole));
    // Finished is finished.
    let (code, _) = finish(train(&out, &["--resume"]).spawn().unwrap());
    assert_eq!(code, Some(0));
}
