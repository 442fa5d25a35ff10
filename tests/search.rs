//! `search`: it finds the fusion that a task was made of, writes it as `fuse` would, refuses what is not better, and
//! goes on after a kill as if there had been none.

#[path = "common/kill.rs"]
mod kill;
#[path = "common/small.rs"]
mod small;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anabranch::checkpoint::config::ModelConfig;
use anabranch::checkpoint::provenance::{Provenance, Verdict};
use serde_json::Value;

const BIN: &str = env!("CARGO_BIN_EXE_anabranch");

/// A folder with a base, two adapters `a` and `b` of different ranks, and tasks.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let config = ModelConfig::open(&small::model(place.0.path())).unwrap();
        small::adapter(&place.at("a"), &config, 3, 1, 1.2);
        small::adapter(&place.at("b"), &config, 2, 2, 1.2);
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BIN);
        command.env("CUDA_VISIBLE_DEVICES", "").current_dir(self.0.path()).args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// stdout of a run that ends well.
    fn good(&self, args: &[&str]) -> String {
        let done = self.run(args);
        let error = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(0), "{args:?}: {error}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// stdout of a run that ends with `code` and says all of `parts` on stderr.
    fn bad(&self, args: &[&str], code: i32, parts: &[&str]) -> String {
        let done = self.run(args);
        let error = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{args:?}: {error}");
        for part in parts {
            assert!(error.contains(part), "{args:?}: {part:?} is not in {error}");
        }
        assert!(!error.contains("panicked"), "{error}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// A task of `items` items whose right answers are those of the model with an adapter, or alone.
    fn task(&self, name: &str, items: usize, seed: u64, adapter: Option<&str>) {
        let path = self.at(&format!("{name}.jsonl"));
        small::task(&path, items, seed, |_| 0);
        let file = format!("{name}.jsonl");
        let mut args = vec!["eval", "--model", "base", "--task", &file, "--predictions", "said"];
        args.extend(adapter.iter().flat_map(|a| ["--adapter", *a]));
        self.good(&args);
        let text = std::fs::read_to_string(self.at("said")).unwrap();
        let said: Vec<usize> = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["predicted"].as_u64().unwrap() as usize)
            .collect();
        std::fs::remove_file(self.at("said")).unwrap();
        small::task(&path, items, seed, |item| said[item]);
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Every file of a folder.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap()))
        .collect()
}

fn search<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["search", "a", "b", "--model", "base"][..], more].concat()
}

#[test]
fn it_finds_the_fusion_that_made_the_answers() {
    let place = Place::new();
    place.good(&["fuse", "a", "b", "--method", "mean", "--weights", "0.3,0.7", "--out", "known"]);
    place.task("val", 60, 1, Some("known"));
    place.task("more", 15, 2, Some("known"));
    place.task("test", 40, 3, Some("known"));
    let args = search(&[
        "--task",
        "val.jsonl",
        "more.jsonl",
        "--test",
        "test.jsonl",
        "--methods",
        "fedex,task-arithmetic,mean",
        "--resolve",
        "none,lora-cr",
        "--weights",
        "grid",
        "--weights",
        "uniform",
        "--require-better-than",
        "base,best-edge",
        "--out",
        "best",
    ]);
    // 11 points of the grid, of which one is uniform where weights are normalised.
    let before = place.names();
    let plan = place.good(&[&args[..], &["--dry-run"]].concat());
    for part in ["score the base, 2 adapters and 68 candidates", "75 items", "40 others", "activations"] {
        assert!(plan.contains(part), "{part}: {plan}");
    }
    assert_eq!(place.names(), before);

    let text = place.good(&args);
    for part in ["best of 68: mean 0.3,0.7", "100.0", "simplest of them was taken", "optimistic", "held-out"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let best = place.at("best");
    assert!(Provenance::verify(&best).unwrap().values().all(|v| *v == Verdict::Same));
    let (found, fused) = (files(&best), files(&place.at("known")));
    for name in ["adapter_model.safetensors", "adapter_config.json", "certificate.json"] {
        assert_eq!(found[name], fused[name], "{name} is what fuse writes");
    }
    assert_eq!(
        found.keys().map(String::as_str).collect::<Vec<_>>(),
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "anabranch.json",
            "certificate.json",
            "search.json"
        ]
    );
    let provenance = Provenance::open(&best).unwrap().unwrap();
    assert_eq!(provenance.command, "search");
    let chosen = &provenance.other["search"];
    assert_eq!((&chosen["candidates"], &chosen["correct"]), (&68.into(), &75.into()));

    // Paired numbers are those of `eval`.
    let report: Value = serde_json::from_slice(&found["search.json"]).unwrap();
    let rows = report["table"]["rows"].as_array().unwrap();
    assert_eq!((rows.len(), rows[0]["name"].as_str()), (71, Some("base")));
    let own = &rows[report["best"].as_u64().unwrap() as usize];
    assert_eq!((own["name"].as_str(), own["to_best"].is_null()), (Some("mean 0.3,0.7"), true));
    let eval = ["eval", "--model", "base", "--base", "--task", "val.jsonl", "more.jsonl", "--json"];
    let eval = place.good(&[&eval[..], &["--adapter", "b", "--adapter", "best"]].concat());
    let eval: Value = serde_json::from_str(&eval).unwrap();
    assert_eq!(eval["overall"][2]["correct"], 75);
    for (pair, row) in [(0, &rows[2]), (1, own)] {
        for key in ["only_first", "only_second", "difference", "interval", "p"] {
            assert_eq!(eval["pairs"][pair][key], row["to_base"][key], "{key}");
        }
    }
    let test = report["test"]["rows"].as_array().unwrap();
    let names: Vec<_> = test.iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "a", "b", "mean 0.3,0.7"]);
    assert_eq!(test[3]["overall"]["correct"], 40);

    // Finished is finished; the number of threads is no matter.
    let again = place.good(&[&args[..], &["--resume"]].concat());
    assert!(again.contains("already finished") && again.contains("best of 68: mean 0.3,0.7"), "{again}");
    let one = [&args[..args.len() - 1], &["other", "--threads", "1", "--json"]].concat();
    let json: Value = serde_json::from_str(&place.good(&one)).unwrap();
    assert_eq!((&json["best"], &json["table"]), (&report["best"], &report["table"]));
    assert_eq!(files(&place.at("other")), found);
}

#[test]
fn what_is_not_better_is_not_written() {
    let place = Place::new();
    place.task("base-knows", 40, 1, None);
    place.task("a-knows", 40, 1, Some("a"));
    place.task("few", 3, 1, Some("a"));
    let before = place.names();
    let how = ["--methods", "mean,mean-svd", "--weights", "grid", "--out", "best"];
    let refused = |task: &str, rival: &str, parts: &[&str]| {
        let args = search(&["--task", task, "--require-better-than", rival]);
        let text = place.bad(&[&args[..], &how].concat(), 1, parts);
        assert!(text.contains("best of") && text.contains("not written"), "{text}");
        assert_eq!(place.names(), before, "nothing was written");
    };
    refused("base-knows.jsonl", "base", &["nothing was written", "not better than base (base, 100.0"]);
    // The corner of the grid is the adapter itself, and no better.
    refused("a-knows.jsonl", "base,best-edge", &["not better than best-edge (a, 100.0"]);
    refused("few.jsonl", "base", &["McNemar's exact p is", "above the 0.05 of --level"]);
    // The report says so too, on stdout alone.
    let args = search(&["--task", "base-knows.jsonl", "--require-better-than", "base", "--json"]);
    let json: Value = serde_json::from_str(&place.bad(&[&args[..], &how].concat(), 1, &[])).unwrap();
    assert_eq!((json["refused"].as_array().unwrap().len(), &json["certificate"]), (1, &Value::Null));

    // With as many right answers as can be asked for, and where nothing is asked for.
    place.good(&[&search(&["--task", "a-knows.jsonl", "--require-better-than", "base"])[..], &how].concat());
    let force = search(&["--task", "few.jsonl", "--require-better-than", "base", "--level", "1", "--force"]);
    place.good(&[&force[..], &how].concat());
    let old = files(&place.at("best"));
    // A refusal leaves what was there.
    let force = search(&["--task", "base-knows.jsonl", "--require-better-than", "base", "--force"]);
    place.bad(&[&force[..], &how].concat(), 1, &["nothing was written"]);
    assert_eq!(files(&place.at("best")), old);
    let text = place.good(&[&search(&["--task", "a-knows.jsonl", "--force"])[..], &how].concat());
    assert!(text.contains("mean 1,0"), "{text}");
}

#[test]
fn killed_and_resumed_it_has_the_same_bytes() {
    let place = Place::new();
    place.good(&["fuse", "a", "b", "--method", "mean", "--weights", "0.6,0.4", "--out", "known"]);
    place.task("val", 40, 1, Some("known"));
    place.task("test", 20, 2, Some("known"));
    let args = |out: &'static str| {
        search(&[
            "--task",
            "val.jsonl",
            "--test",
            "test.jsonl",
            "--weights",
            "grid",
            "--methods",
            "fedex,mean,tsv",
            "--resolve",
            "none,lora-cr",
            "--out",
            out,
        ])
    };
    place.good(&args("whole"));
    let expected = files(&place.at("whole"));
    let journal = place.at("killed.partial").join(".scores.jsonl");
    let (mut kills, mut went_on, mut starts) = (0, 0, 0);
    let began = Instant::now();
    while kills < 8 || went_on < 4 {
        assert!(began.elapsed() < Duration::from_secs(120), "{kills} kills, {went_on} of them with scores");
        if place.at("killed").exists() {
            std::fs::remove_dir_all(place.at("killed")).unwrap();
        }
        // One that is killed while it tidies up has left its marker, which the next start removes.
        while !place.at("killed").exists() || place.at("killed/.anabranch-partial").exists() {
            let there = ["killed", "killed.partial"].iter().any(|name| place.at(name).exists());
            let resume: &[&str] = if there { &["--resume"] } else { &[] };
            let scored = kill::lines(&journal);
            went_on += i32::from(scored > 0);
            starts += 1;
            let all = [&args("killed")[..], resume].concat();
            let child = place.command(&all).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            let until = scored + 1 + starts * 5 % 17;
            kills += i32::from(kill::at_lines(child, &journal, until, Duration::ZERO));
            if starts % 3 == 0 && journal.exists() {
                // Torn in the middle of a line.
                let text = std::fs::read(&journal).unwrap();
                std::fs::write(&journal, &text[..text.len().saturating_sub(9)]).unwrap();
            }
        }
        assert_eq!(files(&place.at("killed")), expected);
        assert!(!place.at("killed.partial").exists());
    }

    // An interruption says what is kept, and another command does not take it.
    let mut child =
        place.command(&args("stopped")).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    kill::wait(&mut child, &place.at("stopped.partial").join(".scores.jsonl"), 1);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let ended = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{error}");
    assert!(error.contains("scores so far are kept, --resume"), "{error}");
    let other = [&args("stopped")[..], &["--resume", "--level", "0.01"]].concat();
    place.bad(&other, 2, &["another command"]);
    place.good(&[&args("stopped")[..], &["--resume"]].concat());
    assert_eq!(files(&place.at("stopped")), expected);
}

#[test]
fn mistakes_are_told_before_any_work() {
    let place = Place::new();
    place.task("val", 3, 1, None);
    std::fs::write(place.at("empty.jsonl"), "").unwrap();
    let before = place.names();
    let refused = |more: &[&str], code: i32, parts: &[&str]| {
        let all = [&search(&["--out", "best"])[..], more].concat();
        let text = place.bad(&all, code, parts);
        assert_eq!((text.as_str(), place.names()), ("", before.clone()), "{more:?}");
    };
    let val = ["--task", "val.jsonl", "--methods"];
    let with = |more: &[&'static str]| [&val[..], more].concat();
    refused(&with(&["ties"]), 2, &["ties", "full rank", "--rank"]);
    refused(&with(&["regmean"]), 2, &["regmean", "--grams"]);
    refused(&with(&["mean", "--grams", "g"]), 2, &["--grams goes with", "regmean"]);
    refused(&with(&["fedsa,mean"]), 2, &["--fedsa", "client:J"]);
    refused(&with(&["mean,tsv", "--density", "0.5"]), 2, &["--density goes with", "knots-ties"]);
    refused(&with(&["mean,mean"]), 2, &["--methods names mean twice"]);
    refused(&with(&["mean", "--resolve", "none,none"]), 2, &["--resolve names none twice"]);
    refused(&with(&["mean", "--resolve", "magic"]), 2, &["magic", "lora-cr"]);
    refused(&with(&["fedavg"]), 2, &["ranks [3, 2]", "mean"]);
    refused(&with(&["mean", "--weights", "1,2,3"]), 2, &["3 numbers for 2 adapters"]);
    refused(&with(&["mean", "--weights", "gird"]), 2, &["gird", "grid"]);
    refused(
        &with(&["mean", "--weights", "grid", "--max-candidates", "10"]),
        2,
        &["11 candidates", "the 10 of"],
    );
    refused(&with(&["mean", "--level", "0"]), 2, &["--level is 0"]);
    refused(&with(&["mean", "--level", "nan"]), 2, &["--level is NaN"]);
    refused(&with(&["mean", "--require-better-than", "luck"]), 2, &["luck", "best-edge"]);
    refused(&with(&["mean", "--batch-tokens", "0"]), 2, &["--batch-tokens is 0"]);
    refused(&with(&["mean", "--test", "nowhere.jsonl"]), 1, &["nowhere.jsonl"]);
    refused(&["--task", "empty.jsonl", "--methods", "mean"], 1, &["empty.jsonl", "no items"]);
    refused(&with(&["mean", "--memory-limit", "1KiB"]), 1, &["the limit is 1.0 KiB"]);
    let alone = ["search", "a", "nowhere", "--model", "base", "--task", "val.jsonl", "--methods", "mean"];
    place.bad(&[&alone[..], &["--out", "best"]].concat(), 1, &["nowhere"]);
    assert_eq!(place.names(), before);
}
