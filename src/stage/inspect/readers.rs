//! Which other programs would load a model or an adapter as it is, and what to mind.

use serde::Serialize;

use crate::checkpoint::adapter::{Adapter, Coordinates};
use crate::checkpoint::config::{Family, ModelConfig};
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

/// PEFT, vLLM and llama.cpp about an adapter.
pub fn of_adapter(a: &Adapter) -> Result<Vec<Reader>> {
    let pruned = match a.coordinates()? {
        Coordinates::Pruned => vec!["on the pruned model only".to_string()],
        Coordinates::Full => vec![],
    };
    let patterned =
        |key: &str| a.config.to_json().get(key).is_some_and(|v| v.as_object().is_some_and(|m| !m.is_empty()));
    let (ranks, alphas) = (patterned("rank_pattern"), patterned("alpha_pattern"));
    let mut vllm = pruned.clone();
    let needed = VLLM_RANKS.into_iter().find(|r| *r >= a.max_rank());
    match needed {
        Some(r) if r > 16 => vllm.push(format!("with --max-lora-rank {r}")),
        None => vllm.push(format!("rank {} is above its limit of 512", a.max_rank())),
        _ => {}
    }
    if ranks || alphas {
        vllm.push("versions of 2025 and before ignore rank_pattern and alpha_pattern".into());
    }
    let mut llama = pruned.clone();
    if alphas {
        llama.push("its converter ignores alpha_pattern".into());
    }
    if a.config.rslora {
        llama.push("its converter ignores use_rslora".into());
    }
    if a.config.base.is_none() {
        llama.push("its converter needs --base".into());
    }
    Ok(vec![
        reader("PEFT", true, &pruned),
        reader("vLLM", needed.is_some(), &vllm),
        reader("llama.cpp", !alphas && !a.config.rslora, &llama),
    ])
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
        use crate::tensor::DType;
        let m = Module { layer: 0, target: Target::Q };
        let of = |config: AdapterConfig, rank: usize| {
            let dir = tempfile::tempdir().unwrap();
            let spec = PairSpec { module: m, rank, dims: (3, 3), dtypes: (DType::F32, DType::F32) };
            let mut w = AdapterWriter::create(dir.path(), config, vec![spec]).unwrap();
            w.write_f32(m, &vec![0.0; 3 * rank], &vec![0.0; 3 * rank]).unwrap();
            w.finish(None, Provenance::new("t")).unwrap();
            of_adapter(&Adapter::open(dir.path(), Default::default()).unwrap()).unwrap()
        };
        let r = of(AdapterConfig::portable(2, &[Target::Q], Some("org/base")), 2);
        assert!(r.iter().all(|r| r.loads && r.note.is_empty()), "{r:?}");
        let r = of(AdapterConfig::portable(17, &[Target::Q], None), 17);
        assert_eq!(
            (r[1].note.as_str(), r[2].note.as_str()),
            ("with --max-lora-rank 32", "its converter needs --base")
        );
        let ranks = std::collections::BTreeMap::from([(m, 2), (Module { layer: 1, target: Target::Q }, 3)]);
        let r = of(AdapterConfig::patterned(&ranks, Some("b")).unwrap(), 2);
        assert!(r[0].loads && r[1].loads && !r[2].loads);
    }
}
