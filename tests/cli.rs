//! The commands as people type them: what is printed, the exit code, and what a mistake says.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn asset(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(name).display().to_string()
}

fn anabranch(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    // Numbers of the CPU are expected, on a machine with a GPU too.
    command.env("CUDA_VISIBLE_DEVICES", "").args(args);
    command
}

/// Fails with `code`, one line on stderr that contains all of `parts`, and nothing on stdout.
fn refused(args: &[&str], code: i32, parts: &[&str]) {
    let mut assert = anabranch(args).assert().code(code).stdout("");
    for part in parts {
        assert = assert.stderr(contains(*part));
    }
    assert.stderr(contains("panicked").not()).stderr(predicate::str::starts_with("anabranch: "));
}

/// `--dry-run` prints all of `parts` and leaves `dir` as it was.
fn planned(dir: &Path, args: &[&str], parts: &[&str]) {
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let mut assert = anabranch(args).arg("--dry-run").assert().success();
    for part in parts {
        assert = assert.stdout(contains(*part));
    }
    assert_eq!(names(), before, "{args:?}");
}

fn config_8b(dir: &Path) -> PathBuf {
    let path = dir.join("config.json");
    let text = r#"{"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": false}"#;
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn weights_are_packed_where_they_fit() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (asset("base"), dir.path().join("out").display().to_string());
    let data = asset("harbour.train.jsonl");
    for command in [
        vec!["train", "--model", &base, "--data", &data, "--out", &out, "--steps", "1", "--seq", "64"],
        vec!["grams", "--model", &base, "--data", &data, "--out", &out],
    ] {
        // Bytes of the plan, and the names of what is packed.
        let plan = |more: &[&str]| -> (u64, Vec<String>) {
            let args =
                [&command[..], &["--device", "cpu", "--precision", "f32", "--dry-run", "--json"], more]
                    .concat();
            let done = anabranch(&args).assert().success().get_output().stdout.clone();
            let outline: serde_json::Value = serde_json::from_slice(&done).unwrap();
            let rows = outline["memory"]["rows"].as_array().unwrap();
            let name = |row: &serde_json::Value| row["name"].as_str().unwrap().to_string();
            let packed = rows.iter().map(name).filter(|name| name.contains("packed")).collect();
            (rows.iter().map(|row| row["bytes"].as_u64().unwrap()).sum(), packed)
        };
        let (off, none) = plan(&["--pack-weights", "off"]);
        let (on, all) = plan(&["--pack-weights", "on"]);
        let passes = if command[0] == "train" { 2 } else { 1 };
        assert_eq!((none.len(), all.len()), (0, passes));
        // An eighth stays free.
        for (limit, count) in [(off, 0), (on * 8 / 7 + 8, passes)] {
            let (bytes, packed) = plan(&["--memory-limit", &limit.to_string()]);
            assert_eq!(packed, all[..count], "{bytes} of {limit}");
        }
        let limit = on.to_string();
        assert_eq!(plan(&["--memory-limit", &limit, "--pack-weights", "on"]).0, on);
        let limit = (on - 1).to_string();
        let tight = ["--device", "cpu", "--memory-limit", &limit, "--pack-weights", "on"];
        let said = ["--pack-weights on: the plan takes ", "use auto, or give it more memory"];
        refused(&[&command[..], &tight].concat(), 1, &said);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was written");
}

#[test]
fn budget_of_llama_3_8b_needs_no_weights() {
    let dir = tempfile::tempdir().unwrap();
    let config = config_8b(dir.path()).display().to_string();
    let mut args = vec!["budget", "--config", &config];
    for ratio in ["0.2", "0.4", "0.6", "0.8"] {
        args.extend(["--ratio", ratio]);
    }
    let mut assert = anabranch(&args).assert().success();
    for n in ["8,030,261,248", "6,734,745,600", "5,271,851,008", "3,976,728,576", "2,513,833,984"] {
        assert = assert.stdout(contains(n));
    }
    let json = anabranch(&[&args[..], &["--json"]].concat()).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&json.get_output().stdout).unwrap();
    assert_eq!(report["columns"][3]["parameters"], 3_976_728_576u64);
}

#[test]
fn mistakes_in_options_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let (base, data) = (asset("base"), asset("harbour.train.jsonl"));
    let calibration = asset("calibration.jsonl");
    for (ratio, part) in
        [("0", "ratio"), ("1", "ratio"), ("NaN", "ratio"), ("-0.5", "ratio"), ("0.999", "layer")]
    {
        let ratio = format!("--ratio={ratio}");
        refused(
            &["prune", "--model", &base, &ratio, "--calibration", &calibration, "--out", &out],
            2,
            &[part],
        );
    }
    let train = ["train", "--model", &base, "--data", &data, "--out", &out, "--steps", "1", "--seq", "64"];
    let with = |more: &[&str], code: i32, parts: &[&str]| refused(&[&train[..], more].concat(), code, parts);
    with(&["--rank", "0"], 2, &["--rank 0"]);
    with(&["--rank", "100000"], 2, &["--rank 100000", "larger"]);
    with(&["--lr", "nan"], 2, &["--lr"]);
    with(&["--lora-dropout", "1"], 2, &["--lora-dropout"]);
    with(&["--keep", "best"], 2, &["--val"]);
    with(&["--threads", "0"], 2, &["--threads"]);
    with(&["--device", "cuda:60000"], 1, &["cuda"]);
    with(&["--device", "cuda", "--precision", "f32"], 2, &["bf16", "--device cpu"]);
    with(&["--device", "cuda", "--pack-weights", "on"], 2, &["--pack-weights on", "--device cpu"]);
    let generate = ["generate", "--model", &base, "--prompt", "a", "--pack-weights", "on"];
    refused(&generate, 2, &["--pack-weights on", "this command does not"]);
    with(&["--grad-accum", "18446744073709551615"], 2, &["--grad-accum", "too many tokens"]);
    anabranch(
        &[&train[..5], &["--out", &out, "--seq", "64", "--steps", "1000000000000", "--dry-run"]].concat(),
    )
    .assert()
    .success();
    with(&["--device", "tpu"], 2, &["tpu", "expected auto, cpu, cuda"]);
    with(&["--memory-limit", "1MiB"], 1, &["the plan takes", "the limit is 1.0 MiB", "activations"]);
    refused(
        &["train", "--model", &base, "--data", &data, "--out", &out, "--seq", "100000"],
        1,
        &["config.json", "positions", "100000"],
    );
    assert!(!Path::new(&out).exists(), "nothing was written");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was left");
}

#[test]
fn a_dry_run_of_every_command_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (base, data, task) = (asset("base"), asset("harbour.train.jsonl"), asset("harbour.jsonl"));
    let plan = |args: &[&str], parts: &[&str]| planned(dir.path(), args, parts);
    let (small, edge, full) = (at("small"), at("edge"), at("full"));
    let prune = ["prune", "--model", &base, "--ratio", "0.3", "--importance", "l1", "--out", &small];
    plan(&prune, &["reads", "assets/demo/base", "writes", "small (new)", "total"]);
    anabranch(&prune).assert().success();
    let train = ["train", "--model", &small, "--data", &data, "--steps", "1", "--seq", "64"];
    let train = [&train[..], &["--out", &edge]].concat();
    plan(&train, &["harbour.train.jsonl", "edge (new)", "optimizer"]);
    anabranch(&train).assert().success();
    planned(dir.path(), &[&train[..], &["--force"]].concat(), &["replaces what is there"]);
    refused(&[&train[..], &["--dry-run"]].concat(), 2, &["exists", "--force"]);
    let recover = ["recover", "--adapter", &edge, "--model", &base, "--out", &full];
    plan(&recover, &["full (new)"]);
    anabranch(&recover).assert().success();
    plan(&["fuse", &full, &full, "--method", "fedavg", "--out", &at("fused")], &["28 modules", "rank 8"]);
    plan(&["conflict", &full, &full], &["reads"]);
    let grams = ["grams", "--model", &small, "--adapter", &edge, "--data", &data, "--seq", "64"];
    let parts = ["grams (new)", "of Grams over", "tokens", "activations"];
    plan(&[&grams[..], &["--tokens", "200", "--out", &at("grams")]].concat(), &parts);
    let eval = ["eval", "--model", &base, "--adapter", &full, "--task", &task, "--predictions", &at("p")];
    plan(&eval, &["p (new)", "harbour.jsonl", "activations"]);
    // Predictions of an earlier run may be replaced, and a dry run knows them.
    let old = r#"{"task": "t", "adapter": null, "id": "1", "gold": 0, "predicted": 0, "logprobs": [0.0]}"#;
    std::fs::write(at("p"), old).unwrap();
    plan(&[&eval[..], &["--force"]].concat(), &["p (replaces what is there)"]);
    plan(&["eval", "--model", &base, "--text", &asset("calibration.jsonl")], &["logits"]);
    plan(&["generate", "--model", &base, "--prompt", "a"], &["activations"]);
    plan(&["logits", "--model", &base, "--ids", "1,2", "--out", &at("l")], &["l (new)"]);
    plan(&["run", &asset("flow.toml")], &["prune to ratio", "harbour + orchard", "evaluate on"]);
    for args in [&["inspect", base.as_str()][..], &["demo"], &["doctor"]] {
        refused(&[args, &["--dry-run"]].concat(), 2, &["--dry-run goes with"]);
    }
    // A finished evaluation is shown again.
    let few = at("one.jsonl");
    std::fs::write(&few, std::fs::read_to_string(&task).unwrap().lines().next().unwrap()).unwrap();
    let (eval, result) =
        (["eval", "--model", &base, "--task", &few, "--out", &at("result")], contains("one"));
    anabranch(&eval).assert().success().stdout(result.clone());
    let again = anabranch(&eval).arg("--resume").assert().success();
    again.stdout(result).stdout(contains("already finished"));
    // The cap holds for what writes no model too, and for its plan.
    let ids = ["logits", "--model", &base, "--ids", "1,2", "--out", &at("logits")];
    let capped: [(&[&str], &str); 3] = [
        (&["generate", "--model", &base, "--prompt", "a"], "cached keys"),
        (&["eval", "--model", &base, "--task", &few], "activations"),
        (&ids, "logits"),
    ];
    for (args, part) in capped {
        let limited = [args, &["--memory-limit", "1KiB"]].concat();
        refused(&limited, 1, &["the limit is 1.0 KiB", part]);
        refused(&[&limited[..], &["--dry-run"]].concat(), 1, &["the limit is 1.0 KiB", part]);
    }
}

/// Numbers do not depend on how a model's file keeps them: the first matrix in F32, the others as they are; and all of them
/// a byte further on, which is no place for a bf16.
#[test]
fn a_model_may_have_several_dtypes_and_lie_anywhere() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let copy = |name: &str| {
        std::fs::create_dir(at(name)).unwrap();
        for entry in std::fs::read_dir(asset("base")).unwrap().map(|entry| entry.unwrap()) {
            std::fs::copy(entry.path(), dir.path().join(name).join(entry.file_name())).unwrap();
        }
        dir.path().join(name).join("model.safetensors")
    };
    let path = copy("mixed");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let q = file.tensor(Q).unwrap();
    assert_eq!(q.dtype(), Dtype::BF16);
    let wide: Vec<u8> = q.data().chunks(2).flat_map(|x| [0, 0, x[0], x[1]]).collect();
    let wide = TensorView::new(Dtype::F32, q.shape().to_vec(), &wide).unwrap();
    let mixed =
        file.tensors().into_iter().map(|(name, t)| if name == Q { (name, wide.clone()) } else { (name, t) });
    safetensors::serialize_to_file(mixed, None, &path).unwrap();
    let matrices: usize =
        file.tensors().iter().filter(|(_, t)| t.shape().len() == 2).map(|(_, t)| t.data().len()).sum();

    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let after = 8 + header as usize;
    let shifted = [&(header + 1).to_le_bytes()[..], &bytes[8..after], b" ", &bytes[after..]].concat();
    std::fs::write(copy("shifted"), shifted).unwrap();
    let plan =
        ["logits", "--ids", "1", "--out", &at("x"), "--device", "cpu", "--dry-run", "--json", "--model"];
    let rows = |model: &str| {
        let out = anabranch(&[&plan[..], &[model]].concat()).assert().success().get_output().stdout.clone();
        let plan: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let rows = plan["memory"]["rows"].as_array().unwrap().clone();
        rows.iter().find(|row| row["name"] == "copies of unaligned weights").map(|row| row["bytes"].clone())
    };
    assert_eq!(rows(&asset("base")), None);
    assert_eq!(rows(&at("shifted")), Some(serde_json::json!(matrices)));

    let task = at("task.jsonl");
    let tasks = std::fs::read_to_string(asset("harbour.jsonl")).unwrap();
    std::fs::write(&task, tasks.lines().next().unwrap()).unwrap();
    for precision in ["f32", "bf16"] {
        let run = |model: &str| {
            let of = |args: &[&str]| {
                let all = [args, &["--model", model, "--device", "cpu", "--precision", precision]].concat();
                anabranch(&all).assert().success().get_output().stdout.clone()
            };
            of(&["logits", "--ids", "1,2,3,4,5", "--out", &at("logits"), "--force"]);
            let scored = of(&["eval", "--task", &task, "--json"]);
            let written = of(&["generate", "--prompt", "the harbour", "--max-tokens", "4"]);
            let train = ["train", "--data", &asset("harbour.train.jsonl"), "--steps", "2", "--seq", "64"];
            of(&[&train[..], &["--out", &at("adapter"), "--force"]].concat());
            let file = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
            (file("logits"), scored, written, file("adapter/adapter_model.safetensors"))
        };
        let want = run(&asset("base"));
        for model in ["mixed", "shifted"] {
            assert!(run(&at(model)) == want, "{model}, {precision}");
        }
    }
}

#[test]
fn training_goes_on_from_adapters_of_the_same_model_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for seed in ["1", "2"] {
        let prune = ["prune", "--model", &asset("base"), "--importance", "random", "--ratio", "0.5"];
        anabranch(&[&prune[..], &["--out", &at(seed), "--seed", seed]].concat()).assert().success();
    }
    let data = asset("harbour.train.jsonl");
    let (first, second) = (at("1"), at("2"));
    let train = |model: &str, out: &str, more: &[&str]| {
        let how = ["--steps", "1", "--seq", "64", "--freeze-a", "--device", "cpu"];
        [&["train", "--model", model, "--data", &data, "--out", out][..], &how, more]
            .concat()
            .into_iter()
            .map(String::from)
            .collect::<Vec<_>>()
    };
    let run = |args: Vec<String>| anabranch(&args.iter().map(String::as_str).collect::<Vec<_>>()).assert();
    run(train(&first, &at("a"), &["--init-seed", "7"])).success();
    // The same shapes, other heads and channels: refused before anything is done.
    for more in [&[][..], &["--dry-run"]] {
        let args = train(&second, &at("b"), &[&["--init-adapter", &at("a")][..], more].concat());
        run(args).code(1).stdout("").stderr(contains("is of the model with fingerprint"));
    }
    run(train(&first, &at("b"), &["--init-adapter", &at("nowhere"), "--dry-run"]))
        .code(1)
        .stderr(contains("nowhere"));
    // A is the given adapter's, and so is the seed that it is known by.
    run(train(&first, &at("b"), &["--init-adapter", &at("a"), "--init-seed", "8"])).success();
    let known = std::fs::read_to_string(dir.path().join("b/anabranch.json")).unwrap();
    let known: serde_json::Value = serde_json::from_str(&known).unwrap();
    assert_eq!(known["init_seed"], 7);
}

#[test]
fn mistakes_in_files_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (base, out) = (asset("base"), at("out"));
    let train = |model: &str, data: &str, code: i32, parts: &[&str]| {
        refused(&["train", "--model", model, "--data", data, "--out", &out, "--steps", "1"], code, parts);
        assert!(!Path::new(&out).exists());
    };
    let data = asset("harbour.train.jsonl");
    train(&at("nowhere"), &data, 1, &["nowhere"]);
    train(&data, &data, 1, &["harbour.train.jsonl"]);
    train(&base, &at("nothing.jsonl"), 1, &["nothing.jsonl"]);
    std::fs::write(at("bad.jsonl"), "{\"text\": \"fine\"}\nno json\n").unwrap();
    train(&base, &at("bad.jsonl"), 1, &["bad.jsonl", "2"]);
    std::fs::write(at("empty.jsonl"), "").unwrap();
    train(&base, &at("empty.jsonl"), 1, &["empty.jsonl"]);

    // A truncated checkpoint names the file.
    let broken = dir.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    for file in std::fs::read_dir(&base).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, broken.join(file.file_name().unwrap())).unwrap();
    }
    let weights = broken.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    train(&broken.display().to_string(), &data, 1, &["model.safetensors"]);
    std::fs::write(&weights, &bytes).unwrap();
    let config = std::fs::read_to_string(broken.join("config.json")).unwrap();
    std::fs::write(broken.join("config.json"), config.replace("\"llama\"", "\"gpt2\"")).unwrap();
    train(&broken.display().to_string(), &data, 1, &["config.json", "gpt2", "llama"]);

    // An output that is not ours is never touched.
    std::fs::create_dir(&out).unwrap();
    std::fs::write(Path::new(&out).join("thesis.txt"), "years of work").unwrap();
    refused(
        &["train", "--model", &base, "--data", &data, "--out", &out, "--steps", "1", "--force"],
        2,
        &["out", "another name"],
    );
    assert!(Path::new(&out).join("thesis.txt").exists());
    anabranch(&["train", "--model", &base, "--data", &data, "--out", ".", "--steps", "1"])
        .current_dir(dir.path())
        .assert()
        .code(2);
}

#[test]
fn instructions_are_those_that_are_asked_for_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let (base, data) = (asset("base"), asset("harbour.train.jsonl"));
    let train = ["train", "--model", &base, "--data", &data, "--out", &out, "--steps", "1"];
    anabranch(&train).env("ANABRANCH_INSTRUCTIONS", "sse9").assert().code(2).stderr(
        contains("ANABRANCH_INSTRUCTIONS=sse9").and(contains("expected one of")).and(contains("baseline")),
    );
    assert!(!Path::new(&out).exists());
    let doctor = || anabranch(&["doctor"]);
    doctor().env("ANABRANCH_INSTRUCTIONS", "baseline").assert().success().stdout(contains("baseline in use"));
}

#[test]
fn a_flow_with_an_unknown_key_names_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let flow = dir.path().join("flow.toml");
    let text = std::fs::read_to_string(asset("flow.toml")).unwrap();
    for (old, new, parts) in [
        ("steps =", "stepps =", ["train.stepps", "steps"]),
        ("[prune]", "[prone]", ["prone", "prune"]),
        ("pairs = true", "pears = true", ["fuse.pears", "pairs"]),
        ("\"fedavg\"", "\"fedavgg\"", ["fedavgg", "fedavg"]),
    ] {
        assert!(text.contains(old), "{old}");
        std::fs::write(&flow, text.replacen(old, new, 1)).unwrap();
        refused(&["run", &flow.display().to_string()], 1, &parts);
    }
    std::fs::write(&flow, "base = \"x\"\noutput = \"y\"\n").unwrap();
    refused(&["run", &flow.display().to_string()], 1, &["edge"]);
}

#[test]
fn a_flow_with_absurd_values_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let flow = dir.path().join("flow.toml");
    let text = format!(
        "base = {:?}\noutput = \"out\"\n[[edge]]\nname = \"a\"\ndata = [\"d\"]\nratio = 0.5\n[[fuse]]\nmethod = \"mean\"\n\
         [[task]]\nname = \"t\"\nfile = \"f\"\n",
        asset("base")
    );
    let many = format!("method = {:?}\nside = {:?}", vec!["mean"; 1000], vec!["left"; 1000]);
    for (old, new, part) in [
        ("ratio = 0.5", "ratio = nan", "edge.ratio is nan"),
        ("ratio = 0.5", "ratio = 1.0", "edge.ratio is 1.0"),
        ("method = \"mean\"", "method = \"mean\"\nedges = []", "[[fuse]] of no edges"),
        ("method = \"mean\"", &many, "makes 1000000 fusions, expected at most 1000"),
        ("method = \"mean\"", "method = \"dare\"", "which gives a result of full rank"),
        ("method = \"mean\"", "method = [\"mean\", \"regmean\"]", "which needs --grams"),
        ("name = \"t\"", "name = \"../t\"", "task.name is \"../t\""),
    ] {
        assert!(text.contains(old), "{old}");
        std::fs::write(&flow, text.replacen(old, new, 1)).unwrap();
        refused(&["run", &flow.display().to_string()], 1, &["flow.toml", part]);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was left");
}

#[test]
fn files_without_an_end_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (asset("base"), dir.path().join("out").display().to_string());
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    for file in ["/dev/zero".to_string(), pipe.display().to_string()] {
        let parts = [&file, "is no regular file"];
        refused(&["train", "--model", &base, "--data", &file, "--out", &out], 1, &parts);
        refused(&["eval", "--model", &base, "--task", &file], 1, &parts);
        refused(&["budget", "--config", &file], 1, &parts);
        refused(&["run", &file], 1, &parts);
    }
}

#[test]
fn a_weight_that_is_no_number_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (base, broken, out) = (PathBuf::from(asset("base")), dir.path().join("broken"), at("out"));
    std::fs::create_dir(&broken).unwrap();
    for file in std::fs::read_dir(&base).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, broken.join(file.file_name().unwrap())).unwrap();
    }
    let weights = broken.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let at = start + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    // NaN in any of the dtypes.
    bytes[at..at + 4].fill(0xff);
    std::fs::write(&weights, bytes).unwrap();
    let (broken, data) = (broken.display().to_string(), asset("harbour.train.jsonl"));
    let parts = ["model.safetensors", name, "NaN"];
    let train = ["train", "--model", &broken, "--data", &data, "--out", &out, "--steps", "1"];
    refused(&[&train[..], &["--batch", "1", "--seq", "64"]].concat(), 1, &parts);
    refused(&["eval", "--model", &broken, "--text", &asset("calibration.jsonl"), "--seq", "64"], 1, &parts);
    refused(&["logits", "--model", &broken, "--ids", "1,2", "--out", &out], 1, &parts);
    refused(&["generate", "--model", &broken, "--prompt", "a"], 1, &parts);
    let diverging = ["train", "--model", &asset("base"), "--data", &data, "--out", &out, "--lr", "1e38"];
    let short = ["--steps", "1", "--warmup", "0", "--batch", "1", "--seq", "64"];
    refused(&[&diverging[..], &short].concat(), 1, &["diverged", "--lr"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was left");
}

#[test]
fn a_pruned_adapter_is_recovered_before_it_is_fused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (base, calibration) = (asset("base"), asset("calibration.jsonl"));
    anabranch(&[
        "prune",
        "--model",
        &base,
        "--ratio",
        "0.3",
        "--calibration",
        &calibration,
        "--out",
        &at("small"),
    ])
    .assert()
    .success()
    .stdout(contains("perplexity"));
    for (edge, seed) in [("harbour", "1"), ("orchard", "2")] {
        let data = asset(&format!("{edge}.train.jsonl"));
        anabranch(&["train", "--model", &at("small"), "--data", &data, "--steps", "3", "--seq", "64"])
            .args(["--lr", "1e-2", "--warmup", "0", "--seed", seed, "--out", &at(edge)])
            .assert()
            .success();
        let full = at(&format!("{edge}-full"));
        anabranch(&["recover", "--adapter", &at(edge), "--model", &base, "--out", &full]).assert().success();
    }
    let pruned = [at("harbour"), at("orchard")];
    refused(
        &["fuse", &pruned[0], &pruned[1], "--method", "fedavg", "--out", &at("fused")],
        1,
        &["harbour", "anabranch recover"],
    );
    let full = [at("harbour-full"), at("orchard-full")];
    refused(
        &["fuse", &full[0], &full[1], "--method", "fedsa", "--out", &at("fused")],
        2,
        &["mean", "client:J", "sum", "lsq"],
    );
    anabranch(&["conflict", &full[0], &full[1]]).assert().success().stdout(contains("layer 0"));
    anabranch(&[
        "fuse",
        &full[0],
        &full[1],
        "--method",
        "fedavg",
        "--resolve",
        "lora-cr",
        "--out",
        &at("fused"),
    ])
    .args(["--model", &base, "--merged", &at("merged")])
    .assert()
    .success()
    .stdout(contains("effective scale"));
    anabranch(&["inspect", &at("fused"), "--verify"]).assert().success();
    for (folder, name) in [(at("fused"), "layer 0 q ["), (base.clone(), "model.embed_tokens.weight [")] {
        let spectrum = anabranch(&["inspect", &folder, "--spectrum", "2"]).assert().success();
        spectrum.stdout(contains(name).and(contains("of the energy beyond")));
    }

    // Methods on entries go into a merged checkpoint or take a rank, and each option goes with those that it means something to.
    for (options, part) in [
        (&["--method", "ties"][..], "--rank N approximates it, --merged with --model"),
        (
            &["--method", "mean", "--lambda", "2"],
            "--lambda goes with --method task-arithmetic, knots-ties, tsv",
        ),
        (
            &["--method", "dare", "--density", "0.5"],
            "--density goes with --method knots-ties, ties, not with dare",
        ),
        (&["--method", "ties", "--density", "0"], "--density 0: expected a number above 0"),
        (&["--method", "knots-ties", "--density-scope", "model"], "--density-scope goes with --method ties"),
        (&["--method", "ties", "--drop", "0.5"], "--drop goes with --method dare, dare-ties, not with ties"),
        (&["--method", "mean", "--clusters", "2"], "--clusters goes with --method lora-lego, not with mean"),
    ] {
        let fuse = ["fuse", &full[0], &full[1], "--out", &at("none")];
        refused(&[&fuse[..], options].concat(), 2, &[part]);
    }
    anabranch(&[
        "fuse",
        &full[0],
        &full[1],
        "--method",
        "knots-ties",
        "--density",
        "0.5",
        "--density-of",
        "full",
    ])
    .args(["--out", &at("knots")])
    .assert()
    .success();
    anabranch(&["fuse", &full[0], &full[1], "--method", "dare-ties", "--drop", "0.5", "--seed", "3"])
        .args(["--model", &base, "--merged", &at("dare-ties")])
        .assert()
        .success()
        .stdout(contains("entries kept of each adapter"));
    let ties = ["fuse", &full[0], &full[1], "--method", "ties", "--rank", "4", "--out", &at("ties")];
    anabranch(&[&ties[..], &["--dry-run"]].concat())
        .assert()
        .success()
        .stdout(contains("largest rank 4").and(contains("scratch")));
    anabranch(&ties).assert().success().stdout(contains("energy kept by truncation"));
    anabranch(&["inspect", &at("ties"), "--verify"]).assert().success();

    // Each edge's inputs, of its own pruned model with its adapter, are Grams for methods on the recovered adapters.
    let regmean = ["fuse", &full[0], &full[1], "--method", "regmean", "--out", &at("regmean")];
    refused(&regmean, 2, &["--grams", "anabranch grams"]);
    for edge in ["harbour", "orchard"] {
        let data = asset(&format!("{edge}.train.jsonl"));
        anabranch(&["grams", "--model", &at("small"), "--adapter", &at(edge), "--data", &data])
            .args(["--seq", "64", "--tokens", "500", "--out", &at(&format!("{edge}-grams"))])
            .assert()
            .success()
            .stdout(contains("Grams of 16 inputs over"));
    }
    let grams = [at("harbour-grams"), at("orchard-grams")].join(",");
    for method in ["regmean", "cat-merging"] {
        anabranch(&["fuse", &full[0], &full[1], "--method", method, "--grams", &grams, "--out", &at(method)])
            .assert()
            .success()
            .stdout(contains("error to the method's definition"));
    }

    // The merged checkpoint and the adapter on the base answer alike.
    let task = asset("harbour.jsonl");
    let scores = |args: &[&str], file: &str| -> Vec<f64> {
        anabranch(&[&["eval", "--task", &task, "--predictions", &at(file)][..], args].concat())
            .assert()
            .success();
        let text = std::fs::read_to_string(at(file)).unwrap();
        text.lines()
            .flat_map(|l| {
                let line: serde_json::Value = serde_json::from_str(l).unwrap();
                line["logprobs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>()
            })
            .collect()
    };
    let with = scores(&["--model", &base, "--adapter", &at("fused")], "adapter.jsonl");
    let merged = scores(&["--model", &at("merged")], "merged.jsonl");
    assert_eq!(with.len(), 240 * 4);
    let worst = with.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    // The base is bf16, so merged weights round to 8 bits.
    assert!(worst <= 0.2, "{worst}");
}
