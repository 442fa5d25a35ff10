//! Conflict resolution and fusion of two LLaMA-3-8B-shaped rank-8 adapters: module by module, and files to file.

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};

use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::module::{Module, Target};
use anabranch::checkpoint::provenance::Provenance;
use anabranch::checkpoint::sizes::LayerSizes;
use anabranch::cpu::Cpu;
use anabranch::fuse::Recipe;
use anabranch::fuse::measure::measure;
use anabranch::fuse::options::Method;
use anabranch::fuse::weights::Weights;
use anabranch::fuse::{Batch, Factors, Frame, Fusion, LoraCr, Stacks};
use anabranch::stage::common::Common;
use anabranch::stage::conflict::{self, ConflictOptions};
use anabranch::stage::fuse::{FuseOptions, Profile, plan};
use anabranch::tensor::DType;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use faer::Mat;

fn num_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

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
    let cpu = Cpu::new(num_threads()).expect("threads");
    let fusion = Fusion::new(Method::Fedavg, None).expect("needs no choice");
    for (name, o, i) in [("q", 4096, 4096), ("k", 1024, 4096), ("gate", 14336, 4096), ("down", 4096, 14336)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Bytes((16 * (o + i) * 4) as u64)).sample_size(20);
        let batch = two(o, i);
        let stacks = Stacks::new(&cpu, vec![&batch]).expect("room");
        let grams = stacks.grams().expect("room");
        let module = [(&grams[0], &batch.frame.weights[..])];
        let resolutions = LoraCr::default().resolve(&cpu, &module).expect("finite");
        let resolved = stacks.resolved(&resolutions).expect("room").remove(0);
        let fused = fusion.fuse(&resolved, true).expect("equal ranks").factors;
        group.bench_function("grams", |b| b.iter(|| black_box(&stacks).grams()));
        group.bench_function("resolve", |b| b.iter(|| LoraCr::default().resolve(&cpu, black_box(&module))));
        group.bench_function("apply", |b| b.iter(|| stacks.resolved(black_box(&resolutions))));
        group.bench_function("fedavg", |b| b.iter(|| fusion.fuse(black_box(&resolved), true)));
        group.bench_function("certify", |b| {
            b.iter(|| measure(black_box(&fused), &fused, &batch, &grams[0], Some(&resolutions[0])))
        });
    }
}

/// Writes an adapter of rank 8 on the seven linears of every layer of LLaMA-3-8B.
fn write(dir: &Path, seed: u64) {
    fs::create_dir(dir).expect("a new folder");
    let sizes = LayerSizes { heads: 32, kv_heads: 8, mlp: 14336 };
    let specs: Vec<PairSpec> = (0..32)
        .flat_map(|layer| Target::ALL.map(|target| Module { layer, target }))
        .map(|module| PairSpec {
            module,
            rank: 8,
            dims: sizes.dims(module.target, 4096, 128),
            dtypes: (DType::F32, DType::F32),
        })
        .collect();
    let config = AdapterConfig::peft(8, 16.0, 0.0, &Target::ALL, Some("llama-3-8b"));
    let mut state = seed;
    let mut random = |n: usize| -> Vec<f32> {
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * 0.02
        };
        (0..n).map(next).collect()
    };
    let mut writer = AdapterWriter::create(dir, config, specs.clone()).expect("a new file");
    for s in specs {
        let (a, b) = (random(8 * s.dims.1), random(8 * s.dims.0));
        writer.write_f32(s.module, &a, &b).expect("room for 84 MB");
    }
    writer.finish(None, Provenance::new("bench")).expect("room for 84 MB");
}

fn files(c: &mut Criterion) {
    let cpu = Cpu::new(num_threads()).expect("threads");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let adapters: Vec<PathBuf> = (1..=2).map(|e| dir.path().join(e.to_string())).collect();
    (1..).zip(&adapters).for_each(|(seed, path)| write(path, seed));
    let common = Common::default();
    let fusion = Fusion::new(Method::Fedavg, None).expect("needs no choice");
    let ask = FuseOptions {
        adapters: adapters.clone(),
        recipe: Recipe { resolve: Some(LoraCr::default()), fusion },
        weights: Weights::Uniform,
        allow_missing: false,
        dtype: DType::F32,
        profile: Profile::Portable,
        out: Some(dir.path().join("out")),
        model: None,
        merged: None,
        screen: Default::default(),
        trust: Default::default(),
    };
    let bytes = plan(&ask, &common).expect("equal ranks").bytes();
    println!("llama-3-8b, rank 8: {bytes} bytes an adapter, two read, one written");
    let mut group = c.benchmark_group("files");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(2 * bytes)).bench_function("conflict", |b| {
        let ask =
            ConflictOptions { adapters: adapters.clone(), resolve: LoraCr::default(), allow_missing: false };
        b.iter(|| conflict::run(&cpu, &ask, &common).expect("two good adapters"))
    });
    let out = dir.path().join("out");
    group.throughput(Throughput::Bytes(3 * bytes)).bench_function("lora-cr, fedavg", |b| {
        b.iter(|| {
            // A folder that is not there yet is no error.
            let _ = fs::remove_dir_all(&out);
            fs::create_dir(&out).expect("a new folder");
            plan(&ask, &common).and_then(|p| p.write_adapter(&cpu, &out, &common)).expect("two good adapters")
        })
    });
}

criterion_group!(benches, modules, files);
criterion_main!(benches);
