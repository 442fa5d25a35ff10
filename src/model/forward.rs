//! The forward pass, operation by operation.
//!
//! Per layer: `n = norm(h)`, `q, k, v = n Wᵀ`, rope, `o = attention(q, k, v)`, `mid = h + o Wᵀ`, `n = norm(mid)`,
//! `gate, up = n Wᵀ`, `act = silu(gate) ∘ up`, `h' = mid + act Wᵀ`; each linear with its adapters.

use super::adapters::Stack;
use super::input::Input;
use super::room::{Keep, Room};
use super::weights::Model;
use crate::backend::Backend;
use crate::checkpoint::module::{Module, Source, Target};
use crate::error::{Error, Result};
use crate::ops::attention::{Attention, Heads, Segment};
use crate::ops::choice::Choice;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::embed::Embed;
use crate::ops::linear::{Dropout, Epilogue, Linear, LinearOut, LoraRows};
use crate::ops::rms_norm::RmsNorm;
use crate::ops::rope::Rope;
use crate::tensor::{MemoryLayout, Real, Store};

/// The dropout of one micro-batch: p, seed and step; the tensor is added by layer and input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropoutKey {
    /// Probability of zero; 0 for none.
    pub p: f32,
    /// The run's seed.
    pub seed: u64,
    /// The micro-batch, counted from 0 over the whole run.
    pub step: u64,
}

impl DropoutKey {
    /// No dropout.
    pub const NONE: DropoutKey = DropoutKey { p: 0.0, seed: 0, step: 0 };

    pub(crate) fn of(self, layer: usize, which: Source) -> Option<Dropout> {
        let tensor = (layer * 4 + which as usize) as u64;
        (self.p > 0.0).then_some(Dropout { p: self.p, seed: self.seed, tensor, step: self.step })
    }
}

/// What all layers of a pass share.
pub(crate) struct Pass<'a, B: Backend> {
    pub backend: &'a B,
    pub stack: Stack<'a, B::Store>,
    pub rows: Vec<u32>,
    pub segments: Vec<Segment>,
    /// Tokens of the batch, before stacking.
    pub tokens: usize,
    pub offset: usize,
    pub dropout: DropoutKey,
    /// What the last layer computes where that is not everything.
    asked: Option<Asked>,
}

/// The rows of one copy that are asked, and rope rows and segments of their queries, of all copies.
struct Asked {
    rows: Vec<u32>,
    table_rows: Vec<u32>,
    segments: Vec<Segment>,
}

impl<'a, B: Backend> Pass<'a, B> {
    pub fn new(backend: &'a B, input: &Input, stack: Stack<'a, B::Store>, dropout: DropoutKey) -> Self {
        let (rows, segments) = input.stacked(stack.copies());
        let some = input.asked.as_ref().filter(|asked| asked.len() < input.tokens());
        let asked = some.map(|asked| {
            let (table_rows, segments) = input.asked_stacked(asked, stack.copies());
            Asked { rows: asked.clone(), table_rows, segments }
        });
        Pass { backend, stack, rows, segments, tokens: input.tokens(), offset: input.offset, dropout, asked }
    }

    /// Rows of the residual stream.
    pub fn stacked(&self) -> usize {
        self.tokens * self.stack.copies()
    }

    /// Copies the rows `from + asked` of x below one another into y, from row `to` on.
    fn gather<T: Real>(
        &self,
        y: &mut <B::Store as Store>::Buf<T>,
        to: usize,
        x: &<B::Store as Store>::Buf<T>,
        from: usize,
        asked: &[u32],
        width: usize,
    ) -> Result<()> {
        let mut done = 0;
        for run in asked.chunk_by(|a, b| a + 1 == *b) {
            let first = from + run[0] as usize;
            self.backend.copy(
                B::Store::rows_mut(y, to + done..to + done + run.len(), width),
                B::Store::rows(x, first..first + run.len(), width),
            )?;
            done += run.len();
        }
        Ok(())
    }
}

impl<B: Backend> Model<B> {
    /// Runs `input` through all layers and the last norm; the normalised hidden states lie in `room.n`, those of
    /// [`Input::asked`] alone where there is such a list.
    ///
    /// Fails where the room is too small, the list is no list of this batch's tokens, or an operation fails.
    pub fn forward<T: Real>(
        &self,
        room: &mut Room<B::Store, T>,
        backend: &B,
        input: &Input,
        stack: Stack<'_, B::Store>,
        dropout: DropoutKey,
    ) -> Result<()> {
        let t = input.tokens();
        if t > room.size.tokens || stack.copies() > room.size.copies || stack.copies() == 0 {
            return Err(Error::Op {
                op: "forward",
                why: format!(
                    "a batch of {t} tokens × {} copies, expected at most {} × {}",
                    stack.copies(),
                    room.size.tokens,
                    room.size.copies
                ),
            });
        }
        if let Some(asked) = &input.asked {
            let ascend = asked.is_sorted_by(|a, b| a < b) && asked.last().is_some_and(|&r| (r as usize) < t);
            if !ascend || dropout.p > 0.0 || matches!(room.size.keep, Keep::Training { .. }) {
                return Err(Error::Op {
                    op: "forward",
                    why: format!(
                        "asked for some of {t} tokens: expected at least one, ascending, and no training"
                    ),
                });
            }
        }
        let pass = Pass::new(backend, input, stack, dropout);
        let d = self.config.hidden;
        backend.within(|| {
            backend.embed(Embed::<B::Store, T> {
                y: B::Store::rows_mut(&mut room.h[0], 0..t, d),
                table: &self.embed,
                ids: &input.ids,
            })?;
            for l in 0..self.config.layers {
                self.layer_forward(room, &pass, l, false)?;
            }
            let rows = input.rows() * stack.copies();
            let last = room.stream_of(self.config.layers);
            backend.rms_norm(RmsNorm {
                y: B::Store::rows_mut(&mut room.n, 0..rows, d),
                rstd: B::Store::view_mut(&mut room.rstd, 0..rows),
                x: B::Store::rows(&room.h[last], 0..rows, d),
                w: B::Store::view(&self.norm, 0..d),
                tokens: rows,
                width: d,
                eps: self.config.rms_norm_eps as f32,
            })
        })
    }

    /// One layer: reads stream l, writes stream l + 1 and the layer's slot; the slot alone if it runs `again`.
    pub(crate) fn layer_forward<T: Real>(
        &self,
        room: &mut Room<B::Store, T>,
        pass: &Pass<'_, B>,
        l: usize,
        again: bool,
    ) -> Result<()> {
        let c = &self.config;
        let (d, hd) = (c.hidden, c.head_dim);
        let sizes = c.layer_sizes(l);
        let layer = &self.layers[l];
        let rows = pass.stacked();
        // The first layer's stream, norm and base products are equal for all copies and made once.
        let first = if l == 0 { pass.tokens } else { rows };
        let (in_, out) = (room.stream_of(l), room.stream_of(l + 1));
        let slot_at = room.slot_of(l, c.layers);
        let slot = &mut room.slots[slot_at];
        let kept = !matches!(room.size.keep, Keep::Cache { .. });
        let (keys, values) = match room.cache.get_mut(l) {
            Some((k, v)) if !kept => (k, v),
            _ => (&mut slot.k, &mut slot.v),
        };
        let kv = sizes.kv_heads * hd;
        let held = pass.offset + rows;
        let room_for = B::Store::len(keys).checked_div(B::Store::row(kv)).unwrap_or(held);
        if room_for < held {
            return Err(Error::Op {
                op: "forward",
                why: format!("{held} keys of layer {l}, expected at most {room_for}"),
            });
        }
        pass.backend.rms_norm(RmsNorm {
            y: B::Store::rows_mut(&mut room.n, 0..first, d),
            rstd: B::Store::view_mut(&mut slot.rstd1, 0..first),
            x: B::Store::rows(&room.h[in_], 0..first, d),
            w: B::Store::view(&layer.norm1, 0..d),
            tokens: first,
            width: d,
            eps: c.rms_norm_eps as f32,
        })?;
        let copies = pass.stack.copies();
        let asked = pass.asked.as_ref().filter(|_| l + 1 == c.layers);
        // Rows of a copy, and of all, that go on from here; the others have keys and values only.
        let going = asked.map_or(pass.tokens, |a| a.rows.len());
        let queries = going * copies;
        let groups: Vec<Vec<LoraRows>> = Target::ALL
            .iter()
            .map(|&target| {
                let keys = matches!(target, Target::K | Target::V);
                pass.stack.groups(Module { layer: l, target }, if keys { pass.tokens } else { going })
            })
            .collect();
        let [tq, tk, tv, to, tgate, tup, tdown] = &mut slot.t;
        let part = pass.offset..held;
        let mut outs = vec![
            self.out(l, Target::K, B::Store::rows_mut(keys, part.clone(), kv), tk, &groups, rows),
            self.out(l, Target::V, B::Store::rows_mut(values, part.clone(), kv), tv, &groups, rows),
        ];
        if asked.is_none() {
            let q = B::Store::rows_mut(&mut slot.q, 0..queries, sizes.heads * hd);
            outs.insert(0, self.out(l, Target::Q, q, tq, &groups, queries));
        }
        pass.backend.linear(Linear {
            outs,
            epilogue: Epilogue::None,
            scratch: whole_mut::<B::Store>(&mut room.scratch),
            x: B::Store::rows(&room.n, 0..first, d),
            params: whole::<B::Store>(pass.stack.params),
            tokens: first,
            copies: rows / first.max(1),
            dropout: pass.dropout.of(l, Source::Qkv),
        })?;
        if let Some(asked) = asked {
            // The queries' input lies in `mid` until q is made, their residual in the other stream.
            let made = first / pass.tokens;
            let (from, to) = two(&mut room.h, in_, out);
            for copy in 0..copies {
                let at = copy % made * pass.tokens;
                pass.gather(to, copy * going, from, at, &asked.rows, d)?;
                if copy < made {
                    pass.gather(&mut slot.mid, copy * going, &room.n, at, &asked.rows, d)?;
                }
            }
            let q = B::Store::rows_mut(&mut slot.q, 0..queries, sizes.heads * hd);
            pass.backend.linear(Linear {
                outs: vec![self.out(l, Target::Q, q, tq, &groups, queries)],
                epilogue: Epilogue::None,
                scratch: whole_mut::<B::Store>(&mut room.scratch),
                x: B::Store::rows(&slot.mid, 0..made * going, d),
                params: whole::<B::Store>(pass.stack.params),
                tokens: made * going,
                copies: copies / made,
                dropout: None,
            })?;
        } else if first < rows {
            // The residual that each copy adds to: the embedding, once below the other, by way of n.
            pass.backend.copy(
                B::Store::rows_mut(&mut room.n, 0..first, d),
                B::Store::rows(&room.h[in_], 0..first, d),
            )?;
            for copy in 1..copies {
                let at = copy * first;
                pass.backend.copy(
                    B::Store::rows_mut(&mut room.h[in_], at..at + first, d),
                    B::Store::rows(&room.n, 0..first, d),
                )?;
            }
        }
        let (residual, q_rows, segments) = match asked {
            None => (in_, &pass.rows, &pass.segments),
            Some(asked) => (out, &asked.table_rows, &asked.segments),
        };
        let table = room.size.table_rows * (hd / 2);
        for (x, rows, heads) in [
            (B::Store::rows_mut(&mut slot.q, 0..queries, sizes.heads * hd), q_rows, sizes.heads),
            (B::Store::rows_mut(keys, part, kv), &pass.rows, sizes.kv_heads),
        ] {
            pass.backend.rope(Rope {
                x,
                cos: B::Store::view(&room.tables.0, 0..table),
                sin: B::Store::view(&room.tables.1, 0..table),
                rows,
                heads,
                head_dim: hd,
                inverse: false,
            })?;
        }
        pass.backend.attention(Attention {
            o: B::Store::rows_mut(&mut slot.o, 0..queries, sizes.heads * hd),
            lse: B::Store::view_mut(&mut slot.lse, 0..queries * sizes.heads),
            q: B::Store::rows(&slot.q, 0..queries, sizes.heads * hd),
            k: B::Store::rows(keys, 0..held, kv),
            v: B::Store::rows(values, 0..held, kv),
            segments,
            heads: self.heads(l),
        })?;
        pass.backend.linear(Linear {
            outs: vec![self.out(
                l,
                Target::O,
                B::Store::rows_mut(&mut slot.mid, 0..queries, d),
                to,
                &groups,
                queries,
            )],
            epilogue: Epilogue::Residual(B::Store::rows(&room.h[residual], 0..queries, d)),
            scratch: whole_mut::<B::Store>(&mut room.scratch),
            x: B::Store::rows(&slot.o, 0..queries, sizes.heads * hd),
            params: whole::<B::Store>(pass.stack.params),
            tokens: queries,
            copies: 1,
            dropout: pass.dropout.of(l, Source::O),
        })?;
        pass.backend.rms_norm(RmsNorm {
            y: B::Store::rows_mut(&mut room.n, 0..queries, d),
            rstd: B::Store::view_mut(&mut slot.rstd2, 0..queries),
            x: B::Store::rows(&slot.mid, 0..queries, d),
            w: B::Store::view(&layer.norm2, 0..d),
            tokens: queries,
            width: d,
            eps: c.rms_norm_eps as f32,
        })?;
        let f = sizes.mlp;
        let gate_up = vec![
            self.out(
                l,
                Target::Gate,
                B::Store::rows_mut(&mut slot.gate, 0..queries, f),
                tgate,
                &groups,
                queries,
            ),
            self.out(l, Target::Up, B::Store::rows_mut(&mut slot.up, 0..queries, f), tup, &groups, queries),
        ];
        pass.backend.linear(Linear {
            outs: gate_up,
            epilogue: Epilogue::SwiGlu(B::Store::rows_mut(&mut room.act, 0..queries, f)),
            scratch: whole_mut::<B::Store>(&mut room.scratch),
            x: B::Store::rows(&room.n, 0..queries, d),
            params: whole::<B::Store>(pass.stack.params),
            tokens: queries,
            copies: 1,
            dropout: pass.dropout.of(l, Source::GateUp),
        })?;
        let y = (!again).then(|| B::Store::rows_mut(&mut room.h[out], 0..queries, d));
        let residual = B::Store::rows(&slot.mid, 0..queries, d);
        pass.backend.linear(Linear {
            outs: vec![self.out(l, Target::Down, y, tdown, &groups, queries)],
            epilogue: if again { Epilogue::None } else { Epilogue::Residual(residual) },
            scratch: whole_mut::<B::Store>(&mut room.scratch),
            x: B::Store::rows(&room.act, 0..queries, f),
            params: whole::<B::Store>(pass.stack.params),
            tokens: queries,
            copies: 1,
            dropout: pass.dropout.of(l, Source::Down),
        })
    }

    fn out<'a, T: Real>(
        &'a self,
        l: usize,
        target: Target,
        y: impl Into<Option<<B::Store as Store>::ViewMut<'a, T>>>,
        t: &'a mut <B::Store as Store>::Buf<T>,
        groups: &'a [Vec<LoraRows>],
        rows: usize,
    ) -> LinearOut<'a, B::Store, T> {
        let layer = &self.layers[l];
        let at = target as usize;
        let rank = groups[at].iter().map(|g| g.lora.rank).max().unwrap_or(0);
        LinearOut {
            y: y.into(),
            t: B::Store::rows_mut(t, 0..rows, rank),
            w: &layer.linears[at],
            bias: layer.biases[at].as_ref().map(|b| B::Store::view(b, 0..B::Store::len(b))),
            groups: &groups[at],
        }
    }

    pub(crate) fn heads(&self, l: usize) -> Heads {
        let s = self.config.layer_sizes(l);
        let dim = self.config.head_dim;
        Heads { q: s.heads, kv: s.kv_heads, dim, scale: (1.0 / (dim as f64).sqrt()) as f32 }
    }

    /// The negative log-likelihood of each supervised row of the last forward pass, and with `gradient` the gradient
    /// of `weight · Σ nll` with respect to the normalised hidden states, in the room's `dn`.
    pub fn loss<T: Real>(
        &self,
        nll: &mut [f32],
        room: &mut Room<B::Store, T>,
        backend: &B,
        rows: &[u32],
        targets: &[u32],
        tokens: usize,
        gradient: Option<f32>,
    ) -> Result<()> {
        let d = self.config.hidden;
        if B::Store::len(&room.out) < rows.len() {
            return Err(Error::Op {
                op: "loss",
                why: format!("{} supervised rows, expected at most {}", rows.len(), B::Store::len(&room.out)),
            });
        }
        let dx = match (gradient, &mut room.back) {
            (Some(_), Some(back)) => Some(B::Store::rows_mut(&mut back.dn, 0..tokens, d)),
            _ => None,
        };
        backend.cross_entropy(CrossEntropy::<B::Store, T> {
            nll: B::Store::view_mut(&mut room.out, 0..rows.len()),
            dx,
            scratch: whole_mut::<B::Store>(&mut room.scratch),
            x: B::Store::rows(&room.n, 0..tokens, d),
            head: self.head(),
            rows,
            targets,
            tokens,
            weight: gradient.unwrap_or(0.0),
        })?;
        backend.download(nll, B::Store::view(&room.out, 0..rows.len()))
    }

    /// Log-probabilities of (row, token) pairs of the last forward pass; `rows` do not descend.
    pub fn choices<T: Real>(
        &self,
        out: &mut [f32],
        room: &mut Room<B::Store, T>,
        backend: &B,
        rows: &[u32],
        ids: &[u32],
        tokens: usize,
    ) -> Result<()> {
        let d = self.config.hidden;
        if B::Store::len(&room.out) < rows.len() {
            return Err(Error::Op {
                op: "choices",
                why: format!("{} pairs, expected at most {}", rows.len(), B::Store::len(&room.out)),
            });
        }
        backend.choice(Choice::<B::Store, T> {
            out: B::Store::view_mut(&mut room.out, 0..rows.len()),
            scratch: whole_mut::<B::Store>(&mut room.scratch),
            x: B::Store::rows(&room.n, 0..tokens, d),
            head: self.head(),
            rows,
            ids,
            tokens,
        })?;
        backend.download(out, B::Store::view(&room.out, 0..rows.len()))
    }

    /// All logits of rows `first..first + count` of the last forward pass, `[count, V]`, as f32.
    pub fn logits<T: Real>(
        &self,
        out: &mut [f32],
        room: &mut Room<B::Store, T>,
        backend: &B,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let (d, v) = (self.config.hidden, self.config.vocab);
        let mut none = backend.alloc::<T>("no x Aᵀ", 0)?;
        let empty = backend.alloc::<f32>("no adapter", 0)?;
        backend.linear(Linear::<B::Store, T> {
            outs: vec![LinearOut {
                y: Some(B::Store::rows_mut(&mut room.logits, 0..count, v)),
                t: B::Store::view_mut(&mut none, 0..0),
                w: self.head(),
                bias: None,
                groups: &[],
            }],
            epilogue: Epilogue::None,
            scratch: whole_mut::<B::Store>(&mut room.scratch),
            x: B::Store::rows(&room.n, first..first + count, d),
            params: B::Store::view(&empty, 0..0),
            tokens: count,
            copies: 1,
            dropout: None,
        })?;
        // A row at a time, so that the host holds no second copy of all of them.
        let mut host = vec![T::from_f32(0.0); B::Store::row(v)];
        for (r, out) in out.chunks_mut(v).enumerate() {
            backend.download(&mut host, B::Store::rows(&room.logits, r..r + 1, v))?;
            out.iter_mut().zip(&host).for_each(|(out, x)| *out = x.to_f32());
        }
        Ok(())
    }
}

/// Element `a` to read and element `b`, another one, to write.
fn two<T>(all: &mut [T], a: usize, b: usize) -> (&T, &mut T) {
    let (low, high) = all.split_at_mut(a.max(b));
    if a < b { (&low[a], &mut high[0]) } else { (&high[0], &mut low[b]) }
}

fn whole<S: Store>(buf: &S::Buf<f32>) -> S::View<'_, f32> {
    S::view(buf, 0..S::len(buf))
}

pub(crate) fn whole_mut<S: Store>(buf: &mut S::Buf<f32>) -> S::ViewMut<'_, f32> {
    let len = S::len(buf);
    S::view_mut(buf, 0..len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::checkpoint::{Checkpoint, tests::write};
    use crate::checkpoint::weights::OpenOptions;
    use crate::cpu::Cpu;
    use crate::model::adapters::Layout;
    use crate::model::room::{Head, RoomSize};
    use crate::model::rope::{Run, Tables};
    use crate::model::session::Session;
    use crate::ops::cases::normal;
    use crate::tensor::DType;
    use serde_json::json;

    /// Normalised hidden states `[rows, D]` of a shared prefix of 3 tokens and two branches, with two copies of which
    /// the second has an adapter.
    fn hidden(layers: usize, asked: Option<Vec<u32>>) -> Result<Vec<Vec<f32>>> {
        let dir = tempfile::tempdir().unwrap();
        let config = write(dir.path(), json!({"num_hidden_layers": layers}), DType::F32, 1 << 30, "");
        let backend = Cpu::new(2)?;
        let checkpoint = Checkpoint::open(dir.path(), OpenOptions::default())?;
        let model = Model::new(&backend, &checkpoint)?;
        let layout = Layout::uniform(&config, &Target::ALL, 2, 0.5);
        let params = normal::<f32>(7, layout.end(), 0.5);
        let size = RoomSize {
            tokens: 8,
            copies: 2,
            keep: Keep::Output,
            table_rows: 0,
            ranks: [2; 7],
            dropout: false,
            dtype: DType::F32,
            head: Head::Choice(1),
        };
        let mut session: Session<Cpu, f32> = Session::new(&backend, &model, Tables::new(&config, 8), size)?;
        let run = |positions| Run { positions, length: 8 };
        let segments = vec![
            Segment { q: 0..3, own: 0, past: vec![] },
            Segment { q: 3..6, own: 3, past: vec![0..3] },
            Segment { q: 6..8, own: 6, past: vec![0..3] },
        ];
        let (ids, runs) = (vec![1, 2, 3, 4, 5, 6, 0, 2], [run(0..3), run(3..6), run(3..5)]);
        let mut input = session.runs(&backend, ids, &runs, segments, 0, vec![0])?;
        input.asked = asked;
        let stack = Stack { params: &params, layouts: &[None, Some(&layout)] };
        session.forward(&model, &backend, &input, stack)?;
        let rows = session.room.n.chunks(config.hidden).take(2 * input.rows());
        Ok(rows.map(<[f32]>::to_vec).collect())
    }

    #[test]
    fn what_is_asked_is_as_among_all() {
        for layers in [1, 2, 3] {
            let all = hidden(layers, None).unwrap();
            for asked in [vec![7], vec![0, 2, 4, 5, 7], vec![3, 4], (0..8).collect()] {
                let some = hidden(layers, Some(asked.clone())).unwrap();
                assert_eq!(some.len(), 2 * asked.len());
                for (n, got) in some.iter().enumerate() {
                    let want = &all[n / asked.len() * 8 + asked[n % asked.len()] as usize];
                    for (got, want) in got.iter().zip(want) {
                        assert!((got - want).abs() <= 2e-6 * want.abs().max(1.0), "{layers} {asked:?} {n}");
                    }
                }
            }
        }
        for asked in [vec![], vec![2, 1], vec![1, 1], vec![8]] {
            let err = hidden(2, Some(asked)).unwrap_err().to_string();
            assert!(err.contains("expected at least one, ascending"), "{err}");
        }
    }
}
