//! Conflict resolution and fusion of two LLaMA-3-8B-shaped rank-8 adapters: module by module, and files to file.

use std::hint::black_box;

use anabranch::checkpoint::module::{Module, Target};
use anabranch::fuse::measure::measure;
use anabranch::fuse::options::Method;
use anabranch::fuse::{Batch, Factors, Frame, Fusion, Grams, LoraCr};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use faer::Mat;

/// Two adapters of rank 8 on one module.
fn two(o: usize, i: usize) -> Batch {
    let value = |s: usize| {
        move |r: usize, c: usize| (((r * 7919 + c * 104_729 + s) % 10_007) as f64 / 5003.5 - 1.0) * 0.01
    };
    let stack =
        Factors::new(Mat::from_fn(16, o, value(1)), Mat::from_fn(16, i, value(5))).expect("equal ranks");
    Batch::new(Frame::new(Module { layer: 0, target: Target::Q }, (o, i), &[8, 8]), stack)
        .expect("the ranks add up")
}

fn modules(c: &mut Criterion) {
    let fusion = Fusion::new(Method::Fedavg, None).expect("needs no choice");
    for (name, o, i) in [("q", 4096, 4096), ("k", 1024, 4096), ("gate", 14336, 4096), ("down", 4096, 14336)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Bytes((16 * (o + i) * 4) as u64)).sample_size(20);
        let batch = two(o, i);
        let grams = Grams::of(&batch);
        let resolution = LoraCr::default().resolve(&grams, &batch.frame.weights).expect("finite");
        let resolved = batch.with_stack(batch.stack.mapped(resolution.left.as_ref().map(Mat::as_ref), None));
        let fused = fusion.fuse(&resolved, true).expect("equal ranks").factors;
        group.bench_function("grams", |b| b.iter(|| Grams::of(black_box(&batch))));
        group.bench_function("resolve", |b| {
            b.iter(|| LoraCr::default().resolve(black_box(&grams), &batch.frame.weights))
        });
        group.bench_function("apply", |b| {
            b.iter(|| black_box(&batch).stack.mapped(resolution.left.as_ref().map(Mat::as_ref), None))
        });
        group.bench_function("fedavg", |b| b.iter(|| fusion.fuse(black_box(&resolved), true)));
        group.bench_function("certify", |b| {
            b.iter(|| measure(black_box(&fused), &fused, &batch, &grams, Some(&resolution)))
        });
    }
}

criterion_group!(benches, modules);
criterion_main!(benches);
