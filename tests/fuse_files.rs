//! `fuse` and `conflict` from folder to folder: what is read, refused and written.

mod dense;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anabranch::checkpoint::adapter::Adapter;
use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::module::{Module, Target};
use anabranch::checkpoint::provenance::{Provenance, Verdict};
use anabranch::checkpoint::pruning::{BaseModel, KeptLayer, Pruning};
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::fuse::options::{Coverage, Fedsa, Gate, Method, SharedRank};
use anabranch::fuse::weights::Weights;
use anabranch::fuse::{Fusion, LoraCr, Recipe};
use anabranch::stage::common::Common;
use anabranch::stage::conflict::{self, ConflictOptions};
use anabranch::stage::fuse::{FuseOptions, Profile, plan};
use anabranch::tensor::DType;
use dense::{distance, lora_cr, weighted};
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
        allow_missing: false,
        dtype: DType::F32,
        profile: Profile::Portable,
    }
}

fn refused(options: &FuseOptions) -> String {
    let done = plan(&Common::default(), options, true).and_then(|p| {
        let out = tempfile::tempdir().unwrap();
        p.write_adapter(&Common::default(), out.path())
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
    for method in Method::ALL.iter().copied() {
        for resolve in [None, Some(LoraCr::default())] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                if dtype != DType::F32 && (method != Method::Fedavg || resolve.is_some()) {
                    continue;
                }
                let recipe = Recipe { resolve, ..options(&paths, method).recipe };
                let options = FuseOptions { recipe, dtype, ..options(&paths, method) };
                let out = dir.path().join(format!("{method}-{}-{dtype}", resolve.is_some()));
                std::fs::create_dir(&out).unwrap();
                let plan = plan(&Common::default(), &options, true).unwrap();
                let certificate = plan.write_adapter(&Common::default(), &out).unwrap();
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
                plan(&common, &options, true).unwrap().write_adapter(&common, &out).unwrap();
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
        plan(&Common::default(), &options, true).unwrap().write_adapter(&Common::default(), &out).unwrap();
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
        let plan = plan(&Common::default(), &options, true).unwrap();
        let c = plan.write_adapter(&Common::default(), &out).unwrap();
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
    plan(&Common::default(), &options, true).unwrap().write_adapter(&Common::default(), &out).unwrap();
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
    let ffa = plan(&Common::default(), &self::options(&paths, Method::Ffa), true).unwrap();
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
    let plan = plan(&Common::default(), &options(&[good.clone(), renamed], Method::Fedavg), true).unwrap();
    assert!(plan.inputs.warnings[0].contains("\"renamed\"") && plan.inputs.warnings[0].contains("\"base\""));

    let common = Common::default();
    common.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let stopped = plan.write_adapter(&common, tempfile::tempdir().unwrap().path()).unwrap_err();
    assert_eq!(stopped.exit_code(), 130);
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
    let c = plan(&Common::default(), &options(&paths, Method::Ffa), true).unwrap();
    let c = c.write_adapter(&Common::default(), out.path()).unwrap();
    assert_eq!(c.variants.keys().collect::<Vec<_>>(), ["ffa_ref(0)"]);
}

#[test]
fn conflict_of_real_adapters() {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/adapters");
    let paths: Vec<PathBuf> = ["tinyllama-arona-lora-180", "tinyllama-arona-finetuned-75"]
        .iter()
        .map(|n| Path::new(data).join(n))
        .collect();
    if !paths.iter().all(|p| p.exists()) {
        eprintln!("skipped: {data} is absent");
        return;
    }
    let ask = ConflictOptions { adapters: paths.clone(), resolve: LoraCr::default(), allow_missing: false };
    let report = conflict::run(&Common::default(), &ask).unwrap().report;
    assert_eq!((report.modules.len(), report.layers.len()), (44, 22));
    for m in &report.modules {
        assert!(m.before.conflict_mean > 0.0 && m.before.conflict_mean <= 0.5, "{m:?}");
        assert!(m.norms.iter().all(|n| *n > 0.0) && m.energy_kept > 0.0 && m.energy_kept < 1.0, "{m:?}");
    }
    let out = tempfile::tempdir().unwrap();
    let mut ask = options(&paths, Method::Fedavg);
    ask.recipe.resolve = Some(LoraCr::default());
    let c =
        plan(&Common::default(), &ask, true).unwrap().write_adapter(&Common::default(), out.path()).unwrap();
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
