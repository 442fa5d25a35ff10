//! Causal attention over packed documents, caches and prefix trees.

use std::ops::Range;

use super::{ensure, holds, holds_rows, narrow, wide};
use crate::error::Result;
use crate::host::Host;
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
/// Online softmax in f32, no T × T matrix; `o` rounds once. Under bf16 the exponentials (not their sum) round to bf16
/// before they meet v. Queries that no segment names are left alone. What is NaN or infinite in a row of a segment may reach
/// the segment's earlier queries too: keys that they do not see count with a weight of 0, which is no number of such.
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
        let (t, u) = rows::<S>("attention", &self.q, &self.k, self.heads)?;
        let wide = [("H", self.heads.q), ("K", self.heads.dim)];
        holds_rows::<S>("attention", "o", &self.o, &[("T", t)], &wide)?;
        holds("attention", "lse", &self.lse, &[("T", t), ("H", self.heads.q)])?;
        holds("attention", "v", &self.v, &[("U·G·K", self.k.len())])?;
        segments("attention", self.segments, t, u)?;
        Ok((t, u))
    }
}

/// Gradients of [`Attention`] for segments without past, whose keys are their own rows:
/// `dv = pᵀ do`, `ds = p ∘ (do vᵀ − Σ_k do∘o)`, `dq = scale · ds k`, `dk = scale · dsᵀ q`.
///
/// `p` is recomputed from q, k and the log-sum-exp. Sums in f32, each output rounds once; under bf16, p and ds round
/// to bf16 where they are operands of a product. Rows that no segment names are left alone.
pub struct AttentionBwd<'a, S: Store, T: Real> {
    /// `[T, H·K]`, written.
    pub dq: S::ViewMut<'a, T>,
    /// `[T, G·K]`, written.
    pub dk: S::ViewMut<'a, T>,
    /// `[T, G·K]`, written.
    pub dv: S::ViewMut<'a, T>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
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
        let (t, u) = rows::<S>(OP, &self.q, &self.k, self.heads)?;
        let wide = [("H", self.heads.q), ("K", self.heads.dim)];
        let narrow = [("G", self.heads.kv), ("K", self.heads.dim)];
        holds_rows::<S>(OP, "dq", &self.dq, &[("T", t)], &wide)?;
        holds_rows::<S>(OP, "dk", &self.dk, &[("T", t)], &narrow)?;
        holds_rows::<S>(OP, "dv", &self.dv, &[("T", t)], &narrow)?;
        holds_rows::<S>(OP, "do", &self.do_, &[("T", t)], &wide)?;
        holds_rows::<S>(OP, "o", &self.o, &[("T", t)], &wide)?;
        holds(OP, "lse", &self.lse, &[("T", t), ("H", self.heads.q)])?;
        holds_rows::<S>(OP, "k", &self.k, &[("T", t)], &narrow)?;
        holds_rows::<S>(OP, "v", &self.v, &[("T", t)], &narrow)?;
        segments(OP, self.segments, t, u)?;
        ensure(OP, self.segments.iter().all(|s| s.past.is_empty() && s.own == s.q.start), || {
            "a segment has a past or keys of other rows, expected packed documents".into()
        })?;
        Ok(t)
    }
}

fn rows<S: Store>(op: &'static str, q: &impl Length, k: &impl Length, h: Heads) -> Result<(usize, usize)> {
    ensure(op, h.dim > 0 && h.kv > 0 && h.q > 0 && h.q.is_multiple_of(h.kv), || {
        format!("H = {}, G = {}, K = {}: expected G to divide H and none to be 0", h.q, h.kv, h.dim)
    })?;
    let t = q.len() / S::row(h.q * h.dim);
    let u = k.len() / S::row(h.kv * h.dim);
    holds_rows::<S>(op, "q", q, &[("T", t)], &[("H", h.q), ("K", h.dim)])?;
    holds_rows::<S>(op, "k", k, &[("U", u)], &[("G", h.kv), ("K", h.dim)])?;
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

impl Segment {
    /// The rows of k and v that query `t` sees, ascending in time.
    fn keys(&self, t: usize) -> Vec<usize> {
        let own = self.own..self.own + (t - self.q.start) + 1;
        self.past.iter().cloned().chain([own]).flatten().collect()
    }
}

/// Softmax of `scale · q·k`: the exponentials (largest 1), their sum, and the log-sum-exp.
fn softmax(q: &[f64], k: &[&[f64]], scale: f64) -> (Vec<f64>, f64, f64) {
    let dot = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * scale;
    let scores: Vec<f64> = k.iter().map(|k| dot(k)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    (exps, sum, max + sum.ln())
}

/// `Σ_u (exps[u] / sum) v[u]`.
fn mix(exps: &[f64], sum: f64, v: &[&[f64]]) -> Vec<f64> {
    let mut o = vec![0.0; v[0].len()];
    for (e, v) in exps.iter().zip(v) {
        o.iter_mut().zip(*v).for_each(|(o, v)| *o += e * v);
    }
    o.iter().map(|o| o / sum).collect()
}

fn round<T: Real>(x: f64) -> f64 {
    f64::from(T::round(x as f32))
}

/// The definition in f64: all scores of a query at once.
pub fn reference<T: Real>(op: Attention<'_, Host, T>) -> Result<()> {
    op.check()?;
    let Heads { q: heads, kv, dim, scale } = op.heads;
    let (q, k, v) = (wide(op.q), wide(op.k), wide(op.v));
    for s in op.segments {
        for (t, h) in s.q.clone().flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let keys: Vec<usize> = s.keys(t).iter().map(|u| (u * kv + h / (heads / kv)) * dim).collect();
            let (k, v): (Vec<_>, Vec<_>) = keys.iter().map(|&u| (&k[u..u + dim], &v[u..u + dim])).unzip();
            let at = (t * heads + h) * dim..(t * heads + h + 1) * dim;
            let (mut exps, sum, lse) = softmax(&q[at.clone()], &k, f64::from(scale));
            exps.iter_mut().for_each(|e| *e = round::<T>(*e));
            narrow(&mut op.o[at], &mix(&exps, sum, &v));
            op.lse[t * heads + h] = lse as f32;
        }
    }
    Ok(())
}

/// The definition in f64.
pub fn reference_bwd<T: Real>(op: AttentionBwd<'_, Host, T>) -> Result<()> {
    let tokens = op.check()?;
    let Heads { q: heads, kv, dim, scale } = op.heads;
    let scale = f64::from(scale);
    let [q, k, v, o, do_] = [op.q, op.k, op.v, op.o, op.do_].map(wide);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let add = |to: &mut [f64], x: &[f64], by: f64| to.iter_mut().zip(x).for_each(|(to, x)| *to += by * x);
    let mut dk = vec![0.0; tokens * kv * dim];
    let mut dv = dk.clone();
    for s in op.segments {
        for (t, h) in s.q.clone().flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let at = (t * heads + h) * dim..(t * heads + h + 1) * dim;
            let (q, do_) = (&q[at.clone()], &do_[at.clone()]);
            let delta = dot(do_, &o[at.clone()]);
            let mut dq = vec![0.0; dim];
            for u in s.keys(t) {
                let key = (u * kv + h / (heads / kv)) * dim;
                let key = key..key + dim;
                let p = (scale * dot(q, &k[key.clone()]) - f64::from(op.lse[t * heads + h])).exp();
                let ds = round::<T>(p * (dot(do_, &v[key.clone()]) - delta));
                add(&mut dq, &k[key.clone()], scale * ds);
                add(&mut dk[key.clone()], q, scale * ds);
                add(&mut dv[key], do_, round::<T>(p));
            }
            narrow(&mut op.dq[at], &dq);
        }
    }
    for rows in op.segments.iter().map(|s| s.q.start * kv * dim..s.q.end * kv * dim) {
        narrow(&mut op.dk[rows.clone()], &dk[rows.clone()]);
        narrow(&mut op.dv[rows.clone()], &dv[rows]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{differences, normal};

    #[test]
    fn backward_is_the_derivative() -> Result<()> {
        let (tokens, heads) = (7, Heads { q: 4, kv: 2, dim: 3, scale: 0.6 });
        let segments = [Segment { q: 0..2, own: 0, past: vec![] }, Segment { q: 2..7, own: 2, past: vec![] }];
        let (wide_len, narrow_len) = (tokens * heads.q * heads.dim, tokens * heads.kv * heads.dim);
        let [q, do_] = [1, 2].map(|seed| normal::<f32>(seed, wide_len, 1.0));
        let [k, v] = [3, 4].map(|seed| normal::<f32>(seed, narrow_len, 1.0));
        let (mut o, mut lse) = (vec![f32::NAN; wide_len], vec![f32::NAN; tokens * heads.q]);
        reference::<f32>(Attention {
            o: &mut o,
            lse: &mut lse,
            q: &q,
            k: &k,
            v: &v,
            segments: &segments,
            heads,
        })?;
        let mut dq = vec![f32::NAN; wide_len];
        let (mut dk, mut dv) = (vec![f32::NAN; narrow_len], vec![f32::NAN; narrow_len]);
        reference_bwd::<f32>(AttentionBwd {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            scratch: &mut [],
            do_: &do_,
            o: &o,
            lse: &lse,
            q: &q,
            k: &k,
            v: &v,
            segments: &segments,
            heads,
        })?;

        // Σ do∘o, with the softmax written out once more.
        let value = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            let mut sum = 0.0;
            for s in &segments {
                for (t, h) in s.q.clone().flat_map(|t| (0..heads.q).map(move |h| (t, h))) {
                    let row = (t * heads.q + h) * heads.dim;
                    let key = |u: usize| (u * heads.kv + h / 2) * heads.dim;
                    let dot = |u: usize| (0..heads.dim).map(|c| q[row + c] * k[key(u) + c]).sum::<f64>();
                    let weights: Vec<f64> =
                        (s.q.start..=t).map(|u| (dot(u) * f64::from(heads.scale)).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for (u, w) in (s.q.start..).zip(&weights) {
                        for c in 0..heads.dim {
                            sum += w / total * v[key(u) + c] * f64::from(do_[row + c]);
                        }
                    }
                }
            }
            sum
        };
        let (q, k, v) = (wide(&q), wide(&k), wide(&v));
        let all = [
            ("dq", &dq, differences(&q, |q| value(q, &k, &v))),
            ("dk", &dk, differences(&k, |k| value(&q, k, &v))),
            ("dv", &dv, differences(&v, |v| value(&q, &k, v))),
        ];
        for (name, got, want) in all {
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                assert!((f64::from(*got) - want).abs() <= 3e-6, "{name}[{i}]: {got}, expected {want}");
            }
        }
        Ok(())
    }
}
