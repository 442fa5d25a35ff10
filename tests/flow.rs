//! `run FLOW.toml`: what is in the folder afterwards, what a second run keeps, and what a changed option does again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use assert_cmd::Command;
use predicates::str::contains;
use serde_json::Value;

fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(name)
}

/// Two edges of the miniature, one so large that nothing need be pruned, and one task of 12 items.
fn write_flow(dir: &Path, steps: u32) -> PathBuf {
    let task = std::fs::read_to_string(asset("harbour_orchard.jsonl")).unwrap();
    let few: Vec<&str> = task.lines().take(12).collect();
    std::fs::write(dir.join("few.jsonl"), few.join("\n")).unwrap();
    let text = format!(
        r#"
base = {base:?}
output = "out"
ratios = [0.3]

[prune]
importance = "l1"

[train]
rank = 4
alpha = 8
seq = 64
steps = {steps}
lr = 1e-2
warmup = 0

[[edge]]
name = "harbour"
data = [{harbour:?}]
memory = "64GiB"

[[edge]]
name = "orchard"
data = [{orchard:?}]

[[fuse]]
pairs = true
method = "fedavg"
resolve = ["none", "lora-cr"]

[[task]]
name = "few"
file = "few.jsonl"
edges = ["harbour", "orchard"]
pruned = true
"#,
        base = asset("base"),
        harbour = asset("harbour.train.jsonl"),
        orchard = asset("orchard.train.jsonl"),
    );
    let path = dir.join("flow.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn run(flow: &Path) {
    Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .env("CUDA_VISIBLE_DEVICES", "")
        .args(["run", "-q"])
        .arg(flow)
        .assert()
        .success()
        .stdout(contains("few"))
        .stdout(contains("fedavg"));
}

/// When each stage's folder was finished.
fn stages(out: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let mut found = BTreeMap::new();
    let mut open = vec![out.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.file_name().unwrap() == "anabranch.json" {
                let stage = path.parent().unwrap().strip_prefix(out).unwrap().to_path_buf();
                found.insert(stage, path.metadata().unwrap().modified().unwrap());
            }
        }
    }
    found
}

#[test]
fn a_flow_keeps_what_did_not_change() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    run(&write_flow(dir.path(), 2));
    let first = stages(&out);
    let names: Vec<String> = first.keys().map(|p| p.display().to_string()).collect();
    for part in
        ["pruned/ratio-0.3", "harbour/adapter", "orchard/adapter", "orchard/recovered", "fedavg", "few"]
    {
        assert!(names.iter().any(|n| n.contains(part)), "{part} is not among {names:?}");
    }
    assert!(!names.iter().any(|n| n.contains("harbour/recovered")), "nothing to recover: {names:?}");
    assert!(!names.iter().any(|n| n.contains("memory")), "nothing to prune: {names:?}");

    let results: Value = serde_json::from_slice(&std::fs::read(out.join("results.json")).unwrap()).unwrap();
    let sweep = &results["sweeps"][0];
    assert_eq!(sweep["edges"][0]["prune"]["parameters_after"], 2_440_896);
    assert!(sweep["edges"][1]["prune"]["parameters_after"].as_u64().unwrap() < 2_440_896);
    let columns = sweep["tasks"][0]["columns"].as_array().unwrap();
    assert_eq!(columns.len(), 6, "base, pruned, two edges, two fusions: {columns:?}");
    assert_eq!(columns[1]["name"], "pruned, ratio-0.3");
    for c in columns {
        let accuracy = c["accuracy"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&accuracy) && (accuracy * 12.0).fract().abs() < 1e-9, "{c}");
    }
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("<svg") && !html.contains("https://"), "one file without a network");

    let again = write_flow(dir.path(), 2);
    run(&again);
    assert_eq!(stages(&out), first, "a finished flow does nothing again");

    run(&write_flow(dir.path(), 3));
    let third = stages(&out);
    for (stage, time) in &third {
        // What does not depend on the training.
        let kept = stage.starts_with("pruned") || stage.to_string_lossy().contains("of pruned");
        assert_eq!(first.get(stage) == Some(time), kept, "{}", stage.display());
    }
}

/// `[train] val` and `keep` hold for every edge, for both together too where it is given for all; and what the base's
/// config.json says is an input of every stage.
#[test]
fn a_flow_sees_all_that_its_results_follow_from() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("base")).unwrap();
    for entry in std::fs::read_dir(asset("base")).unwrap().map(|entry| entry.unwrap()) {
        std::fs::copy(entry.path(), at("base").join(entry.file_name())).unwrap();
    }
    let lines = std::fs::read_to_string(asset("harbour.train.jsonl")).unwrap();
    let few: Vec<&str> = lines.lines().take(3).collect();
    std::fs::write(at("val.jsonl"), few.join("\n")).unwrap();
    let task = std::fs::read_to_string(asset("harbour_orchard.jsonl")).unwrap();
    std::fs::write(at("few.jsonl"), task.lines().next().unwrap()).unwrap();
    let write = |val: [&str; 3]| {
        let given = |file: &str| if file.is_empty() { String::new() } else { format!("val = {file:?}") };
        let [all, harbour, orchard] = val.map(given);
        let text = format!(
            r#"
base = "base"
output = "out"
joint = true
[train]
rank = 2
seq = 64
steps = 2
keep = "best"
{all}
[[edge]]
name = "harbour"
data = [{harbour_data:?}]
memory = "64GiB"
{harbour}
[[edge]]
name = "orchard"
data = [{orchard_data:?}]
memory = "64GiB"
{orchard}
[[fuse]]
pairs = true
method = "fedavg"
[[task]]
name = "few"
file = "few.jsonl"
"#,
            harbour_data = asset("harbour.train.jsonl"),
            orchard_data = asset("orchard.train.jsonl"),
        );
        std::fs::write(at("flow.toml"), text).unwrap();
        at("flow.toml")
    };
    // Validation losses of each training's folder.
    let validated = || -> BTreeMap<PathBuf, usize> {
        let of = |stage: PathBuf| {
            let text = std::fs::read_to_string(at("out").join(&stage).join("metrics.jsonl")).ok()?;
            Some((stage, text.matches("val_loss").count()))
        };
        stages(&at("out")).into_keys().filter_map(of).collect()
    };
    run(&write(["val.jsonl", "", ""]));
    let counts: Vec<usize> = validated().into_values().collect();
    assert_eq!(counts.len(), 3, "two edges and both together: {:?}", validated());
    assert!(counts.iter().all(|n| *n > 0), "{:?}", validated());

    let first = stages(&at("out"));
    let config = std::fs::read_to_string(at("base/config.json")).unwrap();
    let mut changed: Value = serde_json::from_str(&config).unwrap();
    changed["rms_norm_eps"] = 1e-3.into();
    std::fs::write(at("base/config.json"), changed.to_string()).unwrap();
    run(&at("flow.toml"));
    let second = stages(&at("out"));
    assert!(first.iter().all(|(stage, time)| second.get(stage).is_some_and(|new| new != time)), "{second:?}");

    // Each edge's own: none for both together, which keep their last step.
    std::fs::remove_dir_all(at("out")).unwrap();
    run(&write(["", "val.jsonl", "val.jsonl"]));
    let counts: Vec<usize> = validated().into_values().filter(|n| *n > 0).collect();
    assert_eq!(counts.len(), 2, "{:?}", validated());
}
