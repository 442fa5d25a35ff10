//! Taylor scores of all linears, reduced to rows and columns as the backward pass makes the gradients.

use std::collections::BTreeMap;
use std::ops::Range;

use super::scores::Importance;
use crate::backend::{Backend, Scratch};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::{Module, Target};
use crate::error::Result;
use crate::model::backward::{Buf, Matrix, Observe};
use crate::model::memory::{Allocator, Part};
use crate::ops::importance::{self, Sample, Score};
use crate::tensor::{Frozen, Real, Store};

/// Buffers for the sums of one linear at a time.
pub struct Sums<S: Store> {
    /// `[scores, O]` of the largest O.
    rows: S::Buf<f64>,
    /// `[scores, I]` of the largest I.
    cols: S::Buf<f64>,
    scratch: S::Buf<f32>,
}

impl<S: Store> Sums<S> {
    /// Makes (or notes) the buffers for `scores` of any linear of `config`.
    pub fn new<T: Real, A: Allocator<Store = S>>(
        alloc: &mut A,
        scratch: &impl Scratch,
        config: &ModelConfig,
        scores: &[Score],
    ) -> Result<Sums<S>> {
        let (mut o, mut i, mut room) = (0, 0, 0);
        for m in config.modules() {
            let dims = config.dims(m.target, m.layer);
            (o, i) = (dims.0.max(o), dims.1.max(i));
            room = scratch.importance_scratch::<T>(dims.0, dims.1, scores).max(room);
        }
        Ok(Sums {
            rows: alloc.take(Part::Scratch, "sums over rows", scores.len() * o)?,
            cols: alloc.take(Part::Scratch, "sums over columns", scores.len() * i)?,
            scratch: alloc.take(Part::Scratch, "scratch of importance", room)?,
        })
    }
}

/// Looks on while the gradients of one batch are made; nothing of a weight's size is kept.
pub struct Observer<'a, B: Backend> {
    backend: &'a B,
    sums: Sums<B::Store>,
    samples: Vec<Sample>,
    importance: Importance,
    layers: Range<usize>,
    scores: BTreeMap<Module, Vec<f64>>,
}

impl<'a, B: Backend> Observer<'a, B> {
    /// For a batch of `samples` and the linears of `layers`.
    pub fn new(
        backend: &'a B,
        sums: Sums<B::Store>,
        samples: Vec<Sample>,
        importance: Importance,
        layers: Range<usize>,
    ) -> Observer<'a, B> {
        Observer { backend, sums, samples, importance, layers, scores: BTreeMap::new() }
    }

    /// One number for each row (column of o and down) of the seven linears of `layer`, in the order of [`Target::ALL`];
    /// none if the backward pass did not come by all of them.
    pub fn take(&mut self, layer: usize) -> Option<[Vec<f64>; 7]> {
        let mut members: [Vec<f64>; 7] = Default::default();
        for target in Target::ALL {
            members[target as usize] = self.scores.remove(&Module { layer, target })?;
        }
        Some(members)
    }
}

impl<B: Backend, T: Real> Observe<B, T> for Observer<'_, B> {
    fn linear(
        &mut self,
        module: Module,
        x: &Buf<B, T>,
        dy: &Buf<B, T>,
        w: &Matrix<B>,
        tokens: usize,
    ) -> Result<()> {
        if !self.layers.contains(&module.layer) {
            return Ok(());
        }
        let scores = self.importance.sums();
        let (o, i) = w.size();
        let (rows, cols) = (0..scores.len() * o, 0..scores.len() * i);
        let room = self.backend.importance_scratch::<T>(o, i, scores);
        self.backend.importance(importance::Importance::<B::Store, T> {
            row_sums: B::Store::view_mut(&mut self.sums.rows, rows.clone()),
            col_sums: B::Store::view_mut(&mut self.sums.cols, cols.clone()),
            scratch: B::Store::view_mut(&mut self.sums.scratch, 0..room),
            dy: B::Store::rows(dy, 0..tokens, o),
            x: B::Store::rows(x, 0..tokens, i),
            w,
            samples: &self.samples,
            scores,
            tokens,
        })?;
        let (buf, range) = match module.target.prunes_rows() {
            true => (&self.sums.rows, rows),
            false => (&self.sums.cols, cols),
        };
        let mut host = vec![0.0; range.len()];
        self.backend.download(&mut host, B::Store::view(buf, range))?;
        self.scores.insert(module, self.importance.combine(&host));
        Ok(())
    }
}
