//! Conflict resolution and fusion of LLaMA-3-8B-shaped rank-8 adapters: step by step, whole without files, files to file.
//!
//! Steps are printed with their share of what this machine's multiply-adds in f64 reach, measured first. The whole model
//! of 64 adapters takes minutes and is run where `ANABRANCH_BENCH_EDGES` names its adapters: `64`, or `2,8,64`.

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anabranch::algebra;
use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::module::{Module, Target};
use anabranch::checkpoint::provenance::Provenance;
use anabranch::checkpoint::sizes::LayerSizes;
use anabranch::checkpoint::weights::{OpenOptions, Weights as Tensors};
use anabranch::checkpoint::writer::{SafetensorsWriter, TensorSpec};
use anabranch::cpu::Cpu;
use anabranch::fuse::compare::{Wanted, compare};
use anabranch::fuse::elementwise::Elementwise;
use anabranch::fuse::measure::measure;
use anabranch::fuse::merge::merge_rows;
use anabranch::fuse::options::{Fedsa, Method};
use anabranch::fuse::weights::Weights;
use anabranch::fuse::{Batch, Factors, Frame, Fusion, LoraCr, Made, Recipe, Stacks, low_rank};
use anabranch::stage::common::Common;
use anabranch::stage::conflict::{self, ConflictOptions};
use anabranch::stage::fuse::{FuseOptions, Profile, plan};
use anabranch::tensor::DType;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use faer::Mat;
use rayon::prelude::*;

const RANK: usize = 8;
const LAYERS: usize = 32;

fn num_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// O and I of the seven linears.
fn dims(target: Target) -> (usize, usize) {
    LayerSizes { heads: 32, kv_heads: 8, mlp: 14336 }.dims(target, 4096, 128)
}

/// Numbers that no two adapters share.
fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f64::from(((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * 0.02)
    }
}

/// `edges` adapters on one module.
fn batch(module: Module, edges: usize) -> Batch {
    let ((o, i), p) = (dims(module.target), RANK * edges);
    let mut next = random(module.layer as u64 * 7 + o as u64 + 3 * i as u64);
    let mut factor = |n: usize| Mat::from_fn(p, n, |_, _| next());
    let stack = Factors::new(factor(o), factor(i)).expect("equal ranks");
    Batch::new(Frame::new(module, (o, i), &vec![RANK; edges]), stack).expect("the ranks add up")
}

/// Multiply-adds of one thread per second, twice counted: the product of two matrices that fit the cache.
fn roof() -> f64 {
    let x = Mat::from_fn(512, 512, |i, j| ((i * 31 + j * 17) % 101) as f64 - 50.0);
    let mut best = Duration::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        black_box(algebra::product(black_box(x.as_ref()), x.as_ref()));
        best = best.min(start.elapsed());
    }
    2.0 * 512f64.powi(3) / best.as_secs_f64()
}

/// The median seconds of a step, and its share of the roof.
fn share(name: &str, flops: f64, roof: f64, mut step: impl FnMut()) {
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            step();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let rate = flops / times[4];
    println!(
        "{name:<24} {:>9.3} ms {:>7.1} GFLOP/s {:>4.0} % of the roof",
        1e3 * times[4],
        rate / 1e9,
        100.0 * rate / roof
    );
}

fn steps(c: &mut Criterion) {
    let one = Cpu::new(1).expect("a thread");
    let roof = roof();
    println!("roof: {:.1} GFLOP/s in f64 on one thread", roof / 1e9);
    let fusion = Fusion::new(Method::Fedavg, None).expect("needs no choice");
    for edges in [2, 8, 64] {
        let module = Module { layer: 0, target: Target::Gate };
        let batch = batch(module, edges);
        let ((o, i), p) = (batch.frame.size, batch.frame.rank());
        let (n, rank) = ((o + i) as f64, p as f64);
        let stacks = Stacks::new(&one, vec![&batch]).expect("room");
        let grams = stacks.grams().expect("room");
        let modules = [(&grams[0], &batch.frame.weights[..])];
        let resolutions = LoraCr::default().resolve(&one, &modules).expect("finite");
        let compared = compare(&one, std::slice::from_ref(&batch), Some(&LoraCr::default()), Wanted::Factors)
            .expect("finite")
            .remove(0);
        let resolved = compared.resolved.as_ref().and_then(|r| r.batch.clone()).expect("was asked for");
        let fused = fusion.fuse(&resolved, true).expect("equal ranks").factors;
        let expected = Made::Factors(fused.clone());
        let named = |step: &str| format!("gate of {edges}: {step}");
        // One triangle of the Grams; an eigenproblem is counted as 9 P³.
        share(&named("gram"), rank * rank * n, roof, || drop(black_box(stacks.grams())));
        share(&named("eigh"), 9.0 * rank.powi(3), roof, || {
            drop(black_box(algebra::eigen(grams[0].a.as_ref())))
        });
        share(&named("resolve"), 19.0 * rank.powi(3), roof, || {
            drop(black_box(LoraCr::default().resolve(&one, &modules)));
        });
        share(&named("apply"), 2.0 * rank * rank * o as f64, roof, || {
            drop(black_box(stacks.resolved(&resolutions)))
        });
        share(&named("certify"), 2.0 * rank * RANK as f64 * n, roof, || {
            drop(black_box(measure(&fused, &expected, &batch, &compared)));
        });
        if edges > 8 {
            continue;
        }
        let mut group = c.benchmark_group(format!("gate of {edges}"));
        group.throughput(Throughput::Bytes((p * (o + i) * 4) as u64)).sample_size(20);
        group.bench_function("gram", |b| b.iter(|| black_box(&stacks).grams()));
        group.bench_function("eigh", |b| b.iter(|| algebra::eigen(black_box(grams[0].a.as_ref()))));
        group.bench_function("resolve", |b| b.iter(|| LoraCr::default().resolve(&one, black_box(&modules))));
        group.bench_function("apply", |b| b.iter(|| stacks.resolved(black_box(&resolutions))));
        group.bench_function("fedavg", |b| b.iter(|| fusion.fuse(black_box(&resolved), true)));
        group.bench_function("certify", |b| {
            b.iter(|| measure(black_box(&fused), &expected, &batch, &compared))
        });
    }
}

/// Everything but reading and writing: resolution, method, rounding, certificate of all modules of the model.
fn model(cpu: &Cpu, batches: &[Batch], recipe: &Recipe) {
    let modules: Vec<&Batch> = (0..LAYERS).flat_map(|_| batches).collect();
    modules.into_par_iter().for_each(|batch| {
        let outcome = recipe.run(cpu, std::slice::from_ref(batch), true).expect("finite").remove(0);
        black_box(outcome.write(batch, DType::F32).expect("finite"));
    });
}

fn whole(c: &mut Criterion) {
    let cpu = Cpu::new(num_threads()).expect("threads");
    let recipe = |method, fedsa| Recipe {
        resolve: Some(LoraCr::default()),
        fusion: Fusion::new(method, fedsa).expect("good options"),
    };
    let methods = [
        recipe(Method::Fedavg, None),
        recipe(Method::Mean, None),
        recipe(Method::Ffa, None),
        recipe(Method::Fedsa, Some(Fedsa::Client(0))),
        recipe(Method::Fedex, None),
        recipe(Method::Tsv, None),
    ];
    let of = |edges| Target::ALL.map(|target| batch(Module { layer: 0, target }, edges));
    if let Ok(asked) = std::env::var("ANABRANCH_BENCH_EDGES") {
        for edges in asked.split(',').map(|e| e.parse().expect("numbers of adapters")) {
            let batches = of(edges);
            for recipe in &methods {
                let run = || {
                    let start = Instant::now();
                    model(&cpu, &batches, recipe);
                    start.elapsed()
                };
                // The least of a few seconds' runs, or of one that takes longer.
                let (begun, mut best) = (Instant::now(), run());
                while begun.elapsed() < Duration::from_secs(5) {
                    best = best.min(run());
                }
                println!("{edges} adapters, lora-cr, {}: {best:.2?}", recipe.fusion.method);
            }
        }
        return;
    }
    for edges in [2, 8] {
        let batches = of(edges);
        let mut group = c.benchmark_group(format!("model of {edges}"));
        group.sample_size(10);
        for recipe in &methods {
            group.bench_function(format!("lora-cr, {}", recipe.fusion.method), |b| {
                b.iter(|| model(&cpu, &batches, recipe));
            });
        }
    }
}

/// The methods on entries: `Gelem/s` of a search for thresholds is the GFLOP/s of one product of the factors, which it
/// makes once and a sample of; of a merge the bytes are those of the weight, read and written; of an approximation at
/// rank 16 and its certificate `Gelem/s` are entries, each of which is made nine times.
fn entries(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for target in [Target::K, Target::Gate, Target::Down] {
        let (name, (o, i)) = (target.short(), dims(target));
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        let batch = batch(Module { layer: 0, target }, 2);
        let flops = (2 * 16 * o * i) as u64;
        let path = dir.path().join(name);
        let specs = vec![TensorSpec::new("w", DType::BF16, [o, i])];
        let mut writer = SafetensorsWriter::create(&path, specs, &[]).expect("a new file");
        // Numbers of 2^-7 to 2^-5, every bit of the mantissa.
        let weight: Vec<u8> =
            (0..o * i).flat_map(|x| (0x3c00 | ((x * 7919) & 0x80ff) as u16).to_le_bytes()).collect();
        writer.write("w", &weight).expect("room for 118 MB");
        writer.finish().expect("room for 118 MB");
        let weights = Tensors::open(&path, OpenOptions::default()).expect("as it was written");
        let w = weights.tensor("w").expect("as it was written");
        for method in [Method::Ties, Method::Dare, Method::DareTies] {
            let fusion = Fusion::new(method, None).expect("needs no choice");
            if method == Method::Ties {
                group.throughput(Throughput::Elements(flops)).bench_function("ties, thresholds", |b| {
                    b.iter(|| Elementwise::new(&fusion, black_box(&batch), None).expect("finite"))
                });
            }
            let updates = Elementwise::new(&fusion, &batch, None).expect("finite");
            let at_rank = Fusion { rank: Some(16), ..fusion };
            group.throughput(Throughput::Elements((o * i) as u64));
            group.bench_function(format!("{method}, rank 16"), |b| {
                b.iter(|| {
                    let (factors, _) = low_rank::fuse(&at_rank, &batch, &updates, 16).expect("finite");
                    updates.distance_to(&factors).expect("finite")
                })
            });
            group.throughput(Throughput::Bytes(2 * weight.len() as u64));
            group.bench_function(format!("{method}, merge"), |b| {
                b.iter(|| merge_rows(&w, (o, i), |rows, out| updates.rows(rows, out, true)).expect("finite"))
            });
        }
    }
}

/// Writes an adapter of rank 8 on the seven linears of every layer of LLaMA-3-8B.
fn write(dir: &Path, seed: u64) {
    fs::create_dir(dir).expect("a new folder");
    let specs: Vec<PairSpec> = (0..LAYERS)
        .flat_map(|layer| Target::ALL.map(|target| Module { layer, target }))
        .map(|module| PairSpec {
            module,
            rank: RANK,
            dims: dims(module.target),
            dtypes: (DType::F32, DType::F32),
        })
        .collect();
    let config = AdapterConfig::peft(RANK, 16.0, 0.0, &Target::ALL, Some("llama-3-8b"));
    let mut next = random(seed);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| next() as f32).collect() };
    let mut writer = AdapterWriter::create(dir, config, specs.clone()).expect("a new file");
    for s in specs {
        let (a, b) = (random(RANK * s.dims.1), random(RANK * s.dims.0));
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
        grams: Vec::new(),
        dtype: DType::F32,
        profile: Profile::Portable,
        out: Some(dir.path().join("out")),
        model: None,
        merged: None,
        layers: None,
        screen: Default::default(),
        trust: Default::default(),
    };
    let bytes = plan(&ask, &common).expect("equal ranks").bytes();
    println!("llama-3-8b, rank 8: {bytes} bytes an adapter, two read, one written");
    let mut group = c.benchmark_group("files");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(2 * bytes)).bench_function("conflict", |b| {
        let ask = ConflictOptions {
            adapters: adapters.clone(),
            resolve: LoraCr::default(),
            allow_missing: false,
            names: Vec::new(),
            html: None,
        };
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

criterion_group!(benches, steps, whole, entries, files);
criterion_main!(benches);
