//! Linear with LoRA: several outputs of one x, and what follows them.
//!
//! `y = [x, t] · [W, sB]ᵀ` with `t = x Aᵀ`: the adapter is R more columns of K in the main product and costs no pass
//! over y. Under bf16, A, s·B and t round to bf16 before they meet a product; y rounds once. With dropout the mask m
//! is drawn once per x (all outputs share it): `t = (m∘x)Aᵀ/(1−p)`.

use std::ops::Range;

use super::{ensure, holds};
use crate::error::Result;
use crate::tensor::{Frozen, Length, Real, Store};

/// Rows of y that carry one adapter. Several groups are several adapters stacked as rows.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraRows {
    /// Rows of y.
    pub rows: Range<usize>,
    /// Where its matrices lie.
    pub lora: Lora,
}

/// One adapter pair inside the arena of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// Where `A[R, I]` starts.
    pub a: usize,
    /// Where `B[O, R]` starts.
    pub b: usize,
    /// R.
    pub rank: usize,
    /// s.
    pub scale: f32,
}

/// Inverted dropout on the adapter's input: element `i` is kept if `uniform(seed, tensor, step, i) ≥ p`, and kept
/// elements are divided by `1 − p`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of zero, in `(0, 1)`.
    pub p: f32,
    /// The run's seed.
    pub seed: u64,
    /// Which x of the model.
    pub tensor: u64,
    /// The micro-batch, counted from 0 over the whole run.
    pub step: u64,
}

/// One output of a [`Linear`].
pub struct LinearOut<'a, S: Store, T: Real> {
    /// `[C·T, O]`, written.
    pub y: S::ViewMut<'a, T>,
    /// `[C·T, Rmax]`, written where a group covers the row: `t`, kept for the backward pass. Rmax is the largest rank
    /// of the groups; a row's numbers beyond its rank are zero. Empty if there is no group.
    pub t: S::ViewMut<'a, T>,
    /// `W[O, I]`.
    pub w: &'a S::Matrix,
    /// `[O]`.
    pub bias: Option<S::View<'a, f32>>,
    /// Ascending, disjoint; rows of no group are the base's.
    pub groups: &'a [LoraRows],
}

/// What follows the product.
pub enum Epilogue<'a, S: Store, T: Real> {
    /// Nothing.
    None,
    /// The only output: `y = residual + x Wᵀ + …`, rounded once.
    Residual(S::View<'a, T>),
    /// The two outputs are gate and up: `h = silu(gate) ∘ up` of the rounded gate and up.
    SwiGlu(S::ViewMut<'a, T>),
}

/// `yⱼ = x Wⱼᵀ + biasⱼ + s (x Aⱼᵀ) Bⱼᵀ` for each output j, then the epilogue.
///
/// With `copies` C above 1, x has T rows and each y has C·T: the base's product is made once and repeated, then each
/// group's adapter is added to its rows.
pub struct Linear<'a, S: Store, T: Real> {
    /// The outputs.
    pub outs: Vec<LinearOut<'a, S, T>>,
    /// What follows.
    pub epilogue: Epilogue<'a, S, T>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
    /// `[T, I]`.
    pub x: S::View<'a, T>,
    /// The arena of adapters.
    pub params: S::View<'a, f32>,
    /// T.
    pub tokens: usize,
    /// C.
    pub copies: usize,
    /// Dropout on the adapters' input; only with one copy.
    pub dropout: Option<Dropout>,
}

impl<S: Store, T: Real> Linear<'_, S, T> {
    /// Compares the sizes; returns I.
    pub fn check(&self) -> Result<usize> {
        const OP: &str = "linear";
        ensure(OP, !self.outs.is_empty() && self.copies > 0, || "no output or no copy".into())?;
        let i = self.outs[0].w.size().1;
        holds(OP, "x", &self.x, &[("T", self.tokens), ("I", i)])?;
        let (c, t) = (("C", self.copies), ("T", self.tokens));
        let rows = self.copies * self.tokens;
        for out in self.outs.iter() {
            let (o, inner) = out.w.size();
            ensure(OP, inner == i, || format!("W is [{o}, {inner}], expected I = {i} of the first output"))?;
            holds(OP, "y", &out.y, &[c, t, ("O", o)])?;
            if let Some(bias) = &out.bias {
                holds(OP, "bias", bias, &[("O", o)])?;
            }
            let rank = out.groups.iter().map(|g| g.lora.rank).max().unwrap_or(0);
            holds(OP, "t", &out.t, &[c, t, ("R", rank)])?;
            let mut end = 0;
            for g in out.groups {
                ensure(OP, g.rows.start >= end && g.rows.start <= g.rows.end && g.rows.end <= rows, || {
                    format!(
                        "a group has rows {}..{}, expected ascending runs within {rows}",
                        g.rows.start, g.rows.end
                    )
                })?;
                end = g.rows.end;
                inside(OP, &self.params, g.lora, o, i)?;
            }
        }
        match &self.epilogue {
            Epilogue::None => {}
            Epilogue::Residual(r) => {
                ensure(OP, self.outs.len() == 1, || "a residual goes with one output".into())?;
                holds(OP, "residual", r, &[c, t, ("O", self.outs[0].w.size().0)])?;
            }
            Epilogue::SwiGlu(h) => {
                let f = self.outs[0].w.size().0;
                ensure(OP, self.outs.len() == 2 && self.outs[1].w.size().0 == f, || {
                    "swiglu goes with two outputs of one width".into()
                })?;
                holds(OP, "h", h, &[c, t, ("F", f)])?;
            }
        }
        ensure(OP, self.dropout.is_none() || self.copies == 1, || "dropout goes with one copy of x".into())?;
        dropout(OP, self.dropout)?;
        Ok(i)
    }
}

/// One output of a [`LinearBwd`].
pub struct LinearBwdOut<'a, S: Store, T: Real> {
    /// `[T, O]`: the gradient of y.
    pub dy: S::View<'a, T>,
    /// `[T, R]`, from the forward pass; empty without an adapter.
    pub t: S::View<'a, T>,
    /// `W[O, I]`.
    pub w: &'a S::Matrix,
    /// The adapter of all rows.
    pub lora: Option<Lora>,
}

/// Backward of [`Linear`] with one group over all rows:
/// `dx = Σⱼ dyⱼ Wⱼ + m∘(uⱼ Aⱼ)/(1−p)`, `u = s dy B`, `dB += s dyᵀ t`, `dA += uᵀ (m∘x)/(1−p)`.
///
/// u rounds to `T` before it meets a product (it is an operand there), dx rounds once, dA and dB are f32 sums.
pub struct LinearBwd<'a, S: Store, T: Real> {
    /// `[T, I]`, written; none where nothing below is trained.
    pub dx: Option<S::ViewMut<'a, T>>,
    /// The arena of gradients, of the layout of `params`: dA and dB are added to.
    pub grads: S::ViewMut<'a, f32>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
    /// The outputs.
    pub outs: Vec<LinearBwdOut<'a, S, T>>,
    /// `[T, I]`.
    pub x: S::View<'a, T>,
    /// The arena of adapters.
    pub params: S::View<'a, f32>,
    /// T.
    pub tokens: usize,
    /// As in the forward pass.
    pub dropout: Option<Dropout>,
    /// A is frozen: dA is left alone.
    pub freeze_a: bool,
}

impl<S: Store, T: Real> LinearBwd<'_, S, T> {
    /// Compares the sizes; returns I.
    pub fn check(&self) -> Result<usize> {
        const OP: &str = "linear_bwd";
        ensure(OP, !self.outs.is_empty(), || "no output".into())?;
        let i = self.outs[0].w.size().1;
        let t = ("T", self.tokens);
        holds(OP, "x", &self.x, &[t, ("I", i)])?;
        if let Some(dx) = &self.dx {
            holds(OP, "dx", dx, &[t, ("I", i)])?;
        }
        for out in &self.outs {
            let (o, inner) = out.w.size();
            ensure(OP, inner == i, || format!("W is [{o}, {inner}], expected I = {i} of the first output"))?;
            holds(OP, "dy", &out.dy, &[t, ("O", o)])?;
            holds(OP, "t", &out.t, &[t, ("R", out.lora.map_or(0, |l| l.rank))])?;
            if let Some(lora) = out.lora {
                inside(OP, &self.params, lora, o, i)?;
                inside(OP, &self.grads, lora, o, i)?;
            }
        }
        dropout(OP, self.dropout)?;
        Ok(i)
    }
}

fn inside(op: &'static str, arena: &impl Length, l: Lora, o: usize, i: usize) -> Result<()> {
    let ends = [l.a + l.rank * i, l.b + o * l.rank];
    ensure(op, ends.iter().all(|&e| e <= arena.len()), || {
        format!(
            "an adapter of rank {} at {} and {} does not lie in an arena of {}",
            l.rank,
            l.a,
            l.b,
            arena.len()
        )
    })
}

fn dropout(op: &'static str, d: Option<Dropout>) -> Result<()> {
    ensure(op, d.is_none_or(|d| d.p > 0.0 && d.p < 1.0), || "dropout is not between 0 and 1".into())
}
