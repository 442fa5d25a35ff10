//! Which other programs would load a model or an adapter as it is, and what to mind.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::adapter::ADAPTER_MODEL;
use crate::checkpoint::adapter_config::{ADAPTER_CONFIG, changes_base};
use crate::checkpoint::config::{Family, ModelConfig};
use crate::checkpoint::fields::Fields;
use crate::checkpoint::json;
use crate::checkpoint::weights::{OpenOptions, Weights};
use crate::error::Result;

/// One program's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reader {
    /// The program.
    pub program: &'static str,
    /// Whether it loads the folder and computes the same update or model.
    pub loads: bool,
    /// What is needed, or why it does not.
    pub note: String,
}

fn reader(program: &'static str, loads: bool, notes: &[String]) -> Reader {
    Reader { program, loads, note: notes.join("; ") }
}

/// The values that vLLM takes for `--max-lora-rank`.
const VLLM_RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
/// The one that it takes unless told.
const VLLM_DEFAULT_RANK: usize = 16;
/// Whole modules that vLLM takes beside an adapter.
const VLLM_SAVED: [&str; 2] = ["classifier", "score"];
/// What PEFT puts before the name of every tensor that it saves.
const PREFIX: &str = "base_model.model.";

/// PEFT, vLLM and llama.cpp about the adapter in `dir`, by its files alone: also about one that this program does not
/// read. `pruned` says that its dimensions are a pruned model's.
pub fn of_adapter(dir: &Path, pruned: bool, options: OpenOptions) -> Result<Vec<Reader>> {
    let path = dir.join(ADAPTER_CONFIG);
    let config = json::read_object(&path)?;
    let f = Fields::new(&path, "", &config);
    if !dir.join(ADAPTER_MODEL).exists() {
        let why = "has no adapter_model.safetensors".to_string();
        return Ok(["PEFT", "vLLM", "llama.cpp"]
            .map(|p| reader(p, false, std::slice::from_ref(&why)))
            .to_vec());
    }
    let weights = Weights::open(&dir.join(ADAPTER_MODEL), options)?;
    let about = About { f, weights: &weights };
    let minds = if pruned { vec!["on the pruned model only".to_string()] } else { Vec::new() };
    let with = |program, (why, mut notes): (Vec<String>, Vec<String>)| {
        let loads = why.is_empty();
        let mut all = if loads { minds.clone() } else { why };
        all.append(&mut notes);
        reader(program, loads, &all)
    };
    Ok(vec![with("PEFT", about.peft()), with("vLLM", about.vllm()?), with("llama.cpp", about.llama_cpp()?)])
}

/// An adapter's files.
struct About<'a> {
    f: Fields<'a>,
    weights: &'a Weights,
}

impl About<'_> {
    /// Whether the field `key` says something: it is there, and neither null, false, empty nor "none".
    fn set(&self, key: &str) -> bool {
        match self.f.get(key) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::String(s)) => s != "none",
            Some(Value::Array(a)) => !a.is_empty(),
            Some(Value::Object(o)) => !o.is_empty(),
            Some(_) => true,
        }
    }

    /// The first tensor whose name `is` holds of.
    fn tensor(&self, is: impl Fn(&str) -> bool) -> Option<&str> {
        self.weights.names().find(|n| is(n))
    }

    fn missing(&self, keys: &[&str]) -> Vec<String> {
        keys.iter()
            .filter(|k| self.f.get(k).is_none())
            .map(|k| format!("adapter_config.json has no {k}"))
            .collect()
    }

    /// Initialisations that change the base's weights and were left in place.
    fn base_changing(&self) -> Option<String> {
        let init = self.f.get("init_lora_weights").and_then(Value::as_str)?;
        changes_base(init).then(|| format!("init_lora_weights is {init:?}, which belongs to a changed base"))
    }

    /// What keeps PEFT from loading it, and what to mind.
    fn peft(&self) -> (Vec<String>, Vec<String>) {
        let mut why = self.missing(&["peft_type"]);
        if let Some(name) = self.tensor(|n| !n.starts_with(PREFIX)) {
            why.push(format!("it would leave out {name}, whose name does not start with {PREFIX}"));
        }
        (why, Vec::new())
    }

    /// As [`About::peft`], for vLLM.
    fn vllm(&self) -> Result<(Vec<String>, Vec<String>)> {
        let mut why = self.missing(&["r", "lora_alpha", "target_modules"]);
        for key in ["bias", "lora_bias", "use_dora"] {
            if self.set(key) {
                why.push(format!(
                    "{key} is {}, which it refuses",
                    self.f.get(key).map(json::kind).unwrap_or_default()
                ));
            }
        }
        let saved: Vec<&str> =
            self.f.array("modules_to_save")?.into_iter().flatten().filter_map(Value::as_str).collect();
        why.extend(
            saved.iter().find(|m| !VLLM_SAVED.contains(m)).map(|m| {
                format!("modules_to_save has {m:?}, and it takes only {}", VLLM_SAVED.join(" and "))
            }),
        );
        why.extend(self.base_changing());
        let mut notes = Vec::new();
        let rank = self.max_rank();
        match VLLM_RANKS.into_iter().find(|r| *r >= rank) {
            Some(r) if r > VLLM_DEFAULT_RANK => notes.push(format!("with --max-lora-rank {r}")),
            None => why.push(format!("rank {rank} is above its limit of 512")),
            _ => {}
        }
        if self.set("rank_pattern") || self.set("alpha_pattern") {
            notes.push("versions of 2025 and before ignore rank_pattern and alpha_pattern".into());
        }
        Ok((why, notes))
    }

    /// As [`About::peft`], for llama.cpp, whose converter reads the folder; `export --to gguf` needs no converter.
    fn llama_cpp(&self) -> Result<(Vec<String>, Vec<String>)> {
        let mut why = self.missing(&["lora_alpha"]);
        let factor =
            |n: &str| [".lora_A.weight", ".lora_B.weight", ".lora_embedding_"].iter().any(|p| n.contains(p));
        let norm = |n: &str| n.contains("_layernorm") || n.contains(".norm");
        if let Some(name) = self.tensor(|n| !factor(n) && !norm(n)) {
            why.push(format!("its converter fails at {name}, which is no factor"));
        }
        for key in ["alpha_pattern", "use_rslora"] {
            if self.set(key) {
                why.push(format!("its converter ignores {key}"));
            }
        }
        why.extend(self.base_changing());
        let mut notes = Vec::new();
        if self.f.text("base_model_name_or_path")?.is_none() {
            notes.push("its converter needs --base".into());
        }
        Ok((why, notes))
    }

    /// The largest rank of the tensors, and of the config where it has none.
    fn max_rank(&self) -> usize {
        let of = |n: &str| n.contains(".lora_A.").then(|| self.weights.info(n)?.1.first().copied()).flatten();
        self.weights.names().filter_map(of).max().unwrap_or(0)
    }
}

/// transformers, vLLM and llama.cpp about a model.
pub fn of_model(c: &ModelConfig) -> Vec<Reader> {
    if c.family == Family::PerLayer {
        let why = ["sizes differ by layer".to_string()];
        return ["transformers", "vLLM", "llama.cpp"].map(|p| reader(p, false, &why)).to_vec();
    }
    let divides = c.hidden.is_multiple_of(c.heads);
    let loads = divides || c.family == Family::Mistral;
    let mut transformers = Vec::new();
    if !loads {
        transformers.push(format!(
            "from 5.4 on it refuses a llama whose hidden_size {} is no multiple of its {} heads",
            c.hidden, c.heads
        ));
    }
    // A tensor-parallel size divides both head counts.
    let sizes: Vec<_> = (2..=c.kv_heads)
        .filter(|n| c.heads.is_multiple_of(*n) && c.kv_heads.is_multiple_of(*n))
        .map(|n| n.to_string())
        .collect();
    let parallel = match sizes.is_empty() {
        true => format!("no tensor parallelism with {} key/value heads", c.kv_heads),
        false => format!("tensor parallel sizes {}", sizes.join(", ")),
    };
    let mut vllm = transformers.clone();
    vllm.push(parallel);
    let mut llama = Vec::new();
    if !c.mlp.is_multiple_of(256) {
        llama.push(format!(
            "no K-quants of the MLP, whose {} channels are no multiple of 256 (--round-mlp)",
            c.mlp
        ));
    }
    vec![
        reader("transformers", loads, &transformers),
        reader("vLLM", loads, &vllm),
        reader("llama.cpp", true, &llama),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    fn model(changes: Value) -> Vec<Reader> {
        let mut v = json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 8, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 9});
        v.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        of_model(&ModelConfig::from_json(Path::new("c"), v.as_object().unwrap().clone()).unwrap())
    }

    #[test]
    fn models() {
        let r = model(json!({}));
        assert!(r.iter().all(|r| r.loads));
        assert_eq!(
            (r[0].note.as_str(), r[1].note.as_str(), r[2].note.as_str()),
            ("", "tensor parallel sizes 2, 4", "")
        );
        let odd = json!({"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 37});
        let r = model(odd.clone());
        assert!(!r[0].loads && r[0].note.contains("no multiple of its 6 heads"));
        assert!(r[2].note.contains("37 channels"));
        let mut mistral = odd;
        mistral["model_type"] = "mistral".into();
        assert!(model(mistral).iter().all(|r| r.loads));
        let layers = json!([{"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 3}]);
        let r = model(json!({"model_type": "anabranch-llama", "anabranch": {"layers": layers}}));
        assert!(r.iter().all(|r| !r.loads && r.note == "sizes differ by layer"));
    }

    #[test]
    fn a_portable_adapter_loads_everywhere() {
        use crate::checkpoint::adapter_config::AdapterConfig;
        use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
        use crate::checkpoint::module::{Module, Target};
        use crate::checkpoint::provenance::Provenance;
        use crate::checkpoint::writer::{SafetensorsWriter, TensorSpec};
        use crate::tensor::DType;
        let m = Module { layer: 0, target: Target::Q };
        let made = |config: AdapterConfig, rank: usize| {
            let dir = tempfile::tempdir().unwrap();
            let spec = PairSpec { module: m, rank, dims: (3, 3), dtypes: (DType::F32, DType::F32) };
            let mut w = AdapterWriter::create(dir.path(), config, vec![spec]).unwrap();
            w.write_f32(m, &vec![0.0; 3 * rank], &vec![0.0; 3 * rank]).unwrap();
            w.finish(None, Provenance::new("t")).unwrap();
            dir
        };
        let of = |config: AdapterConfig, rank: usize| {
            of_adapter(made(config, rank).path(), false, OpenOptions::default()).unwrap()
        };
        let r = of(AdapterConfig::portable(2, &[Target::Q], Some("org/base")), 2);
        assert!(r.iter().all(|r| r.loads && r.note.is_empty()), "{r:?}");
        let r = of(AdapterConfig::portable(17, &[Target::Q], None), 17);
        assert_eq!(
            (r[1].note.as_str(), r[2].note.as_str()),
            ("with --max-lora-rank 32", "its converter needs --base")
        );
        assert!(!of(AdapterConfig::portable(513, &[Target::Q], None), 513)[1].loads);
        let ranks = std::collections::BTreeMap::from([(m, 2), (Module { layer: 1, target: Target::Q }, 3)]);
        let r = of(AdapterConfig::patterned(&ranks, Some("b")).unwrap(), 2);
        assert!(r[0].loads && r[1].loads && !r[2].loads);

        // What a key of the config does to each of the three.
        for (key, value, loads, part) in [
            ("use_rslora", json!(true), [true, true, false], "ignores use_rslora"),
            ("alpha_pattern", json!({"q_proj": 3}), [true, true, false], "ignores alpha_pattern"),
            ("rank_pattern", json!({"v_proj": 3}), [true, true, true], "versions of 2025"),
            ("use_dora", json!(true), [true, false, true], "use_dora is true, which it refuses"),
            ("bias", json!("all"), [true, false, true], "bias is \"all\", which it refuses"),
            ("modules_to_save", json!(["lm_head"]), [true, false, true], "only classifier and score"),
            ("modules_to_save", json!(["score"]), [true, true, true], ""),
            ("init_lora_weights", json!("pissa"), [true, false, false], "belongs to a changed base"),
            ("lora_alpha", json!(null), [true, false, false], "has no lora_alpha"),
            ("peft_type", json!(null), [false, true, true], "has no peft_type"),
            ("target_modules", json!(null), [true, false, true], "has no target_modules"),
        ] {
            let dir = made(AdapterConfig::portable(2, &[Target::Q], Some("b")), 2);
            let path = dir.path().join(ADAPTER_CONFIG);
            let mut config = json::read_object(&path).unwrap();
            config.insert(key.into(), value);
            std::fs::write(&path, Value::from(config).to_string()).unwrap();
            let r = of_adapter(dir.path(), true, OpenOptions::default()).unwrap();
            assert_eq!([r[0].loads, r[1].loads, r[2].loads], loads, "{key}: {r:?}");
            assert!(r.iter().any(|r| r.note.contains(part)), "{key}: {r:?}");
            assert!(r.iter().all(|r| r.loads == r.note.contains("on the pruned model only")), "{key}: {r:?}");
        }
        for (name, loads) in [
            ("base_model.model.lm_head.weight", [true, true, false]),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", [true, true, false]),
            ("base_model.model.model.norm.weight", [true, true, true]),
            ("model.layers.0.self_attn.q_proj.lora_A.weight", [false, true, true]),
        ] {
            let dir = made(AdapterConfig::portable(2, &[Target::Q], Some("b")), 2);
            let spec = TensorSpec::new(name, DType::F32, [2, 2]);
            let mut w = SafetensorsWriter::create(&dir.path().join(ADAPTER_MODEL), vec![spec], &[]).unwrap();
            w.write(name, &[0; 16]).unwrap();
            w.finish().unwrap();
            let r = of_adapter(dir.path(), false, OpenOptions::default()).unwrap();
            assert_eq!([r[0].loads, r[1].loads, r[2].loads], loads, "{name}: {r:?}");
        }
    }
}
