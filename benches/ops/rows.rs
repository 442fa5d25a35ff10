//! The operations without a frozen product, in f32 and bf16.

use anabranch::backend::Backend;
use anabranch::cpu::Cpu;
use anabranch::host::{HostMatrix, MatrixSource};
use anabranch::ops::adamw::{AdamW, Hyper};
use anabranch::ops::attention::{Attention, AttentionBwd, Heads, Segment};
use anabranch::ops::embed::Embed;
use anabranch::ops::rms_norm::{RmsNorm, RmsNormBwd};
use anabranch::ops::rope::Rope;
use anabranch::ops::sum_sq::SumSq;
use anabranch::ops::swiglu::{SwiGlu, SwiGluBwd};
use anabranch::random::{Philox, Purpose};
use anabranch::tensor::Real;
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;
use std::sync::Arc;

fn cpu() -> Cpu {
    Cpu::new(std::thread::available_parallelism().map_or(1, |n| n.get())).expect("threads")
}

fn numbers<T: Real>(stream: u64, n: usize) -> Vec<T> {
    let random = Philox::new(1, Purpose::Test.stream(stream));
    (0..n as u64).map(|i| T::from_f32(2.0 * random.uniform(i) - 1.0)).collect()
}

/// Bytes that an operation reads and writes.
fn bytes<T>(elements: usize) -> Throughput {
    Throughput::Bytes((elements * size_of::<T>()) as u64)
}

/// T and D of the 157 M-parameter model.
const TOKENS: usize = 1024;
const WIDTH: usize = 1024;

/// `y[1024, 1024]`.
pub fn embed(c: &mut Criterion) {
    let table = numbers::<bf16>(1, 8192 * WIDTH);
    let data = bytemuck::cast_slice::<_, u8>(&table).to_vec();
    let range = 0..data.len();
    let source = MatrixSource {
        name: "table".into(),
        bytes: Arc::new(data),
        range,
        dtype: bf16::DTYPE,
        size: (8192, WIDTH),
    };
    let table = HostMatrix::new(source).expect("a table");
    let ids: Vec<u32> = (0..TOKENS as u32).map(|t| t * 7919 % 8192).collect();
    let mut y = numbers::<f32>(2, TOKENS * WIDTH);
    let cpu = cpu();
    let mut group = c.benchmark_group("embed");
    group.throughput(Throughput::Bytes((TOKENS * WIDTH * 6) as u64));
    group.bench_function("bf16 to f32", |b| {
        b.iter(|| cpu.embed(Embed { y: &mut y[..], table: &table, ids: &ids }).expect("rows"))
    });
}

/// `[1024, 1024]`, forward and backward with a residual.
pub fn rms_norm(c: &mut Criterion) {
    fn case<T: Real>(c: &mut Criterion) {
        let n = TOKENS * WIDTH;
        let [x, dy, residual] = [1, 2, 3].map(|stream| numbers::<T>(stream, n));
        let w = numbers::<f32>(4, WIDTH);
        let (mut y, mut rstd) = (x.clone(), vec![1f32; TOKENS]);
        let cpu = cpu();
        let mut group = c.benchmark_group("rms_norm");
        group.throughput(bytes::<T>(2 * n));
        group.bench_function(BenchmarkId::new("forward", T::DTYPE), |b| {
            b.iter(|| {
                cpu.rms_norm::<T>(RmsNorm {
                    y: &mut y,
                    rstd: &mut rstd,
                    x: &x,
                    w: &w,
                    tokens: TOKENS,
                    width: WIDTH,
                    eps: 1e-5,
                })
                .expect("a norm")
            })
        });
        group.throughput(bytes::<T>(4 * n));
        group.bench_function(BenchmarkId::new("backward", T::DTYPE), |b| {
            b.iter(|| {
                cpu.rms_norm_bwd::<T>(RmsNormBwd {
                    dx: &mut y,
                    dy: &dy,
                    residual: Some(&residual),
                    x: &x,
                    rstd: &rstd,
                    w: &w,
                    tokens: TOKENS,
                    width: WIDTH,
                })
                .expect("a gradient")
            })
        });
    }
    case::<f32>(c);
    case::<bf16>(c);
}

/// 16 heads of 64 columns.
pub fn rope(c: &mut Criterion) {
    fn case<T: Real>(c: &mut Criterion) {
        let mut x = numbers::<T>(1, TOKENS * WIDTH);
        let [cos, sin] = [2, 3].map(|stream| numbers::<f32>(stream, TOKENS * 32));
        let rows: Vec<u32> = (0..TOKENS as u32).collect();
        let cpu = cpu();
        let mut group = c.benchmark_group("rope");
        group.throughput(bytes::<T>(2 * TOKENS * WIDTH));
        group.bench_function(T::DTYPE.name(), |b| {
            b.iter(|| {
                let (x, cos, sin, rows) = (&mut x[..], &cos[..], &sin[..], &rows[..]);
                cpu.rope::<T>(Rope { x, cos, sin, rows, heads: 16, head_dim: 64, inverse: false })
                    .expect("a rotation")
            })
        });
    }
    case::<f32>(c);
    case::<bf16>(c);
}

/// `[1024, 2816]`.
pub fn swiglu(c: &mut Criterion) {
    fn case<T: Real>(c: &mut Criterion) {
        let (tokens, width) = (TOKENS, 2816);
        let n = tokens * width;
        let [gate, up, dh] = [1, 2, 3].map(|stream| numbers::<T>(stream, n));
        let (mut h, mut dup) = (gate.clone(), gate.clone());
        let cpu = cpu();
        let mut group = c.benchmark_group("swiglu");
        group.throughput(bytes::<T>(3 * n));
        group.bench_function(BenchmarkId::new("forward", T::DTYPE), |b| {
            b.iter(|| cpu.swiglu::<T>(SwiGlu { h: &mut h, gate: &gate, up: &up, tokens, width }).expect("h"))
        });
        group.throughput(bytes::<T>(5 * n));
        group.bench_function(BenchmarkId::new("backward", T::DTYPE), |b| {
            b.iter(|| {
                cpu.swiglu_bwd::<T>(SwiGluBwd {
                    dgate: &mut h,
                    dup: &mut dup,
                    dh: &dh,
                    gate: &gate,
                    up: &up,
                    tokens,
                    width,
                })
                .expect("gradients")
            })
        });
    }
    case::<f32>(c);
    case::<bf16>(c);
}

/// Five million parameters.
pub fn optimizer(c: &mut Criterion) {
    let n = 5_000_000;
    let grads = numbers::<f32>(1, n);
    let mut params = numbers::<f32>(2, n);
    let (mut m, mut v, mut norm_sq) = (vec![0f32; n], vec![0f32; n], [1f64]);
    let hyper = Hyper { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_norm: 1.0 };
    let cpu = cpu();
    let mut group = c.benchmark_group("optimizer");
    group.throughput(bytes::<f32>(n));
    group.bench_function("sum_sq", |b| {
        b.iter(|| cpu.sum_sq(SumSq { out: &mut norm_sq[..], x: &grads[..] }).expect("a sum"))
    });
    group.throughput(bytes::<f32>(7 * n));
    group.bench_function("adamw", |b| {
        b.iter(|| {
            cpu.adamw(AdamW {
                params: &mut params[..],
                m: &mut m[..],
                v: &mut v[..],
                grads: &grads[..],
                norm_sq: &norm_sq[..],
                hyper,
                step: 3,
            })
            .expect("an update")
        })
    });
}

/// Documents of the 157 M-parameter model and of the demo, forward and backward, and a token against a cache of 500.
/// `Gelem/s` is GFLOP/s of the two products forward and five backward, of the scores that are seen.
pub fn attention(c: &mut Criterion) {
    let demo: Vec<usize> = (0..40).map(|i| 30 + i * 7 % 11).collect();
    let heads = |q, kv, dim: usize| Heads { q, kv, dim, scale: 1.0 / (dim as f32).sqrt() };
    attention_case::<f32>(c, "4 × 256", &[256; 4], 0, heads(16, 4, 64));
    attention_case::<bf16>(c, "4 × 256", &[256; 4], 0, heads(16, 4, 64));
    attention_case::<f32>(c, "demo", &demo, 0, heads(16, 8, 32));
    attention_case::<f32>(c, "2048", &[2048], 0, heads(8, 8, 128));
    attention_case::<f32>(c, "decode", &[1], 500, heads(32, 8, 128));
}

fn attention_case<T: Real>(c: &mut Criterion, name: &str, documents: &[usize], past: usize, heads: Heads) {
    let mut segments = Vec::new();
    let (mut end, mut seen) = (0, 0);
    for n in documents {
        let before = if past > 0 { vec![0..past] } else { vec![] };
        segments.push(Segment { q: end..end + n, own: past + end, past: before });
        end += n;
        seen += n * (n + 1) / 2 + n * past;
    }
    let (wide, narrow) = (end * heads.q * heads.dim, (past + end) * heads.kv * heads.dim);
    let [q, do_] = [1, 2].map(|stream| numbers::<T>(stream, wide));
    let [k, v] = [3, 4].map(|stream| numbers::<T>(stream, narrow));
    let (mut o, mut lse) = (q.clone(), vec![0f32; end * heads.q]);
    let product = (2 * seen * heads.q * heads.dim) as u64;
    let cpu = cpu();
    let mut group = c.benchmark_group(format!("attention/{name}"));
    group.throughput(Throughput::Elements(2 * product)).sample_size(20);
    group.bench_function(BenchmarkId::new("forward", T::DTYPE), |b| {
        b.iter(|| {
            cpu.attention::<T>(Attention {
                o: &mut o,
                lse: &mut lse,
                q: &q,
                k: &k,
                v: &v,
                segments: &segments,
                heads,
            })
            .expect("attention")
        })
    });
    if past > 0 {
        return;
    }
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    group.throughput(Throughput::Elements(5 * product));
    group.bench_function(BenchmarkId::new("backward", T::DTYPE), |b| {
        b.iter(|| {
            cpu.attention_bwd::<T>(AttentionBwd {
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
            })
            .expect("gradients")
        })
    });
}
