//! The backward pass, operation by operation: from the last layer to the first, into the arena of gradients.
//!
//! Norm outputs are computed again rather than kept, and so is the MLP's inner activation, along with its gradient.

use super::adapters::{Layout, Stack};
use super::forward::{DropoutKey, Pass, whole_mut};
use super::input::Input;
use super::room::{Back, Keep, Room, Slot};
use super::weights::Model;
use crate::backend::Backend;
use crate::checkpoint::module::{Module, Source, Target};
use crate::error::{Error, Result};
use crate::ops::attention::AttentionBwd;
use crate::ops::linear::{Below, LinearBwd, LinearBwdOut};
use crate::ops::rms_norm::{RmsNorm, RmsNormBwd};
use crate::ops::rope::Rope;
use crate::tensor::{Real, Store};

/// A buffer of a back end.
pub type Buf<B, T> = <<B as Backend>::Store as Store>::Buf<T>;
/// A frozen weight of a back end.
pub type Matrix<B> = <<B as Backend>::Store as Store>::Matrix;

/// Somebody who looks at each linear's input and output gradient as the backward pass makes them.
pub trait Observe<B: Backend, T: Real> {
    /// The first T `tokens` rows of `x[T, I]` and `dy[T, O]` of `module`, whose weight is `w[O, I]`.
    fn linear(
        &mut self,
        module: Module,
        x: &Buf<B, T>,
        dy: &Buf<B, T>,
        w: &Matrix<B>,
        tokens: usize,
    ) -> Result<()>;
}

/// Nobody.
impl<B: Backend, T: Real> Observe<B, T> for () {
    fn linear(&mut self, _: Module, _: &Buf<B, T>, _: &Buf<B, T>, _: &Matrix<B>, _: usize) -> Result<()> {
        Ok(())
    }
}

/// What is trained.
#[derive(Clone, Copy)]
pub struct Trained<'a> {
    /// Where the adapter lies, if there is one.
    pub layout: Option<&'a Layout>,
    /// A is frozen.
    pub freeze_a: bool,
}

impl<B: Backend> Model<B> {
    /// Gradients of the last forward pass and its loss (whose gradient lies in the room's `dn`), added to `grads`.
    ///
    /// `input`, `params` and `dropout` are those of the forward pass. Fails where the room keeps nothing to go back on.
    pub fn backward<T: Real>(
        &self,
        room: &mut Room<B::Store, T>,
        grads: &mut Buf<B, f32>,
        backend: &B,
        input: &Input,
        params: &Buf<B, f32>,
        trained: Trained<'_>,
        dropout: DropoutKey,
        observe: &mut (impl Observe<B, T> + Send),
    ) -> Result<()> {
        if !matches!(room.size.keep, Keep::Training { .. }) {
            return Err(Error::Op { op: "backward", why: "the room keeps no activations".into() });
        }
        let layouts = [trained.layout];
        let stack = Stack { params, layouts: &layouts };
        let pass = Pass::new(backend, input, stack, dropout);
        let (t, d) = (input.tokens(), self.config.hidden);
        let layers = self.config.layers;
        let sharing = room.size.keep.sharing(layers);
        backend.within(|| {
            let Back { dh: [dh, _], dn, .. } = back(&mut room.back)?;
            backend.rms_norm_bwd(RmsNormBwd {
                dx: B::Store::rows_mut(dh, 0..t, d),
                dy: B::Store::rows(dn, 0..t, d),
                residual: None,
                x: B::Store::rows(&room.h[layers], 0..t, d),
                rstd: B::Store::view(&room.rstd, 0..t),
                w: B::Store::view(&self.norm, 0..d),
                tokens: t,
                width: d,
            })?;
            for l in (0..layers).rev() {
                // The first slot still holds the last of those that share it.
                if l + 1 < sharing {
                    self.layer_forward(room, &pass, l, true)?;
                }
                self.layer_backward(room, grads, &pass, trained, observe, l)?;
            }
            Ok(())
        })
    }

    /// One layer: reads `dh[0]`, the gradient of its output, and leaves there the gradient of its input (the first
    /// layer leaves it alone: nothing below is trained).
    fn layer_backward<T: Real>(
        &self,
        room: &mut Room<B::Store, T>,
        grads: &mut Buf<B, f32>,
        pass: &Pass<'_, B>,
        trained: Trained<'_>,
        observe: &mut impl Observe<B, T>,
        l: usize,
    ) -> Result<()> {
        let c = &self.config;
        let (t, d, hd) = (pass.tokens, c.hidden, c.head_dim);
        let sizes = c.layer_sizes(l);
        let (hk, gk, f) = (sizes.heads * hd, sizes.kv_heads * hd, sizes.mlp);
        let slot_at = room.slot_of(l, c.layers);
        let table = room.size.table_rows * (hd / 2);
        let Room { h, n, act, rstd, slots, tables, scratch, back: b, .. } = room;
        let Slot { q, k, v, o, lse, mid, gate, up, rstd1, rstd2, t: ts } = &mut slots[slot_at];
        let layer = &self.layers[l];
        let Back { dh: [dh, dmid], dn, dq, dk, dv, do_ } = back(b)?;
        let backend = pass.backend;
        let eps = c.rms_norm_eps as f32;
        let mut linears = Linears { model: self, pass, trained, l, ts, grads, scratch, observe };

        let of_act = Below::SwiGlu {
            x: B::Store::rows_mut(act, 0..t, f),
            gate: B::Store::rows_mut(gate, 0..t, f),
            up: B::Store::rows_mut(up, 0..t, f),
        };
        let dys = [(Target::Down, &*dh)];
        linears.backward(of_act, &dys, Source::Down)?;
        linears.observe(act, &dys)?;

        // The norms' outputs again; their rstd goes where the last norm's was, which is used up.
        let mut renorm = |y: &mut Buf<B, T>, x, w| {
            backend.rms_norm(RmsNorm::<B::Store, T> {
                y: B::Store::rows_mut(y, 0..t, d),
                rstd: B::Store::view_mut(rstd, 0..t),
                x: B::Store::rows(x, 0..t, d),
                w: B::Store::view(w, 0..d),
                tokens: t,
                width: d,
                eps,
            })
        };
        renorm(n, mid, &layer.norm2)?;
        let dys = [(Target::Gate, &*gate), (Target::Up, up)];
        let of_n = Below::Kept { x: B::Store::rows(n, 0..t, d), dx: Some(B::Store::rows_mut(dn, 0..t, d)) };
        linears.backward(of_n, &dys, Source::GateUp)?;
        linears.observe(n, &dys)?;
        backend.rms_norm_bwd(RmsNormBwd::<B::Store, T> {
            dx: B::Store::rows_mut(dmid, 0..t, d),
            dy: B::Store::rows(dn, 0..t, d),
            residual: Some(B::Store::rows(dh, 0..t, d)),
            x: B::Store::rows(mid, 0..t, d),
            rstd: B::Store::view(rstd2, 0..t),
            w: B::Store::view(&layer.norm2, 0..d),
            tokens: t,
            width: d,
        })?;
        let dys = [(Target::O, &*dmid)];
        let of_o =
            Below::Kept { x: B::Store::rows(o, 0..t, hk), dx: Some(B::Store::rows_mut(do_, 0..t, hk)) };
        linears.backward(of_o, &dys, Source::O)?;
        linears.observe(o, &dys)?;
        backend.attention_bwd(AttentionBwd::<B::Store, T> {
            dq: B::Store::rows_mut(dq, 0..t, hk),
            dk: B::Store::rows_mut(dk, 0..t, gk),
            dv: B::Store::rows_mut(dv, 0..t, gk),
            scratch: whole_mut::<B::Store>(linears.scratch),
            do_: B::Store::rows(do_, 0..t, hk),
            o: B::Store::rows(o, 0..t, hk),
            lse: B::Store::view(lse, 0..t * sizes.heads),
            q: B::Store::rows(q, 0..t, hk),
            k: B::Store::rows(k, 0..t, gk),
            v: B::Store::rows(v, 0..t, gk),
            segments: &pass.segments,
            heads: self.heads(l),
        })?;
        for (x, heads) in [
            (B::Store::rows_mut(dq, 0..t, hk), sizes.heads),
            (B::Store::rows_mut(dk, 0..t, gk), sizes.kv_heads),
        ] {
            backend.rope(Rope::<B::Store, T> {
                x,
                cos: B::Store::view(&tables.0, 0..table),
                sin: B::Store::view(&tables.1, 0..table),
                rows: &pass.rows,
                heads,
                head_dim: hd,
                inverse: true,
            })?;
        }
        renorm(n, &h[l], &layer.norm1)?;
        let dys = [(Target::Q, &*dq), (Target::K, dk), (Target::V, dv)];
        let dx = (l > 0).then(|| B::Store::rows_mut(dn, 0..t, d));
        linears.backward(Below::Kept { x: B::Store::rows(n, 0..t, d), dx }, &dys, Source::Qkv)?;
        linears.observe(n, &dys)?;
        if l == 0 {
            return Ok(());
        }
        backend.rms_norm_bwd(RmsNormBwd::<B::Store, T> {
            dx: B::Store::rows_mut(dh, 0..t, d),
            dy: B::Store::rows(dn, 0..t, d),
            residual: Some(B::Store::rows(dmid, 0..t, d)),
            x: B::Store::rows(&h[l], 0..t, d),
            rstd: B::Store::view(rstd1, 0..t),
            w: B::Store::view(&layer.norm1, 0..d),
            tokens: t,
            width: d,
        })
    }
}

/// The linears of one layer, on the way back.
struct Linears<'a, B: Backend, T: Real, W> {
    model: &'a Model<B>,
    pass: &'a Pass<'a, B>,
    trained: Trained<'a>,
    l: usize,
    /// `x Aᵀ` of each target.
    ts: &'a [Buf<B, T>; 7],
    grads: &'a mut Buf<B, f32>,
    scratch: &'a mut Buf<B, f32>,
    observe: &'a mut W,
}

impl<B: Backend, T: Real, W: Observe<B, T>> Linears<'_, B, T, W> {
    /// The targets that share an input, each with the gradient of its output.
    fn backward<'a>(
        &'a mut self,
        below: Below<'a, B::Store, T>,
        dys: &[(Target, &'a Buf<B, T>)],
        which: Source,
    ) -> Result<()> {
        let t = self.pass.tokens;
        let out = |&(target, dy): &(Target, &'a Buf<B, T>)| {
            let lora = self.trained.layout.and_then(|layout| layout.get(Module { layer: self.l, target }));
            LinearBwdOut {
                dy: B::Store::rows(dy, 0..t, self.model.config.dims(target, self.l).0),
                t: B::Store::rows(&self.ts[target as usize], 0..t, lora.map_or(0, |l| l.rank)),
                w: &self.model.layers[self.l].linears[target as usize],
                lora,
            }
        };
        let (params, end) = (self.pass.stack.params, B::Store::len(self.grads));
        self.pass.backend.linear_bwd(LinearBwd {
            below,
            grads: B::Store::view_mut(self.grads, 0..end),
            scratch: whole_mut::<B::Store>(self.scratch),
            outs: dys.iter().map(out).collect(),
            params: B::Store::view(params, 0..B::Store::len(params)),
            tokens: t,
            dropout: self.pass.dropout.of(self.l, which),
            freeze_a: self.trained.freeze_a,
        })
    }

    /// Shows the observer the input and the targets' gradients.
    fn observe(&mut self, x: &Buf<B, T>, dys: &[(Target, &Buf<B, T>)]) -> Result<()> {
        dys.iter().try_for_each(|&(target, dy)| {
            let w = &self.model.layers[self.l].linears[target as usize];
            self.observe.linear(Module { layer: self.l, target }, x, dy, w, self.pass.tokens)
        })
    }
}

fn back<S: Store, T: Real>(back: &mut Option<Back<S, T>>) -> Result<&mut Back<S, T>> {
    back.as_mut().ok_or_else(|| Error::Op { op: "backward", why: "the room has no gradients".into() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::checkpoint::{Checkpoint, tests::write};
    use crate::checkpoint::weights::OpenOptions;
    use crate::cpu::Cpu;
    use crate::data::batch::Batch;
    use crate::model::room::{Head, RoomSize};
    use crate::model::rope::Tables;
    use crate::model::trainer::Trainer;
    use crate::ops::adamw::Hyper;
    use crate::ops::cases::normal;
    use crate::tensor::DType;

    /// A and B after two steps of two micro-batches each.
    fn trained(recomputed: usize, dropout: f32) -> Vec<f32> {
        let dir = tempfile::tempdir().unwrap();
        let config = write(dir.path(), json!({"num_hidden_layers": 4}), DType::F32, 1 << 30, "");
        let backend = Cpu::new(2).unwrap();
        let model =
            Model::new(&backend, &Checkpoint::open(dir.path(), OpenOptions::default()).unwrap()).unwrap();
        let layout = Layout::uniform(&config, &Target::ALL, 2, 0.5);
        let batch = |seed: u32| Batch {
            ids: (0..9).map(|i| (i * 5 + seed) % 7).collect(),
            bounds: vec![0, 4, 9],
            rows: vec![1, 2, 5, 7],
            targets: vec![seed, 3, 4, 6],
        };
        let size = RoomSize {
            tokens: 9,
            copies: 1,
            keep: Keep::Training { recomputed },
            table_rows: 0,
            ranks: layout.ranks(),
            dropout: dropout > 0.0,
            dtype: DType::F32,
            head: Head::Loss(4),
        };
        let tables = Tables::new(&config, 9);
        let mut trainer =
            Trainer::<Cpu, f32>::new(&backend, &model, layout.clone(), false, tables, size).unwrap();
        trainer.state.params.copy_from_slice(&normal::<f32>(3, layout.end(), 0.5));
        let hyper = Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_norm: 1.0 };
        for step in 0..2 {
            let key = DropoutKey { p: dropout, seed: 1, step: 2 * step };
            trainer.step(&[batch(1), batch(2)], hyper, key, step + 1).unwrap();
        }
        trainer.state.params.to_vec()
    }

    #[test]
    fn however_many_layers_are_recomputed() {
        for dropout in [0.0, 0.25] {
            let none = trained(0, dropout);
            assert!(none.iter().all(|x| x.is_finite()));
            for recomputed in 1..=4 {
                assert!(trained(recomputed, dropout) == none, "{recomputed} layers");
            }
        }
    }
}
