//! Evaluation of a real model: several adapters against each alone, options of several tokens against the same text
//! as a whole. (`golden_mmlu.rs` holds it to transformers.)

use std::path::{Path, PathBuf};

use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::config::ModelConfig;
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::provenance::Provenance;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::cpu::Cpu;
use anabranch::data::documents::Document;
use anabranch::data::tokenizer::Tokenizer;
use anabranch::model::session::Adapters;
use anabranch::model::weights::Model;
use anabranch::random::{Philox, Purpose};
use anabranch::stage::common::Common;
use anabranch::stage::evaluate::score::Columns;
use anabranch::stage::evaluate::{self, EvalOptions, EvalReport};
use anabranch::tensor::DType;

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

/// An adapter on all linears that moves the model well.
fn adapter(dir: &Path, config: &ModelConfig, seed: u64) {
    let rank = 3;
    let specs: Vec<PairSpec> = config
        .modules()
        .map(|module| PairSpec {
            module,
            rank,
            dims: config.dims(module.target, module.layer),
            dtypes: (DType::F32, DType::F32),
        })
        .collect();
    let mut writer =
        AdapterWriter::create(dir, AdapterConfig::portable(rank, &Target::ALL, None), specs.clone())
            .expect("a writer");
    for (n, spec) in specs.iter().enumerate() {
        let random = Philox::new(seed, Purpose::Test.stream(n as u64));
        let values = |from: usize, n: usize| -> Vec<f32> {
            (from..from + n).map(|i| 0.6 * (random.uniform(i as u64) - 0.5)).collect()
        };
        let (o, i) = spec.dims;
        writer.write_f32(spec.module, &values(0, rank * i), &values(rank * i, o * rank)).expect("a pair");
    }
    writer.finish(None, Provenance::new("test")).expect("an adapter");
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
            std::fs::create_dir(&folder).expect("a folder");
            adapter(&folder, &config, n as u64);
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
