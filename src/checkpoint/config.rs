//! `config.json` of the model families that are read: `llama`, `mistral`, and `anabranch-llama` with sizes by layer.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::fields::Fields;
use super::json;
use super::module::{Module, Target};
use super::rope::{Rope, RopeKind};
use super::sizes::LayerSizes;
use crate::error::{Error, Result};

/// The file's name.
pub const CONFIG: &str = "config.json";

/// Far above any model; keeps products of sizes within u64 and lists of tensors within memory.
const MAX_SIZE: usize = 1 << 22;
/// The most layers that a model may have.
pub const MAX_LAYERS: usize = 1 << 14;
const MAX_POSITIONS: usize = 1 << 31;

/// Which reader a folder is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `llama`.
    Llama,
    /// `mistral`: the same tensors and forward pass, no biases, maybe a sliding window.
    Mistral,
    /// `anabranch-llama`: sizes differ by layer, which transformers cannot load.
    PerLayer,
}

impl Family {
    /// `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::PerLayer => "anabranch-llama",
        }
    }

    /// The entry of `architectures`.
    pub(super) fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::PerLayer => "AnabranchLlamaForCausalLM",
        }
    }
}

/// The architecture of a model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The file it was read from.
    pub path: PathBuf,
    /// `model_type`.
    pub family: Family,
    /// Model width D.
    pub hidden: usize,
    /// Query heads H; where sizes differ by layer, the largest.
    pub heads: usize,
    /// Key/value heads G; where sizes differ by layer, the largest.
    pub kv_heads: usize,
    /// Head width K, even.
    pub head_dim: usize,
    /// MLP width F; where sizes differ by layer, the largest.
    pub mlp: usize,
    /// Layers L.
    pub layers: usize,
    /// Vocabulary V.
    pub vocab: usize,
    /// Positions that the model knows (`max_position_embeddings`).
    pub positions: usize,
    /// ε of the RMS norms.
    pub rms_norm_eps: f64,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Rotary positions.
    pub rope: Rope,
    /// Ids that begin a text; none or one in practice.
    pub bos: Vec<u32>,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// Tokens that attention looks back on, where that is limited.
    pub sliding_window: Option<usize>,
    /// Sizes by layer where they differ.
    pub(super) per_layer: Option<Vec<LayerSizes>>,
    /// The file as it was, for keys that are not ours.
    pub(super) raw: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json` in the folder `dir`.
    pub fn open(dir: &Path) -> Result<ModelConfig> {
        ModelConfig::read(&dir.join(CONFIG))
    }

    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<ModelConfig> {
        ModelConfig::from_json(path, json::read_object(path)?)
    }

    /// Reads the object `raw`; `path` is for the errors' text.
    pub fn from_json(path: &Path, raw: Map<String, Value>) -> Result<ModelConfig> {
        let f = Fields::new(path, "", &raw);
        let family = match f.text("model_type")? {
            Some("llama") => Family::Llama,
            Some("mistral") => Family::Mistral,
            Some("anabranch-llama") => Family::PerLayer,
            Some(other) => {
                return Err(f.error("model_type", format!("is {other:?}, expected llama or mistral")));
            }
            None => return Err(Error::file(path, "has no model_type, expected llama or mistral")),
        };
        if f.get("quantization_config").is_some() {
            return Err(f.error("quantization_config", "is there: quantised weights are not read"));
        }
        if let Some(act) = f.text("hidden_act")?.filter(|a| *a != "silu") {
            return Err(f.error("hidden_act", format!("is {act:?}, expected silu")));
        }
        if let (Some(a), Some(b)) = (f.text("dtype")?, f.text("torch_dtype")?)
            && a != b
        {
            return Err(
                f.error("dtype", format!("is {a:?} and torch_dtype is {b:?}: two spellings that disagree"))
            );
        }
        let mistral = family == Family::Mistral;
        let hidden = f.required("hidden_size", MAX_SIZE)?;
        let heads = f.required("num_attention_heads", MAX_SIZE)?;
        // What transformers takes where a key is left out.
        let kv_heads = f.count("num_key_value_heads", MAX_SIZE)?.unwrap_or(
            match (mistral, raw.contains_key("num_key_value_heads")) {
                (true, false) => 8,
                _ => heads,
            },
        );
        let head_dim = match f.count("head_dim", MAX_SIZE)? {
            Some(k) => k,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let why = format!(
                    "is missing, and hidden_size {hidden} is no multiple of num_attention_heads {heads}"
                );
                return Err(f.error("head_dim", why));
            }
        };
        if head_dim % 2 != 0 {
            return Err(f.error("head_dim", format!("is {head_dim}, rotary positions need an even one")));
        }
        let positions = f.count("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(if mistral {
            131_072
        } else {
            2048
        });
        let biases = [f.flag("attention_bias")?.unwrap_or(false), f.flag("mlp_bias")?.unwrap_or(false)];
        if mistral && biases != [false; 2] {
            return Err(f.error(
                "model_type",
                "is mistral, which has no biases, and attention_bias or mlp_bias is true",
            ));
        }
        let layers = f.required("num_hidden_layers", MAX_LAYERS)?;
        let sliding_window = match (family, raw.contains_key("sliding_window")) {
            (Family::Llama, _) => None,
            (Family::Mistral, false) => Some(4096),
            _ => f.count("sliding_window", MAX_POSITIONS)?,
        };
        let mut config = ModelConfig {
            path: path.to_path_buf(),
            family,
            hidden,
            heads,
            kv_heads,
            head_dim,
            mlp: f.required("intermediate_size", MAX_SIZE)?,
            layers,
            vocab: f.required("vocab_size", MAX_SIZE)?,
            positions,
            rms_norm_eps: f.positive("rms_norm_eps")?.unwrap_or(1e-6),
            tied: f.flag("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: biases[0],
            mlp_bias: biases[1],
            rope: Rope::read(&f, positions)?,
            bos: default_id(&f, "bos_token_id", 1)?,
            eos: default_id(&f, "eos_token_id", 2)?,
            sliding_window,
            per_layer: None,
            raw: Map::new(),
        };
        if family == Family::PerLayer {
            config.per_layer = Some(read_layers(&f, layers)?);
        }
        for l in 0..layers {
            let s = config.layer_sizes(l);
            if !s.heads.is_multiple_of(s.kv_heads) {
                let why =
                    format!("is {}, no multiple of num_key_value_heads, which is {}", s.heads, s.kv_heads);
                return Err(f.error("num_attention_heads", why));
            }
            if s.heads.checked_mul(head_dim).is_none_or(|n| n > MAX_SIZE) {
                let why = format!("is {head_dim}: {} heads of that width are more than {MAX_SIZE}", s.heads);
                return Err(f.error("head_dim", why));
            }
        }
        config.raw = raw;
        Ok(config)
    }

    /// The sizes of layer `l`.
    pub fn layer_sizes(&self, l: usize) -> LayerSizes {
        let whole = LayerSizes { heads: self.heads, kv_heads: self.kv_heads, mlp: self.mlp };
        self.per_layer.as_ref().and_then(|p| p.get(l)).copied().unwrap_or(whole)
    }

    /// `(O, I)` of a linear of layer `l`.
    pub fn dims(&self, target: Target, l: usize) -> (usize, usize) {
        self.layer_sizes(l).dims(target, self.hidden, self.head_dim)
    }

    /// Whether `target` has a bias.
    pub fn has_bias(&self, target: Target) -> bool {
        match target {
            Target::Q | Target::K | Target::V | Target::O => self.attention_bias,
            Target::Gate | Target::Up | Target::Down => self.mlp_bias,
        }
    }

    /// All linears, layer by layer.
    pub fn modules(&self) -> impl Iterator<Item = Module> {
        (0..self.layers).flat_map(|layer| self.modules_of(layer))
    }

    /// The linears of one layer.
    pub fn modules_of(&self, layer: usize) -> [Module; 7] {
        Target::ALL.map(|target| Module { layer, target })
    }

    /// Parameters of the whole model; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let product = |(o, i): (usize, usize)| o as u64 * i as u64;
        let linears: u64 = self
            .modules()
            .map(|m| {
                let (o, i) = self.dims(m.target, m.layer);
                product((o, i)) + if self.has_bias(m.target) { o as u64 } else { 0 }
            })
            .sum();
        let tables = if self.tied { 1 } else { 2 };
        tables * product((self.vocab, self.hidden)) + linears + product((2 * self.layers + 1, self.hidden))
    }

    /// The longest sequence: the positions, `factor` times as many where rope is dynamic, at most the sliding window.
    pub fn longest(&self) -> usize {
        let positions = match self.rope.kind {
            RopeKind::Dynamic { factor } => (self.positions as f64 * factor) as usize,
            _ => self.positions,
        };
        positions.min(self.sliding_window.unwrap_or(MAX_POSITIONS)).min(MAX_POSITIONS)
    }

    /// The longest sequence whose rope tables are those of every shorter one: only the dynamic kind has a limit.
    pub fn longest_of_fixed_rope(&self) -> usize {
        match self.rope.kind {
            RopeKind::Dynamic { .. } => self.positions,
            _ => usize::MAX,
        }
    }

    /// An error where a sequence of `tokens` tokens is longer than the model allows; says which key limits it.
    pub fn check_length(&self, tokens: usize) -> Result<()> {
        if let Some(w) = self.sliding_window.filter(|w| tokens > *w) {
            let why = format!(
                "sliding_window is {w} and a sequence has {tokens} tokens: windowed attention is not built"
            );
            return Err(Error::file(&self.path, why));
        }
        if tokens > self.longest() {
            let why =
                format!("the model has {} positions and a sequence has {tokens} tokens", self.longest());
            return Err(Error::file(&self.path, why));
        }
        Ok(())
    }
}

/// A token id, which transformers sets to `default` where the key is left out (and to none where it is null).
fn default_id(f: &Fields<'_>, key: &str, default: u32) -> Result<Vec<u32>> {
    if f.has(key) { f.ids(key) } else { Ok(vec![default]) }
}

/// Sizes by layer of `anabranch-llama`.
fn read_layers(f: &Fields<'_>, layers: usize) -> Result<Vec<LayerSizes>> {
    let object =
        f.object("anabranch")?.ok_or_else(|| f.error("anabranch", "is missing, anabranch-llama needs it"))?;
    let inner = Fields::new(f.path(), "anabranch.", object);
    let list = inner.array("layers")?.map_or(&[][..], |v| v);
    if list.len() != layers {
        return Err(
            inner.error("layers", format!("has {} entries, num_hidden_layers is {layers}", list.len()))
        );
    }
    list.iter()
        .enumerate()
        .map(|(l, v)| {
            let prefix = format!("anabranch.layers[{l}].");
            let map = v.as_object().ok_or_else(|| {
                inner.error("layers", format!("[{l}] is {}, expected an object", json::kind(v)))
            })?;
            let f = Fields::new(f.path(), &prefix, map);
            Ok(LayerSizes {
                heads: f.required("num_attention_heads", MAX_SIZE)?,
                kv_heads: f.required("num_key_value_heads", MAX_SIZE)?,
                mlp: f.required("intermediate_size", MAX_SIZE)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(v: Value) -> Result<ModelConfig> {
        let Value::Object(map) = v else { panic!("no object") };
        ModelConfig::from_json(Path::new("config.json"), map)
    }

    /// `base()` with some keys changed; null removes a key.
    pub(in crate::checkpoint) fn llama3_8b(changes: Value) -> Value {
        let mut v = json!({
            "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 500000.0, "bos_token_id": 128000,
            "eos_token_id": [128001, 128009]
        });
        for (k, x) in changes.as_object().unwrap() {
            if x.is_null() {
                v.as_object_mut().unwrap().remove(k);
            } else {
                v[k] = x.clone();
            }
        }
        v
    }

    fn error(changes: Value) -> String {
        read(llama3_8b(changes)).unwrap_err().to_string()
    }

    #[test]
    fn llama3_8b_and_its_pruned_sizes_have_the_papers_counts() {
        let c = read(llama3_8b(json!({}))).unwrap();
        assert_eq!(c.parameters(), 8_030_261_248);
        assert_eq!((c.bos.as_slice(), c.eos.as_slice()), (&[128000][..], &[128001, 128009][..]));
        assert_eq!((c.head_dim, c.longest(), c.sliding_window), (128, 8192, None));
        assert_eq!(c.dims(Target::K, 0), (1024, 4096));
        assert_eq!(c.dims(Target::Down, 31), (4096, 14336));
        for (ratio, n, family) in [
            (0.2, 6_734_745_600, Family::Mistral),
            (0.4, 5_271_851_008, Family::Mistral),
            (0.6, 3_976_728_576, Family::Llama),
            (0.8, 2_513_833_984, Family::Llama),
        ] {
            let p = c.pruned(&[c.layer_sizes(0).at_ratio(ratio, 128, 1); 32]).unwrap();
            assert_eq!((p.parameters(), p.family), (n, family));
        }
    }

    #[test]
    fn stories260k() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/stories260K-hf"));
        if !path.exists() {
            eprintln!("skipped: {} is absent", path.display());
            return;
        }
        let c = ModelConfig::open(path).unwrap();
        assert_eq!(c.parameters(), 260_032);
        assert!(c.tied);
        assert_eq!(c.rope, Rope { theta: 10000.0, kind: RopeKind::Default });
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (changes, expected) in [
            (json!({"model_type": "qwen2"}), "model_type is \"qwen2\", expected llama or mistral"),
            (json!({"model_type": null}), "has no model_type"),
            (json!({"hidden_size": null}), "has no hidden_size"),
            (json!({"hidden_size": "64"}), "hidden_size is \"64\", expected a whole number"),
            (json!({"hidden_size": 0}), "hidden_size is 0, expected 1 to"),
            (json!({"hidden_size": -1}), "hidden_size is -1, expected a whole number"),
            (json!({"hidden_size": 1e30}), "expected a whole number"),
            (json!({"num_hidden_layers": 1000000}), "num_hidden_layers is 1000000"),
            (json!({"num_attention_heads": 30}), "hidden_size 4096 is no multiple of num_attention_heads 30"),
            (
                json!({"num_attention_heads": 30, "head_dim": 128}),
                "num_attention_heads is 30, no multiple of num_key_value_heads",
            ),
            (json!({"head_dim": 7}), "head_dim is 7, rotary positions need an even one"),
            (json!({"head_dim": 4194304}), "32 heads of that width"),
            (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\", expected silu"),
            (json!({"quantization_config": {}}), "quantised weights are not read"),
            (json!({"rms_norm_eps": 0}), "rms_norm_eps is 0, expected more than 0"),
            (json!({"eos_token_id": ["x"]}), "eos_token_id is an array, expected a token id"),
            (json!({"dtype": "float32", "torch_dtype": "bfloat16"}), "two spellings that disagree"),
            (
                json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
                "rope_theta is 500000 and rope_parameters.rope_theta is 10000: two spellings that disagree",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 4}}),
                "rope_scaling is {\"rope_type\":\"linear\",\"factor\":2.0} and rope_parameters is",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}}),
                "two spellings that disagree",
            ),
            (
                json!({"rope_scaling": {"type": "longrope"}}),
                "rope_scaling.rope_type is \"longrope\", expected one of",
            ),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is missing"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
                "rope_scaling.factor is 0.5, expected at least 1",
            ),
            (
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}),
                "rope_scaling.high_freq_factor is 1, expected more than low_freq_factor, which is 4",
            ),
            (
                json!({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}}),
                "partial_rotary_factor is 0.5",
            ),
            (json!({"model_type": "mistral", "attention_bias": true}), "mistral, which has no biases"),
            (json!({"model_type": "anabranch-llama"}), "anabranch is missing"),
            (
                json!({"model_type": "anabranch-llama", "anabranch": {"layers": [{}]}}),
                "has 1 entries, num_hidden_layers is 32",
            ),
        ] {
            let found = error(changes.clone());
            assert!(found.contains(expected), "{changes}: {found}");
        }
    }

    #[test]
    fn rope_in_both_spellings() {
        let llama3 = RopeKind::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 4096,
        };
        let object = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 4096});
        let mut v5 = object.clone();
        v5["rope_theta"] = json!(500000.0);
        for changes in [
            json!({"rope_scaling": object}),
            json!({"rope_theta": null, "rope_parameters": v5}),
            json!({"rope_scaling": object, "rope_parameters": v5}),
        ] {
            assert_eq!(read(llama3_8b(changes)).unwrap().rope, Rope { theta: 500000.0, kind: llama3 });
        }
        let yarn = |v: Value| match read(llama3_8b(json!({"rope_scaling": v}))).unwrap().rope.kind {
            RopeKind::Yarn(y) => y,
            other => panic!("{other:?}"),
        };
        let y = yarn(json!({"type": "yarn", "factor": 4.0}));
        assert_eq!((y.original_positions, y.beta_fast, y.beta_slow, y.truncate), (8192, 32.0, 1.0, true));
        assert_eq!((y.attention_factor, y.mscale), (None, None));
        let y = yarn(
            json!({"type": "yarn", "original_max_position_embeddings": 2048, "beta_fast": 16, "mscale": 0.7,
            "mscale_all_dim": 1.0, "attention_factor": 1.2, "truncate": false}),
        );
        assert_eq!((y.factor, y.beta_fast, y.truncate), (4.0, 16.0, false));
        assert_eq!((y.attention_factor, y.mscale, y.mscale_all_dim), (Some(1.2), Some(0.7), Some(1.0)));
        let c = read(llama3_8b(json!({"rope_scaling": {"type": "dynamic", "factor": 2.5}}))).unwrap();
        assert_eq!(c.longest(), 20480);
        assert!(c.check_length(20480).is_ok());
        assert!(
            c.check_length(20481)
                .unwrap_err()
                .to_string()
                .contains("20480 positions and a sequence has 20481")
        );
    }

    #[test]
    fn mistral_defaults_and_window() {
        let c = read(llama3_8b(json!({"model_type": "mistral", "num_key_value_heads": null}))).unwrap();
        assert_eq!((c.kv_heads, c.sliding_window, c.longest()), (8, Some(4096), 4096));
        let err = c.check_length(5000).unwrap_err().to_string();
        assert!(err.contains("sliding_window is 4096 and a sequence has 5000"), "{err}");
        let mut v = llama3_8b(json!({"model_type": "mistral"}));
        v["sliding_window"] = Value::Null;
        assert!(read(v).unwrap().check_length(8192).is_ok());
    }

    fn arbitrary_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (0u64..40).prop_map(Value::from),
            "[a-z0-9_]{0,6}".prop_map(Value::from),
            prop_oneof![Just("yarn"), Just("llama3"), Just("mistral"), Just("linear")].prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::vec((key(), inner), 0..4)
                    .prop_map(|v| Value::Object(v.into_iter().collect())),
            ]
        })
    }

    fn key() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("model_type"),
            Just("hidden_size"),
            Just("num_attention_heads"),
            Just("num_key_value_heads"),
            Just("head_dim"),
            Just("intermediate_size"),
            Just("num_hidden_layers"),
            Just("rope_scaling"),
            Just("rope_parameters"),
            Just("rope_type"),
            Just("type"),
            Just("factor"),
            Just("anabranch"),
            Just("layers"),
            Just("sliding_window"),
            Just("eos_token_id"),
            Just("max_position_embeddings"),
        ]
        .prop_map(String::from)
    }

    proptest! {
        /// Any change to a good file is read or refused; what is read has sizes that can be counted.
        #[test]
        fn arbitrary_values_never_panic(changes in proptest::collection::vec((key(), arbitrary_json()), 0..5)) {
            let mut v = llama3_8b(json!({}));
            for (k, x) in changes { v[k] = x; }
            if let Ok(c) = read(v) {
                prop_assert!(c.parameters() > 0);
                prop_assert!(c.longest() > 0);
                let written = c.to_json(crate::tensor::DType::BF16);
                let again = ModelConfig::from_json(Path::new("again"), written).unwrap();
                prop_assert_eq!((again.rope, again.longest(), again.parameters()), (c.rope, c.longest(), c.parameters()));
            }
        }
    }
}
