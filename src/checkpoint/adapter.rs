//! LoRA adapters in PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::adapter_config::{ADAPTER_CONFIG, AdapterConfig};
use super::bytes;
use super::config::ModelConfig;
use super::factor::{Factor, Pair};
use super::module::{Module, Target};
use super::provenance::Provenance;
use super::pruning::Pruning;
use super::weights::{OpenOptions, Weights};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// The file with the tensors.
pub const ADAPTER_MODEL: &str = "adapter_model.safetensors";
/// What says that a folder is a part of a fusion, and no adapter.
pub const PART: &str = "part.json";
/// The longest header of an adapter that is read: 14 tensors a layer, of some 200 bytes each, of 6,000 layers.
const MAX_ADAPTER_HEADER: u64 = 16 << 20;
/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";

/// An adapter: its factors lie in the mapped file, so that many adapters can be gone through module by module.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The folder.
    pub path: PathBuf,
    /// What `adapter_config.json` says.
    pub config: AdapterConfig,
    /// The update of each module, in the order of layers and of the forward pass.
    pub modules: BTreeMap<Module, Pair>,
    /// `anabranch.json`, where there is one.
    pub provenance: Option<Provenance>,
    /// `pruning.json`, where there is one.
    pub pruning: Option<Pruning>,
}

/// Which model an adapter's shapes are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coordinates {
    /// The full model's; also those of an adapter that knows of no pruning.
    Full,
    /// The pruned model's: to be recovered.
    Pruned,
}

/// Which factor a tensor is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    A,
    B,
}

impl Adapter {
    /// Opens the folder `dir` and checks everything but the values (see [`Adapter::check_finite`]) and the base (see
    /// [`Adapter::check_base`]): kinds that are not built are refused by name, a tensor with a name that is none of a
    /// LoRA factor is an error, so are a factor without the other, ranks that differ inside a pair or from the rank
    /// that `adapter_config.json` gives, and a module that it does not name.
    pub fn open(dir: &Path, options: OpenOptions) -> Result<Adapter> {
        if !std::fs::metadata(dir).map_err(Error::io(dir))?.is_dir() {
            return Err(Error::file(dir, "is a file, expected an adapter's folder"));
        }
        if dir.join(PART).exists() {
            return Err(Error::file(
                dir,
                "is a part of a fusion: put it together with the others by `anabranch join`",
            ));
        }
        if !dir.join(ADAPTER_CONFIG).exists() {
            return Err(Error::file(dir, format!("has no {ADAPTER_CONFIG}: no adapter's folder")));
        }
        let config = AdapterConfig::open(dir)?;
        let file = dir.join(ADAPTER_MODEL);
        if !file.exists() {
            let why = match dir.join("adapter_model.bin").exists() {
                true => format!(
                    "has adapter_model.bin, which is not read because a pickle can run code: save it as {ADAPTER_MODEL}"
                ),
                false => format!("has no {ADAPTER_MODEL}"),
            };
            return Err(Error::file(dir, why));
        }
        check_header(&file)?;
        let weights = Weights::open(&file, options)?;
        let modules = pairs(&config, &weights)?;
        if modules.is_empty() {
            return Err(Error::file(&file, "holds no tensor"));
        }
        let adapter = Adapter {
            path: dir.to_path_buf(),
            config,
            modules,
            provenance: Provenance::open(dir)?,
            pruning: Pruning::open(dir)?,
        };
        adapter.coordinates()?;
        Ok(adapter)
    }

    /// The file with the tensors.
    pub fn file(&self) -> PathBuf {
        self.path.join(ADAPTER_MODEL)
    }

    /// The one rank of all modules, or none where they differ.
    pub fn uniform_rank(&self) -> Option<usize> {
        let mut ranks = self.modules.values().map(|p| p.rank);
        let first = ranks.next()?;
        ranks.all(|r| r == first).then_some(first)
    }

    /// The largest rank.
    pub fn max_rank(&self) -> usize {
        self.modules.values().map(|p| p.rank).max().unwrap_or(0)
    }

    /// The one dtype of all factors, or none where they differ.
    pub fn uniform_dtype(&self) -> Option<DType> {
        let mut dtypes = self.modules.values().flat_map(|p| [p.a.dtype(), p.b.dtype()]);
        let first = dtypes.next()?;
        dtypes.all(|d| d == first).then_some(first)
    }

    /// The linears that it sits on in any layer, in the order of the forward pass.
    pub fn targets(&self) -> Vec<Target> {
        Target::ALL.into_iter().filter(|t| self.modules.keys().any(|m| m.target == *t)).collect()
    }

    /// Numbers of both factors of all modules.
    pub fn parameters(&self) -> u64 {
        self.modules.values().map(|p| p.rank as u64 * (p.dims().0 as u64 + p.dims().1 as u64)).sum()
    }

    /// Whether the shapes are the pruned model's or the full one's; an error where they are neither. Where nothing was
    /// pruned of the modules it sits on they are both, and the answer is `Full`.
    pub fn coordinates(&self) -> Result<Coordinates> {
        let Some(pruning) = &self.pruning else { return Ok(Coordinates::Full) };
        if let Some(m) = self.modules.keys().find(|m| m.layer >= pruning.base.num_hidden_layers) {
            let why = format!("has {m}, its pruning.json has {} layers", pruning.base.num_hidden_layers);
            return Err(Error::file(self.file(), why));
        }
        let all =
            |dims: &dyn Fn(&Module) -> (usize, usize)| self.modules.iter().find(|(m, p)| p.dims() != dims(m));
        let Some(_) = all(&|m| pruning.full_dims(m.target)) else { return Ok(Coordinates::Full) };
        let Some((m, pair)) = all(&|m| pruning.pruned_dims(m.target, m.layer)) else {
            return Ok(Coordinates::Pruned);
        };
        let (found, pruned, full) =
            (pair.dims(), pruning.pruned_dims(m.target, m.layer), pruning.full_dims(m.target));
        Err(pair.b.error(format!(
            "and its A make an update of {found:?}, expected {pruned:?} of the pruned model or {full:?} of the full one, as pruning.json beside it says"
        )))
    }

    /// An error where a layer or a shape is not that of the model `base`.
    pub fn check_base(&self, base: &ModelConfig) -> Result<()> {
        for (m, pair) in &self.modules {
            if m.layer >= base.layers {
                let why =
                    format!("is of layer {}, {} has {} layers", m.layer, base.path.display(), base.layers);
                return Err(pair.a.error(why));
            }
            let (o, i) = base.dims(m.target, m.layer);
            for (factor, expected) in [(&pair.a, [pair.rank, i]), (&pair.b, [o, pair.rank])] {
                let found = [factor.rows(), factor.cols()];
                if found != expected {
                    let why = format!("has shape {found:?}, {} needs {expected:?}", base.path.display());
                    return Err(factor.error(why));
                }
            }
        }
        Ok(())
    }

    /// An error where a value is NaN or infinite: reads all of the file.
    pub fn check_finite(&self) -> Result<()> {
        self.modules.values().try_for_each(Pair::check_finite)
    }
}

/// An error where the file announces a header that no adapter has, before it is parsed. What else is wrong with it is for
/// [`Weights::open`] to say.
fn check_header(file: &Path) -> Result<()> {
    let mut length = [0; 8];
    if bytes::open(file)?.0.read_exact(&mut length).is_err() {
        return Ok(());
    }
    match u64::from_le_bytes(length) {
        n if n > MAX_ADAPTER_HEADER => Err(Error::file(
            file,
            format!("announces a header of {n} bytes, the most of an adapter is {MAX_ADAPTER_HEADER}"),
        )),
        _ => Ok(()),
    }
}

/// All pairs of the file.
fn pairs(config: &AdapterConfig, weights: &Weights) -> Result<BTreeMap<Module, Pair>> {
    let mut halves: BTreeMap<Module, [Option<Factor>; 2]> = BTreeMap::new();
    for name in weights.names() {
        let file = weights.path();
        let (module, side) = parse_name(name).map_err(|why| Error::tensor(file, name, why))?;
        if !config.targets(module)? {
            let why = format!(
                "belongs to a module that {} does not name: PEFT would drop it",
                config.path.display()
            );
            return Err(Error::tensor(file, name, why));
        }
        halves.entry(module).or_default()[side as usize] = Some(Factor::new(&weights.tensor(name)?)?);
    }
    let mut out = BTreeMap::new();
    for (module, half) in halves {
        let (a, b) = match half {
            [Some(a), Some(b)] => (a, b),
            [Some(_), None] => {
                return Err(Error::tensor(
                    weights.path(),
                    tensor_name(module, Side::B),
                    "is missing, its A is there",
                ));
            }
            _ => {
                return Err(Error::tensor(
                    weights.path(),
                    tensor_name(module, Side::A),
                    "is missing, its B is there",
                ));
            }
        };
        let pair = Pair::new(a, b, config.scale_of(module)?)?;
        let expected = config.rank_of(module)?;
        if pair.rank != expected {
            let why = format!("has rank {}, {} says {expected}", pair.rank, config.path.display());
            return Err(pair.a.error(why));
        }
        out.insert(module, pair);
    }
    Ok(out)
}

/// The name of `A` of `m` in an adapter's file.
pub fn name_a(m: Module) -> String {
    tensor_name(m, Side::A)
}

/// The name of `B` of `m` in an adapter's file.
pub fn name_b(m: Module) -> String {
    tensor_name(m, Side::B)
}

fn tensor_name(m: Module, side: Side) -> String {
    let letter = if side == Side::A { 'A' } else { 'B' };
    format!("{PREFIX}{}.lora_{letter}.weight", m.path())
}

/// Module and factor of a tensor's name, or why it is not read.
fn parse_name(name: &str) -> Result<(Module, Side), String> {
    let Some(rest) = name.strip_prefix(PREFIX) else {
        return Err(format!("is no name of a PEFT adapter, which start with {PREFIX}"));
    };
    let has = |part: &str| rest.contains(part);
    for (part, why) in [
        ("lora_magnitude_vector", "belongs to DoRA, which is not read"),
        ("lora_embedding_", "is LoRA on the embedding, which is not read"),
        ("embed_tokens", "is the embedding saved or adapted, which is not read"),
        ("lm_head", "is the head saved or adapted, which is not read"),
        ("modules_to_save", "is a whole module saved with the adapter, which is not read"),
        (".bias", "is a bias, which is not read"),
    ] {
        if has(part) {
            return Err(why.into());
        }
    }
    let parts: Vec<_> = rest.split('.').collect();
    let ["model", "layers", layer, block, proj, lora, "weight"] = parts[..] else {
        return Err(if has("lora_") {
            "is LoRA on a module that a LLaMA layer has not: model.layers.N with q, k, v, o, gate, up and down_proj are read".into()
        } else {
            "is no LoRA factor: whole modules saved with an adapter are not read".into()
        });
    };
    let target = Target::ALL.into_iter().find(|t| t.block() == block && t.proj() == proj);
    let side = match lora {
        "lora_A" => Some(Side::A),
        "lora_B" => Some(Side::B),
        _ => None,
    };
    // A number has one spelling, so that two names never mean one module.
    let layer = layer.parse().ok().filter(|n: &usize| n.to_string() == layer);
    match (layer, target, side) {
        (Some(layer), Some(target), Some(side)) => Ok((Module { layer, target }, side)),
        (None, ..) => Err("has no layer number".into()),
        (_, None, _) => Err(format!("is on {block}.{proj}, which a LLaMA layer has not")),
        (.., None) => Err(format!("has {lora} where lora_A or lora_B is expected")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::adapter_writer::{AdapterWriter, PairSpec};
    use super::super::pruning;
    use super::super::writer::{SafetensorsWriter, TensorSpec};
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn write(dir: &Path, tensors: &[(&str, &[usize])], changes: Value) {
        let mut config =
            json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        std::fs::write(dir.join(ADAPTER_CONFIG), config.to_string()).unwrap();
        let specs: Vec<_> = tensors
            .iter()
            .map(|(n, s)| {
                let whole = n.strip_prefix('!').map(String::from);
                let n = whole.unwrap_or_else(|| format!("{PREFIX}model.layers.{n}.weight"));
                TensorSpec::new(n, DType::F32, *s)
            })
            .collect();
        let mut w = SafetensorsWriter::create(&dir.join(ADAPTER_MODEL), specs.clone(), &[]).unwrap();
        for s in specs {
            w.write(&s.name, &vec![0; s.bytes().unwrap() as usize]).unwrap();
        }
        w.finish().unwrap();
    }

    fn open(dir: &Path) -> Result<Adapter> {
        Adapter::open(dir, OpenOptions::default())
    }

    const Q: [(&str, &[usize]); 2] =
        [("0.self_attn.q_proj.lora_A", &[2, 6]), ("0.self_attn.q_proj.lora_B", &[8, 2])];

    #[test]
    fn real_adapters() {
        for name in ["tinyllama-arona-finetuned-75", "tinyllama-arona-lora-180"] {
            let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/adapters")).join(name);
            if !path.exists() {
                eprintln!("skipped: {} is absent", path.display());
                continue;
            }
            let a = open(&path).unwrap();
            assert_eq!(
                (a.modules.len(), a.uniform_rank(), a.uniform_dtype()),
                (44, Some(4), Some(DType::F32))
            );
            assert_eq!(a.targets(), [Target::Q, Target::V]);
            assert!(a.modules.values().all(|p| p.scale == 4.0 && p.a.cols() == 2048));
            assert_eq!(a.parameters(), 563_200);
            a.check_finite().unwrap();
        }
    }

    #[test]
    fn written_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let (m, n) = (Module { layer: 0, target: Target::Q }, Module { layer: 1, target: Target::Down });
        let specs = vec![
            PairSpec { module: m, rank: 3, dims: (4, 2), dtypes: (DType::F32, DType::F32) },
            PairSpec { module: n, rank: 3, dims: (2, 5), dtypes: (DType::BF16, DType::F16) },
        ];
        let config = AdapterConfig::portable(3, &[Target::Q, Target::Down], Some("org/base"));
        let mut w = AdapterWriter::create(dir.path(), config, specs).unwrap();
        let a: Vec<f64> = (0..4).map(|i| f64::from(i) + 0.5).collect();
        let b: Vec<f64> = (0..8).map(|i| f64::from(i) - 2.0).collect();
        w.write_folded(m, &a, &b, 2, 4.0).unwrap();
        w.write_f32(n, &[1.0; 15], &[0.5; 6]).unwrap();
        let mut provenance = Provenance::new("fuse");
        provenance.base_fingerprint = Some("abc".into());
        w.finish(None, provenance).unwrap();
        let back = open(dir.path()).unwrap();
        let p = &back.modules[&m];
        assert_eq!((p.rank, p.scale, p.dims()), (3, 1.0, (4, 2)));
        assert_eq!(p.a.to_f64(), [0.5, 1.5, 2.5, 3.5, 0.0, 0.0]);
        assert_eq!(p.b.to_f32(), [-8.0, -4.0, 0.0, 0.0, 4.0, 0.0, 8.0, 12.0, 0.0, 16.0, 20.0, 0.0]);
        let p = &back.modules[&n];
        assert_eq!((p.a.dtype(), p.b.dtype(), p.b.to_f64()), (DType::BF16, DType::F16, vec![0.5; 6]));
        assert_eq!(back.provenance.as_ref().unwrap().files.len(), 2);
        assert!(
            Provenance::verify(dir.path())
                .unwrap()
                .values()
                .all(|v| *v == super::super::provenance::Verdict::Same)
        );
        assert_eq!(back.config.base.as_deref(), Some("org/base"));
    }

    #[test]
    fn numbers_that_overflow_the_file_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let m = Module { layer: 0, target: Target::Q };
        let specs = vec![PairSpec { module: m, rank: 1, dims: (1, 1), dtypes: (DType::F16, DType::F16) }];
        let config = AdapterConfig::portable(1, &[Target::Q], None);
        let mut w = AdapterWriter::create(dir.path(), config, specs).unwrap();
        let err = w.write_folded(m, &[1.0], &[1000.0], 1, 1000.0).unwrap_err().to_string();
        assert!(err.contains("lora_B.weight would hold NaN or infinity at element 0 in F16"), "{err}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        type Case<'a> = (&'a [(&'a str, &'a [usize])], Value, &'a str);
        let cases: [Case<'_>; 15] = [
            (
                &[("0.self_attn.q_proj.lora_A", &[2, 6])],
                json!({}),
                "q_proj.lora_B.weight is missing, its A is there",
            ),
            (&[Q[1]], json!({}), "q_proj.lora_A.weight is missing, its B is there"),
            (
                &[Q[0], ("0.self_attn.q_proj.lora_B", &[8, 3])],
                json!({}),
                "q_proj.lora_B.weight has shape [8, 3], so rank 3",
            ),
            (&Q, json!({"r": 4}), "lora_A.weight has rank 2, "),
            (&Q, json!({"target_modules": ["v_proj"]}), "belongs to a module that "),
            (&[], json!({}), "holds no tensor"),
            (&[Q[0], ("0.self_attn.q_proj.lora_B", &[8])], json!({}), "has shape [8], expected a matrix"),
            (
                &[Q[0], ("0.self_attn.q_proj.lora_B", &[0, 2])],
                json!({}),
                "has shape [0, 2], expected a matrix",
            ),
            (
                &[("!base_model.model.lm_head.lora_A.weight", &[2, 6])],
                json!({}),
                "lm_head.lora_A.weight is the head",
            ),
            (
                &[("!base_model.model.model.embed_tokens.lora_embedding_A", &[2, 6])],
                json!({}),
                "is LoRA on the embedding",
            ),
            (&[("0.self_attn.q_proj.lora_magnitude_vector", &[2])], json!({}), "belongs to DoRA"),
            (
                &[("!base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", &[2])],
                json!({}),
                "is a bias",
            ),
            (&[("!base_model.model.model.norm.weight", &[2])], json!({}), "is no LoRA factor"),
            (&[("00.self_attn.q_proj.lora_A", &[2, 6])], json!({}), "has no layer number"),
            (&[("0.mlp.q_proj.lora_A", &[2, 6])], json!({}), "is on mlp.q_proj, which a LLaMA layer has not"),
        ];
        for (tensors, changes, expected) in cases {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), tensors, changes);
            let err = open(dir.path()).unwrap_err().to_string();
            assert!(err.contains(expected), "{tensors:?}: {err}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(open(dir.path()).unwrap_err().to_string().contains("has no adapter_config.json"));
        write(dir.path(), &Q, json!({}));
        assert!(
            open(&dir.path().join(ADAPTER_MODEL)).unwrap_err().to_string().contains("is a file, expected")
        );
        std::fs::rename(dir.path().join(ADAPTER_MODEL), dir.path().join("adapter_model.bin")).unwrap();
        assert!(open(dir.path()).unwrap_err().to_string().contains("pickle can run code"));
    }

    #[test]
    fn shapes_against_the_base() {
        let config = |changes: Value| {
            let mut v = json!({"model_type": "llama", "hidden_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 2, "intermediate_size": 5, "num_hidden_layers": 1, "vocab_size": 9});
            v.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            ModelConfig::from_json(Path::new("config.json"), v.as_object().unwrap().clone()).unwrap()
        };
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &Q, json!({}));
        let a = open(dir.path()).unwrap();
        a.check_base(&config(json!({}))).unwrap();
        let err = a.check_base(&config(json!({"hidden_size": 8}))).unwrap_err().to_string();
        assert!(err.contains("lora_A.weight has shape [2, 6], config.json needs [2, 8]"), "{err}");
        let err = a.check_base(&config(json!({"head_dim": 4}))).unwrap_err().to_string();
        assert!(err.contains("lora_B.weight has shape [8, 2], config.json needs [16, 2]"), "{err}");
        write(dir.path(), &[("7.mlp.up_proj.lora_A", &[2, 6]), ("7.mlp.up_proj.lora_B", &[5, 2])], json!({}));
        let err = open(dir.path()).unwrap().check_base(&config(json!({}))).unwrap_err().to_string();
        assert!(err.contains("is of layer 7, config.json has 1 layers"), "{err}");
    }

    #[test]
    fn pruned_or_full_is_told_by_the_shapes() {
        let dir = tempfile::tempdir().unwrap();
        pruning::tests::example().write(&dir.path().join(pruning::PRUNING)).unwrap();
        write(dir.path(), &Q, json!({}));
        assert_eq!(open(dir.path()).unwrap().coordinates().unwrap(), Coordinates::Full);
        write(dir.path(), &[Q[0], ("0.self_attn.q_proj.lora_B", &[4, 2])], json!({}));
        assert_eq!(open(dir.path()).unwrap().coordinates().unwrap(), Coordinates::Pruned);
        write(dir.path(), &[Q[0], ("0.self_attn.q_proj.lora_B", &[5, 2])], json!({}));
        let err = open(dir.path()).unwrap_err().to_string();
        assert!(
            err.contains(
                "an update of (5, 6), expected (4, 6) of the pruned model or (8, 6) of the full one"
            ),
            "{err}"
        );
        write(
            dir.path(),
            &[("2.self_attn.q_proj.lora_A", &[2, 6]), ("2.self_attn.q_proj.lora_B", &[4, 2])],
            json!({}),
        );
        let err = open(dir.path()).unwrap_err().to_string();
        assert!(err.contains("has layer 2 q, its pruning.json has 2 layers"), "{err}");
    }

    proptest! {
        #[test]
        fn names_are_read_in_one_spelling(name in r"(base_model\.model\.)?(model\.layers\.)?[0-9a-z_.]{0,30}(\.lora_[AB])?(\.weight)?") {
            if let Ok((m, side)) = parse_name(&name) {
                prop_assert_eq!(tensor_name(m, side), name);
            }
        }

        #[test]
        fn every_module_has_a_name(layer in any::<usize>(), t in 0usize..7) {
            let m = Module { layer, target: Target::ALL[t] };
            prop_assert!(matches!(parse_name(&name_a(m)), Ok((n, Side::A)) if n == m));
            prop_assert!(matches!(parse_name(&name_b(m)), Ok((n, Side::B)) if n == m));
        }
    }
}
