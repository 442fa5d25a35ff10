//! A model's frozen weights on a device.

use super::memory::Plan;
use super::packing::PackedWeights;
use super::paper::Paper;
use crate::backend::Backend;
use crate::checkpoint::checkpoint::{Checkpoint, EMBED, HEAD, NORM, norm_name};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::{Module, Target};
use crate::error::Result;
use crate::tensor::{Real, Store};

/// One layer.
pub struct Layer<S: Store> {
    /// `[D]`: the norm before attention.
    pub norm1: S::Buf<f32>,
    /// `[D]`: the norm before the MLP.
    pub norm2: S::Buf<f32>,
    /// The seven linears, in the order of [`Target::ALL`].
    pub linears: [S::Matrix; 7],
    /// Their biases.
    pub biases: [Option<S::Buf<f32>>; 7],
}

/// A model on a device: matrices in their file's dtype, norms and biases as f32.
pub struct Model<B: Backend> {
    /// The architecture.
    pub config: ModelConfig,
    /// `E[V, D]`.
    pub embed: <B::Store as Store>::Matrix,
    /// The layers.
    pub layers: Vec<Layer<B::Store>>,
    /// `[D]`: the last norm.
    pub norm: <B::Store as Store>::Buf<f32>,
    /// `[V, D]`; none if the embedding serves.
    pub head: Option<<B::Store as Store>::Matrix>,
}

impl<B: Backend> Model<B> {
    /// Makes the weights of `checkpoint` usable on `backend`.
    pub fn new(backend: &B, checkpoint: &Checkpoint) -> Result<Model<B>> {
        let config = checkpoint.config().clone();
        let mut paper = Paper::<B::Store>::new(Plan::default());
        paper.weights(&config);
        backend.reserve(paper.plan.total())?;
        let matrix = |name: &str| backend.matrix(checkpoint.matrix(name)?);
        let vector = |name: &str| -> Result<<B::Store as Store>::Buf<f32>> {
            let host = checkpoint.vector(name)?;
            let mut buf = backend.alloc::<f32>(name, host.len())?;
            backend.upload(B::Store::view_mut(&mut buf, 0..host.len()), &host)?;
            Ok(buf)
        };
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let mut linears = Vec::with_capacity(7);
            let mut biases = Vec::with_capacity(7);
            for target in Target::ALL {
                let module = Module { layer, target };
                linears.push(matrix(&module.weight())?);
                let bias = config.has_bias(target).then(|| vector(&module.bias()));
                biases.push(bias.transpose()?);
            }
            // Both lists hold one entry for each of the seven targets.
            let seven = "seven targets";
            layers.push(Layer {
                norm1: vector(&norm_name(layer, "input_layernorm"))?,
                norm2: vector(&norm_name(layer, "post_attention_layernorm"))?,
                linears: linears.try_into().unwrap_or_else(|_| unreachable!("{seven}")),
                biases: biases.try_into().unwrap_or_else(|_| unreachable!("{seven}")),
            });
        }
        Ok(Model {
            embed: matrix(EMBED)?,
            layers,
            norm: vector(NORM)?,
            head: if config.tied { None } else { Some(matrix(HEAD)?) },
            config,
        })
    }

    /// Packs what some products read, see [`Backend::pack`]; calls `done` after each of them, and ends with its error.
    pub fn pack<T: Real>(
        &mut self,
        backend: &B,
        packing: PackedWeights,
        mut done: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        for (module, pass) in packing.products(&self.config) {
            let w = match module {
                Some(Module { layer, target }) => &mut self.layers[layer].linears[target as usize],
                None => self.head.as_mut().unwrap_or(&mut self.embed),
            };
            backend.pack::<T>(w, pass)?;
            done()?;
        }
        Ok(())
    }

    /// The matrix that turns hidden states into logits, `[V, D]`.
    pub fn head(&self) -> &<B::Store as Store>::Matrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}
