//! A training run that is killed, interrupted and resumed ends with the bytes of one that was not.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anabranch::random::{Philox, Purpose};

const BIN: &str = env!("CARGO_BIN_EXE_anabranch");
const STEPS: &str = "40";

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
    let start = Instant::now();
    let (code, error) = finish(train(&whole, &[]).spawn().unwrap());
    assert_eq!(code, Some(0), "{error}");
    let usual = start.elapsed();
    let expected = adapter(&whole);
    let config = std::fs::read(whole.join("adapter_config.json")).unwrap();

    let numbers = Philox::new(9, Purpose::Test.stream(1));
    let (mut kills, mut draw, mut run) = (0, 0, 0);
    while kills < 50 {
        run += 1;
        let out = dir.path().join(format!("killed-{run}"));
        let mut first = true;
        while !out.exists() {
            let mut child = train(&out, if first { &[] } else { &["--resume"] }).spawn().unwrap();
            // From before the first step to about a fifth of the run: some kills fall into the writing of a checkpoint.
            let wait = usual.mul_f64(0.2 * numbers.uniform_f64(draw)) + Duration::from_millis(5);
            draw += 1;
            std::thread::sleep(wait);
            if child.try_wait().unwrap().is_none() && kills < 50 {
                child.kill().unwrap();
                kills += 1;
            }
            let (code, error) = finish(child);
            assert!(code.is_none() || code == Some(0), "exit {code:?}: {error}");
            first = first && !dir.path().join(format!("killed-{run}.partial")).exists();
        }
        assert_eq!(adapter(&out), expected, "run {run} after {kills} kills");
        assert_eq!(std::fs::read(out.join("adapter_config.json")).unwrap(), config);
        let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count().to_string(), STEPS);
        assert!(!out.join("checkpoint.safetensors").exists(), "checkpoints stay at home");
    }
}

#[test]
fn interrupted_saves_and_exits_130_and_threads_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let (code, error) = finish(train(&whole, &["--threads", "1"]).spawn().unwrap());
    assert_eq!(code, Some(0), "{error}");

    let out = dir.path().join("interrupted");
    let child = train(&out, &["--threads", "2"]).spawn().unwrap();
    let partial = dir.path().join("interrupted.partial");
    let metrics = partial.join("metrics.jsonl");
    let began = Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |m| m.len()) == 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "the first step never came");
        std::thread::sleep(Duration::from_millis(5));
    }
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
