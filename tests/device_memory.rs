//! The memory of a CUDA device: plans that a device of exactly their size runs, a byte less that is refused, and what a
//! step takes beside what `budget` says. On the emulated driver (feature `emulator`) or a real device, else skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// What the back end takes before a run's memory is counted: room for a batch's lists.
const BEFORE: u64 = 3 << 20;

fn asset(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(name).display().to_string()
}

fn anabranch(args: &[String], env: &[(&str, String)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.args(["--device", "cuda", "--json", "-q"]).args(args);
    command.envs(env.iter().map(|(k, v)| (*k, v)));
    command.output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(out: &Output, what: &[String]) -> Value {
    assert!(out.status.success(), "{what:?}: {}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("one JSON document")
}

/// Whether a CUDA device answers; prints why not.
fn device() -> bool {
    let out = anabranch(&["doctor".to_string()], &[]);
    let answers = out.status.success();
    if !answers {
        if cfg!(feature = "emulator") {
            panic!("the emulator does not answer: {}", text(&out.stderr));
        }
        eprintln!("skipped: {}", text(&out.stderr).trim());
    }
    answers
}

/// Bytes of all rows of a plan.
fn total(plan: &Value) -> u64 {
    let rows = plan["rows"].as_array().expect("rows");
    rows.iter().map(|row| row["bytes"].as_u64().expect("bytes")).sum()
}

/// A command with a model and data of the demo, whose output, if it has one, is in `dir`.
fn command(name: &str, dir: &Path) -> Vec<String> {
    let out = |name: &str| dir.join(name).display().to_string();
    let words: &[&str] = match name {
        "train" => &["--steps", "1", "--batch", "1", "--seq", "32", "--recompute", "1"],
        "prune" => &["--ratio", "0.4", "--samples", "2", "--sample-tokens", "24"],
        _ => &["--batch-tokens", "96"],
    };
    let mut args = vec![name.to_string(), "--model".to_string(), asset("base")];
    args.extend(words.iter().map(|w| w.to_string()));
    match name {
        "train" => {
            args.extend(["--data".into(), asset("harbour.train.jsonl"), "--out".into(), out("adapter")])
        }
        "prune" => {
            args.extend(["--calibration".into(), asset("calibration.jsonl"), "--out".into(), out("small")])
        }
        _ => {
            let few: PathBuf = dir.join("few.jsonl");
            let task = std::fs::read_to_string(asset("harbour_orchard.jsonl")).unwrap();
            std::fs::write(&few, task.lines().take(2).collect::<Vec<_>>().join("\n")).unwrap();
            args.extend(["--base".into(), "--task".into(), few.display().to_string()]);
        }
    }
    args
}

#[test]
fn a_plan_runs_in_exactly_its_bytes_and_not_in_one_less() {
    if !device() {
        return;
    }
    for name in ["train", "prune", "eval"] {
        let dir = tempfile::tempdir().unwrap();
        let args = command(name, dir.path());
        let with = |more: &[String]| [&args[..], more].concat();
        let limit = |bytes: u64| ["--memory-limit".to_string(), bytes.to_string()];
        let planned =
            |more: &[String]| anabranch(&with(&[&["--dry-run".to_string()][..], more].concat()), &[]);
        let mut bytes = total(&json(&planned(&[]), &args)["memory"]);
        // Pruning may compute layers again, so one byte less is a smaller plan, until there is none.
        loop {
            let less = planned(&limit(bytes - 1));
            if name != "prune" || !less.status.success() {
                break;
            }
            let smaller = total(&json(&less, &args)["memory"]);
            assert!(smaller < bytes, "{smaller} bytes planned within {}", bytes - 1);
            bytes = smaller;
        }
        let less = anabranch(&with(&limit(bytes - 1)), &[]);
        assert_eq!(less.status.code(), Some(1), "{name}: {}", text(&less.stdout));
        let refused = text(&less.stderr);
        assert!(refused.contains("the plan takes") && refused.contains("largest first"), "{name}: {refused}");
        // An emulated device has no more than that; a real one is held to the limit by the back end.
        let all = [("ANABRANCH_EMU_MEMORY", (bytes + BEFORE).to_string())];
        json(&anabranch(&with(&limit(bytes)), &all), &args);
        println!("{name} runs in {bytes} bytes");
    }
}

/// `budget --measure` of the demo's base.
fn measured(of: &str, env: &[(&str, String)]) -> Value {
    let words = ["budget", "--measure", "--of", of, "--batch", "2", "--seq", "32", "--model"];
    let args: Vec<String> = words.iter().map(|w| w.to_string()).chain([asset("base")]).collect();
    json(&anabranch(&args, env), &args)
}

#[test]
fn a_step_takes_what_budget_says() {
    if !device() {
        return;
    }
    for of in ["train", "prune", "eval"] {
        let report = measured(of, &[]);
        let m = &report["measured"];
        let peak = m["peak"].as_f64().expect("the driver says what is free");
        let planned = m["planned"].as_f64().unwrap();
        // A real driver hands out memory in pieces of 2 MiB, and loads kernels when they are first used.
        let grain = if cfg!(feature = "emulator") { 0.0 } else { f64::from(32 << 20) };
        let off = (peak - planned).abs();
        assert!(off <= 0.05 * planned + grain, "{of}: {peak} bytes taken, {planned} were planned");
        if of == "train" {
            // What `budget` prints for any edge, without the driver's own.
            let column = &report["budget"]["columns"][0];
            let driver: u64 = column["parts"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|p| p[0] == "driver")
                .map(|p| p[1].as_u64().unwrap())
                .sum();
            let edge = (column["total"].as_u64().unwrap() - driver) as f64;
            let own = peak - m["device"]["process_before"].as_f64().unwrap_or(0.0);
            assert!((own - edge).abs() <= 0.05 * edge + grain, "{own} bytes taken, budget says {edge}");
        }
    }
}

/// The management library counts a process's memory beside the driver; without it nothing is missing but its figures.
#[cfg(feature = "emulator")]
#[test]
fn the_management_library_is_asked_where_it_is() {
    let without = measured("eval", &[]);
    assert!(without["measured"]["device"]["process_peak"].is_null(), "{without:#}");
    let with = measured("eval", &[("ANABRANCH_EMU_NVML", "1".to_string())]);
    let device = &with["measured"]["device"];
    let (before, peak) =
        (device["process_before"].as_u64().unwrap(), device["process_peak"].as_u64().unwrap());
    assert_eq!(before, BEFORE, "{with:#}");
    let taken = device["free_before"].as_u64().unwrap() - device["free_after"].as_u64().unwrap();
    assert_eq!(peak - before, taken, "{with:#}");
    let words = ["budget", "--measure", "--of", "eval", "--batch", "2", "--seq", "32", "--model"];
    let out = Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .args(words)
        .arg(asset("base"))
        .args(["--device", "cuda"])
        .output()
        .unwrap();
    let told = text(&out.stdout);
    assert!(told.contains("free, by the driver") && told.contains("not told"), "{told}");
}
