//! Cases of [`crate::ops::linear`].
//!
//! Tolerances follow from the rounding that the definition states: f32 sums of K products err by at most K · 2^-23 of the
//! sum of the products' sizes (made by the definition on absolute values), whichever order they are made in and whether
//! an addition rounds or truncates, as tensor cores do; a value that is rounded to bf16 may land on the other side of a
//! rounding boundary, which is 2^-7 of it.

use std::sync::Arc;

use half::{bf16, f16};

use super::device::{flat, holding, holding_rows, rows, same_on, unwritten, unwritten_rows};
use crate::backend::{Backend, LinearSize};
use crate::host::{Host, HostMatrix, MatrixSource};
use crate::ops::linear::{
    Below, Dropout, Epilogue, Linear, LinearBwd, LinearBwdOut, LinearOut, Lora, LoraRows, reference,
    reference_bwd, silu, silu_slope,
};
use crate::random::{Philox, Purpose};
use crate::tensor::{DType, Real};

#[derive(Clone, Copy, PartialEq, Debug)]
enum End {
    None,
    Residual,
    SwiGlu,
    /// No y of the last output.
    Thin,
}

#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    copies: usize,
    inner: usize,
    outs: Vec<usize>,
    /// Ranks of the groups of each output.
    ranks: Vec<usize>,
    bias: bool,
    end: End,
    dropout: bool,
}

const PLAIN: Case = Case {
    tokens: 1,
    copies: 1,
    inner: 1,
    outs: vec![],
    ranks: vec![],
    bias: false,
    end: End::None,
    dropout: false,
};

/// `(T, I, O)`: 1, primes, one below and above tiles, the real models' odd widths scaled down.
const SIZES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (7, 13, 11),
    (1, 300, 257),
    (129, 33, 64),
    (65, 513, 255),
    (127, 96, 300),
    (63, 172, 65),
    (64, 358, 129),
    (3, 1127, 8),
];

const DROPOUT: Dropout = Dropout { p: 0.3, seed: 5, tensor: 6, step: 7 };

impl Case {
    fn rows(&self) -> usize {
        self.tokens * self.copies
    }

    /// Rows of y are cut into as many groups, with a row of no group between them where there are several.
    fn groups(&self, o: usize, start: &mut usize) -> Vec<LoraRows> {
        let part = self.rows() / self.ranks.len().max(1);
        let group = |(i, &rank): (usize, &usize)| {
            let a = *start;
            let b = a + rank * self.inner;
            *start = b + o * rank;
            let end =
                if i + 1 == self.ranks.len() { self.rows() } else { (i + 1) * part - usize::from(part > 1) };
            LoraRows { rows: i * part..end, lora: Lora { a, b, rank, scale: 1.7 } }
        };
        self.ranks.iter().enumerate().map(group).collect()
    }

    /// Whether output j has y.
    fn has_y(&self, j: usize) -> bool {
        self.end != End::Thin || j + 1 < self.outs.len()
    }

    fn size(&self, rank: usize, dtype: DType) -> LinearSize {
        LinearSize {
            tokens: self.tokens,
            copies: self.copies,
            out: self.outs.iter().sum(),
            inner: self.inner,
            rank: rank * self.outs.len(),
            adapters: self.ranks.len(),
            dtype,
            dropout: self.dropout,
        }
    }
}

/// `n` numbers in (-1, 1), named by `stream`.
pub fn numbers(stream: u64, n: usize) -> Vec<f32> {
    let p = Philox::new(1, Purpose::Test.stream(stream));
    (0..n as u64).map(|i| 2.0 * p.uniform(i) - 1.0).collect()
}

fn absolute<T: Real>(x: Vec<T>, yes: bool) -> Vec<T> {
    if yes { x.iter().map(|x| T::from_f32(x.to_f32().abs())).collect() } else { x }
}

/// The same, rounded to `T`; with `sizes`, their absolute values.
pub fn reals<T: Real>(stream: u64, n: usize, sizes: bool) -> Vec<T> {
    absolute(numbers(stream, n).into_iter().map(T::from_f32).collect(), sizes)
}

/// A frozen weight of `dtype` that holds `values`.
pub fn source(values: &[f32], size: (usize, usize), dtype: DType) -> MatrixSource {
    let bytes: Vec<u8> = match dtype {
        DType::F32 => bytemuck::cast_slice(values).to_vec(),
        DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
    };
    let range = 0..bytes.len();
    MatrixSource { name: "w".into(), bytes: Arc::new(bytes), range, dtype, size }
}

fn wide<T: Real>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// One unit in the last place of `T`, relative.
fn unit<T: Real>() -> f64 {
    2.0 * super::rounding::<T>()
}

/// Fails unless each of `got` is within its tolerance of `want`.
pub fn close(what: &str, got: &[f64], want: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (err, tol) = ((g - w).abs(), tolerance(i));
        assert!(err <= tol, "{what}: element {i} is {g}, expected {w} within {tol}");
    }
}

struct Inputs<T> {
    x: Vec<T>,
    w: Vec<MatrixSource>,
    bias: Vec<f32>,
    residual: Vec<T>,
    params: Vec<f32>,
    groups: Vec<Vec<LoraRows>>,
}

/// With `sizes`, absolute values.
fn inputs<T: Real>(case: &Case, dtype: DType, sizes: bool) -> Inputs<T> {
    let mut end = 0;
    let groups: Vec<_> = case.outs.iter().map(|&o| case.groups(o, &mut end)).collect();
    let w = |(j, &o): (usize, &usize)| {
        let values = reals(10 + j as u64, o * case.inner, sizes);
        source(&values, (o, case.inner), dtype)
    };
    Inputs {
        x: reals(1, case.tokens * case.inner, sizes),
        w: case.outs.iter().enumerate().map(w).collect(),
        bias: reals(2, case.outs.iter().copied().max().unwrap_or(0), sizes),
        residual: reals(3, case.rows() * case.outs[0], sizes),
        params: reals(4, end, sizes),
        groups,
    }
}

/// y and t of each output, and h.
type Outputs<T> = (Vec<(Vec<T>, Vec<T>)>, Vec<T>);

/// By the definition; without h.
fn defined<T: Real>(case: &Case, input: &Inputs<T>) -> Outputs<T> {
    let width = case.ranks.iter().copied().max().unwrap_or(0);
    let zeros = |n: usize| vec![T::zeroed(); n];
    let mut ys: Vec<_> =
        case.outs.iter().map(|&o| (zeros(case.rows() * o), zeros(case.rows() * width))).collect();
    let weights: Vec<_> = input.w.iter().map(|w| HostMatrix::new(w.clone()).expect("w")).collect();
    let outs =
        ys.iter_mut().zip(&weights).zip(&input.groups).enumerate().map(|(j, (((y, t), w), groups))| {
            LinearOut {
                y: Some(&mut y[..]),
                t: &mut t[..],
                w,
                bias: case.bias.then(|| &input.bias[..case.outs[j]]),
                groups,
            }
        });
    let op: Linear<'_, Host, T> = Linear {
        outs: outs.collect(),
        epilogue: match case.end {
            End::Residual => Epilogue::Residual(&input.residual[..]),
            End::None | End::SwiGlu | End::Thin => Epilogue::None,
        },
        scratch: &mut [],
        x: &input.x,
        params: &input.params,
        tokens: case.tokens,
        copies: case.copies,
        dropout: case.dropout.then_some(DROPOUT),
    };
    reference(op).expect("reference");
    (ys, Vec::new())
}

fn forward<B: Backend, T: Real>(b: &B, case: &Case, input: &Inputs<T>, dtype: DType) -> Outputs<T> {
    let width = case.ranks.iter().copied().max().unwrap_or(0);
    let n = case.rows();
    let mut ys: Vec<_> = case
        .outs
        .iter()
        .map(|&o| (unwritten_rows::<B, T>(b, n, o), unwritten_rows::<B, T>(b, n, width)))
        .collect();
    let pair = case.end == End::SwiGlu;
    let mut h = unwritten_rows::<B, T>(b, if pair { n } else { 0 }, case.outs[0]);
    let mut room = unwritten(b, b.linear_scratch::<T>(case.size(width, dtype)));
    let weights: Vec<_> = input.w.iter().map(|w| b.matrix(w.clone()).expect("w")).collect();
    let biases: Vec<_> = case.outs.iter().map(|&o| flat(b, &input.bias[..o])).collect();
    let (x, params) = (rows(b, &input.x, case.inner), flat(b, &input.params));
    let residual = rows(b, &input.residual, case.outs[0]);
    let outs = ys.iter_mut().zip(&weights).zip(&input.groups).zip(&biases).enumerate().map(
        |(j, ((((y, t), w), groups), bias))| {
            let y = case.has_y(j).then(|| y.view_mut());
            LinearOut { y, t: t.view_mut(), w, bias: case.bias.then(|| bias.view()), groups }
        },
    );
    b.linear(Linear::<B::Store, T> {
        outs: outs.collect(),
        epilogue: match case.end {
            End::None | End::Thin => Epilogue::None,
            End::Residual => Epilogue::Residual(residual.view()),
            End::SwiGlu => Epilogue::SwiGlu(h.view_mut()),
        },
        scratch: room.view_mut(),
        x: x.view(),
        params: params.view(),
        tokens: case.tokens,
        copies: case.copies,
        dropout: case.dropout.then_some(DROPOUT),
    })
    .expect("linear");
    room.done(b);
    let mut ys: Vec<_> = ys.into_iter().map(|(y, t)| (y.done(b), t.done(b))).collect();
    for (_, (y, _)) in ys.iter_mut().enumerate().filter(|(j, _)| !case.has_y(*j)) {
        assert!(y.iter().all(|y| y.to_f32().is_nan()), "y is written");
        y.fill(T::zeroed());
    }
    // Rows of no group have no t.
    for ((_, t), groups) in ys.iter_mut().zip(&input.groups) {
        for row in (0..n).filter(|row| !groups.iter().any(|g| g.rows.contains(row))) {
            assert!(t[row * width..][..width].iter().all(|t| t.to_f32().is_nan()), "t of row {row}");
            t[row * width..][..width].fill(T::zeroed());
        }
    }
    (ys, if pair { h.done(b) } else { Vec::new() })
}

fn check_forward<B: Backend, T: Real>(backends: &[B], case: &Case, dtype: DType) {
    let input = inputs::<T>(case, dtype, false);
    let (got, h) = same_on(backends, |b| forward(b, case, &input, dtype));
    let (want, _) = defined(case, &input);
    let (most, _) = defined(case, &inputs::<T>(case, dtype, true));
    let base = Case { ranks: vec![], ..case.clone() };
    let (most_base, _) = defined(&base, &inputs::<T>(&base, dtype, true));
    let (ulp, k) = (unit::<T>(), (case.inner + 16) as f64 * 2f64.powi(-23));
    for (j, ((y, t), (want_y, want_t))) in got.iter().zip(&want).enumerate() {
        let name = format!("{case:?} {dtype} under {}: ", T::DTYPE);
        let (want_y, want_t) = (wide(want_y), wide(want_t));
        let (most_y, most_t, base) = (wide(&most[j].0), wide(&most[j].1), wide(&most_base[j].0));
        close(&format!("{name}t{j}"), &wide(t), &want_t, |i| ulp * want_t[i].abs() + k * most_t[i]);
        if !case.has_y(j) {
            continue;
        }
        close(&format!("{name}y{j}"), &wide(y), &want_y, |i| {
            let adapter = (most_y[i] - base[i]).max(0.0) + ulp * most_y[i];
            ulp * (want_y[i].abs() + if case.ranks.is_empty() { 0.0 } else { adapter }) + k * most_y[i]
        });
    }
    if case.end == End::SwiGlu {
        let (gate, up) = (wide(&got[0].0), wide(&got[1].0));
        let want: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        close("h", &wide(&h), &want, |i| (ulp + 1e-6) * want[i].abs());
    }
}

fn forward_cases() -> Vec<Case> {
    let mut all = Vec::new();
    for ((tokens, inner, o), rank) in SIZES.into_iter().zip([1, 4, 8, 16, 17, 64, 3, 2, 33]) {
        let case = Case { tokens, inner, outs: vec![o], ..PLAIN };
        all.push(case.clone());
        all.push(Case { ranks: vec![rank], bias: true, ..case.clone() });
        all.push(Case { ranks: vec![3], end: End::Residual, dropout: true, ..case });
    }
    let qkv = Case { tokens: 131, inner: 96, outs: vec![96, 24, 24], ranks: vec![8], ..PLAIN };
    let pair = Case { inner: 65, outs: vec![129, 129], end: End::SwiGlu, ..qkv.clone() };
    let stacked = Case { tokens: 150, inner: 40, outs: vec![70], ranks: vec![4, 8, 2], ..PLAIN };
    let copied = Case { tokens: 50, copies: 3, ..stacked.clone() };
    all.extend([
        qkv.clone(),
        Case { end: End::Thin, dropout: true, ..qkv.clone() },
        Case { end: End::Thin, ..stacked.clone() },
        Case { dropout: true, bias: true, ..qkv },
        pair.clone(),
        Case { ranks: vec![], ..pair },
        stacked.clone(),
        Case { bias: true, ..copied.clone() },
        Case { end: End::Residual, ..copied.clone() },
        Case { tokens: 140, copies: 2, outs: vec![70, 70], end: End::SwiGlu, ..stacked },
        Case { tokens: 33, copies: 2, ranks: vec![], ..copied },
    ]);
    all
}

/// The forward pass against the reference on each of `backends`, which must agree to the byte, for weights of each of
/// `dtypes`.
pub fn forward_conforms<B: Backend, T: Real>(backends: &[B], dtypes: &[DType]) {
    for case in forward_cases() {
        dtypes.iter().for_each(|&dtype| check_forward::<B, T>(backends, &case, dtype));
    }
    let large = Case { tokens: 521, inner: 530, outs: vec![513], ranks: vec![8], ..PLAIN };
    check_forward::<B, T>(backends, &Case { ranks: vec![0], tokens: 40, ..large.clone() }, T::DTYPE);
    check_forward::<B, T>(backends, &large, T::DTYPE);
    check_forward::<B, T>(backends, &Case { ranks: vec![520], tokens: 40, ..large }, T::DTYPE);
}

/// What a backward pass is given besides [`Inputs`].
struct Past<T> {
    dys: Vec<Vec<T>>,
    ts: Vec<Vec<T>>,
    grads: Vec<f32>,
    /// Gate and up, of [`End::SwiGlu`]: that which made x.
    gated: [Vec<T>; 2],
}

fn past<T: Real>(case: &Case, params: usize, sizes: bool) -> Past<T> {
    let rank = case.ranks.first().copied().unwrap_or(0);
    let each = |seed: u64, width: &dyn Fn(usize) -> usize| {
        let one = |(j, &o): (usize, &usize)| reals(seed + j as u64, case.tokens * width(o), sizes);
        case.outs.iter().enumerate().map(one).collect()
    };
    let mut gated = [60, 61].map(|seed| reals::<T>(seed, case.tokens * case.inner, sizes));
    gated[0].iter_mut().for_each(|gate| *gate = T::from_f32(6.0 * gate.to_f32()));
    let far = [-200.0, 200.0, -95.0, 95.0, -88.0, 0.0, -3.0, 4.0];
    let gates = gated[0].iter_mut().step_by(7);
    gates.zip(far).for_each(|(gate, z)| *gate = T::from_f32(if sizes { f32::abs(z) } else { z }));
    Past { dys: each(30, &|o| o), ts: each(40, &|_| rank), grads: reals(50, params, sizes), gated }
}

/// What a backward pass leaves.
#[derive(Debug, PartialEq)]
struct Gradients<T> {
    /// dx, or of [`End::SwiGlu`] x, dgate and dup.
    below: Vec<Vec<T>>,
    grads: Vec<f32>,
}

fn defined_bwd<T: Real>(case: &Case, dtype: DType, freeze_a: bool, sizes: bool) -> Gradients<T> {
    let input = inputs::<T>(case, dtype, sizes);
    let Past { dys, ts, mut grads, gated: [mut gate, mut up] } = past(case, input.params.len(), sizes);
    let mut out_x = vec![T::zeroed(); case.tokens * case.inner];
    let weights: Vec<_> = input.w.iter().map(|w| HostMatrix::new(w.clone()).expect("w")).collect();
    let out = |j: usize| LinearBwdOut {
        dy: &dys[j][..],
        t: &ts[j][..],
        w: &weights[j],
        lora: input.groups[j].first().map(|g| g.lora),
    };
    let gated = case.end == End::SwiGlu;
    let op: LinearBwd<'_, Host, T> = LinearBwd {
        below: match gated {
            true => Below::SwiGlu { x: &mut out_x, gate: &mut gate, up: &mut up },
            false => Below::Kept { x: &input.x, dx: Some(&mut out_x) },
        },
        grads: &mut grads,
        scratch: &mut [],
        outs: (0..case.outs.len()).map(out).collect(),
        params: &input.params,
        tokens: case.tokens,
        dropout: case.dropout.then_some(DROPOUT),
        freeze_a,
    };
    reference_bwd(op).expect("reference");
    Gradients { below: if gated { vec![out_x, gate, up] } else { vec![out_x] }, grads }
}

fn backward<B: Backend, T: Real>(
    b: &B,
    case: &Case,
    dtype: DType,
    (needs_dx, freeze_a): (bool, bool),
) -> Gradients<T> {
    let input = inputs::<T>(case, dtype, false);
    let rank = case.ranks.first().copied().unwrap_or(0);
    let Past { dys, ts, grads, gated } = past::<T>(case, input.params.len(), false);
    let dys: Vec<_> = dys.iter().zip(&case.outs).map(|(dy, &o)| rows(b, dy, o)).collect();
    let ts: Vec<_> = ts.iter().map(|t| rows(b, t, rank)).collect();
    let mut grads = holding(b, &grads, -77.0);
    let mut out_x = unwritten_rows::<B, T>(b, if needs_dx { case.tokens } else { 0 }, case.inner);
    let [mut gate, mut up] = gated.map(|x| holding_rows(b, &x, case.inner));
    let mut room = unwritten(b, b.linear_bwd_scratch::<T>(case.size(rank, dtype)));
    let weights: Vec<_> = input.w.iter().map(|w| b.matrix(w.clone()).expect("w")).collect();
    let (x, params) = (rows(b, &input.x, case.inner), flat(b, &input.params));
    let out = |j: usize| LinearBwdOut {
        dy: dys[j].view(),
        t: ts[j].view(),
        w: &weights[j],
        lora: input.groups[j].first().map(|g| g.lora),
    };
    let gated = case.end == End::SwiGlu;
    b.linear_bwd(LinearBwd::<B::Store, T> {
        below: match gated {
            true => Below::SwiGlu { x: out_x.view_mut(), gate: gate.view_mut(), up: up.view_mut() },
            false => Below::Kept { x: x.view(), dx: needs_dx.then(|| out_x.view_mut()) },
        },
        grads: grads.view_mut(),
        scratch: room.view_mut(),
        outs: (0..case.outs.len()).map(out).collect(),
        params: params.view(),
        tokens: case.tokens,
        dropout: case.dropout.then_some(DROPOUT),
        freeze_a,
    })
    .expect("linear_bwd");
    room.done(b);
    let [gate, up] = [gate, up].map(|x| x.done(b));
    let mut below = vec![out_x.done(b)];
    if gated {
        below.extend([gate, up]);
    }
    Gradients { below, grads: grads.done(b) }
}

fn check_backward<B: Backend, T: Real>(backends: &[B], case: &Case, dtype: DType, flags: (bool, bool)) {
    let got = same_on(backends, |b| backward::<B, T>(b, case, dtype, flags));
    let want = defined_bwd::<T>(case, dtype, flags.1, false);
    let name = format!("{case:?} {dtype} under {}, dx {}, A frozen {}: ", T::DTYPE, flags.0, flags.1);
    let ulp = unit::<T>();
    let k = (case.outs.iter().sum::<usize>() + case.tokens + 16) as f64 * 2f64.powi(-23);
    // u may round to a neighbour, which moves dx and dA by a unit of their parts, and x likewise.
    let mut part = if case.ranks.is_empty() { 0.0 } else { ulp };
    let kept = Case { end: End::None, ..case.clone() };
    if case.end == End::SwiGlu {
        let dx = backward::<B, T>(&backends[0], &kept, dtype, flags).below.remove(0);
        check_gated(&name, case, &got, &dx);
        assert_eq!(
            want.below,
            gated(case, &defined_bwd::<T>(&kept, dtype, flags.1, false).below[0]),
            "{name}"
        );
        part += ulp + 1e-6;
    } else if flags.0 {
        let dx = wide(&want.below[0]);
        let most = wide(&defined_bwd::<T>(&kept, dtype, flags.1, true).below[0]);
        let tolerance = |i: usize| ulp * dx[i].abs() + part * most[i] + k * most[i];
        close(&format!("{name}dx"), &wide(&got.below[0]), &dx, tolerance);
    }
    let most = wide(&defined_bwd::<T>(case, dtype, flags.1, true).grads);
    close(&format!("{name}grads"), &wide(&got.grads), &wide(&want.grads), |i| (part + k) * most[i]);
}

/// x, dgate and dup of a case's gate and up where the gradient of x is `dx`.
fn gated<T: Real>(case: &Case, dx: &[T]) -> Vec<Vec<T>> {
    let [gate, up] = past::<T>(case, 0, false).gated;
    let each = |of: &dyn Fn(f64, f64, f64) -> f64| {
        let all = gate.iter().zip(&up).zip(dx);
        all.map(|((z, u), dx)| {
            T::from_f32(of(z.to_f32().into(), u.to_f32().into(), dx.to_f32().into()) as f32)
        })
        .collect()
    };
    vec![
        each(&|z, u, _| silu(z) * u),
        each(&|z, u, dx| dx * u * silu_slope(z)),
        each(&|z, _, dx| dx * silu(z)),
    ]
}

/// What lies below against its definition, of a dx that was made without it.
fn check_gated<T: Real>(name: &str, case: &Case, got: &Gradients<T>, dx: &[T]) {
    let relative = unit::<T>() + 1e-6;
    let up = wide(&past::<T>(case, 0, false).gated[1]);
    let (want, dx) = (gated(case, dx), wide(dx));
    for (n, what) in ["x", "dgate", "dup"].into_iter().enumerate() {
        let wide_want = wide(&want[n]);
        close(&format!("{name}{what}"), &wide(&got.below[n]), &wide_want, |i| {
            // 1 − σ and 1 + z (1 − σ) cancel, so that an error of the slope is one of its parts, not of it.
            let slope = if n == 1 { 1e-6 * (dx[i] * up[i]).abs() } else { 0.0 };
            relative * wide_want[i].abs() + slope + 1e-37
        });
    }
}

/// The backward pass, likewise.
pub fn backward_conforms<B: Backend, T: Real>(backends: &[B], dtypes: &[DType]) {
    for ((tokens, inner, o), rank) in SIZES.into_iter().zip([1, 4, 8, 16, 17, 64, 3, 2, 33]) {
        let case = Case { tokens, inner, outs: vec![o], ..PLAIN };
        for case in [
            case.clone(),
            Case { ranks: vec![rank], ..case.clone() },
            Case { ranks: vec![3], dropout: true, ..case.clone() },
            Case { ranks: vec![rank], end: End::SwiGlu, ..case.clone() },
        ] {
            for &dtype in dtypes {
                check_backward::<B, T>(backends, &case, dtype, (true, false));
            }
        }
    }
    let qkv = Case { tokens: 131, inner: 96, outs: vec![96, 24, 24], ranks: vec![8], ..PLAIN };
    for case in [qkv.clone(), Case { dropout: true, ..qkv }] {
        for flags in [(true, false), (true, true), (false, false), (false, true)] {
            check_backward::<B, T>(backends, &case, T::DTYPE, flags);
        }
    }
    let large = Case { tokens: 521, inner: 513, outs: vec![260, 130], ranks: vec![8], ..PLAIN };
    check_backward::<B, T>(backends, &large, T::DTYPE, (true, false));
    check_backward::<B, T>(
        backends,
        &Case { ranks: vec![70], tokens: 40, ..large.clone() },
        T::DTYPE,
        (true, false),
    );
    check_backward::<B, T>(backends, &Case { dropout: true, ..large.clone() }, T::DTYPE, (true, false));
    for case in [
        Case { end: End::SwiGlu, ..large.clone() },
        Case { end: End::SwiGlu, dropout: true, ..large.clone() },
        Case { end: End::SwiGlu, ranks: vec![], ..large.clone() },
    ] {
        check_backward::<B, T>(backends, &case, T::DTYPE, (true, false));
    }
    check_backward::<B, T>(backends, &Case { end: End::SwiGlu, ..large.clone() }, T::DTYPE, (true, true));
    let wide = Case { tokens: 3, inner: 5734, outs: vec![8], ranks: vec![3], end: End::SwiGlu, ..PLAIN };
    check_backward::<B, T>(backends, &wide, T::DTYPE, (true, false));
    check_backward::<B, T>(backends, &Case { outs: vec![0], ..wide }, T::DTYPE, (true, false));
    // An adapter of no rank, and more columns than a block of a gradient has.
    let none = Case { tokens: 5, inner: 300, outs: vec![260, 3], ranks: vec![0], ..PLAIN };
    check_backward::<B, T>(backends, &none, T::DTYPE, (true, false));
    check_backward::<B, T>(backends, &Case { dropout: true, ..none }, T::DTYPE, (true, false));
}

/// The definition of the backward pass gives the derivatives of `Σ y∘dy` by the definition of the forward pass, which
/// is linear in x, in A and in B, so that whole steps lose nothing.
#[test]
fn gradients_of_the_definition() {
    for dropout in [false, true] {
        let case = Case { tokens: 5, inner: 4, outs: vec![3, 2], ranks: vec![2], dropout, ..PLAIN };
        let mut input = inputs::<f32>(&case, DType::F32, false);
        let dys: Vec<_> =
            [3, 2].iter().enumerate().map(|(j, o)| numbers(30 + j as u64, case.tokens * o)).collect();
        let total = |input: &Inputs<f32>| {
            let (ys, _) = defined(&case, input);
            let dot = |(y, dy): (&Vec<f32>, &Vec<f32>)| -> f64 {
                y.iter().zip(dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum()
            };
            ys.iter().map(|(y, _)| y).zip(&dys).map(dot).sum::<f64>()
        };
        // t of this forward pass, not the random one of the other tests.
        let (ys, _) = defined(&case, &input);
        let (mut grads, mut dx) = (vec![0f32; input.params.len()], vec![0f32; case.tokens * case.inner]);
        let weights: Vec<_> = input.w.iter().map(|w| HostMatrix::new(w.clone()).expect("w")).collect();
        let out = |j: usize| LinearBwdOut {
            dy: &dys[j][..],
            t: &ys[j].1[..],
            w: &weights[j],
            lora: Some(input.groups[j][0].lora),
        };
        let op: LinearBwd<'_, Host, f32> = LinearBwd {
            below: Below::Kept { x: &input.x, dx: Some(&mut dx) },
            grads: &mut grads,
            scratch: &mut [],
            outs: vec![out(0), out(1)],
            params: &input.params,
            tokens: case.tokens,
            dropout: case.dropout.then_some(DROPOUT),
            freeze_a: false,
        };
        reference_bwd(op).expect("reference");
        for i in 0..dx.len() + grads.len() {
            let mut at = |by: f32| {
                let place = if i < dx.len() { &mut input.x[i] } else { &mut input.params[i - dx.len()] };
                let before = std::mem::replace(place, *place + by);
                let sum = total(&input);
                if i < dx.len() {
                    input.x[i] = before
                } else {
                    input.params[i - dx.len()] = before
                }
                sum
            };
            let slope = at(1.0) - at(0.0);
            let got = f64::from(if i < dx.len() { dx[i] } else { grads[i - dx.len()] });
            // y is an f32 below 64 in 25 places.
            assert!((got - slope).abs() <= 64.0 * 25.0 * 2f64.powi(-23), "{i}: {got}, slope {slope}");
        }
    }
}
