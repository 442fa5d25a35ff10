//! The operations without a frozen product.

use anabranch::Result;
use anabranch::backend::Backend;
use anabranch::ops::adamw::{AdamW, Hyper};
use anabranch::ops::attention::{Attention, AttentionBwd, Heads, Segment};
use anabranch::ops::embed::Embed;
use anabranch::ops::rms_norm::{RmsNorm, RmsNormBwd};
use anabranch::ops::rope::Rope;
use anabranch::ops::sum_sq::SumSq;
use anabranch::tensor::{Real, Store};

use super::bench::{Bench, Timed, Work};
use super::data;
use super::sizes::{ADAPTER, Model, Scale};

/// embed, norms and rope.
pub fn all<B: Timed, T: Real>(bench: &mut Bench<'_, B>, model: &Model) {
    let Model { tokens, width, head_dim, vocab, .. } = *model;
    let heads = model.layers[0].heads;
    let b = bench.backend;
    let size = size_of::<T>();
    let name = |columns: usize| format!("{tokens}×{columns}, {}", T::DTYPE);
    let n = tokens * width;
    bench.case("embed", &name(width), Work::Bytes(n * (2 + size)), || {
        let table = data::matrix(b, (vocab, width))?;
        let mut y = data::rows::<B, T>(b, 1, tokens, width)?;
        let ids: Vec<u32> = (0..tokens as u32).map(|t| t * 7919 % vocab as u32).collect();
        Ok(move || {
            b.embed(Embed { y: B::Store::rows_mut(&mut y, 0..tokens, width), table: &table, ids: &ids })
        })
    });
    bench.case("rms_norm", &name(width), Work::Bytes(2 * n * size), || {
        let (x, w) = (data::rows::<B, T>(b, 1, tokens, width)?, data::vector(b, 2, width)?);
        let mut y = data::rows::<B, T>(b, 3, tokens, width)?;
        let mut rstd = b.alloc::<f32>("rstd", tokens)?;
        Ok(move || {
            b.rms_norm::<T>(RmsNorm {
                y: B::Store::rows_mut(&mut y, 0..tokens, width),
                rstd: B::Store::view_mut(&mut rstd, 0..tokens),
                x: B::Store::rows(&x, 0..tokens, width),
                w: B::Store::view(&w, 0..width),
                tokens,
                width,
                eps: 1e-5,
            })
        })
    });
    bench.case("rms_norm_bwd", &name(width), Work::Bytes(4 * n * size), || {
        let [x, dy, residual] =
            [1, 2, 3].map(|from| data::rows::<B, T>(b, from, tokens, width)).map(Result::unwrap);
        let mut dx = data::rows::<B, T>(b, 4, tokens, width)?;
        let (w, rstd) = (data::vector(b, 5, width)?, data::vector(b, 6, tokens)?);
        Ok(move || {
            b.rms_norm_bwd::<T>(RmsNormBwd {
                dx: B::Store::rows_mut(&mut dx, 0..tokens, width),
                dy: B::Store::rows(&dy, 0..tokens, width),
                residual: Some(B::Store::rows(&residual, 0..tokens, width)),
                x: B::Store::rows(&x, 0..tokens, width),
                rstd: B::Store::view(&rstd, 0..tokens),
                w: B::Store::view(&w, 0..width),
                tokens,
                width,
            })
        })
    });
    let columns = heads * head_dim;
    bench.case("rope", &name(columns), Work::Bytes(2 * tokens * columns * size), || {
        let half = head_dim / 2;
        let mut x = data::rows::<B, T>(b, 1, tokens, columns)?;
        let (cos, sin) = (data::vector(b, 2, tokens * half)?, data::vector(b, 3, tokens * half)?);
        let rows: Vec<u32> = (0..tokens as u32).collect();
        Ok(move || {
            b.rope::<T>(Rope {
                x: B::Store::rows_mut(&mut x, 0..tokens, columns),
                cos: B::Store::view(&cos, 0..tokens * half),
                sin: B::Store::view(&sin, 0..tokens * half),
                rows: &rows,
                heads,
                head_dim,
                inverse: false,
            })
        })
    });
}

/// Long documents and short ones, causal, full and pruned heads: two products forward and five backward, of the scores
/// that are seen.
pub fn attention<B: Timed, T: Real>(bench: &mut Bench<'_, B>, model: &Model) {
    let b = bench.backend;
    for layer in [Some(model.layers[0]), model.pruned()].into_iter().flatten() {
        let (q, kv, dim) = (layer.heads, layer.kv_heads, model.head_dim);
        let heads = Heads { q, kv, dim, scale: 1.0 / (dim as f32).sqrt() };
        for documents in &model.documents {
            let longest = documents.iter().max().copied().unwrap_or(0);
            let seen: usize = documents.iter().map(|n| n * (n + 1) / 2).sum();
            let product = 2 * seen * q * dim;
            let name = format!(
                "{} documents of up to {longest}, {q}/{kv} heads of {dim}, {}",
                documents.len(),
                T::DTYPE
            );
            bench.case("attention", &name, Work::Flops(2 * product), || {
                let mut a = Attending::<B, T>::new(b, documents, heads)?;
                Ok(move || a.forward())
            });
            bench.case("attention_bwd", &name, Work::Flops(5 * product), || {
                let mut a = Attending::<B, T>::new(b, documents, heads)?;
                a.forward()?;
                Ok(move || a.backward())
            });
        }
    }
    // A token against what a cache holds.
    let (heads, past) = (model.layers[0], model.documents[0][0]);
    let (q, kv, dim) = (heads.heads, heads.kv_heads, model.head_dim);
    let heads = Heads { q, kv, dim, scale: 1.0 / (dim as f32).sqrt() };
    let name = format!("a token and {past} before it, {q}/{kv} heads of {dim}, {}", T::DTYPE);
    let bytes = 2 * (past + 1) * kv * dim * size_of::<T>();
    bench.case("attention", &name, Work::Bytes(bytes), || {
        let mut a = Attending::<B, T>::cached(b, past, heads)?;
        Ok(move || a.forward())
    });
}

type Buf<B, T> = <<B as Backend>::Store as Store>::Buf<T>;

/// The buffers of attention, forward and backward.
struct Attending<'a, B: Backend, T: Real> {
    backend: &'a B,
    segments: Vec<Segment>,
    heads: Heads,
    /// T and U.
    tokens: [usize; 2],
    q: [Buf<B, T>; 4],
    kv: [Buf<B, T>; 4],
    lse: Buf<B, f32>,
    scratch: Buf<B, f32>,
}

impl<'a, B: Backend, T: Real> Attending<'a, B, T> {
    fn new(backend: &'a B, documents: &[usize], heads: Heads) -> Result<Attending<'a, B, T>> {
        let mut end = 0;
        let segment = |&n: &usize| {
            end += n;
            Segment { q: end - n..end, own: end - n, past: vec![] }
        };
        let segments = documents.iter().map(segment).collect();
        Attending::with(backend, segments, [end, end], heads)
    }

    fn cached(backend: &'a B, past: usize, heads: Heads) -> Result<Attending<'a, B, T>> {
        let segment = Segment { q: 0..1, own: past, past: vec![0..past] };
        Attending::with(backend, vec![segment], [1, past + 1], heads)
    }

    fn with(backend: &'a B, segments: Vec<Segment>, tokens: [usize; 2], heads: Heads) -> Result<Self> {
        let q = |from| data::rows::<B, T>(backend, from, tokens[0], heads.q * heads.dim);
        let kv = |from| data::rows::<B, T>(backend, from, tokens[1], heads.kv * heads.dim);
        let room = backend.attention_bwd_scratch(tokens[0], heads.q);
        Ok(Attending {
            backend,
            segments,
            heads,
            tokens,
            q: [q(1)?, q(2)?, q(3)?, q(4)?],
            kv: [kv(5)?, kv(6)?, kv(7)?, kv(8)?],
            lse: backend.alloc("log-sum-exp", tokens[0] * heads.q)?,
            scratch: backend.alloc("scratch", room)?,
        })
    }

    fn forward(&mut self) -> Result<()> {
        let (wide, narrow) = (self.heads.q * self.heads.dim, self.heads.kv * self.heads.dim);
        let ([t, u], [q, o, ..], [k, v, ..]) = (self.tokens, &mut self.q, &self.kv);
        self.backend.attention::<T>(Attention {
            o: B::Store::rows_mut(o, 0..t, wide),
            lse: B::Store::view_mut(&mut self.lse, 0..t * self.heads.q),
            q: B::Store::rows(q, 0..t, wide),
            k: B::Store::rows(k, 0..u, narrow),
            v: B::Store::rows(v, 0..u, narrow),
            segments: &self.segments,
            heads: self.heads,
        })
    }

    fn backward(&mut self) -> Result<()> {
        let (wide, narrow) = (self.heads.q * self.heads.dim, self.heads.kv * self.heads.dim);
        let ([t, u], [q, o, do_, dq], [k, v, dk, dv]) = (self.tokens, &mut self.q, &mut self.kv);
        let room = B::Store::len(&self.scratch);
        self.backend.attention_bwd::<T>(AttentionBwd {
            dq: B::Store::rows_mut(dq, 0..t, wide),
            dk: B::Store::rows_mut(dk, 0..u, narrow),
            dv: B::Store::rows_mut(dv, 0..u, narrow),
            scratch: B::Store::view_mut(&mut self.scratch, 0..room),
            do_: B::Store::rows(do_, 0..t, wide),
            o: B::Store::rows(o, 0..t, wide),
            lse: B::Store::view(&self.lse, 0..t * self.heads.q),
            q: B::Store::rows(q, 0..t, wide),
            k: B::Store::rows(k, 0..u, narrow),
            v: B::Store::rows(v, 0..u, narrow),
            segments: &self.segments,
            heads: self.heads,
        })
    }
}

/// All parameters of an adapter.
pub fn optimizer<B: Timed>(bench: &mut Bench<'_, B>, scale: Scale) {
    let n = if scale == Scale::Full { ADAPTER } else { 5003 };
    let b = bench.backend;
    let name = format!("{n} parameters");
    bench.case("sum_sq", &name, Work::Bytes(4 * n), || {
        let x = data::vector(b, 1, n)?;
        let mut out = b.alloc::<f64>("a sum", 1)?;
        Ok(move || b.sum_sq(SumSq { out: B::Store::view_mut(&mut out, 0..1), x: B::Store::view(&x, 0..n) }))
    });
    bench.case("adamw", &name, Work::Bytes(7 * 4 * n), || {
        let (grads, mut params) = (data::vector(b, 1, n)?, data::vector(b, 2, n)?);
        let (mut m, mut v) = (b.alloc::<f32>("moments", n)?, b.alloc::<f32>("moments", n)?);
        let norm_sq = data::buffer(b, &[1.0f64])?;
        let hyper =
            Hyper { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_norm: 1.0 };
        Ok(move || {
            b.adamw(AdamW {
                params: B::Store::view_mut(&mut params, 0..n),
                m: B::Store::view_mut(&mut m, 0..n),
                v: B::Store::view_mut(&mut v, 0..n),
                grads: B::Store::view(&grads, 0..n),
                norm_sq: B::Store::view(&norm_sq, 0..1),
                hyper,
                step: 3,
            })
        })
    });
}
