//! `export`: an adapter in another program's format, its scale folded into B.

use std::path::PathBuf;

use serde::Serialize;

use super::adapters::check_model;
use super::common::Common;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::adapter_config::AdapterConfig;
use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec, folded};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::convert::narrow_finite;
use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::gguf::{self, GgufWriter, Value};
use crate::checkpoint::manifest::Chain;
use crate::checkpoint::module::{Module, Target};
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::output_file::OutputFile;
use crate::checkpoint::provenance::Provenance;
use crate::checkpoint::writer::TensorSpec;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// `--to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One file that llama.cpp loads beside the base's: one rank for all modules.
    Gguf,
    /// A folder in PEFT's own form, with a rank by module.
    Peft,
}

impl std::str::FromStr for Format {
    type Err = Error;

    fn from_str(s: &str) -> Result<Format> {
        match s {
            "gguf" => Ok(Format::Gguf),
            "peft" => Ok(Format::Peft),
            _ => Err(Error::Usage(format!("--to {s:?}: expected gguf or peft"))),
        }
    }
}

/// What is exported.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// The format.
    pub to: Format,
    /// The model that the adapter is for.
    pub model: Option<PathBuf>,
    /// The dtype of the factors.
    pub dtype: DType,
    /// Where to write: a file, or a folder.
    pub out: PathBuf,
}

/// What was exported.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// Where it lies.
    pub out: PathBuf,
    /// The format.
    pub format: Format,
    /// Modules that carry an update.
    pub modules: usize,
    /// The rank in the file; the largest where it differs by module.
    pub rank: usize,
    /// The dtype of the factors.
    pub dtype: &'static str,
    /// What a user should know and what is no error.
    pub warnings: Vec<String>,
}

/// An adapter that can be exported.
#[derive(Debug)]
pub struct Ready {
    adapter: Adapter,
    model: Option<Checkpoint>,
}

impl Ready {
    /// Opens and checks the adapter, its signature where it has one, and the model where one is given.
    pub fn new(options: &ExportOptions, common: &Common) -> Result<Ready> {
        Chain::open(&options.adapter)?;
        let adapter = Adapter::open(&options.adapter, common.open_options())?;
        let model = match &options.model {
            None => None,
            Some(dir) => Some(Checkpoint::open(dir, common.open_options())?),
        };
        if let Some(model) = &model {
            check_model(&adapter, model)?;
        }
        adapter.check_finite()?;
        let ready = Ready { adapter, model };
        if options.to == Format::Gguf {
            ready.adapter.modules.keys().try_for_each(|m| ready.head_width(*m).map(drop))?;
        }
        Ok(ready)
    }

    /// K of a q or k projection, whose rows llama.cpp has in another order; none of the others.
    fn head_width(&self, m: Module) -> Result<Option<usize>> {
        if !matches!(m.target, Target::Q | Target::K) {
            return Ok(None);
        }
        let k = match (&self.model, &self.adapter.pruning) {
            (Some(model), _) => model.config().head_dim,
            (None, Some(pruning)) => pruning.base.head_dim,
            (None, None) => {
                return Err(Error::Usage(format!(
                    "{} has an update of {m}, whose rows llama.cpp orders by heads: give the model that has them with --model",
                    self.adapter.path.display()
                )));
            }
        };
        let rows = self.adapter.modules[&m].dims().0;
        if !k.is_multiple_of(2) || !rows.is_multiple_of(k) {
            return Err(Error::file(
                self.adapter.file(),
                format!(
                    "has {rows} rows in B of {m}, expected a multiple of the head width {k}, which must be even"
                ),
            ));
        }
        Ok(Some(k))
    }

    fn gguf(&self, options: &ExportOptions, common: &Common) -> Result<()> {
        let (adapter, dtype) = (&self.adapter, options.dtype);
        let rank = adapter.max_rank();
        let name =
            |m: &Module, side: &str| format!("blk.{}.{}.weight.{side}", m.layer, gguf::linear(m.target));
        let specs = adapter.modules.iter().flat_map(|(m, p)| {
            let (o, i) = p.dims();
            [
                TensorSpec::new(name(m, "lora_a"), dtype, [rank, i]),
                TensorSpec::new(name(m, "lora_b"), dtype, [o, rank]),
            ]
        });
        let metadata = [
            ("general.architecture", Value::Text("llama")),
            ("general.type", Value::Text("adapter")),
            ("general.file_type", Value::U32(gguf::file_type(dtype))),
            ("adapter.type", Value::Text("lora")),
            // The scale in llama.cpp is alpha over the rank of B: 1, for it is in B.
            ("adapter.lora.alpha", Value::F32(rank as f32)),
            ("anabranch.version", Value::Text(env!("CARGO_PKG_VERSION"))),
        ];
        let out = OutputFile::begin(&options.out, common.force)?;
        let mut writer = GgufWriter::create(out.path(), &metadata, specs.collect())?;
        for (m, p) in &adapter.modules {
            common.check_stop("nothing was written")?;
            let (a, mut b) = folded(&p.a.to_f64(), &p.b.to_f64(), (p.rank, rank), p.dims(), p.scale);
            if let Some(k) = self.head_width(*m)? {
                b = (0..p.dims().0)
                    .flat_map(|row| &b[gguf::rotated(row, k) * rank..][..rank])
                    .copied()
                    .collect();
            }
            for (side, factor, x) in [("lora_a", &p.a, a), ("lora_b", &p.b, b)] {
                let bytes = narrow_finite(&x, dtype).map_err(|why| factor.error(why))?;
                writer.write(&name(m, side), &bytes)?;
            }
        }
        writer.finish()?;
        out.finish()
    }

    fn peft(&self, options: &ExportOptions, common: &Common) -> Result<()> {
        let adapter = &self.adapter;
        let mut hasher = Hasher::default();
        for file in [&adapter.file(), &adapter.config.path] {
            hasher.update(digest::sha256_file(file)?.as_bytes());
        }
        hasher.update(options.dtype.name().as_bytes());
        let Begun::Work(output) = Output::begin(&options.out, "export", &hasher.finish(), common.output())?
        else {
            return Ok(());
        };
        let specs = adapter.modules.iter().map(|(&module, p)| PairSpec {
            module,
            rank: p.rank,
            dims: p.dims(),
            dtypes: (options.dtype, options.dtype),
        });
        let ranks = adapter.modules.iter().map(|(m, p)| (*m, p.rank)).collect();
        let config = AdapterConfig::patterned(&ranks, adapter.config.base.as_deref())?;
        let mut writer = AdapterWriter::create(output.dir(), config, specs.collect())?;
        for (&m, p) in &adapter.modules {
            common.check_stop("nothing was written")?;
            writer.write_folded(m, &p.a.to_f64(), &p.b.to_f64(), p.rank, p.scale)?;
        }
        let mut provenance = adapter.provenance.clone().unwrap_or_else(|| Provenance::new("export"));
        provenance.command = "export".into();
        provenance.version = env!("CARGO_PKG_VERSION").into();
        writer.finish(adapter.pruning.as_ref(), provenance)?;
        output.finish()
    }
}

/// Exports the adapter.
pub fn run(options: &ExportOptions, common: &Common) -> Result<ExportReport> {
    let ready = Ready::new(options, common)?;
    match options.to {
        Format::Gguf => ready.gguf(options, common)?,
        Format::Peft => ready.peft(options, common)?,
    }
    let mut warnings = Vec::new();
    if options.to == Format::Gguf && ready.model.is_none() {
        warnings.push("the adapter was not compared with a model: --model does".to_string());
    }
    Ok(ExportReport {
        out: options.out.clone(),
        format: options.to,
        modules: ready.adapter.modules.len(),
        rank: ready.adapter.max_rank(),
        dtype: options.dtype.name(),
        warnings,
    })
}
