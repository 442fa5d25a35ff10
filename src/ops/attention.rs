//! Causal attention over packed documents, caches and prefix trees.

use std::ops::Range;

use super::{ensure, holds};
use crate::error::Result;
use crate::tensor::{Length, Real, Store};

/// A run of queries that see one another causally, and everything in `past`.
///
/// A packed document is a segment without past; a decoded token is a segment of one query whose past is the cache; a
/// branch of a prefix tree has its ancestors' rows as past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of q.
    pub q: Range<usize>,
    /// The row of k and v that belongs to query `q.start`; the others follow.
    pub own: usize,
    /// Rows of k and v before it, ascending, all seen by every query.
    pub past: Vec<Range<usize>>,
}

/// Sizes that forward and backward share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// H.
    pub q: usize,
    /// G, a divisor of H; query head h reads key/value head h / (H/G).
    pub kv: usize,
    /// K.
    pub dim: usize,
    /// Multiplies the scores, usually 1/√K.
    pub scale: f32,
}

/// `o[t, h] = Σ_u p[t, u] v[u, h/(H/G)]`, `p = softmax(scale · q k)` over the keys that t sees.
///
/// Online softmax in f32, no T × T matrix; `o` rounds once. Under bf16 the probabilities round to bf16 before they
/// meet v. Queries that no segment names are left alone.
pub struct Attention<'a, S: Store, T: Real> {
    /// `[T, H·K]`, written.
    pub o: S::ViewMut<'a, T>,
    /// `[T, H]`, written: log-sum-exp of the scaled scores, kept for the backward pass.
    pub lse: S::ViewMut<'a, f32>,
    /// `[T, H·K]`.
    pub q: S::View<'a, T>,
    /// `[U, G·K]`.
    pub k: S::View<'a, T>,
    /// `[U, G·K]`.
    pub v: S::View<'a, T>,
    /// Who sees whom.
    pub segments: &'a [Segment],
    /// H, G, K and the scale.
    pub heads: Heads,
}

impl<S: Store, T: Real> Attention<'_, S, T> {
    /// Compares the sizes; returns `(T, U)`.
    pub fn check(&self) -> Result<(usize, usize)> {
        let (t, u) = rows("attention", &self.q, &self.k, self.heads)?;
        let wide = [("T", t), ("H", self.heads.q), ("K", self.heads.dim)];
        holds("attention", "o", &self.o, &wide)?;
        holds("attention", "lse", &self.lse, &[("T", t), ("H", self.heads.q)])?;
        holds("attention", "v", &self.v, &[("U·G·K", self.k.len())])?;
        segments("attention", self.segments, t, u)?;
        Ok((t, u))
    }
}

/// Gradients of [`Attention`] for segments without past, whose keys are their own rows:
/// `dv = pᵀ do`, `ds = p ∘ (do vᵀ − Σ_k do∘o)`, `dq = scale · ds k`, `dk = scale · dsᵀ q`.
///
/// `p` is recomputed from q, k and the log-sum-exp. Sums in f32, each output rounds once. Rows that no segment names
/// are left alone.
pub struct AttentionBwd<'a, S: Store, T: Real> {
    /// `[T, H·K]`, written.
    pub dq: S::ViewMut<'a, T>,
    /// `[T, G·K]`, written.
    pub dk: S::ViewMut<'a, T>,
    /// `[T, G·K]`, written.
    pub dv: S::ViewMut<'a, T>,
    /// `[T, H·K]`: the gradient of o.
    pub do_: S::View<'a, T>,
    /// `[T, H·K]`.
    pub o: S::View<'a, T>,
    /// `[T, H]`.
    pub lse: S::View<'a, f32>,
    /// `[T, H·K]`.
    pub q: S::View<'a, T>,
    /// `[T, G·K]`.
    pub k: S::View<'a, T>,
    /// `[T, G·K]`.
    pub v: S::View<'a, T>,
    /// Who sees whom; no past.
    pub segments: &'a [Segment],
    /// H, G, K and the scale.
    pub heads: Heads,
}

impl<S: Store, T: Real> AttentionBwd<'_, S, T> {
    /// Compares the sizes; returns T.
    pub fn check(&self) -> Result<usize> {
        const OP: &str = "attention_bwd";
        let (t, u) = rows(OP, &self.q, &self.k, self.heads)?;
        let wide = [("T", t), ("H", self.heads.q), ("K", self.heads.dim)];
        let narrow = [("T", t), ("G", self.heads.kv), ("K", self.heads.dim)];
        holds(OP, "dq", &self.dq, &wide)?;
        holds(OP, "dk", &self.dk, &narrow)?;
        holds(OP, "dv", &self.dv, &narrow)?;
        holds(OP, "do", &self.do_, &wide)?;
        holds(OP, "o", &self.o, &wide)?;
        holds(OP, "lse", &self.lse, &[("T", t), ("H", self.heads.q)])?;
        holds(OP, "k", &self.k, &narrow)?;
        holds(OP, "v", &self.v, &narrow)?;
        segments(OP, self.segments, t, u)?;
        ensure(OP, self.segments.iter().all(|s| s.past.is_empty() && s.own == s.q.start), || {
            "a segment has a past or keys of other rows, expected packed documents".into()
        })?;
        Ok(t)
    }
}

fn rows(op: &'static str, q: &impl Length, k: &impl Length, h: Heads) -> Result<(usize, usize)> {
    ensure(op, h.dim > 0 && h.kv > 0 && h.q > 0 && h.q.is_multiple_of(h.kv), || {
        format!("H = {}, G = {}, K = {}: expected G to divide H and none to be 0", h.q, h.kv, h.dim)
    })?;
    let t = q.len() / (h.q * h.dim);
    let u = k.len() / (h.kv * h.dim);
    holds(op, "q", q, &[("T", t), ("H", h.q), ("K", h.dim)])?;
    holds(op, "k", k, &[("U", u), ("G", h.kv), ("K", h.dim)])?;
    Ok((t, u))
}

fn segments(op: &'static str, segments: &[Segment], t: usize, u: usize) -> Result<()> {
    let mut end = 0;
    for (n, s) in segments.iter().enumerate() {
        ensure(op, s.q.start >= end && s.q.start <= s.q.end && s.q.end <= t, || {
            format!(
                "segment {n} has queries {}..{}, expected ascending runs within T = {t}",
                s.q.start, s.q.end
            )
        })?;
        end = s.q.end;
        let own = s.own..s.own + s.q.len();
        let fits = s.past.iter().all(|p| p.start <= p.end && p.end <= u) && own.end <= u;
        ensure(op, fits, || format!("segment {n} has keys beyond U = {u}"))?;
    }
    Ok(())
}
