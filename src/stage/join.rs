//! Parts of a fusion (`fuse --layers A..B`), and `join`, which puts them together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::common::Common;
use crate::checkpoint::adapter::{PART, name_a, name_b};
use crate::checkpoint::adapter_config::AdapterConfig;
use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::json;
use crate::checkpoint::module::{Module, Target};
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::{Provenance, Verdict};
use crate::checkpoint::weights::{TensorRef, Weights};
use crate::error::{Error, Result};
use crate::fuse::Recipe;
use crate::fuse::certificate::{CERTIFICATE, Certificate, ModuleCertificate};

/// A part's factors.
pub(super) const PART_MODEL: &str = "part.safetensors";
const FORMAT: &str = "anabranch-part/1";

/// A part of a fusion: the modules of some layers, and all that is needed to write the whole once every part is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// `anabranch-part/1`.
    format: String,
    /// What all parts have in common.
    whole: Whole,
    /// `[A, B]` of `--layers A..B`.
    layers: [usize; 2],
    /// The modules of these layers.
    modules: Vec<ModuleCertificate>,
}

/// The fusion that a part is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Whole {
    /// SHA-256 over the options and the bytes of all inputs.
    pub fingerprint: String,
    /// One more than the last layer.
    pub layers: usize,
    /// Modules of all layers.
    pub modules: usize,
    /// What was asked for.
    pub recipe: Recipe,
    /// The weight of each adapter.
    pub weights: Vec<f64>,
    /// The dtype of the factors.
    pub dtype: String,
    /// `adapter_config.json` of the whole.
    pub config: Map<String, Value>,
    /// `anabranch.json` of the whole.
    pub provenance: Provenance,
}

impl Whole {
    /// `certificate.json` of the whole.
    pub(super) fn certificate(&self, modules: Vec<ModuleCertificate>) -> Certificate {
        let base = self.provenance.base_fingerprint.as_deref();
        Certificate::new(self.recipe, &self.weights, base, &self.dtype, modules)
    }
}

impl Part {
    /// The layers `layers` of a fusion.
    pub(super) fn new(whole: Whole, layers: [usize; 2], modules: Vec<ModuleCertificate>) -> Part {
        Part { format: FORMAT.into(), whole, layers, modules }
    }

    /// Ends the part's folder, whose factors have this hash.
    pub(super) fn seal(&self, dir: &Path, factors: String) -> Result<()> {
        let hash = digest::write_json(&dir.join(PART), self)?;
        let mut provenance = Provenance::new("fuse");
        provenance.other.insert("part".into(), self.layers.to_vec().into());
        provenance.seal(dir, BTreeMap::from([(PART.into(), hash), (PART_MODEL.into(), factors)]))
    }

    fn open(dir: &Path) -> Result<Part> {
        let path = dir.join(PART);
        if !path.exists() {
            return Err(Error::file(
                dir,
                format!("has no {PART}, so it is no part: `fuse --layers A..B` makes them"),
            ));
        }
        let value = json::parse(&path, &json::read_bounded(&path)?)?;
        match value.get("format").and_then(Value::as_str) {
            Some(FORMAT) => {}
            found => return Err(Error::file(path, format!("format is {found:?}, expected {FORMAT:?}"))),
        }
        for (name, verdict) in Provenance::verify(dir)? {
            let why = match verdict {
                Verdict::Same => continue,
                Verdict::Changed => "is not what was written: its SHA-256 is another",
                Verdict::Missing => "is gone",
                Verdict::Unknown => "does not belong to the part",
            };
            return Err(Error::file(dir.join(name), why));
        }
        json::typed(&path, value)
    }
}

/// What `join` is asked.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// The parts' folders, in any order.
    pub parts: Vec<PathBuf>,
    /// Where to write the adapter.
    pub out: PathBuf,
}

/// What was joined.
#[derive(Clone, Debug, Serialize)]
pub struct JoinReport {
    /// The adapter's folder.
    pub out: PathBuf,
    /// Parts that it was put together from.
    pub parts: usize,
    /// Modules that carry an update.
    pub modules: usize,
    /// Of the adapter; none where its folder was there already, under `--resume`.
    pub certificate: Option<Certificate>,
}

/// The parts of one fusion, by their layers: no gap, no overlap, nothing missing.
#[derive(Debug)]
pub struct Parts {
    whole: Whole,
    parts: Vec<(PathBuf, Part)>,
}

impl Parts {
    /// Opens and checks the parts, every byte of them.
    pub fn open(paths: &[PathBuf]) -> Result<Parts> {
        let mut parts: Vec<(PathBuf, Part)> =
            paths.iter().map(|p| Ok((p.clone(), Part::open(p)?))).collect::<Result<_>>()?;
        parts.sort_by_key(|(_, part)| part.layers);
        let Some((first, whole)) = parts.first().map(|(path, part)| (path.clone(), part.whole.clone()))
        else {
            return Err(Error::Usage("no part: give the folders that `fuse --layers A..B` made".into()));
        };
        for (path, part) in &parts {
            if part.whole != whole {
                return Err(another(path, &part.whole, &first, &whole));
            }
        }
        let mut next = 0;
        for (path, part) in &parts {
            let [start, end] = part.layers;
            if start != next {
                let why = match start < next {
                    true => format!(
                        "holds layers {start}..{end}, and another part those up to {next}: they overlap"
                    ),
                    false => format!("holds layers {start}..{end}: layers {next}..{start} are in no part"),
                };
                return Err(Error::file(path, why));
            }
            next = end;
        }
        let modules: usize = parts.iter().map(|(_, p)| p.modules.len()).sum();
        if next != whole.layers || modules != whole.modules {
            return Err(Error::Usage(format!(
                "the parts hold layers 0..{next} and {modules} modules, the fusion has {} layers and {} modules: \
                 layers {next}..{} are in no part",
                whole.layers, whole.modules, whole.layers
            )));
        }
        Ok(Parts { whole, parts })
    }

    /// Modules of all parts.
    pub fn modules(&self) -> usize {
        self.whole.modules
    }

    /// Writes the adapter into the folder `dir`, which is there and empty.
    fn write(&self, dir: &Path, common: &Common) -> Result<Certificate> {
        let files = self
            .parts
            .iter()
            .map(|(path, _)| Weights::open(&path.join(PART_MODEL), common.open_options()))
            .collect::<Result<Vec<_>>>()?;
        let mut pairs = Vec::with_capacity(self.whole.modules);
        for ((path, part), file) in self.parts.iter().zip(&files) {
            for m in &part.modules {
                let target: Target = m.target.parse()?;
                let module = Module { layer: m.layer, target };
                if !(part.layers[0]..part.layers[1]).contains(&m.layer) {
                    return Err(Error::file(path, format!("holds {module}, which is not in its layers")));
                }
                pairs.push((module, file.tensor(&name_a(module))?, file.tensor(&name_b(module))?));
            }
        }
        let specs = pairs.iter().map(|(module, a, b)| spec(*module, a, b)).collect::<Result<_>>()?;
        let config = AdapterConfig::from_json(&dir.join(PART), self.whole.config.clone())?;
        let mut writer = AdapterWriter::create(dir, config, specs)?;
        for (module, a, b) in &pairs {
            common.check_stop("nothing was written")?;
            writer.write_bytes(*module, a.bytes(), b.bytes())?;
        }
        let modules = self.parts.iter().flat_map(|(_, p)| p.modules.iter().cloned()).collect();
        let certificate = self.whole.certificate(modules);
        digest::write_json(&dir.join(CERTIFICATE), &certificate)?;
        writer.finish(None, self.whole.provenance.clone())?;
        Ok(certificate)
    }
}

fn spec(module: Module, a: &TensorRef<'_>, b: &TensorRef<'_>) -> Result<PairSpec> {
    match (a.shape(), b.shape()) {
        (&[rank, i], &[o, same]) if rank == same => {
            Ok(PairSpec { module, rank, dims: (o, i), dtypes: (a.dtype(), b.dtype()) })
        }
        (a, other) => Err(b.error(format!("has shape {other:?} beside an A of {a:?}"))),
    }
}

/// Why two parts are not of one fusion.
fn another(path: &Path, found: &Whole, first: &Path, expected: &Whole) -> Error {
    let why = if found.provenance.version != expected.provenance.version {
        format!("was made by version {}, not {}", found.provenance.version, expected.provenance.version)
    } else if found.recipe != expected.recipe || found.weights != expected.weights {
        "was made with other options".into()
    } else {
        "is of other adapters, or was made with other options".into()
    };
    Error::file(path, format!("is a part of another fusion than {}: it {why}", first.display()))
}

/// Puts the parts together: the bytes of the fusion that was not parted.
pub fn run(options: &JoinOptions, common: &Common) -> Result<JoinReport> {
    let parts = Parts::open(&options.parts)?;
    let mut hasher = Hasher::default();
    hasher.update(parts.whole.fingerprint.as_bytes());
    let mut report = JoinReport {
        out: options.out.clone(),
        parts: parts.parts.len(),
        modules: parts.modules(),
        certificate: None,
    };
    if let Begun::Work(output) = Output::begin(&options.out, "join", &hasher.finish(), common.output())? {
        report.certificate = Some(parts.write(output.dir(), common)?);
        output.finish()?;
    }
    Ok(report)
}
