//! A small seeded model, adapters that move a model well, and tasks with the right answers that a test wants.

// Each test program uses a part of this.
#![allow(dead_code)]

#[path = "seeded.rs"]
mod seeded;

use std::path::{Path, PathBuf};

use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::config::ModelConfig;
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::provenance::Provenance;
use anabranch::random::{Philox, Purpose};
use anabranch::tensor::DType;
use serde_json::json;

const VOCAB: usize = 96;

/// The model's folder `dir/base`, with a tokenizer of 96 words.
pub fn model(dir: &Path) -> PathBuf {
    let base = dir.join("base");
    std::fs::create_dir(&base).expect("a folder");
    let config = json!({
        "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
    });
    seeded::write_model(&base, &config, 5, "F32");
    seeded::write_tokenizer(&base, VOCAB);
    base
}

/// An adapter on all linears in the folder `dir`, its numbers uniform in `±size / 2`.
pub fn adapter(dir: &Path, config: &ModelConfig, rank: usize, seed: u64, size: f32) {
    std::fs::create_dir(dir).expect("a folder");
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
            (from..from + n).map(|i| size * (random.uniform(i as u64) - 0.5)).collect()
        };
        let (o, i) = spec.dims;
        writer.write_f32(spec.module, &values(0, rank * i), &values(rank * i, o * rank)).expect("a pair");
    }
    writer.finish(None, Provenance::new("test")).expect("an adapter");
}

/// A task of random prompts of 5 to 9 words with four random words to choose from; the right one is `gold(item)`.
pub fn task(path: &Path, items: usize, seed: u64, gold: impl Fn(usize) -> usize) {
    let mut text = String::new();
    for item in 0..items {
        let words = seeded::ids(seed, &format!("item {item}"), 13, VOCAB as u64 - 3);
        let word = |n: usize| format!("t{}", words[n] + 3);
        let prompt: Vec<String> = (4..9 + item % 5).map(word).collect();
        let continuations: Vec<String> = (0..4).map(|n| format!(" {}", word(n))).collect();
        let line = json!({
            "id": format!("q{item}"), "prompt": prompt.join(" "), "continuations": continuations, "answer": gold(item),
        });
        text += &format!("{line}\n");
    }
    std::fs::write(path, text).expect("a task");
}
