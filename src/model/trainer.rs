//! One optimizer step: forward and backward over its micro-batches, gradient norm, AdamW.

use super::adapters::{Layout, Stack};
use super::backward::{Buf, Trained};
use super::forward::DropoutKey;
use super::memory::{Allocator, Device, Part, Plan};
use super::paper::Paper;
use super::room::{Room, RoomSize};
use super::rope::Tables;
use super::session::Session;
use super::weights::Model;
use crate::backend::{Backend, Scratch};
use crate::checkpoint::config::ModelConfig;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::ops::adamw::{AdamW, Hyper};
use crate::ops::sum_sq::SumSq;
use crate::tensor::{Real, Store};

/// The state of a LoRA training run, besides the room.
pub struct State<S: Store> {
    /// All A and B.
    pub params: S::Buf<f32>,
    /// Their gradients, of the same layout.
    pub grads: S::Buf<f32>,
    /// First moments of what is trained.
    pub m: S::Buf<f32>,
    /// Second moments of what is trained.
    pub v: S::Buf<f32>,
    /// `[1]`: the squared norm of the gradients.
    pub norm_sq: S::Buf<f64>,
}

impl<S: Store> State<S> {
    /// Makes (or notes) the arena of `layout`.
    pub fn new<A: Allocator<Store = S>>(alloc: &mut A, layout: &Layout, freeze_a: bool) -> Result<State<S>> {
        let trained = layout.trained(freeze_a).len();
        Ok(State {
            params: alloc.take(Part::Adapter, "A and B", layout.end())?,
            grads: alloc.take(Part::Gradients, "gradients of A and B", layout.end())?,
            m: alloc.take(Part::Optimizer, "first moments", trained)?,
            v: alloc.take(Part::Optimizer, "second moments", trained)?,
            norm_sq: alloc.take(Part::Gradients, "squared norm", 1)?,
        })
    }
}

/// Everything a training run holds on a device, made (or noted) at once.
pub struct Buffers<S: Store, T: Real> {
    /// Adapter, gradients, moments.
    pub state: State<S>,
    /// Activations and scratch.
    pub room: Room<S, T>,
}

impl<S: Store, T: Real> Buffers<S, T> {
    /// Makes (or notes) the buffers of a run of `size` that trains `layout`.
    pub fn new<A: Allocator<Store = S>>(
        alloc: &mut A,
        scratch: &impl Scratch,
        config: &ModelConfig,
        layout: &Layout,
        freeze_a: bool,
        size: RoomSize,
    ) -> Result<Buffers<S, T>> {
        let state = State::new(alloc, layout, freeze_a)?;
        Ok(Buffers { state, room: Room::new(alloc, scratch, config, size)? })
    }
}

/// What one optimizer step gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Mean negative log-likelihood over the step's supervised tokens.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
}

/// A model with one adapter being trained on it.
pub struct Trainer<'a, B: Backend, T: Real> {
    backend: &'a B,
    model: &'a Model<B>,
    session: Session<B, T>,
    /// Adapter, gradients, moments.
    pub state: State<B::Store>,
    layout: Layout,
    freeze_a: bool,
    nll: Vec<f32>,
}

impl<'a, B: Backend, T: Real> Trainer<'a, B, T> {
    /// Makes all buffers. `size` holds the largest micro-batch.
    pub fn new(
        backend: &'a B,
        model: &'a Model<B>,
        layout: Layout,
        freeze_a: bool,
        tables: Tables,
        size: RoomSize,
    ) -> Result<Trainer<'a, B, T>> {
        let size = RoomSize { table_rows: tables.rows(size.tokens), ..size };
        let mut paper = Paper::<B::Store>::new(Plan::default());
        Buffers::<_, T>::new(&mut paper, backend, &model.config, &layout, freeze_a, size)?;
        backend.reserve(paper.plan.total())?;
        let Buffers { state, room } =
            Buffers::new(&mut Device(backend), backend, &model.config, &layout, freeze_a, size)?;
        let session = Session::with_room(backend, room, tables)?;
        Ok(Trainer { backend, model, session, state, layout, freeze_a, nll: Vec::new() })
    }

    /// Where the adapter lies in the arena.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// One step over `batches`. `dropout.step` is the first micro-batch's number; `step` counts from 1.
    ///
    /// Fails if no token is supervised or the loss is no number; the adapter is then as it was.
    pub fn step(
        &mut self,
        batches: &[Batch],
        hyper: Hyper,
        dropout: DropoutKey,
        step: u64,
    ) -> Result<StepResult> {
        let supervised: usize = batches.iter().map(|b| b.rows.len()).sum();
        if supervised == 0 {
            return Err(Error::Numeric(format!(
                "step {step} has no supervised token: every completion was cut off, or the data has none"
            )));
        }
        let all = 0..self.layout.end();
        self.backend.zero(B::Store::view_mut(&mut self.state.grads, all.clone()))?;
        let (mut total, mut tokens) = (0.0f64, 0);
        for (n, batch) in batches.iter().enumerate() {
            let key = DropoutKey { step: dropout.step + n as u64, ..dropout };
            let input = self.session.documents(self.backend, batch.ids.clone(), &batch.bounds)?;
            let layouts = [Some(&self.layout)];
            let stack = Stack { params: &self.state.params, layouts: &layouts };
            let room = &mut self.session.room;
            self.model.forward(room, self.backend, &input, stack, key)?;
            self.nll.resize(batch.rows.len(), 0.0);
            let weight = Some((1.0 / supervised as f64) as f32);
            let (rows, targets) = (&batch.rows, &batch.targets);
            self.model.loss(&mut self.nll, room, self.backend, rows, targets, input.tokens(), weight)?;
            total += self.nll.iter().map(|&x| f64::from(x)).sum::<f64>();
            tokens += input.tokens();
            let trained = Trained { layout: Some(&self.layout), freeze_a: self.freeze_a };
            let (params, grads) = (&self.state.params, &mut self.state.grads);
            self.model.backward(room, grads, self.backend, &input, params, trained, key, &mut ())?;
        }
        let loss = total / supervised as f64;
        let grad_norm = self.grad_norm()?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::Numeric(format!(
                "step {step}: loss {loss}, gradient norm {grad_norm}: lower --lr, or look for NaN in the weights"
            )));
        }
        let trained = self.layout.trained(self.freeze_a);
        self.backend.adamw(AdamW {
            params: B::Store::view_mut(&mut self.state.params, trained.clone()),
            m: B::Store::view_mut(&mut self.state.m, 0..trained.len()),
            v: B::Store::view_mut(&mut self.state.v, 0..trained.len()),
            grads: B::Store::view(&self.state.grads, trained),
            norm_sq: B::Store::view(&self.state.norm_sq, 0..1),
            hyper,
            step,
        })?;
        Ok(StepResult { loss, grad_norm, tokens })
    }

    /// Sum of the negative log-likelihood over the supervised tokens of a batch, and their number.
    pub fn nll(&mut self, batch: &Batch) -> Result<(f64, usize)> {
        let input = self.session.documents(self.backend, batch.ids.clone(), &batch.bounds)?;
        let layouts = [Some(&self.layout)];
        let stack = Stack { params: &self.state.params, layouts: &layouts };
        let room = &mut self.session.room;
        self.model.forward(room, self.backend, &input, stack, DropoutKey::NONE)?;
        self.nll.resize(batch.rows.len(), 0.0);
        let (rows, targets) = (&batch.rows, &batch.targets);
        self.model.loss(&mut self.nll, room, self.backend, rows, targets, input.tokens(), None)?;
        Ok((self.nll.iter().map(|&x| f64::from(x)).sum(), batch.rows.len()))
    }

    /// Copies a buffer of the state to the host.
    pub fn download(&self, dst: &mut [f32], from: &Buf<B, f32>) -> Result<()> {
        self.backend.download(dst, B::Store::view(from, 0..dst.len()))
    }

    fn grad_norm(&mut self) -> Result<f64> {
        let trained = self.layout.trained(self.freeze_a);
        self.backend.sum_sq(SumSq {
            out: B::Store::view_mut(&mut self.state.norm_sq, 0..1),
            x: B::Store::view(&self.state.grads, trained),
        })?;
        let mut norm_sq = [0.0f64];
        self.backend.download(&mut norm_sq, B::Store::view(&self.state.norm_sq, 0..1))?;
        Ok(norm_sq[0].sqrt())
    }
}
