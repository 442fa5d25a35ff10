//! A model folder: its architecture and its weights, checked against each other.

use std::path::{Path, PathBuf};

use super::config::ModelConfig;
use super::convert::widen;
use super::module::Module;
use super::weights::{OpenOptions, Weights};
use crate::error::Result;
use crate::host::MatrixSource;
use crate::tensor::DType;

/// The embedding's name in a file.
pub const EMBED: &str = "model.embed_tokens.weight";
/// The last norm's name in a file.
pub const NORM: &str = "model.norm.weight";
/// The head's name in a file; absent where it is tied to the embedding.
pub const HEAD: &str = "lm_head.weight";

/// A Hugging Face folder of a `llama` or `mistral` model, opened and checked.
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    weights: Weights,
}

impl Checkpoint {
    /// Reads `config.json` and the headers of the weights in `dir`, and checks that every tensor of the architecture
    /// is there with its shape. Tensors that the architecture does not have are left alone.
    pub fn open(dir: &Path, options: OpenOptions) -> Result<Checkpoint> {
        let config = ModelConfig::open(dir)?;
        let weights = Weights::open(dir, options)?;
        let checkpoint = Checkpoint { dir: dir.to_path_buf(), config, weights };
        for (name, shape) in checkpoint.expected() {
            checkpoint.weights.shaped(&name, &shape)?;
        }
        Ok(checkpoint)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tensors.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Name and shape of every tensor of the architecture, in the order of the forward pass.
    pub fn expected(&self) -> Vec<(String, Vec<usize>)> {
        let c = &self.config;
        let mut all = vec![(EMBED.to_string(), vec![c.vocab, c.hidden])];
        for layer in 0..c.layers {
            all.push((norm_name(layer, "input_layernorm"), vec![c.hidden]));
            for module in c.modules_of(layer) {
                let (o, i) = c.dims(module.target, layer);
                all.push((module.weight(), vec![o, i]));
                if c.has_bias(module.target) {
                    all.push((module.bias(), vec![o]));
                }
            }
            all.push((norm_name(layer, "post_attention_layernorm"), vec![c.hidden]));
        }
        all.push((NORM.to_string(), vec![c.hidden]));
        if !c.tied {
            all.push((HEAD.to_string(), vec![c.vocab, c.hidden]));
        }
        all
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
        let first = Module { layer: 0, target: super::module::Target::Q };
        Ok(self.weights.tensor(&first.weight())?.dtype())
    }

    /// Whether every matrix is F32, so that f32 products need no widened panels.
    pub fn all_f32(&self) -> bool {
        self.expected()
            .iter()
            .filter(|(_, shape)| shape.len() == 2)
            .all(|(name, _)| self.weights.tensor(name).is_ok_and(|t| t.dtype() == DType::F32))
    }
}

/// `model.layers.3.input_layernorm.weight`.
pub fn norm_name(layer: usize, which: &str) -> String {
    format!("model.layers.{layer}.{which}.weight")
}
