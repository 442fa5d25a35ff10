//! What decides the memory of a training run, apart from its data.

use serde::Serialize;

use super::adapters::Layout;
use super::room::{Head, Keep, RoomSize};
use super::rope::Tables;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::Target;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// The largest micro-batch and the adapter of a training run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainingShape {
    /// Rows of a micro-batch.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// R.
    pub rank: usize,
    /// Linears that carry an adapter.
    pub targets: Vec<Target>,
    /// Whether the adapter's input has dropout.
    pub dropout: bool,
    /// Whether B alone is trained.
    pub freeze_a: bool,
    /// Layers computed again in the backward pass; none is as few as the memory asks for.
    pub recompute: Option<usize>,
}

/// The shape that `train` has without options.
impl Default for TrainingShape {
    fn default() -> TrainingShape {
        TrainingShape {
            batch: 4,
            seq: 512,
            rank: 8,
            targets: Target::ALL.to_vec(),
            dropout: false,
            freeze_a: false,
            recompute: None,
        }
    }
}

impl TrainingShape {
    /// An error where `config` cannot be trained with it.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let usage = |why: String| Err(Error::Usage(why));
        if self.batch == 0 || self.seq == 0 || self.rank == 0 || self.targets.is_empty() {
            return usage(format!(
                "--batch {}, --seq {}, --rank {} and {} --targets: each must be at least 1",
                self.batch,
                self.seq,
                self.rank,
                self.targets.len()
            ));
        }
        if self.batch.checked_mul(self.seq).is_none_or(|t| t > u32::MAX as usize / 2) {
            return usage(format!("--batch {} × --seq {} is too many tokens", self.batch, self.seq));
        }
        if let Some(n) = self.recompute.filter(|&n| n > config.layers) {
            return usage(format!("--recompute {n}, the model has {} layers", config.layers));
        }
        for module in config.modules().filter(|m| self.targets.contains(&m.target)) {
            let (o, i) = config.dims(module.target, module.layer);
            if self.rank > o.min(i) {
                return usage(format!(
                    "--rank {} is larger than a side of {module}, which is {o} × {i}",
                    self.rank
                ));
            }
        }
        config.check_length(self.seq)
    }

    /// Tokens of a micro-batch.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// The adapter's matrices; the scale is not part of a shape and is 1.
    pub fn layout(&self, config: &ModelConfig) -> Layout {
        Layout::uniform(config, &self.targets, self.rank, 1.0)
    }

    /// The room of a full micro-batch, every token of which is supervised but the first of each row.
    pub fn room(&self, config: &ModelConfig, dtype: DType, recomputed: usize) -> RoomSize {
        let tokens = self.tokens();
        RoomSize {
            tokens,
            copies: 1,
            keep: Keep::Training { recomputed },
            table_rows: Tables::new(config, self.seq).rows(tokens),
            ranks: self.layout(config).ranks(),
            dropout: self.dropout,
            dtype,
            head: Head::Loss(tokens.saturating_sub(self.batch)),
        }
    }
}

/// [`TrainingShape`] as reports store it.
impl Serialize for TrainingShape {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut out = s.serialize_struct("shape", 6)?;
        out.serialize_field("batch", &self.batch)?;
        out.serialize_field("seq", &self.seq)?;
        out.serialize_field("rank", &self.rank)?;
        let targets: Vec<_> = self.targets.iter().map(|t| t.short()).collect();
        out.serialize_field("targets", &targets)?;
        out.serialize_field("dropout", &self.dropout)?;
        out.serialize_field("freeze_a", &self.freeze_a)?;
        out.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::select::tests::config;

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let c = config(64, 8, 4, 60, 2, 32);
        let good = TrainingShape { seq: 16, ..TrainingShape::default() };
        assert!(good.check(&c).is_ok());
        for (shape, expected) in [
            (TrainingShape { batch: 0, ..good.clone() }, "--batch 0"),
            (TrainingShape { rank: 0, ..good.clone() }, "--rank 0"),
            (
                TrainingShape { rank: 33, ..good.clone() },
                "--rank 33 is larger than a side of layer 0 k, which is 32 × 64",
            ),
            (TrainingShape { targets: vec![], ..good.clone() }, "0 --targets"),
            (TrainingShape { recompute: Some(3), ..good.clone() }, "--recompute 3, the model has 2 layers"),
            (TrainingShape { seq: 9000, ..good.clone() }, "8192 positions"),
            (TrainingShape { batch: usize::MAX, ..good.clone() }, "too many tokens"),
        ] {
            let err = shape.check(&c).unwrap_err().to_string();
            assert!(err.contains(expected), "{err}");
        }
        let size = good.room(&c, DType::BF16, 1);
        assert_eq!((size.tokens, size.head, size.ranks), (64, Head::Loss(60), [8; 7]));
    }
}
