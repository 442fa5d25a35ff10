//! The matrix-product operations.

use std::sync::Arc;

use anabranch::backend::{Backend, LinearSize, Scratch};
use anabranch::cpu::Cpu;
use anabranch::host::{Host, HostMatrix, MatrixSource};
use anabranch::ops::choice::Choice;
use anabranch::ops::cross_entropy::CrossEntropy;
use anabranch::ops::importance::{Importance, Sample, Score};
use anabranch::ops::linear::{Dropout, Epilogue, Linear, LinearBwd, LinearBwdOut, LinearOut, Lora, LoraRows};
use anabranch::random::{Philox, Purpose};
use anabranch::tensor::{DType, Real};
use criterion::{Criterion, Throughput};
use half::bf16;

fn cpu() -> Cpu {
    Cpu::new(std::thread::available_parallelism().map_or(1, |n| n.get())).expect("threads")
}

fn numbers<T: Real>(stream: u64, n: usize) -> Vec<T> {
    let p = Philox::new(1, Purpose::Test.stream(stream));
    (0..n as u64).map(|i| T::from_f32(2.0 * p.uniform(i) - 1.0)).collect()
}

fn matrix<W: Real>(o: usize, i: usize) -> HostMatrix {
    let bytes = bytemuck::cast_slice::<W, u8>(&numbers::<W>(9, o * i)).to_vec();
    let range = 0..bytes.len();
    let source =
        MatrixSource { name: "w".into(), bytes: Arc::new(bytes), range, dtype: W::DTYPE, size: (o, i) };
    HostMatrix::new(source).expect("a matrix")
}

/// A linear of a model: what it is called, T, I, the widths of its outputs.
type Shape = (&'static str, usize, usize, &'static [usize]);

const SHAPES: [Shape; 6] = [
    ("qkv", 1024, 1024, &[1024, 256, 256]),
    ("o", 1024, 1024, &[1024]),
    ("gate up", 1024, 1024, &[2816, 2816]),
    ("down", 1024, 2816, &[1024]),
    ("odd down", 1024, 1127, &[1024]),
    ("demo gate up", 1500, 192, &[512, 512]),
];

fn flops(tokens: usize, inner: usize, out: usize) -> Throughput {
    Throughput::Elements(2 * (tokens * inner * out) as u64)
}

/// Adapters of rank `rank` one after another in an arena; its length.
fn adapters(outs: &[usize], inner: usize, rank: usize) -> (Vec<Lora>, usize) {
    let mut end = 0;
    let one = |&o: &usize| {
        let lora = Lora { a: end, b: end + rank * inner, rank, scale: 2.0 };
        end += rank * (inner + o);
        lora
    };
    let loras = outs.iter().map(one).collect();
    (loras, end)
}

const DROPOUT: Dropout = Dropout { p: 0.1, seed: 1, tensor: 2, step: 3 };

/// Frozen, with an adapter, with dropout, from bf16 weights, and in bf16 precision.
pub fn linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear");
    group.sample_size(10);
    for shape in SHAPES {
        forward::<f32, f32>(&mut group, shape, 0, false);
        forward::<f32, f32>(&mut group, shape, 8, false);
    }
    for shape in [SHAPES[1], SHAPES[2]] {
        forward::<f32, f32>(&mut group, shape, 8, true);
        forward::<f32, bf16>(&mut group, shape, 8, false);
        forward::<bf16, bf16>(&mut group, shape, 8, false);
    }
}

type Group<'a> = criterion::BenchmarkGroup<'a, criterion::measurement::WallTime>;

fn name<T: Real, W: Real>(what: &str, rank: usize, dropout: bool) -> String {
    let rank = if rank == 0 { "frozen".into() } else { format!("rank {rank}") };
    format!("{what}, {rank}{}, {} under {}", if dropout { ", dropout" } else { "" }, W::DTYPE, T::DTYPE)
}

fn forward<T: Real, W: Real>(
    group: &mut Group<'_>,
    (what, tokens, inner, outs): Shape,
    rank: usize,
    dropout: bool,
) {
    let cpu = cpu();
    let (loras, end) = adapters(outs, inner, rank);
    let groups: Vec<Vec<LoraRows>> =
        loras.iter().map(|&lora| vec![LoraRows { rows: 0..tokens, lora }; usize::from(rank > 0)]).collect();
    let (x, params) = (numbers::<T>(1, tokens * inner), numbers::<f32>(2, end));
    let ws: Vec<_> = outs.iter().map(|&o| matrix::<W>(o, inner)).collect();
    let mut ys: Vec<_> =
        outs.iter().map(|o| (vec![T::zeroed(); tokens * o], vec![T::zeroed(); tokens * rank])).collect();
    let mut h = vec![T::zeroed(); tokens * outs[0]];
    let out = outs.iter().sum();
    let size = LinearSize {
        tokens,
        copies: 1,
        out,
        inner,
        rank: rank * outs.len(),
        adapters: 1,
        dtype: W::DTYPE,
        dropout,
    };
    let mut scratch = vec![0f32; cpu.linear_scratch::<T>(size)];
    group.throughput(flops(tokens, inner, out));
    group.bench_function(name::<T, W>(what, rank, dropout), |b| {
        b.iter(|| {
            let outs = ys.iter_mut().zip(&ws).zip(&groups).map(|(((y, t), w), groups)| LinearOut {
                y: &mut y[..],
                t: &mut t[..],
                w,
                bias: None,
                groups,
            });
            let op: Linear<'_, Host, T> = Linear {
                outs: outs.collect(),
                epilogue: if what.ends_with("gate up") {
                    Epilogue::SwiGlu(&mut h[..])
                } else {
                    Epilogue::None
                },
                scratch: &mut scratch,
                x: &x,
                params: &params,
                tokens,
                copies: 1,
                dropout: dropout.then_some(DROPOUT),
            };
            cpu.linear(op).expect("linear");
        });
    });
}

/// dx, dA and dB.
pub fn linear_bwd(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear_bwd");
    group.sample_size(10);
    for shape in SHAPES {
        backward::<f32, f32>(&mut group, shape, 0, false);
        backward::<f32, f32>(&mut group, shape, 8, false);
    }
    for shape in [SHAPES[1], SHAPES[2]] {
        backward::<f32, f32>(&mut group, shape, 8, true);
        backward::<bf16, bf16>(&mut group, shape, 8, false);
    }
}

fn backward<T: Real, W: Real>(
    group: &mut Group<'_>,
    (what, tokens, inner, outs): Shape,
    rank: usize,
    dropout: bool,
) {
    let cpu = cpu();
    let (loras, end) = adapters(outs, inner, rank);
    let (x, params) = (numbers::<T>(1, tokens * inner), numbers::<f32>(2, end));
    let (mut grads, mut dx) = (vec![0f32; end], x.clone());
    let ws: Vec<_> = outs.iter().map(|&o| matrix::<W>(o, inner)).collect();
    let dys: Vec<_> =
        outs.iter().map(|o| (numbers::<T>(3, tokens * o), numbers::<T>(4, tokens * rank))).collect();
    let out = outs.iter().sum();
    let size = LinearSize {
        tokens,
        copies: 1,
        out,
        inner,
        rank: rank * outs.len(),
        adapters: 1,
        dtype: W::DTYPE,
        dropout,
    };
    let mut scratch = vec![0f32; cpu.linear_bwd_scratch::<T>(size)];
    group.throughput(flops(tokens, inner, out));
    group.bench_function(name::<T, W>(what, rank, dropout), |b| {
        b.iter(|| {
            let outs = dys.iter().zip(&ws).zip(&loras).map(|(((dy, t), w), &lora)| LinearBwdOut {
                dy: &dy[..],
                t: &t[..],
                w,
                lora: (rank > 0).then_some(lora),
            });
            let op: LinearBwd<'_, Host, T> = LinearBwd {
                dx: Some(&mut dx),
                grads: &mut grads,
                scratch: &mut scratch,
                outs: outs.collect(),
                x: &x,
                params: &params,
                tokens,
                dropout: dropout.then_some(DROPOUT),
                freeze_a: false,
            };
            cpu.linear_bwd(op).expect("linear_bwd");
        });
    });
}

/// cross_entropy with and without its gradient, and choice of four tokens a row.
pub fn head(c: &mut Criterion) {
    let mut group = c.benchmark_group("head");
    group.sample_size(10);
    loss::<f32, f32>(&mut group, (1024, 1024, 32_000), true);
    loss::<f32, f32>(&mut group, (1024, 1024, 32_000), false);
    loss::<bf16, bf16>(&mut group, (1024, 1024, 32_000), true);
    loss::<f32, f32>(&mut group, (1500, 192, 2048), true);
    choice(&mut group, (64, 1024, 32_000));
}

fn loss<T: Real, W: Real>(
    group: &mut Group<'_>,
    (tokens, width, vocab): (usize, usize, usize),
    gradient: bool,
) {
    let cpu = cpu();
    let (x, head) = (numbers::<T>(1, tokens * width), matrix::<W>(vocab, width));
    let rows: Vec<u32> = (0..tokens as u32).collect();
    let targets: Vec<u32> = rows.iter().map(|r| r * 7919 % vocab as u32).collect();
    let (mut nll, mut dx) = (vec![0f32; tokens], x.clone());
    let mut scratch = vec![0f32; cpu.cross_entropy_scratch::<T>(tokens, vocab, width, W::DTYPE)];
    group.throughput(flops(tokens, width, if gradient { 2 * vocab } else { vocab }));
    let what = if gradient { "cross_entropy and gradient" } else { "cross_entropy" };
    group.bench_function(format!("{what}, V {vocab}, {} under {}", W::DTYPE, T::DTYPE), |b| {
        b.iter(|| {
            let op: CrossEntropy<'_, Host, T> = CrossEntropy {
                nll: &mut nll,
                dx: gradient.then_some(&mut dx[..]),
                scratch: &mut scratch,
                x: &x,
                head: &head,
                rows: &rows,
                targets: &targets,
                tokens,
                weight: 0.1,
            };
            cpu.cross_entropy(op).expect("cross_entropy");
        });
    });
}

fn choice(group: &mut Group<'_>, (tokens, width, vocab): (usize, usize, usize)) {
    let cpu = cpu();
    let (x, head) = (numbers::<f32>(1, tokens * width), matrix::<f32>(vocab, width));
    let rows: Vec<u32> = (0..4 * tokens as u32).map(|i| i / 4).collect();
    let ids: Vec<u32> = (0..4 * tokens as u32).map(|i| i % 4).collect();
    let mut out = vec![0f32; rows.len()];
    let mut scratch = vec![0f32; cpu.choice_scratch::<f32>(rows.len(), vocab, width, DType::F32)];
    group.throughput(flops(tokens, width, vocab));
    group.bench_function(format!("choice, V {vocab}"), |b| {
        b.iter(|| {
            let op: Choice<'_, Host, f32> = Choice {
                out: &mut out,
                scratch: &mut scratch,
                x: &x,
                head: &head,
                rows: &rows,
                ids: &ids,
                tokens,
            };
            cpu.choice(op).expect("choice");
        });
    });
}

/// Eight samples of 128 tokens, first order and second.
pub fn importance(c: &mut Criterion) {
    let mut group = c.benchmark_group("importance");
    group.sample_size(10);
    let (tokens, o, i) = (1024, 1024, 1024);
    let cpu = cpu();
    let (dy, x, w) = (numbers::<f32>(1, tokens * o), numbers::<f32>(2, tokens * i), matrix::<f32>(o, i));
    let samples: Vec<_> = (0..8).map(|s| Sample { rows: s * 128..(s + 1) * 128, supervised: 127 }).collect();
    group.throughput(flops(tokens, i, o));
    for scores in [&[Score::AbsFirst][..], &[Score::First, Score::Second, Score::AbsMix]] {
        let mut scratch = vec![0f32; cpu.importance_scratch::<f32>(o, i, scores)];
        let (mut rows, mut cols) = (vec![0f64; scores.len() * o], vec![0f64; scores.len() * i]);
        group.bench_function(format!("{scores:?}"), |b| {
            b.iter(|| {
                let op: Importance<'_, Host, f32> = Importance {
                    row_sums: &mut rows,
                    col_sums: &mut cols,
                    scratch: &mut scratch,
                    dy: &dy,
                    x: &x,
                    w: &w,
                    samples: &samples,
                    scores,
                    tokens,
                };
                cpu.importance(op).expect("importance");
            });
        });
    }
}
