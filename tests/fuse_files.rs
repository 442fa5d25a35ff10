//! `fuse` and `conflict` from folder to folder: what is read, refused and written.

mod dense;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anabranch::checkpoint::adapter::Adapter;
use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::checkpoint::{Checkpoint, tensors};
use anabranch::checkpoint::config::ModelConfig;
use anabranch::checkpoint::convert::narrow;
use anabranch::checkpoint::input_grams::InputGrams;
use anabranch::checkpoint::module::{Module, Source, Target};
use anabranch::checkpoint::provenance::{Provenance, Verdict};
use anabranch::checkpoint::pruning::{BaseModel, KeptLayer, Pruning};
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::checkpoint::writer::{ModelWriter, SHARD_BYTES, TensorSpec};
use anabranch::fuse::elementwise::{Elementwise, Sparse};
use anabranch::fuse::inputs::Inputs;
use anabranch::fuse::options::{Coverage, DensityOf, DensityScope, Fedsa, Gate, Method, SharedRank, Side};
use anabranch::fuse::ties::Trim;
use anabranch::fuse::weights::Weights;
use anabranch::fuse::{Batch, Factors, Frame, Fusion, LoraCr, Recipe};
use anabranch::stage::common::Common;
use anabranch::stage::conflict::{self, ConflictOptions};
use anabranch::stage::fuse::{FuseOptions, Profile, outline, plan, run};
use anabranch::tensor::DType;
use dense::{cpu, distance, lora_cr, weighted};
use faer::Mat;
use tempfile::TempDir;

/// Two layers, H 4, G 2, K 4, D 16, F 24.
fn base() -> BaseModel {
    BaseModel {
        fingerprint: "a".repeat(64),
        hidden_size: 16,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        intermediate_size: 24,
        num_hidden_layers: 2,
    }
}

fn all_modules() -> Vec<Module> {
    (0..2).flat_map(|layer| Target::ALL.map(|target| Module { layer, target })).collect()
}

fn size(m: Module) -> (usize, usize) {
    base().sizes().dims(m.target, 16, 4)
}

struct Maker {
    seed: u64,
    rank: usize,
    alpha: f64,
    modules: Vec<Module>,
    name: Option<&'static str>,
    provenance: Provenance,
    pruning: Option<Pruning>,
    pruned_dims: bool,
    poison: bool,
}

fn maker(seed: u64) -> Maker {
    let mut provenance = Provenance::new("train");
    provenance.base_fingerprint = Some(base().fingerprint);
    provenance.samples = Some(10 * seed);
    Maker {
        seed,
        rank: 3,
        alpha: 6.0,
        modules: all_modules(),
        name: Some("base"),
        provenance,
        pruning: None,
        pruned_dims: false,
        poison: false,
    }
}

impl Maker {
    fn write(self, at: &TempDir, name: &str) -> PathBuf {
        let dir = at.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let dims = |m: Module| match &self.pruning {
            Some(p) if self.pruned_dims => p.pruned_dims(m.target, m.layer),
            _ => size(m),
        };
        let config = AdapterConfig::peft(self.rank, self.alpha, 0.0, &Target::ALL, self.name);
        let dtypes = (DType::F32, DType::F32);
        let specs = self.modules.iter().map(|&module| PairSpec {
            module,
            rank: self.rank,
            dims: dims(module),
            dtypes,
        });
        let mut writer = AdapterWriter::create(&dir, config, specs.collect()).unwrap();
        for (n, &m) in self.modules.iter().enumerate() {
            let (o, i) = dims(m);
            let (b, a) = dense::adapters(self.seed * 1000 + n as u64, o, i, &[self.rank]).remove(0);
            let mut a: Vec<f32> = (0..self.rank * i).map(|x| a[(x / i, x % i)] as f32).collect();
            let mut b: Vec<f32> =
                (0..self.rank * o).map(|x| b[(x / self.rank, x % self.rank)] as f32).collect();
            if let Some(p) = self.pruning.as_ref().filter(|_| !self.pruned_dims) {
                // A recovered adapter: zeros where its edge had nothing.
                let kept = p.kept(m.target, m.layer);
                let rows = m.target.prunes_rows();
                (0..o)
                    .filter(|x| rows && !kept.contains(x))
                    .for_each(|x| b[x * self.rank..][..self.rank].fill(0.0));
                (0..i).filter(|x| !rows && !kept.contains(x)).for_each(|x| {
                    (0..self.rank).for_each(|k| a[k * i + x] = 0.0);
                });
            }
            if self.poison && n == 3 {
                b[1] = f32::NAN;
            }
            writer.write_f32(m, &a, &b).unwrap();
        }
        writer.finish(self.pruning.as_ref(), self.provenance).unwrap();
        dir
    }
}

/// The inputs of the base's linears and their widths.
fn inputs() -> impl Iterator<Item = (usize, Source, usize)> {
    let all = (0..2).flat_map(|layer| Source::ALL.map(|source| (layer, source)));
    all.map(|(layer, source)| (layer, source, size(Module { layer, target: source.target() }).1))
}

/// A folder with a Gram of each input of the base, over 40 random inputs; of no known base where `fingerprint` is empty.
fn write_grams(at: &TempDir, name: &str, seed: u64, fingerprint: &str) -> PathBuf {
    let dir = at.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    let grams = inputs().enumerate().map(|(n, (layer, source, width))| {
        let x = dense::Random(seed * 100 + n as u64).matrix(40, width);
        (layer, source, dense::upper(&(faer::Scale(1.0 / 40.0) * (x.transpose() * &x))))
    });
    dense::write_grams(&dir, 40, &grams.collect::<Vec<_>>());
    if !fingerprint.is_empty() {
        let mut provenance = Provenance::new("grams");
        provenance.base_fingerprint = Some(fingerprint.to_string());
        provenance.seal(&dir, BTreeMap::new()).unwrap();
    }
    dir
}

fn pruning(heads: [usize; 1], mlp: std::ops::Range<usize>) -> Pruning {
    let layer = KeptLayer { kv_heads: heads.to_vec(), mlp: mlp.collect() };
    Pruning::new(base(), 0.5, 0, vec![layer.clone(), layer])
}

fn two() -> (TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let paths = vec![maker(1).write(&dir, "one"), maker(3).write(&dir, "two")];
    (dir, paths)
}

fn options(adapters: &[PathBuf], method: Method) -> FuseOptions {
    let fedsa = (method == Method::Fedsa).then_some(Fedsa::Sum);
    FuseOptions {
        adapters: adapters.to_vec(),
        recipe: Recipe { resolve: None, fusion: Fusion::new(method, fedsa).unwrap() },
        weights: Weights::Uniform,
        grams: Vec::new(),
        allow_missing: false,
        dtype: DType::F32,
        profile: Profile::Portable,
        out: Some("out".into()),
        model: None,
        merged: None,
        layers: None,
        screen: Default::default(),
        trust: Default::default(),
    }
}

fn refused(options: &FuseOptions) -> String {
    let done = plan(options, &Common::default()).and_then(|p| {
        let out = tempfile::tempdir().unwrap();
        p.write_adapter(&cpu(), out.path(), &Common::default())
    });
    done.map(|_| "not refused".to_string()).unwrap_or_else(|e| e.to_string())
}

fn open(dir: &Path) -> Adapter {
    Adapter::open(dir, OpenOptions::default()).unwrap()
}

/// `s B A` of every module.
fn updates(adapter: &Adapter) -> BTreeMap<Module, Mat<f64>> {
    let dense = |(m, p): (&Module, &anabranch::checkpoint::factor::Pair)| {
        let ((o, i), r) = (p.dims(), p.rank);
        let (a, b) = (p.a.to_f64(), p.b.to_f64());
        let b = Mat::from_fn(o, r, |x, k| p.scale * b[x * r + k]);
        (*m, b * Mat::from_fn(r, i, |k, x| a[k * i + x]))
    };
    adapter.modules.iter().map(dense).collect()
}

#[test]
fn every_method_writes_what_it_defines_and_certifies_it() {
    let (dir, paths) = two();
    let inputs: Vec<_> = paths.iter().map(|p| updates(&open(p))).collect();
    let grams =
        [write_grams(&dir, "grams-one", 1, &base().fingerprint), write_grams(&dir, "grams-two", 2, "")];
    for method in Method::ALL.iter().copied().filter(|m| !m.is_elementwise()) {
        for resolve in [None, Some(LoraCr::default())] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                if dtype != DType::F32 && (method != Method::Fedavg || resolve.is_some()) {
                    continue;
                }
                let recipe = Recipe { resolve, ..options(&paths, method).recipe };
                let grams = if method.needs_input_grams() { grams.to_vec() } else { Vec::new() };
                let options = FuseOptions { recipe, dtype, grams, ..options(&paths, method) };
                let out = dir.path().join(format!("{method}-{}-{dtype}", resolve.is_some()));
                std::fs::create_dir(&out).unwrap();
                let plan = plan(&options, &Common::default()).unwrap();
                let certificate = plan.write_adapter(&cpu(), &out, &Common::default()).unwrap();
                let adapter = open(&out);
                adapter.check_finite().unwrap();
                let bytes = adapter.modules.values().map(|p| p.a.bytes().len() + p.b.bytes().len());
                assert_eq!(plan.bytes(), bytes.sum::<usize>() as u64);
                assert!(adapter.uniform_rank().is_some() && adapter.modules.values().all(|p| p.scale == 1.0));
                let tolerance = match dtype {
                    DType::F32 => 1e-6,
                    DType::F16 => 2e-3,
                    DType::BF16 => 1e-2,
                };
                let (error, got) = (certificate.error, updates(&adapter));
                assert!(error.max <= tolerance, "{method} {dtype}: {error:?}");
                // Halves and stacks of f32 factors are exact in f32; bf16 and f16 are not.
                assert!(dtype == DType::F32 || error.max > tolerance / 100.0, "{method} {dtype}: {error:?}");
                for (n, (m, got)) in got.iter().enumerate() {
                    let d: Vec<_> = inputs.iter().map(|x| x[m].clone()).collect();
                    let d = if resolve.is_some() { lora_cr(&d, SharedRank::All, Gate::Paper).0 } else { d };
                    let mean = weighted(&d, &[0.5, 0.5]);
                    let c = &certificate.modules[n];
                    let want = distance(got.as_ref(), mean.as_ref());
                    assert!(
                        (c.distance_to_mean - want).abs() <= 1e-6,
                        "{method} {m}: {} {want}",
                        c.distance_to_mean
                    );
                    if method == Method::Mean {
                        assert!(want <= 1.01 * tolerance);
                    }
                    if method == Method::TaskArithmetic {
                        assert!(distance(got.as_ref(), weighted(&d, &[1.0, 1.0]).as_ref()) <= tolerance);
                    }
                }
                let verdicts = Provenance::verify(&out).unwrap();
                assert!(
                    verdicts.values().all(|v| *v == Verdict::Same)
                        && verdicts.contains_key("certificate.json")
                );
                assert_eq!(adapter.provenance.unwrap().base_fingerprint, Some(base().fingerprint));
            }
        }
    }
}

#[test]
fn the_same_bytes_whatever_the_number_of_threads() {
    let (dir, paths) = two();
    let mut options = options(&paths, Method::Fedavg);
    options.recipe.resolve = Some(LoraCr::default());
    let bytes: Vec<_> = [1, 2, 5]
        .into_iter()
        .map(|threads| {
            let out = dir.path().join(format!("t{threads}"));
            std::fs::create_dir(&out).unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let common = Common::default();
                plan(&options, &common).unwrap().write_adapter(&cpu(), &out, &common).unwrap();
            });
            ["adapter_model.safetensors", "certificate.json", "anabranch.json"]
                .map(|f| std::fs::read(out.join(f)).unwrap())
        })
        .collect();
    assert!(bytes.windows(2).all(|b| b[0] == b[1]));
}

#[test]
fn ranks_by_module_or_padded() {
    let dir = tempfile::tempdir().unwrap();
    let wide = maker(1).write(&dir, "one");
    let some = Maker { modules: all_modules()[..9].to_vec(), rank: 2, ..maker(2) }.write(&dir, "two");
    let paths = [wide, some];
    let text = refused(&options(&paths, Method::Mean));
    assert!(text.contains("two: has no layer 1 v") && text.contains("--allow-missing"), "{text}");
    for profile in [Profile::Portable, Profile::Peft] {
        let options = FuseOptions { allow_missing: true, profile, ..options(&paths, Method::Mean) };
        let out = dir.path().join(format!("{profile:?}"));
        std::fs::create_dir(&out).unwrap();
        plan(&options, &Common::default()).unwrap().write_adapter(&cpu(), &out, &Common::default()).unwrap();
        let fused = open(&out);
        let (one, two) = (updates(&open(&paths[0])), updates(&open(&paths[1])));
        for (n, (m, got)) in updates(&fused).iter().enumerate() {
            let want = match two.get(m) {
                Some(two) => weighted(&[one[m].clone(), two.clone()], &[0.5, 0.5]),
                None => one[m].clone(),
            };
            assert!(distance(got.as_ref(), want.as_ref()) <= 1e-6, "{m}");
            let rank = if n < 9 || profile == Profile::Portable { 5 } else { 3 };
            assert_eq!(fused.modules[m].rank, rank, "{m}");
        }
    }
    let text = refused(&FuseOptions { allow_missing: true, ..options(&paths, Method::Fedavg) });
    assert!(text.contains("[3, 2]") && text.contains("mean-svd"), "{text}");
}

#[test]
fn weights_count_and_samples_are_read() {
    let (dir, paths) = two();
    let inputs: Vec<_> = paths.iter().map(|p| updates(&open(p))).collect();
    for weights in [Weights::Samples, Weights::List(vec![1.0, 3.0])] {
        let out = dir.path().join(weights.to_string());
        std::fs::create_dir(&out).unwrap();
        let options = FuseOptions { weights, ..options(&paths, Method::Mean) };
        let plan = plan(&options, &Common::default()).unwrap();
        let c = plan.write_adapter(&cpu(), &out, &Common::default()).unwrap();
        for (m, got) in updates(&open(&out)) {
            let want = weighted(&[inputs[0][&m].clone(), inputs[1][&m].clone()], &[0.25, 0.75]);
            assert!(distance(got.as_ref(), want.as_ref()) <= 1e-6);
        }
        assert!((c.effective_scale[0] - 0.25).abs() <= 1e-6 && (c.effective_scale[1] - 0.75).abs() <= 1e-6);
    }
}

#[test]
fn differently_pruned_edges_take_the_coverage_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let make = |seed, p: Pruning| Maker { pruning: Some(p), ..maker(seed) };
    let paths =
        [make(1, pruning([0], 0..16)).write(&dir, "one"), make(2, pruning([1], 8..24)).write(&dir, "two")];
    let inputs: Vec<_> = paths.iter().map(|p| updates(&open(p))).collect();
    let mut options = options(&paths, Method::Mean);
    options.recipe.fusion.coverage = Coverage::Present;
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    plan(&options, &Common::default()).unwrap().write_adapter(&cpu(), &out, &Common::default()).unwrap();
    for (m, got) in updates(&open(&out)) {
        let sum = weighted(&[inputs[0][&m].clone(), inputs[1][&m].clone()], &[1.0, 1.0]);
        let both = |x: usize| match m.target {
            Target::Gate | Target::Up | Target::Down => (8..16).contains(&x),
            _ => false,
        };
        let want = Mat::from_fn(sum.nrows(), sum.ncols(), |o, i| {
            sum[(o, i)] / if both(if m.target.prunes_rows() { o } else { i }) { 2.0 } else { 1.0 }
        });
        assert!(distance(got.as_ref(), want.as_ref()) <= 1e-6, "{m}");
    }
    // ffa stacks on o and down, where the columns of A differ, and only there.
    let ffa = plan(&self::options(&paths, Method::Ffa), &Common::default()).unwrap();
    for (m, rank) in ffa.inputs.modules.iter().zip(&ffa.ranks) {
        assert_eq!(*rank, if m.target.prunes_rows() { 3 } else { 6 });
    }
}

#[test]
fn what_does_not_fit_together_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = maker(1).write(&dir, "good");
    let with = |path: &PathBuf| refused(&options(&[good.clone(), path.clone()], Method::Fedavg));

    let pruned =
        Maker { pruning: Some(pruning([1], 0..8)), pruned_dims: true, ..maker(2) }.write(&dir, "pruned");
    let text = with(&pruned);
    assert!(text.contains("anabranch recover --adapter") && text.contains("pruned"), "{text}");

    let mut other = maker(2);
    other.provenance.base_fingerprint = Some("b".repeat(64));
    let text = with(&other.write(&dir, "other"));
    assert!(text.contains("other: is of a base with fingerprint bbb") && text.contains("aaa"), "{text}");

    let text = with(&Maker { poison: true, ..maker(2) }.write(&dir, "nan"));
    assert!(text.contains("o_proj.lora_B.weight holds NaN or infinity at row 0, column 1"), "{text}");

    let text = with(&Maker { rank: 4, ..maker(2) }.write(&dir, "rank"));
    assert!(text.contains("[3, 4]") && text.contains("mean and mean-svd"), "{text}");

    let text = with(&dir.path().join("nowhere"));
    assert!(text.contains("nowhere"), "{text}");
    assert!(refused(&options(&[], Method::Mean)).contains("no adapter"));

    let mut unknown = maker(2);
    unknown.provenance.samples = None;
    let paths = [good.clone(), unknown.write(&dir, "unknown")];
    let text = refused(&FuseOptions { weights: Weights::Samples, ..options(&paths, Method::Mean) });
    assert!(text.contains("adapter 1"), "{text}");

    let renamed = Maker { name: Some("renamed"), ..maker(2) }.write(&dir, "renamed");
    let plan = plan(&options(&[good.clone(), renamed], Method::Fedavg), &Common::default()).unwrap();
    assert!(plan.inputs.warnings[0].contains("\"renamed\"") && plan.inputs.warnings[0].contains("\"base\""));

    let common = Common::default();
    common.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let stopped = plan.write_adapter(&cpu(), tempfile::tempdir().unwrap().path(), &common).unwrap_err();
    assert_eq!(stopped.exit_code(), 130);
}

/// A base in `dtype` whose sizes are those of [`base`].
fn write_base(at: &TempDir, name: &str, dtype: DType, poison: bool) -> PathBuf {
    let dir = at.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 8,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), "{}").unwrap();
    let all = tensors(&ModelConfig::open(&dir).unwrap());
    let specs = all.iter().map(|(n, s)| TensorSpec::new(n.as_str(), dtype, s.clone())).collect();
    let mut writer = ModelWriter::create(&dir, specs, SHARD_BYTES).unwrap();
    for (seed, (name, shape)) in all.iter().enumerate() {
        let n: usize = shape.iter().product();
        let x = dense::Random(seed as u64).matrix(n, 1);
        let mut x: Vec<f32> = (0..n).map(|i| x[(i, 0)] as f32).collect();
        if poison && name.contains("layers.1.mlp.up") {
            x[5] = f32::INFINITY;
        }
        let mut bytes = vec![];
        narrow(&mut bytes, &x, dtype);
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    dir
}

#[test]
fn a_merged_base_is_the_weight_plus_the_update_rounded_once() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let dir = tempfile::tempdir().unwrap();
        let model = write_base(&dir, "base", dtype, false);
        let base = Checkpoint::open(&model, OpenOptions::default()).unwrap();
        let make = |seed| {
            let mut m = Maker { modules: all_modules()[..10].to_vec(), ..maker(seed) };
            m.provenance.base_fingerprint = Some(base.fingerprint().unwrap().to_owned());
            m
        };
        let paths = [make(1).write(&dir, "one"), make(2).write(&dir, "two")];
        let mut ask = options(&paths, Method::Mean);
        (ask.model, ask.merged, ask.out) =
            (Some(model.clone()), Some(dir.path().join("m")), Some(dir.path().join("a")));
        let report = run(&cpu(), &ask, &Common::default()).unwrap();
        let merged = Checkpoint::open(&dir.path().join("m"), OpenOptions::default()).unwrap();
        assert_ne!(merged.fingerprint().unwrap(), base.fingerprint().unwrap());
        let adapter = updates(&open(&dir.path().join("a")));
        let mut changed = 0;
        for (name, _) in base.expected() {
            let (old, new) = (base.weights().tensor(&name).unwrap(), merged.weights().tensor(&name).unwrap());
            let Some((m, d)) = adapter.iter().find(|(m, _)| m.weight() == name) else {
                assert_eq!(old.bytes(), new.bytes(), "{name}");
                continue;
            };
            changed += 1;
            let i = size(*m).1;
            let exact = |x: usize| f64::from(old.to_f32()[x]) + d[(x / i, x % i)];
            let ulp = match dtype {
                DType::F32 => 2f64.powi(-23),
                DType::F16 => 2f64.powi(-10),
                DType::BF16 => 2f64.powi(-7),
            };
            let (mut lost, mut size) = (0.0, 0.0);
            for (x, new) in new.to_f32().into_iter().enumerate() {
                // Half a unit for the rounding, the rest for sums in f32.
                let tolerance = 0.5 * ulp * exact(x).abs() + 1e-5 * d.norm_max();
                assert!((f64::from(new) - exact(x)).abs() <= tolerance, "{name} {x}: {new} {}", exact(x));
                lost += (f64::from(new) - exact(x)).powi(2);
                size += d[(x / i, x % i)].powi(2);
            }
            let c = report.merged_certificate.as_ref().unwrap();
            let c = c.modules.iter().find(|c| c.layer == m.layer && c.target == m.target.short()).unwrap();
            let want = (lost / size).sqrt();
            assert!((c.error - want).abs() <= 1e-3 * want + 1e-7, "{name} {dtype}: {} {want}", c.error);
        }
        assert_eq!((changed, report.modules, report.rank), (10, 10, Some(6)));
        let verdicts = Provenance::verify(&dir.path().join("m")).unwrap();
        assert!(verdicts.values().all(|v| *v == Verdict::Same));
        for file in ["config.json", "tokenizer_config.json", "certificate.json"] {
            assert!(verdicts.contains_key(file), "{file}");
        }
    }
}

#[test]
fn input_grams_go_with_their_methods_and_their_adapters() {
    let (dir, paths) = two();
    let fingerprint = base().fingerprint;
    let grams = [write_grams(&dir, "g1", 1, &fingerprint), write_grams(&dir, "g2", 2, &fingerprint)];
    let ask = |method, grams: &[PathBuf]| FuseOptions { grams: grams.to_vec(), ..options(&paths, method) };
    let text = refused(&ask(Method::Regmean, &[]));
    assert!(text.contains("--method regmean needs --grams DIR,…"), "{text}");
    let text = refused(&ask(Method::Tsv, &grams));
    assert!(text.contains("--grams goes with") && text.contains("not with tsv"), "{text}");
    let text = refused(&ask(Method::CatMerging, &grams[..1]));
    assert!(text.contains("--grams names 1 folders for 2 adapters"), "{text}");
    let other = write_grams(&dir, "g3", 3, &"b".repeat(64));
    let text = refused(&ask(Method::Regmean, &[grams[0].clone(), other]));
    assert!(text.contains("g3: has Grams of a base with fingerprint bbb"), "{text}");
    // What a plan needs is told; more than the limit is refused before any work.
    let limited = Common { memory_limit: Some(100), ..Common::default() };
    let text = plan(&ask(Method::Regmean, &grams), &limited).unwrap_err().to_string();
    assert!(text.contains("sum of input Grams of width 24"), "{text}");
    assert_eq!(plan(&ask(Method::CatMerging, &grams), &limited).unwrap().memory().total(), 0);

    // A pruned edge's Grams are narrower on o and down, and count where its channels are.
    let pruning = pruning([1], 8..24);
    let narrow = dir.path().join("narrow");
    std::fs::create_dir(&narrow).unwrap();
    pruning.write(&narrow.join("pruning.json")).unwrap();
    let whole = write_grams(&dir, "whole", 5, &fingerprint);
    let full = InputGrams::open(&whole, OpenOptions::default()).unwrap();
    let entries = |m: Module, kept: &[usize]| {
        let n = size(m).1;
        let gram = full.of(m, n).unwrap();
        let mut rows = vec![vec![0.0; n]; n];
        rows.iter_mut().enumerate().for_each(|(k, row)| gram.row(k, row));
        let pairs = kept.iter().enumerate().flat_map(|(x, &i)| kept[x..].iter().map(move |&j| (i, j)));
        pairs.map(|(i, j)| rows[i][j - i] as f32).collect::<Vec<f32>>()
    };
    let grams = inputs().map(|(layer, source, _)| {
        let m = Module { layer, target: source.target() };
        (layer, source, entries(m, &channels(&pruning, m)))
    });
    dense::write_grams(&narrow, 40, &grams.collect::<Vec<_>>());
    // The same Gram at full width, zero where the edge has no channel.
    let padded = write_padded(&dir, &narrow, &pruning);
    for method in [Method::Regmean, Method::CatMerging] {
        let fuse = |second: &PathBuf, name: &str| {
            let out = dir.path().join(format!("{method}-{name}"));
            std::fs::create_dir(&out).unwrap();
            let ask = ask(method, &[grams[0].clone(), second.clone()]);
            plan(&ask, &Common::default()).unwrap().write_adapter(&cpu(), &out, &Common::default()).unwrap();
            updates(&open(&out))
        };
        let (got, want) = (fuse(&narrow, "narrow"), fuse(&padded, "padded"));
        for (m, want) in &want {
            assert!(distance(got[m].as_ref(), want.as_ref()) <= 1e-6, "{method} {m}");
        }
    }
}

/// q, k and v read one input, gate and up another: what is made of the Grams of one is made once.
#[test]
fn the_sum_of_input_grams_is_factored_once_for_those_who_share_it() {
    let (dir, paths) = two();
    let grams = [write_grams(&dir, "g1", 1, ""), write_grams(&dir, "g2", 2, "")];
    let open = OpenOptions::default();
    let inputs = Inputs::open(&paths, false, open).unwrap().with_grams(&grams, open).unwrap();
    let factored = |layer, target, weights: [f64; 2]| {
        let batch = inputs.batch(inputs.frame(Module { layer, target })).unwrap();
        batch.inputs().unwrap().factored(&weights, 0.9).unwrap()
    };
    let even = [0.5, 0.5];
    let first = factored(0, Target::Q, even);
    for target in [Target::K, Target::V] {
        assert!(Arc::ptr_eq(&first, &factored(0, target, even)), "{target}");
    }
    assert!(!Arc::ptr_eq(&first, &factored(0, Target::V, [0.25, 0.75])), "other weights");
    let gate = factored(0, Target::Gate, even);
    assert!(!Arc::ptr_eq(&first, &gate) && Arc::ptr_eq(&gate, &factored(0, Target::Up, even)));
    assert!(!Arc::ptr_eq(&gate, &factored(1, Target::Up, even)), "another layer's");
}

/// The Grams of a pruned edge at the full model's widths.
fn write_padded(at: &TempDir, narrow: &Path, pruning: &Pruning) -> PathBuf {
    let dir = at.path().join("padded");
    std::fs::create_dir(&dir).unwrap();
    let grams = InputGrams::open(narrow, OpenOptions::default()).unwrap();
    let padded = inputs().map(|(layer, source, n)| {
        let m = Module { layer, target: source.target() };
        let (gram, kept) = (grams.of(m, n).unwrap(), channels(pruning, m));
        let (mut whole, mut row) = (Mat::zeros(n, n), vec![0.0; n]);
        for (k, &i) in kept.iter().enumerate() {
            gram.row(k, &mut row);
            kept[k..].iter().zip(&row).for_each(|(&j, g)| whole[(i, j)] = *g);
        }
        (layer, source, dense::upper(&whole))
    });
    dense::write_grams(&dir, 40, &padded.collect::<Vec<_>>());
    dir
}

/// What pruning left of the input of a module.
fn channels(pruning: &Pruning, m: Module) -> Vec<usize> {
    if m.target.prunes_rows() { (0..size(m).1).collect() } else { pruning.kept(m.target, m.layer) }
}

/// Two adapters of TinyLLaMA that others trained; none, with a word, where they are absent.
fn real_adapters() -> Option<Vec<PathBuf>> {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/adapters");
    let names = ["tinyllama-arona-lora-180", "tinyllama-arona-finetuned-75"];
    let paths: Vec<PathBuf> = names.iter().map(|n| Path::new(data).join(n)).collect();
    if !paths.iter().all(|p| p.exists()) {
        eprintln!("skipped: {data} is absent");
        return None;
    }
    Some(paths)
}

#[test]
fn certificates_of_every_method_on_real_adapters() {
    let Some(paths) = real_adapters() else { return };
    for method in Method::ALL.iter().copied().filter(|m| !m.needs_input_grams() && !m.is_elementwise()) {
        let plan = plan(&options(&paths, method), &Common::default()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let c = plan.write_adapter(&cpu(), out.path(), &Common::default()).unwrap();
        assert_eq!(c.modules.len(), 44);
        assert!(c.error.max <= 1e-6, "{method}: {:?}", c.error);
        println!("{method:16} error {:.1e}, distance to the mean {:.3}", c.error.max, c.distance_to_mean.max);
    }
}

/// What f16 cannot hold is said to be that, with what to do.
#[test]
fn a_result_that_f16_cannot_hold_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let giant = Maker { alpha: 6e9, ..maker(1) }.write(&dir, "giant");
    let paths = [giant, maker(2).write(&dir, "small")];
    for method in [Method::Fedavg, Method::Mean, Method::Fedex, Method::PeftCat] {
        let text = refused(&FuseOptions { dtype: DType::F16, ..options(&paths, method) });
        assert!(text.contains("too large for F16") && text.contains("--dtype f32"), "{method}: {text}");
        let out = tempfile::tempdir().unwrap();
        let c = plan(&options(&paths, method), &Common::default()).unwrap();
        let c = c.write_adapter(&cpu(), out.path(), &Common::default()).unwrap();
        assert!(c.error.max <= 1e-6, "{method}: {:?}", c.error);
    }
}

#[test]
fn a_base_that_does_not_fit_is_refused_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) =
        (write_base(&dir, "good", DType::F32, false), write_base(&dir, "bad", DType::F32, true));
    let one = maker(1).write(&dir, "one");
    let mut unknown = maker(2);
    unknown.provenance.base_fingerprint = None;
    let unknown = unknown.write(&dir, "unknown");
    let left = || std::fs::read_dir(dir.path()).unwrap().count();
    let before = left();
    let ask = |adapter: &PathBuf, model: &PathBuf, modules: Option<PathBuf>| {
        let mut ask = options(std::slice::from_ref(adapter), Method::Mean);
        (ask.model, ask.merged, ask.out) = (Some(model.clone()), modules, None);
        run(&cpu(), &ask, &Common::default()).map(|_| String::new()).unwrap_or_else(|e| e.to_string())
    };
    let out = || Some(dir.path().join("m"));
    let text = ask(&one, &good, out());
    assert!(text.contains("the adapters are of base aaa"), "{text}");
    let text = ask(&unknown, &bad, out());
    assert!(text.contains("layers.1.mlp.up_proj.weight holds NaN or infinity"), "{text}");
    assert_eq!(left(), before);
    let mut ask = options(&[unknown], Method::Mean);
    (ask.merged, ask.out) = (out(), None);
    assert!(run(&cpu(), &ask, &Common::default()).unwrap_err().to_string().contains("--model"));
    ask.merged = None;
    assert!(run(&cpu(), &ask, &Common::default()).unwrap_err().to_string().contains("--out"));
}

#[test]
fn a_finished_fusion_is_known_again() {
    let (dir, paths) = two();
    let ask = FuseOptions { out: Some(dir.path().join("new/out")), ..options(&paths, Method::Fedavg) };
    assert!(run(&cpu(), &ask, &Common::default()).unwrap().certificate.is_some());
    let text = run(&cpu(), &ask, &Common::default()).unwrap_err().to_string();
    assert!(text.contains("--force"), "{text}");
    let again = run(&cpu(), &ask, &Common { resume: true, ..Common::default() }).unwrap();
    assert!(again.certificate.is_none());
    assert!(run(&cpu(), &ask, &Common { force: true, ..Common::default() }).unwrap().certificate.is_some());
    assert!(!dir.path().join("new/out.partial").exists());
}

#[test]
fn a_declared_frozen_a_is_believed_only_where_it_is_common() {
    let dir = tempfile::tempdir().unwrap();
    let frozen = |seed: u64, init: u64, name: &str| {
        let mut m = maker(seed);
        m.provenance.freeze_a = Some(true);
        m.provenance.init_seed = Some(init);
        m.write(&dir, name)
    };
    let paths = [frozen(1, 7, "a"), frozen(2, 7, "b")];
    let text = refused(&options(&paths, Method::Ffa));
    assert!(text.contains("adapters 0 and 1 both declare a frozen A"), "{text}");
    // Other seeds: no common A is declared, and none is looked for.
    let paths = [frozen(1, 1, "c"), frozen(2, 2, "d")];
    let out = tempfile::tempdir().unwrap();
    let c = plan(&options(&paths, Method::Ffa), &Common::default()).unwrap();
    let c = c.write_adapter(&cpu(), out.path(), &Common::default()).unwrap();
    assert_eq!(c.variants.keys().collect::<Vec<_>>(), ["ffa_ref(0)"]);
}

/// Two adapters of the base at `model` in `dir`, the second without the last four modules and of other edges' rows.
fn two_of(dir: &TempDir, model: &Path) -> Vec<PathBuf> {
    let base_of = Checkpoint::open(model, OpenOptions::default()).unwrap();
    let make = |seed, modules: usize, kept: Pruning| {
        let mut m = Maker { modules: all_modules()[..modules].to_vec(), ..maker(seed) };
        let fingerprint = base_of.fingerprint().unwrap().to_owned();
        m.provenance.base_fingerprint = Some(fingerprint.clone());
        m.pruning = Some(Pruning { base: BaseModel { fingerprint, ..base() }, ..kept });
        m
    };
    vec![
        make(1, 14, pruning([0], 0..11)).write(dir, "one"),
        Maker { rank: 2, ..make(2, 10, pruning([1], 5..17)) }.write(dir, "two"),
    ]
}

/// The batch of every module of these adapters, weighted as `weights` say of all.
fn batches(paths: &[PathBuf], weights: &[f64]) -> Vec<Batch> {
    let inputs = Inputs::open(paths, true, OpenOptions::default()).unwrap();
    let one = |&m: &Module| {
        let mut frame = inputs.frame(m);
        let sum: f64 = frame.members.iter().map(|&e| weights[e]).sum();
        frame.weights = frame.members.iter().map(|&e| weights[e] / sum).collect();
        inputs.batch(frame).unwrap()
    };
    inputs.modules.iter().map(one).collect()
}

/// The fused update of one module, row by row.
fn rows(fusion: &Fusion, batch: &Batch) -> Vec<f32> {
    let (o, i) = batch.frame.size;
    let mut out = vec![0.0; o * i];
    Elementwise::new(fusion, batch, None).unwrap().rows(0..o, &mut out, true).unwrap();
    out
}

#[test]
fn methods_on_entries_are_merged_and_certified() {
    for (method, dtype, resolve) in [
        (Method::Ties, DType::BF16, None),
        (Method::Ties, DType::F32, Some(LoraCr::default())),
        (Method::Dare, DType::F16, None),
        (Method::DareTies, DType::BF16, None),
        (Method::DareTies, DType::F32, Some(LoraCr { side: Side::Both, ..LoraCr::default() })),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let model = write_base(&dir, "base", dtype, false);
        let paths = two_of(&dir, &model);
        let fusion = Fusion { lambda: 0.5, seed: 5, ..Fusion::new(method, None).unwrap() };
        let common = Common { seed: 5, ..Common::default() };
        let ask = FuseOptions {
            recipe: Recipe { resolve, fusion },
            weights: Weights::List(vec![3.0, 1.0]),
            allow_missing: true,
            out: None,
            model: Some(model.clone()),
            merged: Some(dir.path().join("m")),
            ..options(&paths, method)
        };
        let c = run(&cpu(), &ask, &common).unwrap().merged_certificate.unwrap();
        let open = |dir: &Path| Checkpoint::open(dir, OpenOptions::default()).unwrap();
        let (base, merged) = (open(&model), open(&dir.path().join("m")));
        assert!(Provenance::verify(&dir.path().join("m")).unwrap().values().all(|v| *v == Verdict::Same));
        let read = batches(&paths, &[0.75, 0.25]);
        assert_eq!((c.modules.len(), c.variants[method.word()], c.dtype.as_str()), (14, 14, dtype.name()));
        for (read, c) in read.iter().zip(&c.modules) {
            let fused = resolve.map(|options| dense::resolve(&cpu(), read, &options).0);
            let delta = rows(&fusion, fused.as_ref().unwrap_or(read));
            let name = read.frame.module.weight();
            let (old, new) = (base.weights().tensor(&name).unwrap(), merged.weights().tensor(&name).unwrap());
            // Bit for bit: one addition and one rounding.
            let sum: Vec<f32> = old.to_f32().iter().zip(&delta).map(|(w, d)| w + d).collect();
            let mut want = vec![];
            narrow(&mut want, &sum, dtype);
            assert_eq!(new.bytes(), want, "{method} {name}");

            let (o, i) = read.frame.size;
            let got = Mat::from_fn(o, i, |r, c| f64::from(delta[r * i + c]));
            let (old, new) = (old.to_f32(), new.to_f32());
            let written = Mat::from_fn(o, i, |r, c| f64::from(new[r * i + c]) - f64::from(old[r * i + c]));
            assert!((c.error - distance(written.as_ref(), got.as_ref())).abs() <= 1e-9, "{method} {name}");
            let updates = |b: &Batch| dense::updates(b);
            let mean = weighted(&updates(fused.as_ref().unwrap_or(read)), &read.frame.weights);
            let off = distance(got.as_ref(), mean.as_ref());
            assert!((c.distance_to_mean - off).abs() <= 1e-6, "{name}: {} {off}", c.distance_to_mean);
            let nearest = weighted(&updates(read), &c.effective_scale);
            let best = distance(nearest.as_ref(), got.as_ref());
            for e in 0..read.frame.edges() {
                for step in [-1e-3, 1e-3] {
                    let mut scale = c.effective_scale.clone();
                    scale[e] += step;
                    let other = weighted(&updates(read), &scale);
                    assert!(distance(other.as_ref(), got.as_ref()) >= best - 1e-9, "{name}");
                }
            }
            let kept = c.kept.as_ref().unwrap();
            assert_eq!((kept.len(), c.adapters.len()), (read.frame.edges(), read.frame.edges()));
            assert!(kept.iter().all(|k| k.threshold.is_some() == (method == Method::Ties)));
            assert!(kept.iter().all(|k| k.kept < (o * i) as u64 / 2), "{name}: {kept:?}");
            assert_eq!(c.after.is_some(), resolve.is_some());
        }
        for (name, _) in base.expected() {
            if read.iter().all(|b| b.frame.module.weight() != name) {
                let tensor = |c: &Checkpoint| c.weights().tensor(&name).unwrap().bytes().to_vec();
                assert_eq!(tensor(&base), tensor(&merged), "{name}");
            }
        }
    }
}

#[test]
fn methods_on_entries_are_written_at_a_rank_and_certified() {
    let both = LoraCr { side: Side::Both, ..LoraCr::default() };
    for (method, rank, dtype, resolve) in [
        (Method::Ties, 5, DType::F32, None),
        (Method::Ties, 100, DType::F32, Some(LoraCr::default())),
        (Method::Dare, 3, DType::BF16, None),
        (Method::DareTies, 4, DType::F16, Some(both)),
        (Method::DareTies, 16, DType::F32, None),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let model = write_base(&dir, "base", DType::F32, false);
        let paths = two_of(&dir, &model);
        let plain = Fusion { lambda: 0.5, seed: 5, ..Fusion::new(method, None).unwrap() };
        let ask = FuseOptions {
            recipe: Recipe { resolve, fusion: Fusion { rank: Some(rank), ..plain } },
            weights: Weights::List(vec![3.0, 1.0]),
            allow_missing: true,
            dtype,
            out: Some(dir.path().join("a")),
            model: Some(model.clone()),
            merged: Some(dir.path().join("m")),
            ..options(&paths, method)
        };
        let report = run(&cpu(), &ask, &Common { seed: 5, ..Common::default() }).unwrap();
        let (c, merged) = (report.certificate.unwrap(), report.merged_certificate.unwrap());
        let weights =
            [&model, &dir.path().join("m")].map(|d| Checkpoint::open(d, OpenOptions::default()).unwrap());
        let written = open(&dir.path().join("a"));
        assert_eq!((report.rank, written.uniform_rank()), (Some(rank.min(16)), Some(rank.min(16))));
        let (got, lost) = (
            updates(&written),
            match dtype {
                DType::F32 => 1e-6,
                DType::F16 => 2e-3,
                DType::BF16 => 1e-2,
            },
        );
        for ((read, c), merged) in batches(&paths, &[0.75, 0.25]).iter().zip(&c.modules).zip(&merged.modules)
        {
            let (m, (o, i)) = (read.frame.module, read.frame.size);
            let resolved = resolve.map(|options| dense::resolve(&cpu(), read, &options).0);
            let fused = resolved.as_ref().unwrap_or(read);
            let delta = rows(&plain, fused);
            let want = Mat::from_fn(o, i, |r, c| f64::from(delta[r * i + c]));
            let err = distance(got[&m].as_ref(), want.as_ref());
            assert!((c.error - err).abs() <= 1e-6, "{method} {m}: {} {err}", c.error);
            let sizes = want.singular_values().unwrap();
            let best = sizes.iter().skip(rank).map(|s| s * s).sum::<f64>().sqrt() / want.norm_l2();
            assert!(err >= best - 1e-6 && err <= 1.01 * best + lost, "{method} {m}: {err} {best}");
            assert!(rank < o.min(i) || dtype != DType::F32 || err <= 1e-5, "{method} {m}: {err:e}");
            assert!((c.energy_kept + best * best - 1.0).abs() <= 0.02, "{method} {m}: {}", c.energy_kept);
            assert_eq!((c.rank, c.variant.as_str()), (rank.min(o).min(i), method.word()));
            let mean = weighted(&dense::updates(fused), &read.frame.weights);
            let off = distance(got[&m].as_ref(), mean.as_ref());
            assert!((c.distance_to_mean - off).abs() <= 1e-6, "{m}: {} {off}", c.distance_to_mean);
            assert_eq!(c.kept.as_ref().unwrap().len(), read.frame.edges());
            assert_eq!((&c.kept, c.energy_kept, c.after), (&merged.kept, merged.energy_kept, merged.after));

            // What was added to the weight is the adapter's update, measured against the entries too.
            let [old, new] = weights.each_ref().map(|w| w.weights().tensor(&m.weight()).unwrap().to_f32());
            let change = Mat::from_fn(o, i, |r, c| f64::from(new[r * i + c]) - f64::from(old[r * i + c]));
            let err = distance(change.as_ref(), want.as_ref());
            assert!((merged.error - err).abs() <= 1e-6, "{method} {m}: {} {err}", merged.error);
            assert!(distance(change.as_ref(), got[&m].as_ref()) <= 2.0 * lost + 1e-5, "{method} {m}");
        }
        let again = Common { seed: 5, resume: true, ..Common::default() };
        assert!(run(&cpu(), &ask, &again).unwrap().certificate.is_none());
    }
}

/// Whatever does not depend on values is told, and refused, before they are read: one of them is no number.
#[test]
fn what_can_be_known_without_values_is_known_without_them() {
    let dir = tempfile::tempdir().unwrap();
    let paths = [maker(1).write(&dir, "good"), Maker { poison: true, ..maker(2) }.write(&dir, "no-number")];
    let common = Common::default();
    let ask = options(&paths, Method::Mean);
    let seen = outline(&ask, &common).unwrap();
    assert_eq!((seen.asked().len(), seen.rank(), seen.memory().total()), (14, 6, 0));
    assert!(refused(&ask).contains("holds NaN or infinity"));
    for method in [Method::Ties, Method::Dare, Method::DareTies] {
        let mut ask = options(&paths, method);
        for (found, how) in
            [(refused(&ask), "fused"), (outline(&ask, &common).unwrap_err().to_string(), "seen")]
        {
            assert!(found.contains("--rank N") && found.contains("--merged"), "{how}: {found}");
        }
        ask.recipe.fusion.rank = Some(3);
        let seen = outline(&ask, &common).unwrap();
        assert_eq!(seen.rank(), 3);
        assert!(refused(&ask).contains("holds NaN or infinity"));
        let limited = Common { memory_limit: Some(100), ..Common::default() };
        let text = outline(&ask, &limited).unwrap_err().to_string();
        assert!(text.contains("search for 3 singular vectors"), "{text}");
    }
}

#[test]
fn one_threshold_for_all_modules_of_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_base(&dir, "base", DType::F32, false);
    let paths = two_of(&dir, &model);
    let read = batches(&paths, &[0.5, 0.5]);
    let single = |b: &Batch, e: usize| {
        let frame = Frame::new(b.frame.module, b.frame.size, &[b.frame.ranks()[e]]);
        Batch::new(frame, Factors::new(b.bt(e).to_owned(), b.a(e).to_owned()).unwrap()).unwrap()
    };
    let sparse = |of, scope| Some(Sparse::Trim(Trim { density: 0.1, of, scope }));
    let plain = Fusion::new(Method::Ties, None).unwrap();
    let whole = Fusion { sparse: Some(Sparse::Trim(Trim { density: 1.0, ..Trim::default() })), ..plain };
    for of in [DensityOf::Support, DensityOf::Full] {
        let want: Vec<f32> = (0..2)
            .map(|e| {
                let mut n = 0;
                let mut all: Vec<f32> = vec![];
                for b in read.iter().filter(|b| b.frame.members.contains(&e)) {
                    let at = b.frame.members.iter().position(|&m| m == e).unwrap();
                    all.extend(rows(&whole, &single(b, at)).iter().map(|x| x.abs()));
                    let (kept, (o, i)) = (&b.frame.kept[at], b.frame.size);
                    let axis = |k: &Option<Vec<usize>>, n: usize| k.as_ref().map_or(n, Vec::len);
                    n += match of {
                        DensityOf::Support => axis(&kept.rows, o) * axis(&kept.columns, i),
                        DensityOf::Full => o * i,
                    };
                }
                all.sort_by(|a, b| b.total_cmp(a));
                all[(0.1 * n as f64) as usize - 1]
            })
            .collect();
        let ask = FuseOptions {
            recipe: Recipe {
                resolve: None,
                fusion: Fusion { sparse: sparse(of, DensityScope::Model), ..plain },
            },
            allow_missing: true,
            out: None,
            model: Some(model.clone()),
            merged: Some(dir.path().join(format!("m-{of}"))),
            ..options(&paths, Method::Ties)
        };
        let c = run(&cpu(), &ask, &Common::default()).unwrap().merged_certificate.unwrap();
        for m in &c.modules {
            for (&e, kept) in m.adapters.iter().zip(m.kept.as_ref().unwrap()) {
                assert_eq!(kept.threshold, Some(want[e]), "{of} layer {} {}", m.layer, m.target);
            }
        }
        let mut at_rank = FuseOptions { merged: None, ..ask };
        at_rank.recipe.fusion.rank = Some(2);
        (at_rank.out, at_rank.layers) = (Some(dir.path().join(format!("part-{of}"))), Some(1..2));
        let part = run(&cpu(), &at_rank, &Common::default()).unwrap().certificate.unwrap();
        assert_eq!(part.modules.len(), 7);
        for (part, whole) in part.modules.iter().zip(&c.modules[7..]) {
            assert_eq!(part.kept, whole.kept);
        }
    }
}

#[test]
fn merging_entries_depends_on_the_seed_and_not_on_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_base(&dir, "base", DType::BF16, false);
    let paths = two_of(&dir, &model);
    let bytes = |threads: usize, seed: u64, no_mmap: bool| {
        let out = dir.path().join(format!("m-{threads}-{seed}-{no_mmap}"));
        let mut ask = options(&paths, Method::DareTies);
        (ask.model, ask.merged, ask.out) = (Some(model.clone()), Some(out.clone()), None);
        ask.allow_missing = true;
        let common = Common { seed, no_mmap, ..Common::default() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&cpu(), &ask, &common)).unwrap();
        ["model.safetensors", "certificate.json", "anabranch.json"]
            .map(|f| std::fs::read(out.join(f)).unwrap())
    };
    let one = bytes(1, 0, false);
    assert_eq!(bytes(2, 0, true), one);
    assert_eq!(bytes(3, 0, false), one);
    assert_ne!(bytes(1, 1, false)[0], one[0]);
    // What cannot be is refused before anything is written.
    let mut ask = options(&paths, Method::Ties);
    ask.allow_missing = true;
    let text = plan(&ask, &Common::default()).unwrap_err().to_string();
    assert!(text.contains("--rank") && text.contains("--merged"), "{text}");
}

#[test]
fn a_page_of_conflict() {
    let dir = tempfile::tempdir().unwrap();
    let page = dir.path().join("conflict.html");
    let ask = ConflictOptions {
        adapters: vec![maker(1).write(&dir, "hum"), maker(2).write(&dir, "a<b>")],
        resolve: LoraCr::default(),
        allow_missing: false,
        names: Vec::new(),
        html: Some(page.clone()),
    };
    let report = conflict::run(&cpu(), &ask, &Common::default()).unwrap().report;
    for m in &report.modules {
        let shares = m.dominance[0][1] + m.dominance[1][0];
        assert!((shares - 1.0).abs() <= 1e-12 && m.dominance[0][0] == 0.5, "{m:?}");
        assert!(m.leading.len() == m.directions && m.leading.windows(2).all(|d| d[0].sigma >= d[1].sigma));
    }
    let kept: f64 = report.kept.iter().zip(&report.norms).map(|(k, n)| k * n * n).sum();
    let energy: f64 = report.norms.iter().map(|n| n * n).sum();
    assert!((kept / energy - report.energy_kept).abs() <= 1e-12);
    let html = std::fs::read_to_string(&page).unwrap();
    for m in &report.modules {
        let id = format!("module-{}-{}", m.layer, m.target);
        assert_eq!(html.matches(&format!("href=\"#{id}\"")).count(), 1, "{id} is led to from the heat map");
        assert_eq!(html.matches(&format!("id=\"{id}\"")).count(), 1, "{id} is drawn");
        assert!(html.contains(&format!("c̄ {:.4}", m.before.conflict_mean)), "{id} tells its conflict");
    }
    assert!(html.contains("a&lt;b&gt;") && !html.contains("a<b>"), "names are escaped");
    assert!(!html.contains("<script") && !html.contains("src=") && !html.contains("NaN"));
    // A page that is there stays, unless it may be replaced.
    let error = conflict::run(&cpu(), &ask, &Common::default()).unwrap_err().to_string();
    assert!(error.contains("conflict.html") && error.contains("--force"), "{error}");
    conflict::run(&cpu(), &ask, &Common { force: true, ..Common::default() }).unwrap();
}

#[test]
fn conflict_of_real_adapters() {
    let Some(paths) = real_adapters() else { return };
    let ask = ConflictOptions {
        adapters: paths.clone(),
        resolve: LoraCr::default(),
        allow_missing: false,
        names: Vec::new(),
        html: None,
    };
    let report = conflict::run(&cpu(), &ask, &Common::default()).unwrap().report;
    assert_eq!((report.modules.len(), report.layers.len()), (44, 22));
    for m in &report.modules {
        assert!(m.before.conflict_mean > 0.0 && m.before.conflict_mean <= 0.5, "{m:?}");
        assert!(m.norms.iter().all(|n| *n > 0.0) && m.energy_kept > 0.0 && m.energy_kept < 1.0, "{m:?}");
    }
    let out = tempfile::tempdir().unwrap();
    let mut ask = options(&paths, Method::Fedavg);
    ask.recipe.resolve = Some(LoraCr::default());
    let c = plan(&ask, &Common::default())
        .unwrap()
        .write_adapter(&cpu(), out.path(), &Common::default())
        .unwrap();
    assert!((c.before.conflict_mean - report.before.conflict_mean).abs() <= 1e-12);
    assert!((c.after.unwrap().conflict_mean - report.after.conflict_mean).abs() <= 1e-12);
    assert!(c.error.max <= 1e-6);
    // From the files, against the dense definition.
    let (one, two) = (updates(&open(&paths[0])), updates(&open(&paths[1])));
    for (m, d) in one.iter().take(2) {
        let (want, _) = lora_cr(&[d.clone(), two[m].clone()], SharedRank::All, Gate::Paper);
        let norm: Vec<f64> = want.iter().map(|w| w.norm_l2()).collect();
        let c = report
            .modules
            .iter()
            .find(|c| (c.layer, c.target.as_str()) == (m.layer, m.target.short()))
            .unwrap();
        for (got, want) in c.norms_after.iter().zip(norm) {
            assert!((got / want - 1.0).abs() <= 1e-8, "{got} {want}");
        }
    }
}
