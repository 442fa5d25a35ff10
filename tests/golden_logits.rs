//! Logits against transformers on seeded random checkpoints of every architecture variant
//! (`tools/golden/logits.py`), and the tokens that a real model writes.

#[path = "common/seeded.rs"]
mod seeded;

use std::path::Path;

use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::cpu::Cpu;
use anabranch::model::adapters::Stack;
use anabranch::model::room::{Head, Keep, RoomSize};
use anabranch::model::rope::Tables;
use anabranch::model::session::Session;
use anabranch::model::weights::Model;
use anabranch::stage::adapters::load_adapters;
use anabranch::stage::common::Common;
use anabranch::stage::generate::{self, GenerateOptions};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// `[T, V]` of the model in `dir`, under an adapter or none.
fn logits(dir: &Path, adapter: Option<&Path>, ids: &[u32]) -> Vec<f32> {
    let backend = Cpu::new(2).expect("threads");
    let checkpoint = Checkpoint::open(dir, OpenOptions::default()).expect("a checkpoint");
    let model = Model::new(&backend, &checkpoint).expect("a model");
    let adapters = load_adapters(&backend, &checkpoint, adapter.as_slice(), false, &Common::default())
        .expect("an adapter");
    let tokens = ids.len();
    let size = RoomSize {
        tokens,
        copies: 1,
        keep: Keep::Output,
        table_rows: 0,
        ranks: adapters.ranks(),
        dropout: false,
        dtype: checkpoint.dtype().expect("a dtype"),
        head: Head::Logits(tokens),
    };
    let tables = Tables::new(&model.config, tokens);
    let mut session: Session<Cpu, f32> = Session::new(&backend, &model, tables, size).expect("buffers");
    let input = session.documents(&backend, ids.to_vec(), &[0, tokens as u32]).expect("an input");
    let stack = Stack { params: &adapters.params, layouts: &adapters.layouts() };
    session.forward(&model, &backend, &input, stack).expect("a forward pass");
    let mut out = vec![f32::NAN; tokens * model.config.vocab];
    model.logits(&mut out, &mut session.room, &backend, 0, tokens).expect("logits");
    out
}

/// The largest difference as a fraction of the largest of `want`; NaN if any number is.
fn off(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let most = |x: f32, y: f32| if x.is_nan() || y.is_nan() { f32::NAN } else { x.max(y) };
    let largest = want.iter().fold(0.0, |m, x| most(m, x.abs()));
    got.iter().zip(want).fold(0.0, |m, (a, b)| most(m, (a - b).abs())) / largest
}

/// The model with a key and value head for each query head: `h / (H/G)`, or `h % G` if `wrong`.
fn expanded(config: &Value, seed: u64, wrong: bool) -> (Value, Vec<seeded::Tensor>) {
    let size = |key: &str| config[key].as_u64().expect("a size") as usize;
    let (h, g, k) = (size("num_attention_heads"), size("num_key_value_heads"), size("head_dim"));
    let mut tensors = seeded::checkpoint(config, seed);
    for t in tensors.iter_mut().filter(|t| t.name.contains("k_proj") || t.name.contains("v_proj")) {
        let head = t.values.len() / g;
        let of = |i: usize| if wrong { i % g } else { i / (h / g) };
        t.values = (0..h).flat_map(|i| t.values[of(i) * head..(of(i) + 1) * head].to_vec()).collect();
        t.shape[0] = h * k;
    }
    let mut config = config.clone();
    config["num_key_value_heads"] = json!(h);
    (config, tensors)
}

/// The JSON and safetensors files of one set.
fn stored(name: &str) -> (Value, Vec<u8>) {
    let read = |ending: &str| std::fs::read(format!("{GOLDEN}/{name}.{ending}")).expect("stored");
    (serde_json::from_slice(&read("json")).expect("JSON"), read("safetensors"))
}

#[test]
fn every_variant_gives_the_logits_of_transformers_and_no_switch_is_idle() {
    let (index, bytes) = stored("logits");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut failed = Vec::new();
    for case in index["cases"].as_array().expect("cases") {
        let name = case["name"].as_str().expect("a name");
        let (seed, dtype) =
            (case["seed"].as_u64().expect("a seed"), case["dtype"].as_str().expect("a dtype"));
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
        let want = seeded::f32s(&file.tensor(name).expect("logits"));
        let dir = tempfile::tempdir().expect("a temporary folder");
        seeded::write_model(dir.path(), &case["config"], seed, dtype);
        let same = off(&logits(dir.path(), None, &ids), &want);

        let other = if case["off"] == "gqa map" {
            let (config, tensors) = expanded(&case["config"], seed, false);
            std::fs::write(dir.path().join("config.json"), config.to_string()).expect("config.json written");
            seeded::write_tensors(&dir.path().join("model.safetensors"), &tensors, dtype);
            let repeated = off(&logits(dir.path(), None, &ids), &want);
            assert!(repeated <= 2e-5, "{name}: {repeated:.1e} off with its heads written out");
            let (_, tensors) = expanded(&case["config"], seed, true);
            seeded::write_tensors(&dir.path().join("model.safetensors"), &tensors, dtype);
            logits(dir.path(), None, &ids)
        } else {
            seeded::write_model(dir.path(), &case["off"], seed, dtype);
            logits(dir.path(), None, &ids)
        };
        let moved = off(&other, &want);
        println!("{name:24} {same:.1e} off; without its {} {moved:.2} off", case["feature"]);
        // NaN is no success.
        let good = same <= 2e-5 && moved >= 1e-2;
        if !good {
            failed.push(format!("{name}: {same:.1e} off, without its {} {moved:.1e}", case["feature"]));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn every_form_of_adapter_means_what_it_means_in_peft() {
    let (index, bytes) = stored("adapters");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let want = |name: &str| seeded::f32s(&file.tensor(name).expect("logits"));
    let ids: Vec<u32> = serde_json::from_value(index["ids"].clone()).expect("ids");
    let dir = tempfile::tempdir().expect("a temporary folder");
    seeded::write_model(dir.path(), &index["config"], index["seed"].as_u64().expect("a seed"), "F32");
    let base = want("base");
    assert!(off(&logits(dir.path(), None, &ids), &base) <= 2e-5);
    for case in index["cases"].as_array().expect("cases") {
        let name = case["name"].as_str().expect("a name");
        let (seed, std) =
            (case["seed"].as_u64().expect("a seed"), index["std"].as_f64().expect("a deviation"));
        let shapes: Vec<(String, Vec<usize>)> =
            serde_json::from_value(case["tensors"].clone()).expect("shapes");
        let tensors: Vec<seeded::Tensor> =
            shapes.into_iter().map(|(n, shape)| seeded::Tensor::seeded(seed, n, shape, 0.0, std)).collect();
        let adapter = dir.path().join(name);
        std::fs::create_dir(&adapter).expect("a folder");
        std::fs::write(adapter.join("adapter_config.json"), case["adapter_config"].to_string())
            .expect("written");
        seeded::write_tensors(&adapter.join("adapter_model.safetensors"), &tensors, "F32");
        let got = logits(dir.path(), Some(&adapter), &ids);
        let (same, moved) = (off(&got, &want(name)), off(&got, &base));
        println!("{name:16} {same:.1e} off; the base {moved:.2} off");
        assert!(same <= 2e-5 && moved >= 1e-2, "{name}: {same:.1e} off, the base {moved:.1e}");
    }
}

#[test]
fn a_real_model_writes_its_golden_tokens() {
    let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
    let Ok(text) = std::fs::read(data.join("stories260K-hf-golden.json")) else {
        println!("skipped: {} is not there", data.display());
        return;
    };
    let golden: Value = serde_json::from_slice(&text).expect("JSON");
    let list = |key: &str| -> Vec<u32> { serde_json::from_value(golden[key].clone()).expect("ids") };
    let (prompt, all) = (list("ids"), list("greedy_ids"));
    // BOS and the 200 tokens after it.
    assert_eq!(all.len(), 201);
    let options = GenerateOptions {
        model: data.join("stories260K-hf"),
        adapter: None,
        prompt: golden["prompt"].as_str().expect("a prompt").into(),
        max_tokens: all.len() - prompt.len(),
        temperature: 0.0,
    };
    let backend = Cpu::new(2).expect("threads");
    let got = generate::run::<Cpu, f32>(&backend, &options, &Common::default()).expect("a text");
    assert_eq!(got.prompt_ids, prompt);
    assert_eq!(got.ids, all[prompt.len()..]);
    assert_eq!(format!("{}{}", options.prompt, got.text), golden["greedy_text"].as_str().expect("a text"));
}
