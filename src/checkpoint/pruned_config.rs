//! The `config.json` of a pruned model, and writing one.

use serde_json::{Map, Value, json};

use super::config::{Family, ModelConfig};
use super::sizes::LayerSizes;
use crate::error::{Error, Result};
use crate::tensor::DType;

impl ModelConfig {
    /// This architecture with other layers, as a pruned model has them.
    ///
    /// Sizes that are equal for all layers stay in the family, or go to `mistral` where D is no multiple of H, because
    /// transformers refuses such a `llama`; a model with biases cannot, and the error names the nearest ratios that
    /// can. Sizes that differ give `anabranch-llama`. A layer without a head or a channel is an error.
    pub fn pruned(&self, sizes: &[LayerSizes]) -> Result<ModelConfig> {
        if sizes.len() != self.layers {
            let why = format!("has {} layers, sizes of {} were given", self.layers, sizes.len());
            return Err(Error::file(&self.path, why));
        }
        for (l, s) in sizes.iter().enumerate() {
            if s.kv_heads == 0 || s.heads == 0 || s.mlp == 0 || !s.heads.is_multiple_of(s.kv_heads) {
                return Err(Error::Usage(format!(
                    "layer {l} would keep {} of {} heads, {} of {} key/value heads and {} of {} MLP channels, each needs at least one: take a smaller ratio",
                    s.heads, self.heads, s.kv_heads, self.kv_heads, s.mlp, self.mlp
                )));
            }
        }
        let mut out = self.clone();
        let same = sizes.windows(2).all(|w| w[0] == w[1]);
        let Some(first) = sizes.first().filter(|_| same) else {
            out.family = Family::PerLayer;
            out.per_layer = Some(sizes.to_vec());
            return Ok(out);
        };
        (out.heads, out.kv_heads, out.mlp) = (first.heads, first.kv_heads, first.mlp);
        out.per_layer = None;
        out.family = match self.family {
            Family::Llama if self.hidden.is_multiple_of(first.heads) => Family::Llama,
            Family::Mistral => Family::Mistral,
            _ if self.attention_bias || self.mlp_bias => return Err(self.no_mistral_form(*first)),
            _ => Family::Mistral,
        };
        Ok(out)
    }

    fn no_mistral_form(&self, kept: LayerSizes) -> Error {
        let whole = LayerSizes { heads: self.heads, kv_heads: self.kv_heads, mlp: self.mlp };
        let grid = |i: usize| (i as f64 / 100.0, whole.at_ratio(i as f64 / 100.0, self.head_dim, 1).heads);
        let fits = |&(_, heads): &(f64, usize)| heads > 0 && self.hidden.is_multiple_of(heads);
        let below = (1..100).map(grid).filter(fits).rfind(|(_, heads)| *heads > kept.heads);
        let above = (1..100).map(grid).filter(fits).find(|(_, heads)| *heads < kept.heads);
        let near: Vec<_> =
            below.into_iter().chain(above).map(|(a, heads)| format!("{a} ({heads} heads)")).collect();
        Error::Usage(format!(
            "{} query heads would be kept, hidden_size {} is no multiple of that, and transformers loads such a model only as mistral, which has no biases; this model has. The nearest ratios that can be written: {}",
            kept.heads,
            self.hidden,
            if near.is_empty() { "none".into() } else { near.join(", ") }
        ))
    }

    /// `config.json` of this architecture with weights mostly of `dtype`: every key of the file it was read from, ours
    /// in both spellings.
    pub fn to_json(&self, dtype: DType) -> Map<String, Value> {
        let mut map = self.raw.clone();
        let mut put = |key: &str, value: Value| map.insert(key.to_string(), value);
        let dtype = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::F32 => "float32",
        };
        put("architectures", json!([self.family.architecture()]));
        put("model_type", json!(self.family.model_type()));
        put("hidden_size", json!(self.hidden));
        put("num_attention_heads", json!(self.heads));
        put("num_key_value_heads", json!(self.kv_heads));
        put("head_dim", json!(self.head_dim));
        put("intermediate_size", json!(self.mlp));
        put("num_hidden_layers", json!(self.layers));
        put("vocab_size", json!(self.vocab));
        put("max_position_embeddings", json!(self.positions));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        put("hidden_act", json!("silu"));
        put("tie_word_embeddings", json!(self.tied));
        put("dtype", json!(dtype));
        put("torch_dtype", json!(dtype));
        // Tensor-parallel slices of the training run that transformers 4 would cut the linears into.
        put("pretraining_tp", json!(1));
        match self.family {
            Family::Mistral => {
                put("sliding_window", json!(self.sliding_window));
                map.remove("attention_bias");
                map.remove("mlp_bias");
            }
            Family::Llama | Family::PerLayer => {
                put("attention_bias", json!(self.attention_bias));
                put("mlp_bias", json!(self.mlp_bias));
                if let Some(w) = self.sliding_window {
                    put("sliding_window", json!(w));
                }
            }
        }
        map.remove("anabranch");
        if let Some(layers) = &self.per_layer {
            let layers: Vec<_> = layers
                .iter()
                .map(|s| {
                    json!({"num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "intermediate_size": s.mlp})
                })
                .collect();
            let note = "sizes differ by layer: transformers cannot load this model";
            map.insert("anabranch".into(), json!({"note": note, "layers": layers}));
        }
        self.rope.write(&mut map);
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn small(changes: Value) -> ModelConfig {
        let mut v = json!({
            "model_type": "llama", "hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4,
            "intermediate_size": 100, "num_hidden_layers": 2, "vocab_size": 32, "torch_dtype": "float32",
            "attention_dropout": 0.1, "unknown": [1, {"a": null}], "attention_bias": false
        });
        v.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::from_json(Path::new("config.json"), v.as_object().unwrap().clone()).unwrap()
    }

    fn again(c: &ModelConfig) -> ModelConfig {
        ModelConfig::from_json(Path::new("again"), c.to_json(DType::BF16)).unwrap()
    }

    #[test]
    fn other_keys_are_carried_over_and_ours_stand_in_both_spellings() {
        let c = small(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}));
        let p = c.pruned(&[LayerSizes { heads: 8, kv_heads: 4, mlp: 37 }; 2]).unwrap();
        let j = p.to_json(DType::BF16);
        assert_eq!(j["unknown"], json!([1, {"a": null}]));
        assert_eq!((&j["dtype"], &j["torch_dtype"]), (&json!("bfloat16"), &json!("bfloat16")));
        assert_eq!(
            (&j["head_dim"], &j["intermediate_size"], &j["num_attention_heads"]),
            (&json!(4), &json!(37), &json!(8))
        );
        assert_eq!(j["rope_scaling"], json!({"rope_type": "linear", "factor": 2.0}));
        assert_eq!(
            j["rope_parameters"],
            json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
        );
        assert_eq!((&j["rope_theta"], &j["model_type"]), (&json!(10000.0), &json!("llama")));
        assert_eq!(again(&p).layer_sizes(1), p.layer_sizes(1));
    }

    #[test]
    fn heads_that_do_not_divide_the_width_need_the_mistral_form() {
        let fourteen = [LayerSizes { heads: 14, kv_heads: 7, mlp: 80 }; 2];
        let p = small(json!({})).pruned(&fourteen).unwrap();
        let j = p.to_json(DType::F32);
        assert_eq!(
            (&j["model_type"], &j["architectures"]),
            (&json!("mistral"), &json!(["MistralForCausalLM"]))
        );
        assert!(
            j["sliding_window"].is_null()
                && j.contains_key("sliding_window")
                && !j.contains_key("attention_bias")
        );
        assert_eq!(again(&p).longest(), 2048);
        for bias in ["attention_bias", "mlp_bias"] {
            let err = small(json!({bias: true})).pruned(&fourteen).unwrap_err();
            assert_eq!(err.exit_code(), 2);
            let err = err.to_string();
            assert!(err.contains("14 query heads") && err.contains("mistral, which has no biases"), "{err}");
            assert!(err.contains("0.09 (16 heads), 0.47 (8 heads)"), "{err}");
        }
    }

    #[test]
    fn sizes_by_layer() {
        let c = small(json!({}));
        let sizes =
            [LayerSizes { heads: 16, kv_heads: 8, mlp: 100 }, LayerSizes { heads: 6, kv_heads: 3, mlp: 11 }];
        let p = c.pruned(&sizes).unwrap();
        let j = p.to_json(DType::F32);
        assert_eq!(j["model_type"], "anabranch-llama");
        assert!(j["anabranch"]["note"].as_str().unwrap().contains("transformers cannot load"));
        let back = again(&p);
        assert_eq!([back.layer_sizes(0), back.layer_sizes(1)], sizes);
        assert_eq!(back.parameters(), p.parameters());
        assert_eq!(back.pruned(&[sizes[0]; 2]).unwrap().to_json(DType::F32).get("anabranch"), None);
    }

    #[test]
    fn a_layer_without_heads_or_channels_is_refused() {
        let c = small(json!({}));
        for (heads, kv_heads, mlp) in [(0, 0, 10), (2, 1, 0)] {
            let err = c.pruned(&[LayerSizes { heads, kv_heads, mlp }; 2]).unwrap_err();
            assert_eq!(err.exit_code(), 2);
            assert!(err.to_string().contains("each needs at least one"));
        }
        assert!(c.pruned(&[]).is_err());
    }
}
