//! `adapter_config.json` of a PEFT LoRA adapter: what is read, what is refused and why, and writing one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::json;
use super::module::{Module, Target};
use crate::error::{Error, Result};

/// The file's name.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
const MAX_RANK: usize = 1 << 20;
/// Patterns for every module of the largest model, several times over.
const MAX_CONFIG: u64 = 4 << 20;

/// A pattern of PEFT with its text.
#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    regex: Regex,
}

impl Pattern {
    fn matches(&self, path: &Path, name: &str) -> Result<bool> {
        self.regex.is_match(name).map_err(|e| {
            Error::file(path, format!("pattern {:?} cannot be matched against {name}: {e}", self.text))
        })
    }
}

/// Which modules an adapter sits on.
#[derive(Clone, Debug)]
enum Targets {
    /// `all-linear`.
    All,
    /// Names, or ends of names.
    Names(Vec<String>),
    /// A regular expression over the whole name.
    Regex(Pattern),
}

/// What `adapter_config.json` says.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// The file it was read from; empty for one that was made.
    pub path: PathBuf,
    /// `r`, where no pattern says otherwise.
    pub rank: usize,
    /// `lora_alpha`, where no pattern says otherwise.
    pub alpha: f64,
    /// Whether the scale is α/√r rather than α/r.
    pub rslora: bool,
    /// `base_model_name_or_path`.
    pub base: Option<String>,
    targets: Targets,
    layers: Option<Vec<usize>>,
    excluded: Option<Targets>,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
    raw: Map<String, Value>,
}

/// Keys that change what an adapter means and are not built; null, false, empty and the value given are fine.
const REFUSED: [(&str, &str); 14] = [
    ("bias", "trained biases are not read; only \"none\" is"),
    ("lora_bias", "a bias on lora_B is not read"),
    ("use_dora", "DoRA is not read"),
    ("fan_in_fan_out", "transposed weights are not read"),
    ("modules_to_save", "whole modules saved with an adapter are not read"),
    ("layer_replication", "replicated layers are not read"),
    ("trainable_token_indices", "trained embedding rows are not read"),
    ("target_parameters", "LoRA on bare parameters is not read"),
    ("alora_invocation_tokens", "activated LoRA is not read"),
    ("arrow_config", "routed adapters are not read"),
    ("use_qalora", "QA-LoRA is not read"),
    ("use_bdlora", "block-diagonal LoRA is not read"),
    ("monteclora_config", "MonteCLoRA is not read"),
    ("kasa_config", "KaSA is not read"),
];

/// Initialisations that change the base's weights, so that the adapter alone means nothing on the original base.
const BASE_CHANGING: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

impl AdapterConfig {
    /// Reads `adapter_config.json` in the folder `dir`.
    pub fn open(dir: &Path) -> Result<AdapterConfig> {
        let path = dir.join(ADAPTER_CONFIG);
        AdapterConfig::from_json(&path, json::object(&path, &json::read_at_most(&path, MAX_CONFIG)?)?)
    }

    /// Reads the object `raw`; `path` is for the errors' text.
    pub fn from_json(path: &Path, raw: Map<String, Value>) -> Result<AdapterConfig> {
        let f = Fields::new(path, "", &raw);
        match f.text("peft_type")? {
            Some("LORA") => {}
            Some(other) => return Err(f.error("peft_type", format!("is {other:?}, expected \"LORA\""))),
            None => return Err(Error::file(path, "has no peft_type, expected \"LORA\"")),
        }
        refuse(&f)?;
        let layers = match f.get("layers_to_transform") {
            None => None,
            Some(Value::Array(a)) if a.is_empty() => None,
            Some(v) => {
                let one = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
                let list =
                    v.as_array().map_or_else(|| one(v).map(|n| vec![n]), |a| a.iter().map(one).collect());
                let why = || {
                    f.error("layers_to_transform", format!("is {}, expected layer numbers", json::kind(v)))
                };
                Some(list.ok_or_else(why)?)
            }
        };
        let ranks = patterns(&f, "rank_pattern", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))?;
        if let Some((p, r)) = ranks.iter().find(|(_, r)| *r == 0 || *r > MAX_RANK) {
            return Err(
                f.error("rank_pattern", format!("gives {:?} rank {r}, expected 1 to {MAX_RANK}", p.text))
            );
        }
        let config = AdapterConfig {
            path: path.to_path_buf(),
            rank: f.count("r", MAX_RANK)?.unwrap_or(8),
            alpha: f.number("lora_alpha")?.unwrap_or(8.0),
            rslora: f.flag("use_rslora")?.unwrap_or(false),
            base: f.text("base_model_name_or_path")?.map(String::from),
            targets: targets(&f, "target_modules")?.ok_or_else(|| {
                Error::file(path, "has no target_modules, expected names or \"all-linear\"")
            })?,
            layers,
            excluded: targets(&f, "exclude_modules")?,
            ranks,
            alphas: patterns(&f, "alpha_pattern", |v| v.as_f64().filter(|x| x.is_finite()))?,
            raw: Map::new(),
        };
        Ok(AdapterConfig { raw, ..config })
    }

    /// PEFT's own form, as a fresh training run writes it: `rank`, `alpha` and `dropout` as given, for all `targets`.
    pub fn peft(
        rank: usize,
        alpha: f64,
        dropout: f64,
        targets: &[Target],
        base: Option<&str>,
    ) -> AdapterConfig {
        let names: Vec<_> = targets.iter().map(|t| t.proj().to_string()).collect();
        // The keys that every reader knows; a null for a key that only new ones know would break old ones.
        let Value::Object(raw) = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": null,
            "r": rank, "lora_alpha": whole(alpha), "lora_dropout": dropout, "bias": "none", "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "modules_to_save": null, "use_rslora": false,
            "use_dora": false, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": null,
            "layers_pattern": null, "target_modules": names,
        }) else {
            unreachable!("the literal above is an object")
        };
        AdapterConfig {
            path: PathBuf::new(),
            rank,
            alpha,
            rslora: false,
            base: base.map(String::from),
            targets: Targets::Names(names),
            layers: None,
            excluded: None,
            ranks: Vec::new(),
            alphas: Vec::new(),
            raw,
        }
    }

    /// The portable form: one rank for all, `lora_alpha` = r, so that the scale is 1 in every reader.
    pub fn portable(rank: usize, targets: &[Target], base: Option<&str>) -> AdapterConfig {
        AdapterConfig::peft(rank, rank as f64, 0.0, targets, base)
    }

    /// PEFT's own form with a rank by module and scale 1: the largest rank is `r`, the others are patterns.
    pub fn patterned(ranks: &BTreeMap<Module, usize>, base: Option<&str>) -> Result<AdapterConfig> {
        let rank = ranks.values().copied().max().unwrap_or(1);
        let targets: Vec<_> =
            Target::ALL.into_iter().filter(|t| ranks.keys().any(|m| m.target == *t)).collect();
        let mut config = AdapterConfig::portable(rank, &targets, base);
        let (mut by_rank, mut by_alpha) = (Map::new(), Map::new());
        for (m, &r) in ranks.iter().filter(|(_, r)| **r != rank) {
            let text = m.path().replace('.', r"\.");
            let pattern = Pattern { regex: compile(Path::new(""), &ended(&text))?, text };
            by_rank.insert(pattern.text.clone(), r.into());
            by_alpha.insert(pattern.text.clone(), r.into());
            config.alphas.push((pattern.clone(), r as f64));
            config.ranks.push((pattern, r));
        }
        config.raw.insert("rank_pattern".into(), by_rank.into());
        config.raw.insert("alpha_pattern".into(), by_alpha.into());
        Ok(config)
    }

    /// The rank of `m`: the first matching entry of `rank_pattern`, else `r`.
    pub fn rank_of(&self, m: Module) -> Result<usize> {
        Ok(self.first(&self.ranks, m)?.unwrap_or(self.rank))
    }

    /// The scale s of `m`: α/r, or α/√r under rsLoRA, with its own α and r.
    pub fn scale_of(&self, m: Module) -> Result<f64> {
        let alpha = self.first(&self.alphas, m)?.unwrap_or(self.alpha);
        let rank = self.rank_of(m)? as f64;
        Ok(alpha / if self.rslora { rank.sqrt() } else { rank })
    }

    fn first<T: Copy>(&self, patterns: &[(Pattern, T)], m: Module) -> Result<Option<T>> {
        let name = m.path();
        for (pattern, value) in patterns {
            if pattern.matches(&self.path, &name)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// Whether the adapter sits on `m`: PEFT drops the tensors of any other module.
    pub fn targets(&self, m: Module) -> Result<bool> {
        let name = m.path();
        let of = |t: &Targets| match t {
            Targets::All => Ok(true),
            Targets::Names(names) => Ok(names
                .iter()
                .any(|n| name == *n || name.strip_suffix(n.as_str()).is_some_and(|s| s.ends_with('.')))),
            Targets::Regex(p) => p.matches(&self.path, &name),
        };
        let here = self.layers.as_ref().is_none_or(|l| l.contains(&m.layer));
        Ok(here && of(&self.targets)? && !self.excluded.as_ref().map_or(Ok(false), of)?)
    }

    /// The file's content.
    pub fn to_json(&self) -> &Map<String, Value> {
        &self.raw
    }
}

/// `alpha` as a whole number where it is one: PEFT declares an int.
fn whole(alpha: f64) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 2f64.powi(53) { json!(alpha as i64) } else { json!(alpha) }
}

/// Whether the initialisation `init` changes the base's weights, so that an adapter means nothing on the original ones.
pub fn changes_base(init: &str) -> bool {
    BASE_CHANGING.iter().any(|b| init.to_lowercase().starts_with(b))
}

fn refuse(f: &Fields<'_>) -> Result<()> {
    for (key, why) in REFUSED {
        let fine = match f.get(key) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::String(s)) => s == "none",
            Some(Value::Array(a)) => a.is_empty(),
            Some(Value::Object(o)) => o.is_empty(),
            Some(_) => false,
        };
        if !fine {
            let found = f.get(key).map(json::kind).unwrap_or_default();
            return Err(f.error(key, format!("is {found}: {why}")));
        }
    }
    match f.get("init_lora_weights") {
        Some(Value::String(s)) if changes_base(s) => Err(f.error(
            "init_lora_weights",
            format!("is {s:?}, which changes the base's weights: convert the adapter to plain LoRA when saving it (path_initial_model_for_weight_conversion in PEFT)"),
        )),
        _ => Ok(()),
    }
}

fn compile(path: &Path, text: &str) -> Result<Regex> {
    if text.len() > 10_000 {
        return Err(Error::file(
            path,
            format!("a pattern has {} characters, at most 10000 are read", text.len()),
        ));
    }
    Regex::new(text).map_err(|e| Error::file(path, format!("pattern {text:?} is no regular expression: {e}")))
}

/// PEFT's way to match the end of a name.
fn ended(text: &str) -> String {
    format!(r"^(?:.*\.)?(?:{text})$")
}

fn targets(f: &Fields<'_>, key: &str) -> Result<Option<Targets>> {
    let is_all = |s: &str| s.to_lowercase() == "all-linear";
    let Some(v) = f.get(key) else { return Ok(None) };
    let wrong = || f.error(key, format!("is {}, expected names, a pattern or \"all-linear\"", json::kind(v)));
    match v {
        Value::String(s) if is_all(s) => Ok(Some(Targets::All)),
        Value::String(s) => {
            let regex = compile(f.path(), &format!("^(?:{s})$"))?;
            Ok(Some(Targets::Regex(Pattern { text: s.clone(), regex })))
        }
        Value::Array(a) => {
            let names: Option<Vec<_>> = a.iter().map(|v| v.as_str().map(String::from)).collect();
            let names = names.ok_or_else(wrong)?;
            match &names[..] {
                [one] if is_all(one) => Ok(Some(Targets::All)),
                [] if key == "exclude_modules" => Ok(None),
                _ => Ok(Some(Targets::Names(names))),
            }
        }
        _ => Err(wrong()),
    }
}

fn patterns<T>(f: &Fields<'_>, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Pattern, T)>> {
    let Some(map) = f.object(key)? else { return Ok(Vec::new()) };
    map.iter()
        .map(|(text, v)| {
            let value = read(v).ok_or_else(|| {
                f.error(key, format!("gives {text:?} {}, expected a number", json::kind(v)))
            })?;
            Ok((Pattern { text: text.clone(), regex: compile(f.path(), &ended(text))? }, value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(changes: Value) -> Result<AdapterConfig> {
        let mut v = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "mlp.up_proj"]});
        v.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        AdapterConfig::from_json(Path::new("adapter_config.json"), v.as_object().unwrap().clone())
    }

    fn module(layer: usize, target: Target) -> Module {
        Module { layer, target }
    }

    #[test]
    fn scale_rank_and_patterns_as_peft_reads_them() {
        let q0 = module(0, Target::Q);
        let c = read(json!({})).unwrap();
        assert_eq!((c.rank_of(q0).unwrap(), c.scale_of(q0).unwrap()), (4, 4.0));
        assert_eq!(read(json!({"use_rslora": true})).unwrap().scale_of(q0).unwrap(), 8.0);
        let c = read(json!({
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 8, "(?<!x)up_proj": 16},
            "alpha_pattern": {"self_attn.q_proj": 32},
        }))
        .unwrap();
        assert_eq!(c.rank_of(module(0, Target::Q)).unwrap(), 8);
        assert_eq!(c.rank_of(module(1, Target::Q)).unwrap(), 2);
        assert_eq!(c.rank_of(module(11, Target::Q)).unwrap(), 8);
        assert_eq!(c.rank_of(module(0, Target::Up)).unwrap(), 16);
        assert_eq!(c.rank_of(module(0, Target::V)).unwrap(), 4);
        assert_eq!(c.scale_of(module(1, Target::Q)).unwrap(), 16.0);
        assert_eq!(c.scale_of(module(0, Target::Up)).unwrap(), 1.0);
    }

    #[test]
    fn targets_by_name_by_pattern_and_all() {
        let on = |changes: Value, l, t| read(changes).unwrap().targets(module(l, t)).unwrap();
        assert!(on(json!({}), 3, Target::Q) && on(json!({}), 3, Target::Up) && !on(json!({}), 3, Target::K));
        assert!(on(json!({"target_modules": ["model.layers.3.self_attn.k_proj"]}), 3, Target::K));
        assert!(!on(json!({"target_modules": ["proj"]}), 3, Target::K));
        let re = json!({"target_modules": r".*layers\.(0|1)\..*(q|k)_proj"});
        assert!(on(re.clone(), 1, Target::K) && !on(re.clone(), 2, Target::K) && !on(re, 0, Target::V));
        for all in [json!("all-linear"), json!("ALL-LINEAR"), json!(["all-linear"])] {
            assert!(on(json!({"target_modules": all}), 9, Target::Down));
        }
        let some = json!({"target_modules": "all-linear", "layers_to_transform": [1, 2], "exclude_modules": ["v_proj"]});
        assert!(on(some.clone(), 1, Target::Q) && !on(some.clone(), 0, Target::Q) && !on(some, 1, Target::V));
        assert!(!on(json!({"layers_to_transform": 1}), 0, Target::Q));
    }

    #[test]
    fn refused_by_name_and_reason() {
        for (changes, expected) in [
            (json!({"peft_type": "IA3"}), "peft_type is \"IA3\", expected \"LORA\""),
            (json!({"bias": "all"}), "bias is \"all\": trained biases are not read"),
            (json!({"bias": "lora_only"}), "bias is \"lora_only\""),
            (json!({"lora_bias": true}), "lora_bias is true"),
            (json!({"use_dora": true}), "use_dora is true: DoRA is not read"),
            (json!({"fan_in_fan_out": true}), "fan_in_fan_out is true"),
            (json!({"modules_to_save": ["lm_head"]}), "modules_to_save is an array: whole modules"),
            (json!({"layer_replication": [[0, 4]]}), "layer_replication"),
            (json!({"trainable_token_indices": [5]}), "trainable_token_indices"),
            (json!({"alora_invocation_tokens": [5]}), "alora_invocation_tokens"),
            (
                json!({"init_lora_weights": "pissa_niter_4"}),
                "init_lora_weights is \"pissa_niter_4\", which changes the base's weights",
            ),
            (json!({"init_lora_weights": "OLoRA"}), "which changes the base's weights"),
            (json!({"r": 0}), "r is 0, expected 1 to"),
            (json!({"r": "4"}), "r is \"4\", expected a whole number"),
            (json!({"lora_alpha": []}), "lora_alpha is an array, expected a number"),
            (json!({"target_modules": null}), "has no target_modules"),
            (json!({"target_modules": [1]}), "target_modules is an array, expected names"),
            (json!({"target_modules": "("}), "is no regular expression"),
            (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern gives \"q_proj\" rank 0"),
            (json!({"rank_pattern": {"(": 1}}), "is no regular expression"),
            (json!({"alpha_pattern": {"q_proj": "x"}}), "alpha_pattern gives \"q_proj\" \"x\""),
            (json!({"layers_to_transform": [-1]}), "layers_to_transform is an array, expected layer numbers"),
        ] {
            let err = read(changes.clone()).unwrap_err().to_string();
            assert!(err.contains(expected), "{changes}: {err}");
        }
        for fine in [
            json!({"bias": "none"}),
            json!({"use_dora": false, "modules_to_save": []}),
            json!({"init_lora_weights": "gaussian"}),
            json!({"init_lora_weights": "eva"}),
            json!({"loftq_config": {}, "megatron_core": "megatron.core"}),
        ] {
            assert!(read(fine.clone()).is_ok(), "{fine}");
        }
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let again =
            |c: &AdapterConfig| AdapterConfig::from_json(Path::new("again"), c.to_json().clone()).unwrap();
        let m = module(7, Target::V);
        for c in [
            AdapterConfig::peft(8, 16.0, 0.05, &Target::ALL, Some("org/model")),
            AdapterConfig::peft(8, 1.5, 0.0, &[Target::V], None),
            AdapterConfig::portable(12, &Target::ALL, None),
        ] {
            let back = again(&c);
            assert_eq!((back.rank, back.alpha, &back.base), (c.rank, c.alpha, &c.base));
            assert_eq!(back.scale_of(m).unwrap(), c.scale_of(m).unwrap());
            assert!(back.targets(m).unwrap());
        }
        let c = AdapterConfig::portable(12, &Target::ALL, None);
        assert!(c.to_json()["lora_alpha"].is_i64(), "PEFT declares an int");
        let ranks = BTreeMap::from([(m, 3), (module(0, Target::Q), 5), (module(17, Target::V), 5)]);
        let back = again(&AdapterConfig::patterned(&ranks, None).unwrap());
        for (&m, &r) in &ranks {
            assert_eq!((back.rank_of(m).unwrap(), back.scale_of(m).unwrap()), (r, 1.0));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_fields_never_panic(
            key in prop_oneof![Just("r"), Just("target_modules"), Just("rank_pattern"), Just("bias"), Just("layers_to_transform"), Just("lora_alpha")],
            text in ".{0,20}", n in any::<f64>(), which in 0..5,
        ) {
            let value = match which {
                0 => json!(text),
                1 => json!([text]),
                2 => json!({text: n}),
                3 => json!(n),
                _ => json!({text: 3}),
            };
            if let Ok(c) = read(json!({key: value})) {
                for t in Target::ALL {
                    let m = module(3, t);
                    let (_, _, _) = (c.targets(m), c.rank_of(m), c.scale_of(m));
                }
            }
        }
    }
}
