//! `inspect`: what a folder holds, which programs would load it, and whether its bytes are those that were written.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::adapter::{Adapter, Coordinates};
use crate::checkpoint::adapter_config::ADAPTER_CONFIG;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::config::{CONFIG, ModelConfig};
use crate::checkpoint::manifest::Chain;
use crate::checkpoint::provenance::{PROVENANCE, Provenance, Verdict};
use crate::checkpoint::pruning::Pruning;
use crate::checkpoint::weights::OpenOptions;
use crate::error::{Error, Result};
use crate::model::memory::human_bytes;

pub mod readers;
pub mod spectrum;

use readers::Reader;
use spectrum::Spectrum;

/// What a model is.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFacts {
    /// `model_type`.
    pub model_type: &'static str,
    /// Parameters; a tied head counts once.
    pub parameters: u64,
    /// Bytes of all tensors in the files.
    pub bytes: u64,
    /// Numbers by dtype.
    pub dtypes: BTreeMap<String, u64>,
    /// Files of weights.
    pub files: usize,
    /// L.
    pub layers: usize,
    /// D.
    pub hidden: usize,
    /// H, the largest where layers differ.
    pub heads: usize,
    /// G, the largest where layers differ.
    pub kv_heads: usize,
    /// K.
    pub head_dim: usize,
    /// F, the largest where layers differ.
    pub mlp: usize,
    /// V.
    pub vocab: usize,
    /// The longest sequence.
    pub positions: usize,
    /// Rope kind and base.
    pub rope: String,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether linears have biases: of attention, of the MLP.
    pub biases: [bool; 2],
    /// Which model this is.
    pub fingerprint: String,
    /// Tensors in the files that the model does not need.
    pub extra: Vec<String>,
    /// What it was pruned from, and by how much.
    pub pruned: Option<PrunedFacts>,
}

/// What a model or adapter was pruned from.
#[derive(Clone, Debug, Serialize)]
pub struct PrunedFacts {
    /// The full model.
    pub base_fingerprint: String,
    /// The ratio asked for.
    pub ratio: f64,
    /// How single weights were scored.
    pub importance: String,
    /// Key/value heads kept and there were, over all layers.
    pub kv_heads: (usize, usize),
    /// MLP channels kept and there were, over all layers.
    pub mlp: (usize, usize),
}

/// What an adapter is.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterFacts {
    /// Modules that carry an update.
    pub modules: usize,
    /// Layers that have one of them.
    pub layers: usize,
    /// The linears, by short name.
    pub targets: Vec<String>,
    /// Modules by rank.
    pub ranks: BTreeMap<usize, usize>,
    /// The smallest and the largest scale s.
    pub scale: (f64, f64),
    /// Numbers of both factors.
    pub parameters: u64,
    /// Numbers by dtype.
    pub dtypes: BTreeMap<String, u64>,
    /// `base_model_name_or_path`.
    pub base: Option<String>,
    /// The O and I of each linear, those of the first layer that has it.
    pub dims: BTreeMap<String, (usize, usize)>,
    /// Whether it has the pruned model's dimensions.
    pub to_be_recovered: bool,
    /// What the model that it was trained on was pruned from.
    pub pruned: Option<PrunedFacts>,
}

/// What a folder holds.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// The folder.
    pub path: PathBuf,
    /// A model.
    pub model: Option<ModelFacts>,
    /// An adapter.
    pub adapter: Option<AdapterFacts>,
    /// Where it comes from.
    pub provenance: Option<Provenance>,
    /// Who signed it, each with a signature that is right; whether they are trusted is for `verify`.
    pub signed: Option<Chain>,
    /// Which programs would load it.
    pub readers: Vec<Reader>,
    /// Why this program does not read the adapter.
    #[serde(skip)]
    pub refused: Option<Error>,
    /// Under `--verify`: each file against its stored hash.
    pub verified: Option<BTreeMap<String, Verdict>>,
    /// Under `--spectrum`: the largest singular values of each weight or update, see [`spectrum::spectra`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spectrum: Option<Vec<Spectrum>>,
}

/// Looks at the folder `path`; `verify` reads every byte against the stored hashes.
pub fn inspect(path: &Path, verify: bool, options: OpenOptions) -> Result<Inspection> {
    if !std::fs::metadata(path).map_err(Error::io(path))?.is_dir() {
        return Err(Error::file(path, "is a file, expected a folder"));
    }
    let mut out = Inspection {
        path: path.to_path_buf(),
        model: None,
        adapter: None,
        provenance: Provenance::open(path)?,
        signed: None,
        readers: Vec::new(),
        refused: None,
        verified: None,
        spectrum: None,
    };
    if path.join(ADAPTER_CONFIG).exists() {
        let read =
            Adapter::open(path, options).and_then(|a| a.check_finite().and_then(|()| adapter_facts(&a)));
        let pruned = read.as_ref().is_ok_and(|facts| facts.to_be_recovered);
        out.readers = readers::of_adapter(path, pruned, options)?;
        match read {
            Ok(facts) => out.adapter = Some(facts),
            Err(why) => {
                let note = why.to_string();
                out.readers.push(Reader { program: "anabranch", loads: false, note });
                out.refused = Some(why);
            }
        }
        out.signed = Chain::open(path)?;
    } else if path.join(CONFIG).exists() {
        let checkpoint = Checkpoint::open(path, options)?;
        out.readers = readers::of_model(checkpoint.config());
        out.model = Some(model_facts(&checkpoint)?);
    } else if out.provenance.is_none() {
        return Err(Error::file(
            path,
            format!("has no {CONFIG}, {ADAPTER_CONFIG} or {PROVENANCE}: neither model, adapter nor output"),
        ));
    }
    if verify {
        out.verified = Some(Provenance::verify(path)?);
    }
    Ok(out)
}

impl Inspection {
    /// An error where this program does not read the adapter, and where a file is not the one that was written. Files
    /// that were added are no error.
    pub fn check(self) -> Result<()> {
        if let Some(why) = self.refused {
            return Err(why);
        }
        let bad = |v: &Verdict| matches!(v, Verdict::Changed | Verdict::Missing);
        let names: Vec<_> = self
            .verified
            .iter()
            .flatten()
            .filter(|(_, v)| bad(v))
            .map(|(name, v)| {
                format!("{name} is {}", if *v == Verdict::Changed { "changed" } else { "missing" })
            })
            .collect();
        if names.is_empty() { Ok(()) } else { Err(Error::file(&self.path, names.join(", "))) }
    }
}

fn model_facts(c: &Checkpoint) -> Result<ModelFacts> {
    let config: &ModelConfig = c.config();
    let mut dtypes = BTreeMap::new();
    for (name, _) in c.expected() {
        let t = c.weights().tensor(&name)?;
        *dtypes.entry(t.dtype().to_string()).or_default() += t.len() as u64;
    }
    Ok(ModelFacts {
        model_type: config.family.model_type(),
        parameters: config.parameters(),
        bytes: c.weights().total_bytes(),
        dtypes,
        files: c.weights().files().count(),
        layers: config.layers,
        hidden: config.hidden,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        mlp: config.mlp,
        vocab: config.vocab,
        positions: config.longest(),
        rope: format!("{}, base {}", config.rope.kind.name(), config.rope.theta),
        tied: config.tied,
        biases: [config.attention_bias, config.mlp_bias],
        fingerprint: c.fingerprint()?.to_string(),
        extra: c.extra().to_vec(),
        pruned: c.pruning().map(pruned_facts),
    })
}

fn pruned_facts(p: &Pruning) -> PrunedFacts {
    let b = &p.base;
    PrunedFacts {
        base_fingerprint: b.fingerprint.clone(),
        ratio: p.ratio,
        importance: p.importance.clone(),
        kv_heads: (
            p.layers.iter().map(|l| l.kv_heads.len()).sum(),
            b.num_key_value_heads * b.num_hidden_layers,
        ),
        mlp: (p.layers.iter().map(|l| l.mlp.len()).sum(), b.intermediate_size * b.num_hidden_layers),
    }
}

fn adapter_facts(a: &Adapter) -> Result<AdapterFacts> {
    let (mut ranks, mut dtypes, mut dims) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut scale = (f64::INFINITY, f64::NEG_INFINITY);
    for (m, p) in &a.modules {
        *ranks.entry(p.rank).or_default() += 1;
        scale = (scale.0.min(p.scale), scale.1.max(p.scale));
        for f in [&p.a, &p.b] {
            *dtypes.entry(f.dtype().to_string()).or_default() += f.rows() as u64 * f.cols() as u64;
        }
        dims.entry(m.target.short().to_string()).or_insert_with(|| p.dims());
    }
    let layers: std::collections::BTreeSet<_> = a.modules.keys().map(|m| m.layer).collect();
    Ok(AdapterFacts {
        modules: a.modules.len(),
        layers: layers.len(),
        targets: a.targets().iter().map(|t| t.short().to_string()).collect(),
        ranks,
        scale,
        parameters: a.parameters(),
        dtypes,
        base: a.config.base.clone(),
        dims,
        to_be_recovered: a.coordinates()? == Coordinates::Pruned,
        pruned: a.pruning.as_ref().map(pruned_facts),
    })
}

/// The first 12 digits, which tell models apart for people.
fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

fn counts<K: fmt::Display>(map: &BTreeMap<K, impl fmt::Display>) -> String {
    map.iter().map(|(k, n)| format!("{k}: {n}")).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for PrunedFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "of {} at ratio {} by {}: {} of {} key/value heads, {} of {} MLP channels",
            short(&self.base_fingerprint),
            self.ratio,
            self.importance,
            self.kv_heads.0,
            self.kv_heads.1,
            self.mlp.0,
            self.mlp.1
        )
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let row = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display| {
            writeln!(f, "  {name:<14} {value}")
        };
        if let Some(m) = &self.model {
            let pruned = if m.pruned.is_some() { "pruned model" } else { "model" };
            writeln!(f, "{path}: {pruned}, {}, {} parameters", m.model_type, m.parameters)?;
            row(
                f,
                "weights",
                &format!("{} in {} files; {}", human_bytes(m.bytes), m.files, counts(&m.dtypes)),
            )?;
            row(f, "layers", &format!("{} of width {}", m.layers, m.hidden))?;
            row(
                f,
                "attention",
                &format!("{} heads, {} key/value heads of width {}", m.heads, m.kv_heads, m.head_dim),
            )?;
            row(f, "MLP channels", &m.mlp)?;
            let tied = if m.tied { "tied" } else { "own head" };
            row(f, "vocabulary", &format!("{}, {tied}", m.vocab))?;
            row(f, "positions", &format!("{}, rope {}", m.positions, m.rope))?;
            if m.biases != [false; 2] {
                row(
                    f,
                    "biases",
                    &match m.biases {
                        [true, true] => "attention, MLP",
                        [true, false] => "attention",
                        _ => "MLP",
                    },
                )?;
            }
            if let Some(p) = &m.pruned {
                row(f, "pruned", p)?;
            }
            row(f, "fingerprint", &m.fingerprint)?;
            if !m.extra.is_empty() {
                row(f, "not used", &format!("{} tensors, {} first", m.extra.len(), m.extra[0]))?;
            }
        }
        if let Some(a) = &self.adapter {
            writeln!(f, "{path}: LoRA adapter, {} numbers", a.parameters)?;
            row(f, "modules", &format!("{} in {} layers: {}", a.modules, a.layers, a.targets.join(", ")))?;
            let ranks: Vec<_> = match a.ranks.len() {
                1 => a.ranks.keys().map(usize::to_string).collect(),
                _ => a.ranks.iter().map(|(r, n)| format!("{r} in {n} modules")).collect(),
            };
            row(f, "rank", &ranks.join(", "))?;
            let scale = if a.scale.0 == a.scale.1 {
                a.scale.0.to_string()
            } else {
                format!("{} to {}", a.scale.0, a.scale.1)
            };
            row(f, "scale", &scale)?;
            row(f, "numbers", &counts(&a.dtypes))?;
            let dims: Vec<_> = a.dims.iter().map(|(t, (o, i))| format!("{t} {o}×{i}")).collect();
            row(f, "dimensions", &dims.join(", "))?;
            if let Some(base) = &a.base {
                row(f, "base", base)?;
            }
            if let Some(p) = &a.pruned {
                row(f, "trained on", p)?;
            }
            if a.to_be_recovered {
                row(
                    f,
                    "to do",
                    &format!("it has the pruned model's dimensions: anabranch recover --adapter {path}"),
                )?;
            }
        }
        if self.refused.is_some() {
            writeln!(f, "{path}: adapter that this program does not read")?;
        } else if self.model.is_none() && self.adapter.is_none() {
            writeln!(f, "{path}: output of this program")?;
        }
        if let Some(p) = &self.provenance {
            let mut text = format!("{} of version {}", p.command, p.version);
            for (name, print) in [("base", &p.base_fingerprint), ("model", &p.model_fingerprint)] {
                if let Some(print) = print {
                    text += &format!(", {name} {}", short(print));
                }
            }
            for (name, n) in [("steps", p.steps), ("samples", p.samples)] {
                if let Some(n) = n {
                    text += &format!(", {n} {name}");
                }
            }
            row(f, "made by", &text)?;
        }
        if let Some(c) = &self.signed {
            let edge = c.edge.map(|k| format!(", recovered from the adapter of key {}", k.short()));
            let text = format!("by key {} for {}{}", c.signer.short(), c.occasion, edge.unwrap_or_default());
            row(f, "signed", &text)?;
        }
        for r in &self.readers {
            let answer = if r.loads { "loads it" } else { "does not load it" };
            let note = if r.note.is_empty() { String::new() } else { format!(": {}", r.note) };
            row(f, r.program, &format!("{answer}{note}"))?;
        }
        for (name, verdict) in self.verified.iter().flatten() {
            let text = match verdict {
                Verdict::Same => "as written",
                Verdict::Changed => "CHANGED",
                Verdict::Missing => "MISSING",
                Verdict::Unknown => "not written by this program",
            };
            writeln!(f, "  {text:<14} {name}")?;
        }
        for spectrum in self.spectrum.iter().flatten() {
            write!(f, "{spectrum}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::adapter_config::AdapterConfig;
    use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
    use crate::checkpoint::checkpoint;
    use crate::checkpoint::module::{Module, Target};
    use crate::checkpoint::pruning;
    use crate::tensor::DType;
    use serde_json::json;

    fn look(path: &Path, verify: bool) -> Result<Inspection> {
        inspect(path, verify, OpenOptions::default())
    }

    #[test]
    fn a_model() {
        let dir = tempfile::tempdir().unwrap();
        checkpoint::tests::write(dir.path(), json!({"attention_bias": true}), DType::BF16, 300, "");
        let i = look(dir.path(), false).unwrap();
        let m = i.model.as_ref().unwrap();
        assert_eq!((m.parameters, m.bytes), (m.dtypes["BF16"], 2 * m.dtypes["BF16"]));
        let text = i.to_string();
        for part in [
            "4 heads, 2 key/value heads of width 2",
            "biases         attention\n",
            "own head",
            "transformers",
            &m.fingerprint,
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let err = look(dir.path(), true).unwrap_err();
        assert!(err.exit_code() == 1 && err.to_string().contains("there are no hashes"), "{err}");
        assert!(serde_json::to_value(&i).unwrap()["model"]["head_dim"] == 2);
    }

    #[test]
    fn an_adapter_and_its_hashes() {
        let dir = tempfile::tempdir().unwrap();
        let plan = pruning::tests::example();
        let m = Module { layer: 0, target: Target::Q };
        let specs = vec![PairSpec {
            module: m,
            rank: 2,
            dims: plan.pruned_dims(Target::Q, 0),
            dtypes: (DType::F32, DType::F32),
        }];
        let config = AdapterConfig::peft(2, 4.0, 0.0, &[Target::Q], None);
        let mut w = AdapterWriter::create(dir.path(), config, specs).unwrap();
        w.write_f32(m, &[1.0; 12], &[1.0; 8]).unwrap();
        w.finish(Some(&plan), Provenance::new("train")).unwrap();
        let i = look(dir.path(), true).unwrap();
        let text = i.to_string();
        i.check().unwrap();
        for part in [
            "LoRA adapter, 20 numbers",
            "scale          2\n",
            "q 4×6",
            "anabranch recover --adapter",
            "3 of 4 key/value heads",
            "as written     pruning.json",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        std::fs::write(dir.path().join("README.md"), "").unwrap();
        look(dir.path(), true).unwrap().check().unwrap();
        let mut config = std::fs::read(dir.path().join(ADAPTER_CONFIG)).unwrap();
        config.push(b' ');
        std::fs::write(dir.path().join(ADAPTER_CONFIG), config).unwrap();
        let i = look(dir.path(), true).unwrap();
        assert!(i.to_string().contains("CHANGED        adapter_config.json"));
        assert!(i.check().unwrap_err().to_string().contains("adapter_config.json is changed"));
        // Of what this program does not read it tells all the same who would.
        let config = std::fs::read_to_string(dir.path().join(ADAPTER_CONFIG)).unwrap();
        std::fs::write(
            dir.path().join(ADAPTER_CONFIG),
            config.replace("\"use_dora\": false", "\"use_dora\": true"),
        )
        .unwrap();
        let i = look(dir.path(), false).unwrap();
        let text = i.to_string();
        for part in [
            "PEFT           loads it",
            "vLLM           does not load it: use_dora is true",
            "anabranch      does not load it",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(i.check().unwrap_err().to_string().contains("DoRA is not read"));
    }

    #[test]
    fn neither() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            look(dir.path(), false).unwrap_err().to_string().contains("neither model, adapter nor output")
        );
        std::fs::write(dir.path().join("f"), "").unwrap();
        assert!(look(&dir.path().join("f"), false).unwrap_err().to_string().contains("expected a folder"));
        Provenance::new("eval").seal(dir.path(), BTreeMap::new()).unwrap();
        let i = look(dir.path(), true).unwrap();
        assert!(i.to_string().contains("output of this program"));
        i.check().unwrap();
    }

    #[test]
    fn real_adapters_and_a_real_model() {
        let shared = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
        if !shared.exists() {
            eprintln!("skipped: {} is absent", shared.display());
            return;
        }
        let text = look(&shared.join("adapters/tinyllama-arona-lora-180"), false).unwrap().to_string();
        assert!(text.contains("44 in 22 layers: q, v") && text.contains("q 2048×2048, v 256×2048"), "{text}");
        let text = look(&shared.join("stories260K-hf"), false).unwrap().to_string();
        assert!(text.contains("260032 parameters") && text.contains("tied"), "{text}");
    }
}
