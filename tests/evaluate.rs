//! Evaluation of a real model: several adapters against each alone, options of several tokens against the same text
//! as a whole; and what a report says of columns beside one another. (`golden_mmlu.rs` holds it to transformers.)

#[path = "common/small.rs"]
mod small;

use std::path::{Path, PathBuf};
use std::process::Command;

use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::config::ModelConfig;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::cpu::Cpu;
use anabranch::data::documents::Document;
use anabranch::data::tokenizer::Tokenizer;
use anabranch::model::packing::PackWeights;
use anabranch::model::session::Adapters;
use anabranch::model::weights::Model;
use anabranch::stage::common::Common;
use anabranch::stage::evaluate::score::Columns;
use anabranch::stage::evaluate::{self, EvalOptions, EvalReport};
use anabranch::stage::generate::{self, GenerateOptions};

fn shared(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data")).join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not on this machine", path.display());
        return None;
    }
    Some(path)
}

fn eval(options: EvalOptions) -> EvalReport {
    let backend = Cpu::new(2).expect("threads");
    let options = EvalOptions { batch_tokens: 2048, seq: 512, ..options };
    evaluate::run::<Cpu, f32>(&backend, &options, &Common::default()).expect("an evaluation")
}

#[test]
fn texts_are_predicted_as_well_as_is_known() {
    let (Some(model), Some(texts)) = (shared("stories260K-hf"), shared("tinystories")) else { return };
    for (name, expected) in [("tinystories_sample_cs336.txt", 1.27), ("tinystories_mini_gpt.txt", 1.90)] {
        let text = Some(texts.join(name));
        let report = eval(EvalOptions { model: model.clone(), text, ..EvalOptions::default() });
        let score = report.text[0];
        eprintln!("{name}: {score:?}");
        assert!((score.nll - expected).abs() <= 0.005, "{name}: {score:?}");
        assert!((score.perplexity.ln() - score.nll).abs() <= 1e-12);
    }
}

#[test]
fn adapters_together_score_as_each_alone() {
    let Some(model) = shared("stories260K-hf") else { return };
    let config = ModelConfig::open(&model).expect("a config");
    let dir = tempfile::tempdir().expect("a folder");
    let task = dir.path().join("t.jsonl");
    std::fs::write(
        &task,
        r#"{"prompt": "Once upon a time", "continuations": [", there was a dog", ", there was a cat", " the end"], "answer": 0}
{"prompt": "Lily went to the", "continuations": [" park.", " park and played", " house"], "answer": 1}"#,
    )
    .expect("a task");
    let folders: Vec<(String, PathBuf)> = ["one", "two"]
        .iter()
        .enumerate()
        .map(|(n, name)| {
            let folder = dir.path().join(name);
            small::adapter(&folder, &config, 3, n as u64, 0.6);
            (name.to_string(), folder)
        })
        .collect();
    let of = |adapters: &[(String, PathBuf)], base: bool| {
        let tasks = vec![task.clone()];
        eval(EvalOptions {
            model: model.clone(),
            adapters: adapters.to_vec(),
            base,
            tasks,
            ..EvalOptions::default()
        })
    };
    let together = of(&folders, true);
    assert_eq!(together.columns, [None, Some("one".into()), Some("two".into())]);
    let alone = [of(&[], false), of(&folders[..1], false), of(&folders[1..], false)];
    for (column, own) in alone.iter().enumerate() {
        for (item, prediction) in own.predictions.iter().enumerate() {
            let joint = &together.predictions[item * 3 + column];
            assert_eq!((&joint.adapter, &joint.id), (&prediction.adapter, &prediction.id));
            for (a, b) in joint.logprobs.iter().zip(&prediction.logprobs) {
                assert!((a - b).abs() <= 1e-4, "{joint:?} {prediction:?}");
            }
        }
    }
    let distance = |a: usize, b: usize| {
        (together.predictions[a].logprobs[0] - together.predictions[b].logprobs[0]).abs()
    };
    assert!(distance(0, 1) >= 0.1 && distance(1, 2) >= 0.1, "the adapters must change something");
}

#[test]
fn options_of_several_tokens_score_as_the_text_they_make() {
    let Some(folder) = shared("stories260K-hf") else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let task = dir.path().join("t.jsonl");
    let prompt = "Once upon a time, there was a little";
    let continuations = [" girl named Lily. She", " girl named Anna.", " boy", " girl named Lily. He"];
    let line = serde_json::json!({"prompt": prompt, "continuations": continuations, "answer": 0});
    std::fs::write(&task, line.to_string()).expect("a task");
    let show = Some("0".to_string());
    let report =
        eval(EvalOptions { model: folder.clone(), tasks: vec![task], show, ..EvalOptions::default() });
    let shown = &report.shown[0];

    let backend = Cpu::new(1).expect("threads");
    let checkpoint = Checkpoint::open(&folder, OpenOptions::default()).expect("a checkpoint");
    let tokenizer = Tokenizer::load(&folder, checkpoint.config().vocab).expect("a tokenizer");
    let model = Model::new(&backend, &checkpoint).expect("a model");
    let adapters = Adapters::base(&backend).expect("no adapter");
    let columns = Columns { backend: &backend, checkpoint: &checkpoint, model: &model, adapters: &adapters };
    for (n, continuation) in continuations.iter().enumerate() {
        let whole = tokenizer.encode(&format!("{prompt}{continuation}")).expect("tokens");
        assert_eq!([&shown.context_ids[..], &shown.option_ids[n]].concat(), whole);
        let document = Document::supervised_from(whole, shown.context_ids.len());
        let score = columns.text::<f32>(&[document], 512, &Common::default()).expect("a score")[0];
        let expected = -score.nll * score.tokens as f64;
        let got = report.predictions[0].logprobs[n];
        assert!((got - expected).abs() <= 1e-4 * expected.abs(), "{continuation}: {got} {expected}");
    }
}

/// A small model, two adapters, and a task whose right answers are what the first adapter says, but for every fifth.
fn compared(dir: &Path) -> EvalOptions {
    let model = small::model(dir);
    let config = ModelConfig::open(&model).expect("a config");
    let adapters = ["one", "two"].map(|name| (name.to_string(), dir.join(name)));
    for (n, (_, folder)) in adapters.iter().enumerate() {
        small::adapter(folder, &config, 2, n as u64, 1.2);
    }
    let (adapters, tasks) = (adapters.to_vec(), vec![dir.join("t.jsonl")]);
    small::task(&tasks[0], 40, 1, |_| 0);
    let options = EvalOptions { model, adapters, base: true, tasks, ..EvalOptions::default() };
    let report = eval(options.clone());
    let said: Vec<usize> = report
        .predictions
        .iter()
        .filter(|p| p.adapter.as_deref() == Some("one"))
        .map(|p| p.predicted)
        .collect();
    small::task(&options.tasks[0], 40, 1, |item| (said[item] + usize::from(item % 5 == 0)) % 4);
    options
}

#[test]
fn any_two_columns_are_compared_item_by_item() {
    let dir = tempfile::tempdir().expect("a folder");
    let options = compared(dir.path());
    let report = eval(options.clone());
    assert_eq!(report.overall[1].correct, 32);
    let right = |column: usize| -> Vec<bool> {
        report.predictions.iter().skip(column).step_by(3).map(|p| p.predicted == p.gold).collect()
    };
    let pairs: Vec<_> = report.pairs.iter().map(|p| (p.first.as_deref(), p.second.as_deref())).collect();
    assert_eq!(pairs, [(None, Some("one")), (None, Some("two")), (Some("one"), Some("two"))]);
    for (pair, (first, second)) in report.pairs.iter().zip([(0, 1), (0, 2), (1, 2)]) {
        let (a, b, p) = (right(first), right(second), &pair.paired);
        let only = |x: &[bool], y: &[bool]| x.iter().zip(y).filter(|(x, y)| **x && !**y).count();
        assert_eq!((p.only_first, p.only_second), (only(&a, &b), only(&b, &a)));
        let difference = report.overall[second].accuracy.unwrap() - report.overall[first].accuracy.unwrap();
        let [low, high] = p.interval.unwrap();
        assert!((p.difference.unwrap() - difference).abs() <= 1e-12);
        assert!(low <= difference + 1e-12 && difference <= high + 1e-12, "{p:?}");
    }
    assert!(report.pairs[0].paired.p < 1e-3, "the first adapter knows what the base does not");
    assert_eq!(report.pairs, report.tasks[0].pairs);
    let letters = &report.letters;
    assert_eq!(letters, &report.tasks[0].letters);
    for (column, counts) in letters.predicted.iter().enumerate() {
        let said = report.predictions.iter().skip(column).step_by(3);
        let count = |option: usize| said.clone().filter(|p| p.predicted == option).count();
        assert_eq!(*counts, (0..4).map(count).collect::<Vec<_>>());
    }
    assert_eq!(letters.gold.iter().sum::<usize>(), 40);

    let text = Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .env("CUDA_VISIBLE_DEVICES", "")
        .args(["eval", "--base", "--model"])
        .arg(&options.model)
        .arg("--adapter")
        .arg(&options.adapters[0].1)
        .arg("--task")
        .arg(&options.tasks[0])
        .output()
        .expect("a run");
    let text = String::from_utf8(text.stdout).expect("text");
    for part in ["80.0 ±", "answers, %", "right", "base → one", "McNemar"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn what_is_shown_counts_for_the_memory_limit() {
    let dir = tempfile::tempdir().expect("a folder");
    let tasks = vec![dir.path().join("t.jsonl")];
    small::task(&tasks[0], 10, 1, |_| 0);
    let options =
        EvalOptions { model: small::model(dir.path()), tasks, batch_tokens: 1, ..EvalOptions::default() };
    // The longest item is as long as the longest batch, and its text needs a cache besides.
    let shown = EvalOptions { show: Some("q9".into()), ..options.clone() };
    let backend = Cpu::new(1).expect("threads");
    let unpacked = Common { pack_weights: PackWeights::Off, ..Common::default() };
    let total = |options: &EvalOptions| {
        evaluate::plan::<Cpu, f32>(&backend, options, &unpacked).expect("a plan").total()
    };
    let (scored, most) = (total(&options), total(&shown));
    assert!(scored < most, "{scored} {most}");
    let within = |memory_limit: u64| {
        let common = Common { memory_limit: Some(memory_limit), ..unpacked.clone() };
        evaluate::run::<Cpu, f32>(&backend, &shown, &common)
    };
    let refused = within(most - 1).unwrap_err().to_string();
    assert!(refused.contains("the plan takes") && refused.contains("cached keys"), "{refused}");
    assert_eq!(within(most).expect("an evaluation").shown.len(), 1);
}

#[test]
fn an_item_is_shown_with_each_columns_own_words() {
    let dir = tempfile::tempdir().expect("a folder");
    let options = compared(dir.path());
    let report = eval(EvalOptions { show: Some("q7".into()), ..options.clone() });
    let shown = &report.shown[0];
    assert_eq!((report.shown.len(), shown.id.as_str()), (1, "q7"));
    for (column, prediction) in report.predictions.iter().skip(21).take(3).enumerate() {
        assert_eq!((&prediction.id, shown.predicted[column]), (&shown.id, prediction.predicted));
        let p = &shown.probabilities[column];
        assert!((p.iter().sum::<f64>() - 1.0).abs() <= 1e-12);
        let ratio = (prediction.logprobs[0] - prediction.logprobs[1]).exp();
        assert!((p[0] / p[1] / ratio - 1.0).abs() <= 1e-9);
        // As `generate` goes on after the prompt.
        let text = generate::run::<Cpu, f32>(
            &Cpu::new(1).expect("threads"),
            &GenerateOptions {
                model: options.model.clone(),
                adapter: (column > 0).then(|| options.adapters[column - 1].1.clone()),
                prompt: shown.context.clone(),
                max_tokens: 16,
                temperature: 0.0,
            },
            &Common::default(),
        );
        assert_eq!(shown.greedy[column], text.expect("a text").text, "column {column}");
    }
    let unknown = EvalOptions { show: Some("q70".into()), ..options };
    let refused = evaluate::run::<Cpu, f32>(
        &Cpu::new(1).expect("threads"),
        &EvalOptions { batch_tokens: 2048, seq: 512, ..unknown },
        &Common::default(),
    );
    assert!(refused.unwrap_err().to_string().contains("the nearest is q7"));
}
