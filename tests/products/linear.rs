//! `linear` and `linear_bwd`.

use anabranch::backend::{Backend, LinearSize, Scratch};
use anabranch::cpu::Cpu;
use anabranch::host::Host;
use anabranch::ops::linear::{
    Dropout, Epilogue, Linear, LinearBwd, LinearBwdOut, LinearOut, Lora, LoraRows, reference, reference_bwd,
};
use anabranch::tensor::{DType, Frozen, Real};
use half::bf16;

use super::views::*;

#[derive(Clone, Copy, PartialEq, Debug)]
enum End {
    None,
    Residual,
    SwiGlu,
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
}

struct Inputs<T> {
    x: Vec<T>,
    w: Vec<anabranch::host::HostMatrix>,
    bias: Vec<f32>,
    residual: Vec<T>,
    params: Vec<f32>,
    groups: Vec<Vec<LoraRows>>,
}

fn inputs<T: Real>(case: &Case, dtype: DType, absolute: bool) -> Inputs<T> {
    let mut end = 0;
    let groups: Vec<_> = case.outs.iter().map(|&o| case.groups(o, &mut end)).collect();
    let fix = |v: Vec<f32>| if absolute { sizes(&v) } else { v };
    let real = |v: Vec<T>| if absolute { sizes(&v) } else { v };
    let w = |(j, &o): (usize, &usize)| {
        matrix(&fix(numbers(10 + j as u64, o * case.inner)), (o, case.inner), dtype)
    };
    Inputs {
        x: real(reals(1, case.tokens * case.inner)),
        w: case.outs.iter().enumerate().map(w).collect(),
        bias: fix(numbers(2, *case.outs.iter().max().unwrap())),
        residual: real(reals(3, case.rows() * case.outs[0])),
        params: fix(numbers(4, end)),
        groups,
    }
}

const DROPOUT: Dropout = Dropout { p: 0.3, seed: 5, tensor: 6, step: 7 };

/// y and t of each output, and h.
type Outputs<T> = (Vec<(Vec<T>, Vec<T>)>, Vec<T>);

fn forward<T: Real>(case: &Case, input: &Inputs<T>, cpu: Option<&Cpu>) -> Outputs<T> {
    let before = input.params.clone();
    let width = case.ranks.iter().copied().max().unwrap_or(0);
    let rows = case.rows();
    let mut ys: Vec<_> =
        case.outs.iter().map(|&o| (unwritten::<T>(rows * o), unwritten::<T>(rows * width))).collect();
    let mut h = unwritten::<T>(if case.end == End::SwiGlu { rows * case.outs[0] } else { 0 });
    let size = LinearSize {
        tokens: case.tokens,
        copies: case.copies,
        out: case.outs.iter().sum(),
        inner: case.inner,
        rank: width * case.outs.len(),
        dtype: input.w[0].dtype(),
        dropout: case.dropout,
    };
    let mut room = scratch(cpu.map_or(0, |cpu| cpu.linear_scratch::<T>(size)));
    let outs = ys.iter_mut().zip(&input.w).zip(&input.groups).map(|(((y, t), w), groups)| LinearOut {
        y: y.inside(),
        t: t.inside(),
        w,
        bias: case.bias.then(|| &input.bias[..w.size().0]),
        groups,
    });
    let op: Linear<'_, Host, T> = Linear {
        outs: outs.collect(),
        epilogue: match case.end {
            End::None => Epilogue::None,
            End::Residual => Epilogue::Residual(&input.residual[..]),
            End::SwiGlu => Epilogue::SwiGlu(h.inside()),
        },
        scratch: room.inside(),
        x: &input.x,
        params: &input.params,
        tokens: case.tokens,
        copies: case.copies,
        dropout: case.dropout.then_some(DROPOUT),
    };
    match cpu {
        Some(cpu) => cpu.linear(op).unwrap(),
        None => reference(op).unwrap(),
    }
    room.take();
    assert_eq!(input.params, before);
    let mut ys: Vec<_> = ys.into_iter().map(|(y, t)| (y.take(), t.take())).collect();
    // Rows of no group have no t.
    for ((_, t), groups) in ys.iter_mut().zip(&input.groups) {
        for row in (0..rows).filter(|row| !groups.iter().any(|g| g.rows.contains(row))) {
            assert!(t[row * width..][..width].iter().all(|t| t.to_f32().is_nan()));
            t[row * width..][..width].fill(T::zeroed());
        }
    }
    (ys, h.take())
}

fn check_forward<T: Real>(case: &Case, dtype: DType) {
    let input = inputs::<T>(case, dtype, false);
    let (got, h) = on_all_threads(|cpu| {
        let (ys, h) = forward(case, &input, Some(cpu));
        (ys.iter().map(|(y, t)| (bytes(y), bytes(t))).collect::<Vec<_>>(), bytes(&h))
    });
    let real = |b: &[u8]| wide(&elements::<T>(b));
    let (want, _) = forward(case, &input, None);
    let absolute = inputs::<T>(case, dtype, true);
    let (most, _) = forward(case, &absolute, None);
    let base = Case { ranks: vec![], ..case.clone() };
    let (most_base, _) = forward(&base, &inputs::<T>(&base, dtype, true), None);
    let (ulp, k) = (unit::<T>(), (case.inner + 16) as f64 * 2f64.powi(-24));
    for (j, ((y, t), (want_y, want_t))) in got.iter().zip(&want).enumerate() {
        let name = format!("{case:?} {dtype} under {}: ", T::DTYPE);
        let (want_y, want_t) = (wide(want_y), wide(want_t));
        let (most_y, most_t, base) = (wide(&most[j].0), wide(&most[j].1), wide(&most_base[j].0));
        close(&format!("{name}t{j}"), &real(t), &want_t, |i| ulp * want_t[i].abs() + k * most_t[i]);
        close(&format!("{name}y{j}"), &real(y), &want_y, |i| {
            let adapter = (most_y[i] - base[i]).max(0.0) + ulp * most_y[i];
            ulp * (want_y[i].abs() + if case.ranks.is_empty() { 0.0 } else { adapter }) + k * most_y[i]
        });
    }
    if case.end == End::SwiGlu {
        let (gate, up) = (real(&got[0].0), real(&got[1].0));
        let want: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        close("h", &real(&h), &want, |i| (ulp + 1e-6) * want[i].abs());
    }
}

fn all_dtypes(case: &Case, check: impl Fn(&Case, DType, bool)) {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        check(case, dtype, false);
        check(case, dtype, true);
    }
}

fn check_all(case: &Case) {
    all_dtypes(
        case,
        |case, dtype, bf| {
            if bf { check_forward::<bf16>(case, dtype) } else { check_forward::<f32>(case, dtype) }
        },
    );
}

#[test]
fn forward_of_one_output() {
    for (tokens, inner, o) in
        [(1, 1, 1), (7, 13, 11), (1, 300, 257), (129, 33, 64), (65, 513, 255), (127, 96, 300)]
    {
        let case = Case { tokens, inner, outs: vec![o], ..PLAIN };
        check_all(&case);
        check_all(&Case { ranks: vec![8], bias: true, ..case.clone() });
        check_all(&Case { ranks: vec![3], end: End::Residual, dropout: true, ..case });
    }
}

#[test]
fn forward_of_several_outputs() {
    let qkv = Case { tokens: 131, inner: 96, outs: vec![96, 24, 24], ranks: vec![8], ..PLAIN };
    check_all(&qkv);
    check_all(&Case { dropout: true, bias: true, ..qkv.clone() });
    check_all(&Case { inner: 65, outs: vec![129, 129], end: End::SwiGlu, ..qkv.clone() });
    check_all(&Case { inner: 65, outs: vec![129, 129], end: End::SwiGlu, ranks: vec![], ..qkv });
}

#[test]
fn forward_of_stacked_adapters() {
    let case = Case { tokens: 150, inner: 40, outs: vec![70], ranks: vec![4, 8, 2], ..PLAIN };
    check_all(&case);
    check_all(&Case { tokens: 50, copies: 3, bias: true, ..case.clone() });
    check_all(&Case { tokens: 50, copies: 3, end: End::Residual, ..case.clone() });
    check_all(&Case { tokens: 140, copies: 2, outs: vec![70, 70], end: End::SwiGlu, ..case.clone() });
    check_all(&Case { tokens: 33, copies: 2, ranks: vec![], ..case });
}

#[test]
fn forward_beyond_one_tile() {
    let case = Case { tokens: 521, inner: 530, outs: vec![513], ranks: vec![8], ..PLAIN };
    check_forward::<f32>(&case, DType::F32);
    check_forward::<bf16>(&case, DType::BF16);
    check_forward::<f32>(&Case { ranks: vec![520], tokens: 40, ..case }, DType::F16);
}

struct Backward {
    dx: Vec<u8>,
    grads: Vec<u8>,
}

fn backward<T: Real>(
    case: &Case,
    input: &Inputs<T>,
    cpu: Option<&Cpu>,
    absolute: bool,
    (needs_dx, freeze_a): (bool, bool),
) -> Backward {
    let rank = case.ranks.first().copied().unwrap_or(0);
    let fix = |v: Vec<T>| if absolute { sizes(&v) } else { v };
    let dys: Vec<_> =
        case.outs.iter().enumerate().map(|(j, &o)| fix(reals::<T>(30 + j as u64, case.tokens * o))).collect();
    let ts: Vec<_> = case
        .outs
        .iter()
        .enumerate()
        .map(|(j, _)| fix(reals::<T>(40 + j as u64, case.tokens * rank)))
        .collect();
    let start = numbers(50, input.params.len());
    let mut grads = Guarded::new(if absolute { sizes(&start) } else { start }, -77.0);
    let mut dx = unwritten::<T>(if needs_dx { case.tokens * case.inner } else { 0 });
    let size = LinearSize {
        tokens: case.tokens,
        copies: 1,
        out: case.outs.iter().sum(),
        inner: case.inner,
        rank: rank * case.outs.len(),
        dtype: input.w[0].dtype(),
        dropout: case.dropout,
    };
    let mut room = scratch(cpu.map_or(0, |cpu| cpu.linear_bwd_scratch::<T>(size)));
    let out = |j: usize| LinearBwdOut {
        dy: &dys[j][..],
        t: &ts[j][..],
        w: &input.w[j],
        lora: input.groups[j].first().map(|g| g.lora),
    };
    let op: LinearBwd<'_, Host, T> = LinearBwd {
        dx: needs_dx.then(|| dx.inside()),
        grads: grads.inside(),
        scratch: room.inside(),
        outs: (0..case.outs.len()).map(out).collect(),
        x: &input.x,
        params: &input.params,
        tokens: case.tokens,
        dropout: case.dropout.then_some(DROPOUT),
        freeze_a,
    };
    match cpu {
        Some(cpu) => cpu.linear_bwd(op).unwrap(),
        None => reference_bwd(op).unwrap(),
    }
    room.take();
    Backward { dx: bytes(&dx.take()), grads: bytes(&grads.take()) }
}

fn check_backward<T: Real>(case: &Case, dtype: DType, flags: (bool, bool)) {
    let input = inputs::<T>(case, dtype, false);
    let run = |input: &Inputs<T>, cpu: Option<&Cpu>, absolute: bool| {
        let b = backward(case, input, cpu, absolute, flags);
        (b.dx, b.grads)
    };
    let (dx, grads) = on_all_threads(|cpu| run(&input, Some(cpu), false));
    let (want_dx, want_grads) = run(&input, None, false);
    let (most_dx, most_grads) = run(&inputs::<T>(case, dtype, true), None, true);
    let real = |b: &[u8]| wide(&elements::<T>(b));
    let single = |b: &[u8]| wide(&elements::<f32>(b));
    let name = format!("{case:?} {dtype} under {}, dx {}, A frozen {}: ", T::DTYPE, flags.0, flags.1);
    let ulp = unit::<T>();
    let k = (case.outs.iter().sum::<usize>() + case.tokens + 16) as f64 * 2f64.powi(-24);
    // u may round to a neighbour, which moves dx and dA by a unit of their parts.
    let part = if case.ranks.is_empty() { 0.0 } else { ulp };
    let most = real(&most_dx);
    let want = real(&want_dx);
    close(&format!("{name}dx"), &real(&dx), &want, |i| ulp * want[i].abs() + part * most[i] + k * most[i]);
    let most = single(&most_grads);
    close(&format!("{name}grads"), &single(&grads), &single(&want_grads), |i| (part + k) * most[i]);
}

#[test]
fn backward_of_one_output() {
    for (tokens, inner, o) in
        [(1, 1, 1), (7, 13, 11), (1, 300, 257), (129, 33, 64), (65, 257, 513), (127, 300, 96)]
    {
        let case = Case { tokens, inner, outs: vec![o], ..PLAIN };
        for case in [
            case.clone(),
            Case { ranks: vec![8], ..case.clone() },
            Case { ranks: vec![3], dropout: true, ..case.clone() },
        ] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                check_backward::<f32>(&case, dtype, (true, false));
                check_backward::<bf16>(&case, dtype, (true, false));
            }
        }
    }
}

#[test]
fn backward_of_several_outputs() {
    let qkv = Case { tokens: 131, inner: 96, outs: vec![96, 24, 24], ranks: vec![8], ..PLAIN };
    for case in [qkv.clone(), Case { dropout: true, ..qkv.clone() }] {
        for flags in [(true, false), (true, true), (false, false), (false, true)] {
            check_backward::<f32>(&case, DType::F32, flags);
            check_backward::<f32>(&case, DType::BF16, flags);
            check_backward::<bf16>(&case, DType::BF16, flags);
        }
    }
}

#[test]
fn backward_beyond_one_tile() {
    let case = Case { tokens: 521, inner: 513, outs: vec![260, 130], ranks: vec![8], ..PLAIN };
    check_backward::<f32>(&case, DType::F32, (true, false));
    check_backward::<bf16>(&Case { dropout: true, ..case }, DType::BF16, (true, false));
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
            let (ys, _) = forward(&case, input, None);
            let dot = |(y, dy): (&Vec<f32>, &Vec<f32>)| -> f64 {
                y.iter().zip(dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum()
            };
            ys.iter().map(|(y, _)| y).zip(&dys).map(dot).sum::<f64>()
        };
        // t of this forward pass, not the random one of the other tests.
        let (ys, _) = forward(&case, &input, None);
        let start = vec![0f32; input.params.len()];
        let (mut grads, mut dx) = (start, vec![0f32; case.tokens * case.inner]);
        let out = |j: usize| LinearBwdOut {
            dy: &dys[j][..],
            t: &ys[j].1[..],
            w: &input.w[j],
            lora: Some(input.groups[j][0].lora),
        };
        let op: LinearBwd<'_, Host, f32> = LinearBwd {
            dx: Some(&mut dx),
            grads: &mut grads,
            scratch: &mut [],
            outs: vec![out(0), out(1)],
            x: &input.x,
            params: &input.params,
            tokens: case.tokens,
            dropout: case.dropout.then_some(DROPOUT),
            freeze_a: false,
        };
        reference_bwd(op).unwrap();
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

#[test]
fn views_that_do_not_fit_are_refused() {
    let cpu = Cpu::new(1).unwrap();
    let w = matrix(&[1.0; 6], (3, 2), DType::BF16);
    let lora = Lora { a: 0, b: 2, rank: 1, scale: 1.0 };
    let run = |x: &[f32], params: &[f32], loras: &[Lora]| {
        let (dy, t) = ([1f32; 6], [1f32; 2]);
        let out = |&lora: &Lora| LinearBwdOut { dy: &dy[..], t: &t[..], w: &w, lora: Some(lora) };
        let op: LinearBwd<'_, Host, f32> = LinearBwd {
            dx: None,
            grads: &mut params.to_vec(),
            scratch: &mut [],
            outs: loras.iter().map(out).collect(),
            x,
            params,
            tokens: 2,
            dropout: None,
            freeze_a: false,
        };
        cpu.linear_bwd(op).unwrap_err().to_string()
    };
    let found = run(&[0.0; 3], &[0.0; 5], &[lora]);
    assert_eq!(found, "linear_bwd: x holds 3 elements, expected T × I = 2 × 2");
    let found = run(&[0.0; 4], &[0.0; 4], &[lora]);
    assert_eq!(found, "linear_bwd: an adapter of rank 1 at 0 and 2 does not lie in an arena of 4");
    let found = run(&[0.0; 4], &[0.0; 5], &[lora, lora]);
    assert_eq!(found, "linear_bwd: two gradients share a place in the arena");
    let found = run(&[0.0; 4], &[0.0; 5], &[lora]);
    assert!(found.starts_with("linear_bwd: scratch holds 0 elements, expected at least "), "{found}");
}
