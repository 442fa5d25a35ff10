//! Linear with LoRA: several outputs of one x, and what follows them.
//!
//! `y = [x, t] · [W, sB]ᵀ` with `t = x Aᵀ`: the adapter is R more columns of K in the main product and costs no pass
//! over y. Under bf16, A, s·B and t round to bf16 before they meet a product; y rounds once. With dropout the mask m
//! is drawn once per x (all outputs share it): `t = (m∘x)Aᵀ/(1−p)`.

use std::ops::Range;

use super::{dot, ensure, exact, holds, holds_rows};
use crate::error::Result;
use crate::host::Host;
use crate::random::{Philox, Purpose};
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
    /// `[C·T, O]`, written; none where t alone is wanted, with no epilogue.
    pub y: Option<S::ViewMut<'a, T>>,
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
        holds_rows::<S>(OP, "x", &self.x, &[("T", self.tokens)], &[("I", i)])?;
        let (c, t) = (("C", self.copies), ("T", self.tokens));
        let rows = self.copies * self.tokens;
        for out in self.outs.iter() {
            let (o, inner) = out.w.size();
            ensure(OP, inner == i, || format!("W is [{o}, {inner}], expected I = {i} of the first output"))?;
            match &out.y {
                Some(y) => holds_rows::<S>(OP, "y", y, &[c, t], &[("O", o)])?,
                None => ensure(OP, matches!(self.epilogue, Epilogue::None), || {
                    "an output without y, expected no epilogue".into()
                })?,
            }
            if let Some(bias) = &out.bias {
                holds(OP, "bias", bias, &[("O", o)])?;
            }
            let rank = out.groups.iter().map(|g| g.lora.rank).max().unwrap_or(0);
            holds_rows::<S>(OP, "t", &out.t, &[c, t], &[("R", rank)])?;
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
                holds_rows::<S>(OP, "residual", r, &[c, t], &[("O", self.outs[0].w.size().0)])?;
            }
            Epilogue::SwiGlu(h) => {
                let f = self.outs[0].w.size().0;
                ensure(OP, self.outs.len() == 2 && self.outs[1].w.size().0 == f, || {
                    "swiglu goes with two outputs of one width".into()
                })?;
                holds_rows::<S>(OP, "h", h, &[c, t], &[("F", f)])?;
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

/// What lies below the linears: their x, and where its gradient goes.
pub enum Below<'a, S: Store, T: Real> {
    /// x as it lies.
    Kept {
        /// `[T, I]`.
        x: S::View<'a, T>,
        /// `[T, I]`, written; none where nothing below is trained.
        dx: Option<S::ViewMut<'a, T>>,
    },
    /// `x = silu(gate) ∘ up`, made again as [`Epilogue::SwiGlu`] made it, and of the rounded dx
    /// `dgate = dx ∘ up ∘ σ(gate)(1 + gate(1 − σ(gate)))`, `dup = dx ∘ silu(gate)`, each in the place of what it is the
    /// gradient of, each rounded once.
    SwiGlu {
        /// `[T, I]`: x, written.
        x: S::ViewMut<'a, T>,
        /// `[T, I]`, read, then dgate.
        gate: S::ViewMut<'a, T>,
        /// `[T, I]`, read, then dup.
        up: S::ViewMut<'a, T>,
    },
}

/// Backward of [`Linear`] with one group over all rows:
/// `dx = Σⱼ dyⱼ Wⱼ + m∘(uⱼ Aⱼ)/(1−p)`, `u = s dy B`, `dB += s dyᵀ t`, `dA += uᵀ (m∘x)/(1−p)`.
///
/// A and s·B are the forward pass's operands, rounded to `T`; u rounds to `T` before it meets a product (it is an
/// operand there), dx rounds once, dA and dB are f32 sums.
pub struct LinearBwd<'a, S: Store, T: Real> {
    /// x and dx.
    pub below: Below<'a, S, T>,
    /// The arena of gradients, of the layout of `params`: dA and dB are added to.
    pub grads: S::ViewMut<'a, f32>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
    /// The outputs.
    pub outs: Vec<LinearBwdOut<'a, S, T>>,
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
        match &self.below {
            Below::Kept { x, dx } => {
                holds_rows::<S>(OP, "x", x, &[t], &[("I", i)])?;
                if let Some(dx) = dx {
                    holds_rows::<S>(OP, "dx", dx, &[t], &[("I", i)])?;
                }
            }
            Below::SwiGlu { x, gate, up } => {
                for (name, view) in [("x", x), ("gate", gate), ("up", up)] {
                    holds_rows::<S>(OP, name, view, &[t], &[("I", i)])?;
                }
            }
        }
        for out in &self.outs {
            let (o, inner) = out.w.size();
            ensure(OP, inner == i, || format!("W is [{o}, {inner}], expected I = {i} of the first output"))?;
            holds_rows::<S>(OP, "dy", &out.dy, &[t], &[("O", o)])?;
            holds_rows::<S>(OP, "t", &out.t, &[t], &[("R", out.lora.map_or(0, |l| l.rank))])?;
            if let Some(lora) = out.lora {
                inside(OP, &self.params, lora, o, i)?;
                inside(OP, &self.grads, lora, o, i)?;
            }
        }
        let arena = |out: &LinearBwdOut<'_, S, T>| {
            let (o, l) = (out.w.size().0, out.lora?);
            Some([l.a..l.a + l.rank * i, l.b..l.b + o * l.rank])
        };
        let mut taken: Vec<Range<usize>> = self.outs.iter().filter_map(arena).flatten().collect();
        taken.sort_by_key(|r| r.start);
        ensure(OP, taken.windows(2).all(|w| w[0].end <= w[1].start), || {
            "two gradients share a place in the arena".into()
        })?;
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

/// The definition of [`Linear`].
pub fn reference<T: Real>(op: Linear<'_, Host, T>) -> Result<()> {
    let i = op.check()?;
    let Linear { mut outs, epilogue, x, params, tokens, copies, dropout, .. } = op;
    let masked = masked(x, dropout);
    let rows = copies * tokens;
    for out in &mut outs {
        let o = out.w.size().0;
        let width = out.groups.iter().map(|g| g.lora.rank).max().unwrap_or(0);
        for group in out.groups {
            let l = group.lora;
            for row in group.rows.clone() {
                let x = &masked[row % tokens * i..][..i];
                let t = &mut out.t[row * width..][..width];
                t.fill(T::zeroed());
                for (t, a) in t.iter_mut().zip(params[l.a..][..l.rank * i].chunks(i.max(1))) {
                    *t = T::from_f32(
                        dot(x.iter().copied().zip(a.iter().map(|&a| f64::from(T::round(a))))) as f32
                    );
                }
            }
        }
        let Some(y) = &mut out.y else { continue };
        let mut w = vec![0f32; i];
        for column in 0..o {
            out.w.rows::<T>(&mut w, column..column + 1);
            for row in 0..rows {
                let x = &x[row % tokens * i..][..i];
                let mut sum = dot(x.iter().zip(&w).map(|(x, &w)| (exact(x), f64::from(w))));
                sum += out.bias.map_or(0.0, |b| f64::from(b[column]));
                if let Some(group) = out.groups.iter().find(|g| g.rows.contains(&row)) {
                    let l = group.lora;
                    let b = &params[l.b + column * l.rank..][..l.rank];
                    let b = b.iter().map(|&b| f64::from(T::round(l.scale * b)));
                    sum += dot(out.t[row * width..].iter().map(exact).zip(b));
                }
                if let Epilogue::Residual(residual) = &epilogue {
                    sum += exact(&residual[row * o + column]);
                }
                y[row * o + column] = T::from_f32(sum as f32);
            }
        }
    }
    if let Epilogue::SwiGlu(h) = epilogue {
        let [gate, up] = [0, 1].map(|j| outs[j].y.iter().flat_map(|y| y.iter()));
        for ((h, gate), up) in h.iter_mut().zip(gate).zip(up) {
            *h = T::from_f32((silu(exact(gate)) * exact(up)) as f32);
        }
    }
    Ok(())
}

/// The definition of [`LinearBwd`].
pub fn reference_bwd<T: Real>(op: LinearBwd<'_, Host, T>) -> Result<()> {
    let i = op.check()?;
    let LinearBwd { mut below, grads, outs, params, tokens, dropout, freeze_a, .. } = op;
    let x = match &mut below {
        Below::Kept { x, .. } => *x,
        Below::SwiGlu { x, gate, up } => {
            for ((x, gate), up) in x.iter_mut().zip(gate.iter()).zip(up.iter()) {
                *x = T::from_f32((silu(exact(gate)) * exact(up)) as f32);
            }
            x
        }
    };
    let masked = masked(x, dropout);
    let mut sums = vec![0f64; tokens * i];
    for out in &outs {
        let o = out.w.size().0;
        let Some(l) = out.lora else { continue };
        let r = l.rank;
        let mut u = vec![0f64; tokens * r];
        for (at, u) in u.iter_mut().enumerate() {
            let (row, rho) = (at / r, at % r);
            let b = (0..o).map(|c| f64::from(T::round(l.scale * params[l.b + c * r + rho])));
            let sum = dot(out.dy[row * o..][..o].iter().map(exact).zip(b));
            *u = f64::from(T::round(sum as f32));
        }
        for column in 0..o {
            for rho in 0..r {
                let dy = (0..tokens).map(|row| exact(&out.dy[row * o + column]));
                let sum = dot(dy.zip((0..tokens).map(|row| exact(&out.t[row * r + rho]))));
                grads[l.b + column * r + rho] += (f64::from(l.scale) * sum) as f32;
            }
        }
        for rho in 0..r {
            for column in 0..i {
                let u = (0..tokens).map(|row| u[row * r + rho]);
                let sum = dot(u.zip((0..tokens).map(|row| masked[row * i + column])));
                if !freeze_a {
                    grads[l.a + rho * i + column] += sum as f32;
                }
            }
        }
        for (at, sum) in sums.iter_mut().enumerate() {
            let (row, column) = (at / i, at % i);
            let a = (0..r).map(|rho| f64::from(T::round(params[l.a + rho * i + column])));
            *sum += dot(u[row * r..][..r].iter().copied().zip(a)) * mask(dropout, at);
        }
    }
    for out in &outs {
        let mut w = vec![0f32; i];
        for column in 0..out.w.size().0 {
            out.w.rows::<T>(&mut w, column..column + 1);
            for (row, sums) in sums.chunks_mut(i.max(1)).enumerate() {
                let dy = exact(&out.dy[row * out.w.size().0 + column]);
                sums.iter_mut().zip(&w).for_each(|(sum, &w)| *sum += dy * f64::from(w));
            }
        }
    }
    let dx = sums.iter().map(|&sum| T::from_f32(sum as f32));
    match below {
        Below::Kept { dx: to, .. } => to.into_iter().flatten().zip(dx).for_each(|(to, dx)| *to = dx),
        Below::SwiGlu { gate, up, .. } => {
            for ((gate, up), dx) in gate.iter_mut().zip(up).zip(dx) {
                let (z, dx) = (exact(gate), exact(&dx));
                *gate = T::from_f32((dx * exact(up) * silu_slope(z)) as f32);
                *up = T::from_f32((dx * silu(z)) as f32);
            }
        }
    }
    Ok(())
}

/// `z σ(z)`.
pub(crate) fn silu(z: f64) -> f64 {
    z / (1.0 + (-z).exp())
}

/// Its derivative.
pub(crate) fn silu_slope(z: f64) -> f64 {
    let sigma = 1.0 / (1.0 + (-z).exp());
    sigma * (1.0 + z * (1.0 - sigma))
}

/// What dropout multiplies element `at` of x by: 0 or 1 / (1 − p).
fn mask(dropout: Option<Dropout>, at: usize) -> f64 {
    let Some(d) = dropout else { return 1.0 };
    let numbers = Philox::new(d.seed, Purpose::Dropout.stream(d.tensor)).at_step(d.step);
    if numbers.uniform(at as u64) >= d.p { 1.0 / (1.0 - f64::from(d.p)) } else { 0.0 }
}

/// `m∘x/(1−p)`.
fn masked<T: Real>(x: &[T], dropout: Option<Dropout>) -> Vec<f64> {
    x.iter().enumerate().map(|(at, x)| exact(x) * mask(dropout, at)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::differences;

    #[test]
    fn the_slope_is_the_derivative() {
        for z in (-400..=400).map(|i| f64::from(i) * 0.05) {
            let want = differences(&[z], |z| silu(z[0]))[0];
            assert!((silu_slope(z) - want).abs() <= 1e-9, "{z}: {}, expected {want}", silu_slope(z));
        }
    }
}
