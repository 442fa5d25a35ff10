//! Seeded weights that need no framework: the twin of `tools/golden/seeded.py`.
//!
//! Value i of a tensor is mean + std · z(i), rounded to f32 and then to the stored dtype. z is the sum of the four
//! 16-bit parts of splitmix64(key + (i + 1) · GOLDEN), centred and scaled to variance 1; key depends on the seed and
//! on the tensor's name. No transcendental function takes part, so that every language gives the same bits.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// splitmix64's output function.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// `count` words of 64 random bits for the tensor `name`.
pub fn bits(seed: u64, name: &str, count: usize) -> impl Iterator<Item = u64> {
    let fnv =
        name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    let key = mix(fnv.wrapping_add((seed + 1).wrapping_mul(GOLDEN)));
    (1..=count as u64).map(move |i| mix(key.wrapping_add(i.wrapping_mul(GOLDEN))))
}

/// `count` values of the given mean and standard deviation.
pub fn normal(seed: u64, name: &str, count: usize, mean: f64, std: f64) -> Vec<f32> {
    // Four uniform 16-bit parts have the mean 4 · 65535 / 2 and the variance 4 · (65536² − 1) / 12.
    let scale = 1.0 / ((65536.0f64 * 65536.0 - 1.0) / 3.0).sqrt();
    bits(seed, name, count)
        .map(|w| {
            let total: u64 = (0..4).map(|k| (w >> (16 * k)) & 0xFFFF).sum();
            let z = (total as f64 - 131_070.0) * scale;
            (mean + std * z) as f32
        })
        .collect()
}

/// `count` token ids below `vocab`.
pub fn ids(seed: u64, name: &str, count: usize, vocab: u64) -> Vec<u32> {
    bits(seed, name, count).map(|w| (w % vocab) as u32).collect()
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its sizes, outermost first.
    pub shape: Vec<usize>,
    /// Its elements before they are stored.
    pub values: Vec<f32>,
}

impl Tensor {
    /// A seeded tensor.
    pub fn seeded(seed: u64, name: String, shape: Vec<usize>, mean: f64, std: f64) -> Tensor {
        let values = normal(seed, &name, shape.iter().product(), mean, std);
        Tensor { name, shape, values }
    }
}

/// Every tensor that the `config.json` object asks for: standard deviation 0.2, norms around 1.
pub fn checkpoint(config: &Value, seed: u64) -> Vec<Tensor> {
    let size = |key: &str| config[key].as_u64().map(|n| n as usize);
    let flag = |key: &str| config[key].as_bool().unwrap_or(false);
    let need = |key: &str| size(key).unwrap_or_else(|| panic!("config has no {key}"));
    let (d, f, v, h) =
        (need("hidden_size"), need("intermediate_size"), need("vocab_size"), need("num_attention_heads"));
    let g = size("num_key_value_heads").unwrap_or(h);
    let k = size("head_dim").unwrap_or(d / h);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: Vec<usize>, mean: f64| {
        tensors.push(Tensor::seeded(seed, name, shape, mean, 0.2))
    };
    add("model.embed_tokens.weight".into(), vec![v, d], 0.0);
    for layer in 0..need("num_hidden_layers") {
        for (name, o, i, bias) in [
            ("self_attn.q_proj", h * k, d, "attention_bias"),
            ("self_attn.k_proj", g * k, d, "attention_bias"),
            ("self_attn.v_proj", g * k, d, "attention_bias"),
            ("self_attn.o_proj", d, h * k, "attention_bias"),
            ("mlp.gate_proj", f, d, "mlp_bias"),
            ("mlp.up_proj", f, d, "mlp_bias"),
            ("mlp.down_proj", d, f, "mlp_bias"),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), vec![o, i], 0.0);
            if flag(bias) {
                add(format!("model.layers.{layer}.{name}.bias"), vec![o], 0.0);
            }
        }
        add(format!("model.layers.{layer}.input_layernorm.weight"), vec![d], 1.0);
        add(format!("model.layers.{layer}.post_attention_layernorm.weight"), vec![d], 1.0);
    }
    add("model.norm.weight".into(), vec![d], 1.0);
    if !flag("tie_word_embeddings") {
        add("lm_head.weight".into(), vec![v, d], 0.0);
    }
    tensors
}

/// Writes tensors in a safetensors dtype (`F32`, `F16` or `BF16`), rounded to nearest even.
pub fn write_tensors(path: &Path, tensors: &[Tensor], dtype: &str) {
    let stored: Vec<(Dtype, Vec<u8>)> = tensors
        .iter()
        .map(|t| match dtype {
            "F32" => (Dtype::F32, t.values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            "F16" => (Dtype::F16, t.values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()),
            "BF16" => (Dtype::BF16, t.values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()),
            other => panic!("no dtype {other}"),
        })
        .collect();
    let views = tensors.iter().zip(&stored).map(|(t, (dtype, bytes))| {
        (t.name.as_str(), TensorView::new(*dtype, t.shape.clone(), bytes).expect("a consistent tensor"))
    });
    safetensors::serialize_to_file(views, None, path).expect("tensors written");
}

/// A Hugging Face folder with seeded weights: `config.json` and `model.safetensors`.
pub fn write_model(dir: &Path, config: &Value, seed: u64, dtype: &str) {
    std::fs::write(dir.join("config.json"), config.to_string()).expect("config.json written");
    write_tensors(&dir.join("model.safetensors"), &checkpoint(config, seed), dtype);
}

/// `tokenizer.json` and `tokenizer_config.json` in which token i is the word "ti" and BOS (1) comes before a text.
pub fn write_tokenizer(dir: &Path, vocab: usize) {
    let special = ["<unk>", "<s>", "</s>"];
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, word)| {
            json!({"id": id, "content": word, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let word = |i: usize| special.get(i).map_or_else(|| format!("t{i}"), |w| w.to_string());
    let words: serde_json::Map<String, Value> = (0..vocab).map(|i| (word(i), i.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    });
    let names = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                       "unk_token": "<unk>"});
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).expect("tokenizer.json written");
    std::fs::write(dir.join("tokenizer_config.json"), names.to_string())
        .expect("tokenizer_config.json written");
}

/// The elements of a tensor that must be F32.
pub fn f32s(tensor: &TensorView<'_>) -> Vec<f32> {
    assert_eq!(tensor.dtype(), Dtype::F32);
    tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// The text that [`write_tokenizer`]'s tokenizer turns into these ids, none of them special.
pub fn words(ids: &[u32]) -> String {
    ids.iter().map(|i| format!("t{i}")).collect::<Vec<_>>().join(" ")
}

#[test]
fn same_bits_as_the_python_twin() {
    let values: Vec<u32> =
        normal(3, "model.norm.weight", 4, 1.0, 0.2).into_iter().map(f32::to_bits).collect();
    assert_eq!(values, [0x3f57_190f, 0x3f7c_1b61, 0x3f6d_8f78, 0x3f76_04e1]);
    assert_eq!(ids(3, "ids", 5, 101), [40, 28, 99, 78, 4]);
}
