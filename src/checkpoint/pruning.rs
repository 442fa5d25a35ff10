//! `pruning.json`: which heads and channels of the full model a pruned one keeps.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::module::Target;
use super::sizes::LayerSizes;
use super::{digest, json};
use crate::error::{Error, Result};

/// The file's name.
pub const PRUNING: &str = "pruning.json";
const FORMAT: &str = "anabranch-pruning/1";
/// As for `config.json`: products of two sizes stay within u64.
const MAX_SIZE: usize = 1 << 22;
/// The most bytes of the file: four times the indices of a model with 80 layers of 28,672 channels.
const MAX_FILE: u64 = 64 << 20;

/// The six sizes of the full model, and which model it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseModel {
    /// The full model's fingerprint.
    pub fingerprint: String,
    /// D.
    pub hidden_size: usize,
    /// H.
    pub num_attention_heads: usize,
    /// G.
    pub num_key_value_heads: usize,
    /// K.
    pub head_dim: usize,
    /// F.
    pub intermediate_size: usize,
    /// L.
    pub num_hidden_layers: usize,
}

/// The training that the ratio was chosen for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingPlan {
    /// Rows of a batch.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// LoRA rank.
    pub rank: usize,
    /// The linears that are trained, by short name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    /// `bf16` or `f32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// Layers that are recomputed.
    #[serde(default)]
    pub recompute: usize,
}

/// What one layer keeps; indices ascend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptLayer {
    /// Key/value heads, each with its query heads.
    pub kv_heads: Vec<usize>,
    /// MLP channels.
    pub mlp: Vec<usize>,
}

/// A pruning plan that was carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pruning {
    /// `anabranch-pruning/1`.
    pub format: String,
    /// The full model.
    pub base: BaseModel,
    /// The ratio asked for, or chosen for the memory given.
    pub ratio: f64,
    /// How single weights are scored.
    pub importance: String,
    /// How the scores of a group are put together.
    pub reduce: String,
    /// `correct` or `llm-pruner`.
    pub gqa: String,
    /// SHA-256 of the calibration file; none where the scores need no text.
    #[serde(default)]
    pub calibration_sha256: Option<String>,
    /// The seed of everything random in it.
    pub seed: u64,
    /// The training that the ratio was chosen for.
    #[serde(default)]
    pub training_plan: Option<TrainingPlan>,
    /// One entry a layer.
    pub layers: Vec<KeptLayer>,
    /// Fields of later versions, kept as they are.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl BaseModel {
    /// The six sizes by their names in the file.
    pub fn named(&self) -> [(&'static str, usize); 6] {
        [
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
        ]
    }

    /// The sizes of each layer of the full model.
    pub fn sizes(&self) -> LayerSizes {
        LayerSizes {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            mlp: self.intermediate_size,
        }
    }
}

impl Pruning {
    /// A plan with the format's name set.
    pub fn new(base: BaseModel, ratio: f64, seed: u64, layers: Vec<KeptLayer>) -> Pruning {
        Pruning {
            format: FORMAT.into(),
            base,
            ratio,
            importance: String::new(),
            reduce: String::new(),
            gqa: String::new(),
            calibration_sha256: None,
            seed,
            training_plan: None,
            layers,
            other: Map::new(),
        }
    }

    /// Reads `pruning.json` in `dir`; none where there is no such file.
    pub fn open(dir: &Path) -> Result<Option<Pruning>> {
        let path = dir.join(PRUNING);
        if path.exists() { Pruning::read(&path).map(Some) } else { Ok(None) }
    }

    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Pruning> {
        Pruning::parse(path, &json::read_at_most(path, MAX_FILE)?)
    }

    /// Reads and checks `text`; `path` is for the errors' text.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Pruning> {
        let value = json::parse_format(path, text, FORMAT)?;
        let plan: Pruning = json::typed(path, value)?;
        plan.check().map_err(|why| Error::file(path, why))?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), String> {
        let b = &self.base;
        let width = ("num_attention_heads × head_dim", b.num_attention_heads.saturating_mul(b.head_dim));
        for (name, n) in b.named().into_iter().chain([width]) {
            if n == 0 || n > MAX_SIZE {
                return Err(format!("base.{name} is {n}, expected 1 to {MAX_SIZE}"));
            }
        }
        if !b.num_attention_heads.is_multiple_of(b.num_key_value_heads) {
            return Err(format!(
                "base.num_attention_heads is {}, no multiple of base.num_key_value_heads, which is {}",
                b.num_attention_heads, b.num_key_value_heads
            ));
        }
        if self.layers.len() != b.num_hidden_layers {
            let (found, expected) = (self.layers.len(), b.num_hidden_layers);
            return Err(format!("layers has {found} entries, base.num_hidden_layers is {expected}"));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            check_kept(&format!("layers[{l}].kv_heads"), &layer.kv_heads, b.num_key_value_heads)?;
            check_kept(&format!("layers[{l}].mlp"), &layer.mlp, b.intermediate_size)?;
        }
        Ok(())
    }

    /// Writes the file at `path`, one line; gives its SHA-256.
    pub fn write(&self, path: &Path) -> Result<String> {
        self.check().map_err(|why| Error::file(path, why))?;
        digest::write_file(path, &json::line(path, self)?)
    }

    /// The sizes that layer `l` keeps; those of the full model for a layer that is not there.
    pub fn sizes(&self, l: usize) -> LayerSizes {
        let full = self.base.sizes();
        self.layers.get(l).map_or(full, |k| LayerSizes {
            heads: k.kv_heads.len() * (full.heads / full.kv_heads),
            kv_heads: k.kv_heads.len(),
            mlp: k.mlp.len(),
        })
    }

    /// `(O, I)` of a linear of layer `l` in the pruned model.
    pub fn pruned_dims(&self, target: Target, l: usize) -> (usize, usize) {
        self.sizes(l).dims(target, self.base.hidden_size, self.base.head_dim)
    }

    /// `(O, I)` of a linear in the full model.
    pub fn full_dims(&self, target: Target) -> (usize, usize) {
        self.base.sizes().dims(target, self.base.hidden_size, self.base.head_dim)
    }

    /// The indices that layer `l` keeps of the axis of `target` that pruning cuts: output rows of q, k, v, gate and up,
    /// input columns of o and down. They ascend. Empty for a layer that is not there.
    pub fn kept(&self, target: Target, l: usize) -> Vec<usize> {
        let Some(layer) = self.layers.get(l) else { return Vec::new() };
        let expand = |width: usize| layer.kv_heads.iter().flat_map(|&g| g * width..(g + 1) * width).collect();
        let (k, b) = (self.base.head_dim, &self.base);
        match target {
            Target::K | Target::V => expand(k),
            Target::Q | Target::O => expand(b.num_attention_heads / b.num_key_value_heads * k),
            Target::Gate | Target::Up | Target::Down => layer.mlp.clone(),
        }
    }
}

/// Indices ascend, none twice, all below `n`, at least one.
fn check_kept(name: &str, kept: &[usize], n: usize) -> Result<(), String> {
    if kept.is_empty() {
        return Err(format!("{name} is empty, a layer keeps at least one"));
    }
    if let Some(w) = kept.windows(2).find(|w| w[0] >= w[1]) {
        return Err(format!("{name} has {} after {}, indices ascend", w[1], w[0]));
    }
    match kept.last() {
        Some(&last) if last >= n => Err(format!("{name} has {last}, the full model has {n}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two layers, H 4, G 2, K 2, F 5, D 6; layer 0 keeps head 1 and channels 0, 3, layer 1 all.
    pub(crate) fn example() -> Pruning {
        let base = BaseModel {
            fingerprint: "f".repeat(64),
            hidden_size: 6,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 2,
            intermediate_size: 5,
            num_hidden_layers: 2,
        };
        let layers = vec![
            KeptLayer { kv_heads: vec![1], mlp: vec![0, 3] },
            KeptLayer { kv_heads: vec![0, 1], mlp: vec![0, 1, 2, 3, 4] },
        ];
        Pruning {
            importance: "taylor1".into(),
            reduce: "sum".into(),
            gqa: "correct".into(),
            ..Pruning::new(base, 0.5, 0, layers)
        }
    }

    fn parse(v: &Value) -> Result<Pruning> {
        Pruning::parse(Path::new("pruning.json"), v.to_string().as_bytes())
    }

    #[test]
    fn indices_are_expanded_to_rows_and_columns() {
        let p = example();
        assert_eq!(p.kept(Target::K, 0), [2, 3]);
        assert_eq!(p.kept(Target::O, 0), [4, 5, 6, 7]);
        assert_eq!(p.kept(Target::Down, 0), [0, 3]);
        assert_eq!(p.kept(Target::Q, 1), (0..8).collect::<Vec<_>>());
        assert_eq!((p.pruned_dims(Target::Q, 0), p.full_dims(Target::Q)), ((4, 6), (8, 6)));
        assert_eq!((p.pruned_dims(Target::Down, 0), p.full_dims(Target::Down)), ((6, 2), (6, 5)));
    }

    #[test]
    fn written_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Pruning::open(dir.path()).unwrap(), None);
        let mut p = example();
        p.other.insert("later".into(), 3.into());
        p.training_plan = Some(TrainingPlan {
            batch: 4,
            seq: 512,
            rank: 8,
            targets: vec!["q".into()],
            precision: Some("bf16".into()),
            recompute: 0,
        });
        p.write(&dir.path().join(PRUNING)).unwrap();
        assert_eq!(Pruning::open(dir.path()).unwrap(), Some(p));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let good = serde_json::to_value(example()).unwrap();
        assert!(parse(&good).is_ok());
        for (pointer, value, expected) in [
            ("/format", "x".into(), "format is \"x\", expected \"anabranch-pruning/1\""),
            ("/layers", serde_json::json!([]), "layers has 0 entries, base.num_hidden_layers is 2"),
            (
                "/layers/0/kv_heads",
                serde_json::json!([1, 0]),
                "layers[0].kv_heads has 0 after 1, indices ascend",
            ),
            ("/layers/0/mlp", serde_json::json!([3, 3]), "layers[0].mlp has 3 after 3"),
            ("/layers/0/mlp", serde_json::json!([5]), "layers[0].mlp has 5, the full model has 5"),
            ("/layers/1/mlp", serde_json::json!([]), "layers[1].mlp is empty"),
            ("/layers/1/mlp", serde_json::json!([-1]), "invalid value: integer `-1`"),
            ("/base/num_attention_heads", 3.into(), "no multiple of base.num_key_value_heads"),
            ("/base/hidden_size", 0.into(), "base.hidden_size is 0"),
            ("/base/head_dim", u64::MAX.into(), "base.head_dim is 18446744073709551615"),
            ("/base", 3.into(), "expected struct BaseModel"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(pointer).unwrap() = value;
            let err = parse(&bad).unwrap_err().to_string();
            assert!(err.contains(expected), "{pointer}: {err}");
        }
        assert!(parse(&serde_json::json!({})).unwrap_err().to_string().contains("has no format"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pruning::parse(Path::new("p"), &text);
        }

        /// A plan with any sizes and indices is refused, or its expansion fits the full model.
        #[test]
        fn arbitrary_plans_never_panic(
            sizes in proptest::collection::vec(prop_oneof![0usize..6, any::<usize>()], 6),
            kv in proptest::collection::vec(0usize..5, 0..3), mlp in proptest::collection::vec(0usize..7, 0..4),
        ) {
            let mut p = example();
            p.base.hidden_size = sizes[0];
            p.base.num_attention_heads = sizes[1];
            p.base.num_key_value_heads = sizes[2];
            p.base.head_dim = sizes[3];
            p.base.intermediate_size = sizes[4];
            p.layers = vec![KeptLayer { kv_heads: kv, mlp }];
            p.base.num_hidden_layers = 1;
            if let Ok(p) = Pruning::parse(Path::new("p"), &serde_json::to_vec(&p).unwrap()) {
                for t in Target::ALL {
                    let ((full_o, full_i), (o, i)) = (p.full_dims(t), p.pruned_dims(t, 0));
                    let kept = p.kept(t, 0);
                    prop_assert_eq!(kept.len(), if t.prunes_rows() { o } else { i });
                    let full = if t.prunes_rows() { full_o } else { full_i };
                    prop_assert!(kept.iter().all(|&k| k < full));
                }
            }
        }
    }
}
