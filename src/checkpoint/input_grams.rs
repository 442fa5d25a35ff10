//! `input_grams.safetensors`: the Gram matrix `XᵀX / T` of every input of a model's linears over T tokens of data.
//!
//! One F32 tensor `layers.L.S` an input, S of `qkv`, `o`, `gate_up`, `down`; a matrix `[I, I]` is stored as the rows of
//! its upper triangle one after another, `I (I + 1) / 2` numbers (`G[numpy.triu_indices(I)]`). The header's metadata
//! say `format` and `tokens`. Beside it lies `pruning.json` where the model was a pruned one: its o and down are
//! narrower, and the channels that it has not got count as zero.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::bytes::Bytes;
use super::convert;
use super::module::{Module, Source};
use super::provenance::Provenance;
use super::pruning::Pruning;
use super::weights::{OpenOptions, Weights};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// The file's name.
pub const INPUT_GRAMS: &str = "input_grams.safetensors";
/// What the file calls itself.
pub const FORMAT: &str = "anabranch-grams/1";

/// The tensor's name of an input.
pub fn tensor_name(layer: usize, source: Source) -> String {
    format!("layers.{layer}.{}", source.name())
}

/// Numbers of the upper triangle of a matrix of this width; none where they are more than a usize holds.
pub fn packed_len(width: usize) -> Option<usize> {
    width.checked_add(1)?.checked_mul(width).map(|n| n / 2)
}

/// A folder with input Grams, opened; nothing is read.
#[derive(Debug)]
pub struct InputGrams {
    /// The folder.
    pub path: PathBuf,
    /// T.
    pub tokens: u64,
    /// The fingerprint of the full model.
    pub base_fingerprint: Option<String>,
    weights: Weights,
    pruning: Option<Pruning>,
}

impl InputGrams {
    /// Opens the folder at `path`; an error where it holds something else, or Grams of no token.
    pub fn open(path: &Path, options: OpenOptions) -> Result<InputGrams> {
        let file = path.join(INPUT_GRAMS);
        if path.is_dir() && !file.exists() {
            let why = format!("has no {INPUT_GRAMS}: `anabranch grams` makes it");
            return Err(Error::file(path, why));
        }
        let weights = Weights::open(&file, options)?;
        let told = |key: &str| weights.metadata().and_then(|m| m.get(key));
        match told("format") {
            Some(f) if f == FORMAT => {}
            other => return Err(Error::file(&file, format!("has format {other:?}, expected {FORMAT:?}"))),
        }
        let tokens = told("tokens").and_then(|t| t.parse().ok()).filter(|t| *t > 0).ok_or_else(|| {
            Error::file(&file, format!("has tokens {:?}, expected a number from 1", told("tokens")))
        })?;
        let provenance = Provenance::open(path)?;
        let pruning = Pruning::open(path)?;
        let base_fingerprint = provenance
            .and_then(|p| p.base_fingerprint)
            .or_else(|| pruning.as_ref().map(|p| p.base.fingerprint.clone()));
        Ok(InputGrams { path: path.to_path_buf(), tokens, base_fingerprint, weights, pruning })
    }

    /// The Gram of the input of `module`, whose width at the full model is `full`.
    ///
    /// An error where it is missing, or of another width.
    pub fn of(&self, module: Module, full: usize) -> Result<InputGram> {
        let source = module.target.source();
        let name = tensor_name(module.layer, source);
        if !self.weights.contains(&name) {
            return Err(Error::tensor(self.file(), name, format!("is missing, {module} needs it")));
        }
        let tensor = self.weights.tensor(&name)?;
        let prunes = matches!(source, Source::O | Source::Down);
        let kept = self.pruning.as_ref().filter(|_| prunes).map(|p| p.kept(module.target, module.layer));
        if let Some(&last) = kept.iter().flatten().last().filter(|&&last| last >= full) {
            return Err(tensor.error(format!("is of channel {last} too, the adapters' input has {full}")));
        }
        let width = kept.as_ref().map_or(full, Vec::len);
        let len = packed_len(width);
        if tensor.dtype() != DType::F32 || tensor.shape().len() != 1 || Some(tensor.len()) != len {
            return Err(tensor.error(format!(
                "is {} {:?}, expected F32 [{}]: the upper triangle of a matrix of width {width}, the input of {module}",
                tensor.dtype(),
                tensor.shape(),
                len.unwrap_or(usize::MAX)
            )));
        }
        let file = tensor.file().to_path_buf();
        Ok(InputGram { file, name, width, full, kept, bytes: tensor.handle()? })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.path.join(INPUT_GRAMS)
    }
}

/// `XᵀX / T` of one input, as it lies in its file. Cloning it copies no numbers.
#[derive(Clone, Debug)]
pub struct InputGram {
    file: PathBuf,
    name: String,
    width: usize,
    full: usize,
    kept: Option<Vec<usize>>,
    bytes: Bytes,
}

impl InputGram {
    /// The width in the file.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The width at the full model, I.
    pub fn full(&self) -> usize {
        self.full
    }

    /// Which of the I channels the file has, ascending; none = all.
    pub fn kept(&self) -> Option<&[usize]> {
        self.kept.as_deref()
    }

    /// `G[k, k..]`.
    pub fn row(&self, k: usize, out: &mut [f64]) {
        let at = self.place(k);
        convert::widen_f64(&mut out[..self.width - k], &self.bytes[at], DType::F32);
    }

    /// An error where a number is NaN or infinite, or one on the diagonal negative.
    pub fn check(&self) -> Result<()> {
        if let Some(at) = convert::first_non_finite(&self.bytes, DType::F32) {
            return Err(self.error(format!("holds NaN or infinity at element {at}")));
        }
        match (0..self.width).map(|k| (k, self.diagonal(k))).find(|(_, d)| *d < 0.0) {
            None => Ok(()),
            Some((k, d)) => {
                Err(self.error(format!("holds {d} on the diagonal at {k}, expected a mean of squares")))
            }
        }
    }

    fn diagonal(&self, k: usize) -> f64 {
        let mut out = [0.0];
        let start = self.place(k).start;
        convert::widen_f64(&mut out, &self.bytes[start..start + 4], DType::F32);
        out[0]
    }

    /// The bytes of `G[k, k..]`.
    fn place(&self, k: usize) -> Range<usize> {
        // Rows 0..k have I, I - 1, … numbers.
        let start = k * self.width - k * k.saturating_sub(1) / 2;
        4 * start..4 * (start + self.width - k)
    }

    /// An error about this Gram.
    pub fn error(&self, why: impl Into<String>) -> Error {
        Error::tensor(&self.file, self.name.as_str(), why)
    }
}
