//! A model's folder: `config.json` and weights, checked against each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::json;

use super::config::ModelConfig;
use super::convert::widen;
use super::digest::{self, Hasher};
use super::module::{Module, Target};
use super::provenance::Provenance;
use super::pruning::{BaseModel, Pruning};
use super::weights::{OpenOptions, TensorRef, Weights};
use crate::error::{Error, Result};
use crate::host::MatrixSource;
use crate::tensor::DType;

/// The embedding `[V, D]`.
pub const EMBED: &str = "model.embed_tokens.weight";
/// The last norm `[D]`.
pub const NORM: &str = "model.norm.weight";
/// The head `[V, D]`, absent where it is tied to the embedding.
pub const HEAD: &str = "lm_head.weight";

/// What a model's folder has beside config and weights, that a changed copy of the model needs too.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// An open model.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    weights: Weights,
    pruning: Option<Pruning>,
    provenance: Option<Provenance>,
    extra: Vec<String>,
    fingerprint: OnceLock<String>,
}

/// The tensors of a model, by name and shape, in the order of the forward pass.
pub fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut out = vec![(EMBED.to_string(), vec![config.vocab, config.hidden])];
    for l in 0..config.layers {
        out.push((norm_name(l, "input_layernorm"), vec![config.hidden]));
        for m in config.modules_of(l) {
            if m.target == Target::Gate {
                out.push((norm_name(l, "post_attention_layernorm"), vec![config.hidden]));
            }
            let (o, i) = config.dims(m.target, l);
            out.push((m.weight(), vec![o, i]));
            if config.has_bias(m.target) {
                out.push((m.bias(), vec![o]));
            }
        }
    }
    out.push((NORM.to_string(), vec![config.hidden]));
    if !config.tied {
        out.push((HEAD.to_string(), vec![config.vocab, config.hidden]));
    }
    out
}

/// `model.layers.3.input_layernorm.weight`.
pub fn norm_name(layer: usize, which: &str) -> String {
    format!("model.layers.{layer}.{which}.weight")
}

/// Buffers that old versions of transformers saved, which follow from the config.
fn is_rotary_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

impl Checkpoint {
    /// Opens the folder `dir`: every tensor that the config asks for is there, with its shape, in BF16, F16 or F32.
    pub fn open(dir: &Path, options: OpenOptions) -> Result<Checkpoint> {
        if !std::fs::metadata(dir).map_err(Error::io(dir))?.is_dir() {
            return Err(Error::file(dir, "is a file, expected a model's folder"));
        }
        let config = ModelConfig::open(dir)?;
        let weights = Weights::open(dir, options)?;
        let mut names = BTreeSet::new();
        for (name, shape) in tensors(&config) {
            if !weights.contains(&name) {
                let why = format!("is missing, expected shape {shape:?} as {} says", config.path.display());
                let at = weights.files().next().filter(|_| weights.files().count() == 1).unwrap_or(dir);
                return Err(Error::tensor(at, name, why));
            }
            weights.shaped(&name, &shape)?;
            names.insert(name);
        }
        let ignored = |n: &str| is_rotary_buffer(n) || (config.tied && n == HEAD);
        let extra =
            weights.names().filter(|n| !names.contains(*n) && !ignored(n)).map(String::from).collect();
        let pruning = Pruning::open(dir)?;
        if let Some(p) = &pruning {
            check_pruning(dir, &config, p)?;
        }
        let provenance = Provenance::open(dir)?;
        Ok(Checkpoint {
            dir: dir.to_path_buf(),
            config,
            weights,
            pruning,
            provenance,
            extra,
            fingerprint: OnceLock::new(),
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// All tensors, those that the model does not need included.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// `pruning.json`, where there is one.
    pub fn pruning(&self) -> Option<&Pruning> {
        self.pruning.as_ref()
    }

    /// `anabranch.json`, where there is one.
    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }

    /// Name and shape of every tensor of the architecture, in the order of the forward pass.
    pub fn expected(&self) -> Vec<(String, Vec<usize>)> {
        tensors(&self.config)
    }

    /// Names of tensors that the model does not need; they are not read.
    pub fn extra(&self) -> &[String] {
        &self.extra
    }

    /// A weight of two dimensions where the file has it, for a back end.
    pub fn matrix(&self, name: &str) -> Result<MatrixSource> {
        let t = self.weights.tensor(name)?;
        let &[o, i] = t.shape() else {
            return Err(t.error(format!("has shape {:?}, expected two dimensions", t.shape())));
        };
        let dtype = t.dtype();
        let (bytes, range) = t.handle()?.into_parts();
        Ok(MatrixSource { name: name.to_string(), bytes, range, dtype, size: (o, i) })
    }

    /// A norm or a bias, widened.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let t = self.weights.tensor(name)?;
        let mut out = vec![0.0; t.len()];
        widen(&mut out, t.bytes(), t.dtype());
        Ok(out)
    }

    /// The dtype of the linears: the first layer's query projection stands for all.
    pub fn dtype(&self) -> Result<DType> {
        let first = Module { layer: 0, target: Target::Q };
        Ok(self.weights.tensor(&first.weight())?.dtype())
    }

    /// The dtype that scratch is planned for: F32 where every matrix is, else that of one that is not, whose blocks are
    /// widened.
    pub fn scratch_dtype(&self) -> Result<DType> {
        Ok(self
            .matrices()?
            .iter()
            .map(|t| t.dtype())
            .find(|&dtype| dtype != DType::F32)
            .unwrap_or(DType::F32))
    }

    /// Bytes of the matrices that do not lie at a multiple of their element's size in memory.
    pub fn unaligned_bytes(&self) -> Result<u64> {
        Ok(self.matrices()?.iter().filter(|t| !t.is_aligned()).map(|t| t.bytes().len() as u64).sum())
    }

    /// The weights of two dimensions.
    fn matrices(&self) -> Result<Vec<TensorRef<'_>>> {
        let matrices = self.expected().into_iter().filter(|(_, shape)| shape.len() == 2);
        matrices.map(|(name, _)| self.weights.tensor(&name)).collect()
    }

    /// Which model this is, 64 hexadecimal digits: SHA-256 over six config fields as compact JSON and a line feed, then,
    /// for each of the model's tensors sorted by name, `[name, dtype, shape]` as compact JSON and a line feed, and 64
    /// blocks of 64 bytes at ⌊i (len − 64) / 63⌋, or all of it where it has at most 4,096 bytes.
    ///
    /// It is the same for a re-sharded or re-saved copy; a tied head, other tensors and other keys do not count.
    pub fn fingerprint(&self) -> Result<&str> {
        if let Some(f) = self.fingerprint.get() {
            return Ok(f);
        }
        let mut hasher = Hasher::default();
        let c = &self.config;
        let fields = json!({
            "hidden_size": c.hidden, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim, "intermediate_size": c.mlp, "num_hidden_layers": c.layers,
        });
        hasher.update(format!("{fields}\n").as_bytes());
        let names: BTreeSet<_> = tensors(c).into_iter().map(|(name, _)| name).collect();
        for name in names {
            let t = self.weights.tensor(&name)?;
            hasher.update(format!("{}\n", json!([name, t.dtype().name(), t.shape()])).as_bytes());
            let bytes = t.bytes();
            if bytes.len() <= 4096 {
                hasher.update(bytes);
                continue;
            }
            for i in 0..64u128 {
                // At most len − 64, a usize.
                let at = (i * (bytes.len() as u128 - 64) / 63) as usize;
                hasher.update(&bytes[at..at + 64]);
            }
        }
        Ok(self.fingerprint.get_or_init(|| hasher.finish()))
    }

    /// The fingerprint of the full model: that of `pruning.json` where this one is pruned, else its own.
    pub fn base_fingerprint(&self) -> Result<&str> {
        match &self.pruning {
            Some(p) => Ok(&p.base.fingerprint),
            None => self.fingerprint(),
        }
    }

    /// What `pruning.json` of a pruned copy of this model says about it.
    pub fn base_model(&self) -> Result<BaseModel> {
        Ok(BaseModel {
            fingerprint: self.fingerprint()?.to_string(),
            hidden_size: self.config.hidden,
            num_attention_heads: self.config.heads,
            num_key_value_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            intermediate_size: self.config.mlp,
            num_hidden_layers: self.config.layers,
        })
    }

    /// Copies tokenizer, chat template and generation settings to `dir`; gives the SHA-256 of each by name.
    pub fn copy_companions(&self, dir: &Path) -> Result<BTreeMap<String, String>> {
        let mut out = BTreeMap::new();
        for name in COMPANIONS {
            let from = self.dir.join(name);
            if from.is_file() {
                let bytes = std::fs::read(&from).map_err(Error::io(&from))?;
                out.insert(name.to_string(), digest::write_file(&dir.join(name), &bytes)?);
            }
        }
        Ok(out)
    }

    /// An error where a weight is NaN or infinite: reads all of the files.
    pub fn check_finite(&self) -> Result<()> {
        tensors(&self.config).iter().try_for_each(|(name, _)| self.weights.tensor(name)?.check_finite())
    }
}

/// A pruned model has the sizes that its `pruning.json` says.
fn check_pruning(dir: &Path, config: &ModelConfig, p: &Pruning) -> Result<()> {
    let path = dir.join(super::pruning::PRUNING);
    let b = &p.base;
    let found = (config.layers, config.hidden, config.head_dim);
    let expected = (b.num_hidden_layers, b.hidden_size, b.head_dim);
    if found != expected {
        let why = format!(
            "is of a model with (layers, hidden_size, head_dim) {expected:?}, config.json says {found:?}"
        );
        return Err(Error::file(path, why));
    }
    for l in 0..config.layers {
        let (found, expected) = (config.layer_sizes(l), p.sizes(l));
        if found != expected {
            return Err(Error::file(
                path,
                format!("keeps {expected:?} in layer {l}, config.json says {found:?}"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::writer::{ModelWriter, TensorSpec};
    use super::*;
    use serde_json::{Map, Value};

    /// Writes a model of D 6, H 4, G 2, K 2, F 5, L 2, V 7 with numbers that follow from their place.
    pub(crate) fn write(dir: &Path, changes: Value, dtype: DType, shard: u64, skip: &str) -> ModelConfig {
        let mut v = json!({"model_type": "llama", "hidden_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 2, "intermediate_size": 5, "num_hidden_layers": 2, "vocab_size": 7});
        v.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        std::fs::write(dir.join("config.json"), v.to_string()).unwrap();
        let map: Map<_, _> = v.as_object().unwrap().clone();
        let config = ModelConfig::from_json(Path::new("c"), map).unwrap();
        let list: Vec<_> = tensors(&config).into_iter().filter(|(n, _)| n != skip).collect();
        let specs: Vec<_> = list.iter().map(|(n, s)| TensorSpec::new(n.clone(), dtype, s.clone())).collect();
        for old in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            if old.to_string_lossy().contains(".safetensors") {
                std::fs::remove_file(old).unwrap();
            }
        }
        let mut w = ModelWriter::create(dir, specs, shard).unwrap();
        for (t, (name, shape)) in list.iter().enumerate() {
            let n: usize = shape.iter().product();
            let x: Vec<f32> = (0..n).map(|i| ((i * 7 + t * 3) % 31) as f32 / 16.0 - 1.0).collect();
            let mut bytes = Vec::new();
            crate::checkpoint::convert::narrow(&mut bytes, &x, dtype);
            w.write(name, &bytes).unwrap();
        }
        w.finish().unwrap();
        config
    }

    fn open(dir: &Path) -> Result<Checkpoint> {
        Checkpoint::open(dir, OpenOptions::default())
    }

    #[test]
    fn biases_ties_and_parameters() {
        let dir = tempfile::tempdir().unwrap();
        for changes in [
            json!({}),
            json!({"attention_bias": true}),
            json!({"mlp_bias": true, "tie_word_embeddings": true}),
        ] {
            let config = write(dir.path(), changes.clone(), DType::BF16, 1 << 30, "");
            let c = open(dir.path()).unwrap();
            let n: usize = c.weights.names().map(|n| c.weights.tensor(n).unwrap().len()).sum();
            assert_eq!(
                (n as u64, c.dtype().unwrap(), c.extra().len()),
                (config.parameters(), DType::BF16, 0)
            );
            let o = Module { layer: 1, target: Target::O };
            assert_eq!(c.vector(&o.bias()).is_ok(), changes.get("attention_bias").is_some());
            assert_eq!(c.matrix(HEAD).is_err(), changes.get("tie_word_embeddings").is_some());
            assert_eq!(c.matrix(EMBED).unwrap().size, (7, 6));
            c.check_finite().unwrap();
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let name = "model.layers.1.mlp.up_proj.weight";
        write(dir.path(), json!({}), DType::F32, 1 << 30, name);
        let err = open(dir.path()).unwrap_err().to_string();
        assert!(
            err.contains(
                "model.safetensors: model.layers.1.mlp.up_proj.weight is missing, expected shape [5, 6]"
            ),
            "{err}"
        );
        write(dir.path(), json!({}), DType::F32, 1 << 30, "");
        let config = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        std::fs::write(
            dir.path().join("config.json"),
            config.replace("\"vocab_size\":7", "\"vocab_size\":8"),
        )
        .unwrap();
        let err = open(dir.path()).unwrap_err().to_string();
        assert!(err.contains("embed_tokens.weight has shape [7, 6], expected [8, 6]"), "{err}");
        assert!(
            open(&dir.path().join("config.json"))
                .unwrap_err()
                .to_string()
                .contains("expected a model's folder")
        );
        std::fs::remove_file(dir.path().join("config.json")).unwrap();
        assert!(open(dir.path()).unwrap_err().to_string().contains("config.json: No such file"));
    }

    #[test]
    fn the_fingerprint_is_of_the_model_not_of_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let print = |changes: Value, dtype, shard| {
            write(dir.path(), changes, dtype, shard, "");
            open(dir.path()).unwrap().fingerprint().unwrap().to_string()
        };
        let one = print(json!({}), DType::F32, 1 << 30);
        assert_eq!(one.len(), 64);
        assert_eq!(print(json!({}), DType::F32, 200), one);
        assert!(dir.path().join("model.safetensors.index.json").exists());
        assert_eq!(print(json!({"rope_theta": 5.0}), DType::F32, 200), one);
        assert_ne!(print(json!({}), DType::BF16, 1 << 30), one);
        assert_ne!(print(json!({"tie_word_embeddings": true}), DType::F32, 1 << 30), one);
    }

    #[test]
    fn pruning_beside_it_must_agree() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), json!({}), DType::F32, 1 << 30, "");
        let mut p = super::super::pruning::tests::example();
        p.write(&dir.path().join("pruning.json")).unwrap();
        let err = open(dir.path()).unwrap_err().to_string();
        assert!(err.contains("keeps LayerSizes { heads: 2, kv_heads: 1, mlp: 2 } in layer 0"), "{err}");
        p.layers[0] = p.layers[1].clone();
        p.write(&dir.path().join("pruning.json")).unwrap();
        assert_eq!(open(dir.path()).unwrap().base_fingerprint().unwrap(), "f".repeat(64));
    }

    #[test]
    fn stories260k() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/stories260K-hf"));
        if !path.exists() {
            eprintln!("skipped: {} is absent", path.display());
            return;
        }
        let c = open(path).unwrap();
        assert!(c.extra().is_empty() && c.config.tied);
        assert_eq!(c.dtype().unwrap(), DType::F32);
        assert_eq!(c.scratch_dtype().unwrap(), DType::F32);
        assert_eq!(c.weights.total_bytes(), 4 * c.config.parameters());
        let read = Checkpoint::open(path, OpenOptions { no_mmap: true }).unwrap();
        assert_eq!(c.fingerprint().unwrap(), read.fingerprint().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let copied = c.copy_companions(dir.path()).unwrap();
        assert!(copied.contains_key("tokenizer.json"));
    }
}
