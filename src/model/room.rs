//! The buffers of a forward and backward pass.

use std::iter;
use std::ops::Range;

use super::memory::{Allocator, Part};
use crate::backend::{LinearSize, Scratch};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::Target;
use crate::error::Result;
use crate::tensor::{DType, Real, Store};

/// What a forward pass leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All that the backward pass reads, except in the first `recomputed` layers, which keep their input only: they share
    /// the slot of the one after them, so that the last layer is never among them.
    Training {
        /// Layers that are computed again in the backward pass.
        recomputed: usize,
    },
    /// The last layer's output; keys and values of one layer at a time.
    Output,
    /// The last layer's output, and `rows` keys and values of every layer.
    Cache {
        /// U.
        rows: usize,
    },
}

impl Keep {
    /// How many of `layers` layers, from the first on, share the first slot.
    pub fn sharing(self, layers: usize) -> usize {
        match self {
            Keep::Training { recomputed } => layers.min(recomputed.saturating_add(1)),
            Keep::Output | Keep::Cache { .. } => layers,
        }
    }
}

/// How large a room is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomSize {
    /// The most tokens of a batch, T.
    pub tokens: usize,
    /// How often a batch is stacked: adapters evaluated together.
    pub copies: usize,
    /// What is kept.
    pub keep: Keep,
    /// Rows of the rope tables, P.
    pub table_rows: usize,
    /// The largest LoRA rank of each target, in the order of [`Target::ALL`]; 0 for none.
    pub ranks: [usize; 7],
    /// Whether the adapters' input has dropout.
    pub dropout: bool,
    /// How the weights are stored; one that is not F32 is widened panel by panel, in scratch.
    pub dtype: DType,
    /// What the head computes.
    pub head: Head,
}

/// What is computed from the last layer's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Head {
    /// The loss of at most so many supervised rows.
    Loss(usize),
    /// Log-probabilities of at most so many (row, token) pairs.
    Choice(usize),
    /// All logits of at most so many rows.
    Logits(usize),
}

/// What a layer's forward pass makes and its backward pass reads.
pub struct Slot<S: Store, T: Real> {
    /// `[T, H·K]`, after rope.
    pub q: S::Buf<T>,
    /// `[U, G·K]`, after rope; empty where keys are kept by layer.
    pub k: S::Buf<T>,
    /// `[U, G·K]`.
    pub v: S::Buf<T>,
    /// `[T, H·K]`.
    pub o: S::Buf<T>,
    /// `[T, H]`.
    pub lse: S::Buf<f32>,
    /// `[T, D]`: the residual stream between attention and MLP.
    pub mid: S::Buf<T>,
    /// `[T, F]`; its gradient after the backward pass.
    pub gate: S::Buf<T>,
    /// `[T, F]`, likewise.
    pub up: S::Buf<T>,
    /// `[T]` of the first norm.
    pub rstd1: S::Buf<f32>,
    /// `[T]` of the second norm.
    pub rstd2: S::Buf<f32>,
    /// `[T, R]` of each target: `x Aᵀ`.
    pub t: [S::Buf<T>; 7],
}

/// Gradients of activations.
pub struct Back<S: Store, T: Real> {
    /// `[T, D]`, two of them: the residual stream's gradient, from layer to layer.
    pub dh: [S::Buf<T>; 2],
    /// `[T, D]`.
    pub dn: S::Buf<T>,
    /// `[T, H·K]`.
    pub dq: S::Buf<T>,
    /// `[T, G·K]`.
    pub dk: S::Buf<T>,
    /// `[T, G·K]`.
    pub dv: S::Buf<T>,
    /// `[T, H·K]`.
    pub do_: S::Buf<T>,
}

/// All buffers of a pass. Made once, before the first step.
pub struct Room<S: Store, T: Real> {
    /// How large it was made.
    pub size: RoomSize,
    /// The residual stream: the input of each layer and the last output (training), or two that alternate.
    pub h: Vec<S::Buf<T>>,
    /// `[T, D]`: a norm's output, which is a linear's input.
    pub n: S::Buf<T>,
    /// `[T, F]`: the MLP's inner activation.
    pub act: S::Buf<T>,
    /// `[T]` of the last norm.
    pub rstd: S::Buf<f32>,
    /// By layer; those that [share](Keep::sharing) one have the first.
    pub slots: Vec<Slot<S, T>>,
    /// Keys and values of every layer, `[U, G·K]` each, if they are kept.
    pub cache: Vec<(S::Buf<T>, S::Buf<T>)>,
    /// Rope tables, `[P, K/2]` each: cos, sin.
    pub tables: (S::Buf<f32>, S::Buf<f32>),
    /// What the head makes: `[n]`.
    pub out: S::Buf<f32>,
    /// `[n, V]` of [`Head::Logits`].
    pub logits: S::Buf<T>,
    /// What operations need besides.
    pub scratch: S::Buf<f32>,
    /// Only for training.
    pub back: Option<Back<S, T>>,
}

impl<S: Store, T: Real> Room<S, T> {
    /// Makes (or notes) all buffers for passes of `config` of at most `size`.
    pub fn new<A: Allocator<Store = S>>(
        alloc: &mut A,
        scratch: &impl Scratch,
        config: &ModelConfig,
        size: RoomSize,
    ) -> Result<Room<S, T>> {
        let rows = size.tokens * size.copies;
        let (d, k) = (config.hidden, config.head_dim);
        let (heads, kv, f) = widest(config, 0..config.layers);
        let wide = |alloc: &mut A, name: &str, width: usize| {
            alloc.take::<T>(Part::Activations, name, rows * S::row(width))
        };
        let (training, cache_rows) = match size.keep {
            Keep::Training { .. } => (true, None),
            Keep::Output => (false, None),
            Keep::Cache { rows } => (false, Some(rows)),
        };
        let h = (0..if training { config.layers + 1 } else { 2 })
            .map(|l| wide(alloc, &format!("residual stream {l}"), d))
            .collect::<Result<Vec<_>>>()?;
        let sharing = size.keep.sharing(config.layers);
        let keys = if cache_rows.is_some() { 0 } else { rows };
        let users = iter::once(0..sharing).chain((sharing..config.layers).map(|l| l..l + 1));
        let slots = users
            .filter(|layers| !layers.is_empty())
            .enumerate()
            .map(|(n, layers)| Slot::new(alloc, n, rows, keys, d, k, widest(config, layers), size.ranks))
            .collect::<Result<Vec<_>>>()?;
        let mut cache = Vec::new();
        for l in 0..cache_rows.map_or(0, |_| config.layers) {
            let len = cache_rows.unwrap_or(0) * size.copies * S::row(config.layer_sizes(l).kv_heads * k);
            cache.push((
                alloc.take::<T>(Part::Activations, &format!("layer {l} cached keys"), len)?,
                alloc.take::<T>(Part::Activations, &format!("layer {l} cached values"), len)?,
            ));
        }
        let back = if training {
            Some(Back {
                dh: [wide(alloc, "gradient of the stream", d)?, wide(alloc, "gradient of the stream", d)?],
                dn: wide(alloc, "gradient of a norm", d)?,
                dq: wide(alloc, "gradient of q", heads * k)?,
                dk: wide(alloc, "gradient of k", kv * k)?,
                dv: wide(alloc, "gradient of v", kv * k)?,
                do_: wide(alloc, "gradient of o", heads * k)?,
            })
        } else {
            None
        };
        let (out, logits) = match size.head {
            Head::Loss(n) | Head::Choice(n) => (n, 0),
            Head::Logits(n) => (0, n),
        };
        let table =
            |alloc: &mut A, name: &str| alloc.take::<f32>(Part::Activations, name, size.table_rows * (k / 2));
        Ok(Room {
            h,
            n: wide(alloc, "norm", d)?,
            act: wide(alloc, "inner activation", f)?,
            rstd: alloc.take(Part::Activations, "last norm's rstd", rows)?,
            slots,
            cache,
            tables: (table(alloc, "rope cos")?, table(alloc, "rope sin")?),
            out: alloc.take(Part::Logits, "head's output", out)?,
            logits: alloc.take::<T>(Part::Logits, "logits", logits * S::row(config.vocab))?,
            scratch: alloc.take(
                Part::Scratch,
                "scratch of operations",
                scratch_len::<T>(scratch, config, size, training),
            )?,
            back,
            size,
        })
    }

    /// The slot that layer `l` of `layers` uses.
    pub fn slot_of(&self, l: usize, layers: usize) -> usize {
        (l + 1).saturating_sub(self.size.keep.sharing(layers))
    }

    /// The residual stream that layer `l` reads (or, at L, the last output).
    pub fn stream_of(&self, l: usize) -> usize {
        if matches!(self.size.keep, Keep::Training { .. }) { l } else { l % 2 }
    }
}

impl<S: Store, T: Real> Slot<S, T> {
    fn new<A: Allocator<Store = S>>(
        alloc: &mut A,
        n: usize,
        rows: usize,
        keys: usize,
        d: usize,
        k: usize,
        (heads, kv, f): (usize, usize, usize),
        ranks: [usize; 7],
    ) -> Result<Slot<S, T>> {
        let mut wide = |what: &str, rows: usize, width: usize| {
            alloc.take::<T>(Part::Activations, &format!("slot {n} {what}"), rows * S::row(width))
        };
        let q = wide("q", rows, heads * k)?;
        let kk = wide("k", keys, kv * k)?;
        let v = wide("v", keys, kv * k)?;
        let o = wide("o", rows, heads * k)?;
        let mid = wide("middle of the stream", rows, d)?;
        let gate = wide("gate", rows, f)?;
        let up = wide("up", rows, f)?;
        let mut t = Vec::with_capacity(7);
        for target in Target::ALL {
            t.push(wide(&format!("x Aᵀ of {target}"), rows, ranks[target as usize])?);
        }
        let mut stat =
            |what: &str, len: usize| alloc.take::<f32>(Part::Activations, &format!("slot {n} {what}"), len);
        let lse = stat("log-sum-exp", rows * heads)?;
        let rstd1 = stat("first norm's rstd", rows)?;
        let rstd2 = stat("second norm's rstd", rows)?;
        // `t` holds one buffer for each of the seven targets.
        let t = t.try_into().unwrap_or_else(|_| unreachable!("seven targets"));
        Ok(Slot { q, k: kk, v, o, lse, mid, gate, up, rstd1, rstd2, t })
    }
}

/// The largest H, G and F of any of `layers`.
fn widest(config: &ModelConfig, layers: Range<usize>) -> (usize, usize, usize) {
    layers
        .map(|l| config.layer_sizes(l))
        .fold((0, 0, 0), |w, s| (w.0.max(s.heads), w.1.max(s.kv_heads), w.2.max(s.mlp)))
}

/// The most that any operation of a pass asks for.
fn scratch_len<T: Real>(scratch: &impl Scratch, c: &ModelConfig, size: RoomSize, training: bool) -> usize {
    let heads = if training { widest(c, 0..c.layers).0 } else { 0 };
    let mut most = scratch.attention_bwd_scratch(size.tokens, heads);
    for l in 0..c.layers {
        for group in [&Target::ALL[0..3], &Target::ALL[3..4], &Target::ALL[4..6], &Target::ALL[6..7]] {
            let first_copies = l == 0 && group.len() == 3;
            let linear = LinearSize {
                tokens: if first_copies { size.tokens } else { size.tokens * size.copies },
                copies: if first_copies { size.copies } else { 1 },
                out: group.iter().map(|&t| c.dims(t, l).0).sum(),
                inner: c.dims(group[0], l).1,
                rank: group.iter().map(|&t| size.ranks[t as usize]).sum(),
                adapters: size.copies,
                dtype: size.dtype,
                dropout: size.dropout,
            };
            most = most.max(scratch.linear_scratch::<T>(linear));
            if training {
                most = most.max(scratch.linear_bwd_scratch::<T>(linear));
            }
        }
    }
    most.max(match size.head {
        Head::Loss(n) => scratch.cross_entropy_scratch::<T>(n, c.vocab, c.hidden, size.dtype),
        Head::Choice(n) => scratch.choice_scratch::<T>(n, c.vocab, c.hidden, size.dtype),
        Head::Logits(n) => scratch.linear_scratch::<T>(LinearSize {
            tokens: n,
            copies: 1,
            out: c.vocab,
            inner: c.hidden,
            rank: 0,
            adapters: 0,
            dtype: size.dtype,
            dropout: false,
        }),
    })
}
