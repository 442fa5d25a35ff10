//! Pruning from folder to folder: scores against dense definitions, the tensors that are written, perplexities.

#[path = "common/seeded.rs"]
mod seeded;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::module::{Module, Target};
use anabranch::checkpoint::provenance::{Provenance, Verdict};
use anabranch::checkpoint::pruning::{KeptLayer, Pruning};
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::cpu::Cpu;
use anabranch::data::batch::Batch;
use anabranch::data::tokenizer::Tokenizer;
use anabranch::data::{calibration, documents};
use anabranch::host::HostMatrix;
use anabranch::model::adapters::Stack;
use anabranch::model::backward::{Observe, Trained};
use anabranch::model::edge;
use anabranch::model::forward::DropoutKey;
use anabranch::model::room::{Head, Keep, RoomSize};
use anabranch::model::rope::Tables;
use anabranch::model::session::Session;
use anabranch::model::shape::TrainingShape;
use anabranch::model::weights::Model;
use anabranch::prune::groups::{Gqa, Reduce};
use anabranch::prune::scores::Importance;
use anabranch::prune::select::Cut;
use anabranch::stage::calibrate::Calibration;
use anabranch::stage::common::Common;
use anabranch::stage::prune::{Amount, Prepared, PruneOptions, PruneReport};
use anabranch::tensor::{DType, Frozen};
use anabranch::{Error, Result};
use half::bf16;
use serde_json::{Value, json};
use tempfile::TempDir;

const D: usize = 64;
const V: usize = 48;
const K: usize = 2;
const SAMPLES: usize = 4;
const TOKENS: usize = 11;

/// H 32 and G 8 as LLaMA-3-8B.
fn config(changes: Value) -> Value {
    let mut v = json!({"model_type": "llama", "hidden_size": D, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": K, "intermediate_size": 50, "num_hidden_layers": 2, "vocab_size": V,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2});
    v.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    v
}

/// A model with its tokenizer, and a calibration text of eight paragraphs.
fn world(changes: Value, dtype: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    seeded::write_model(&model, &config(changes), 5, dtype);
    seeded::write_tokenizer(&model, V);
    let paragraphs: Vec<String> = (0..8)
        .map(|p| {
            let ids = seeded::ids(p, "text", 9 + 3 * p as usize, V as u64 - 3);
            seeded::words(&ids.iter().map(|i| i + 3).collect::<Vec<_>>())
        })
        .collect();
    std::fs::write(dir.path().join("text.txt"), paragraphs.join("\n\n")).unwrap();
    dir
}

fn options(dir: &Path, ratio: f64, importance: Importance) -> PruneOptions {
    PruneOptions {
        model: dir.join("model"),
        out: dir.join("out"),
        amount: Amount::Ratio(ratio),
        calibration: Some(dir.join("text.txt")),
        samples: SAMPLES,
        sample_tokens: TOKENS,
        importance,
        reduce: Reduce::Sum,
        gqa: Gqa::Correct,
        layers: None,
        round_mlp: 1,
        shape: TrainingShape::default(),
    }
}

fn force() -> Common {
    Common { force: true, seed: 3, ..Common::default() }
}

fn prune(options: PruneOptions) -> Result<PruneReport> {
    let cpu = Cpu::new(2)?;
    Prepared::new::<_, f32>(&cpu, options, &force())?.run::<_, f32>(&cpu, &force())
}

fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, OpenOptions::default()).unwrap()
}

/// Input and output gradient of every linear.
#[derive(Default)]
struct Capture(BTreeMap<Module, (Vec<f32>, Vec<f32>)>);

impl Observe<Cpu, f32> for Capture {
    fn linear(&mut self, m: Module, x: &Vec<f32>, dy: &Vec<f32>, w: &HostMatrix, t: usize) -> Result<()> {
        let (o, i) = w.size();
        self.0.insert(m, (x[..t * i].to_vec(), dy[..t * o].to_vec()));
        Ok(())
    }
}

/// The calibration batch that the stage takes, and every linear's x and dy.
fn capture(dir: &Path) -> (Batch, Capture) {
    let checkpoint = open(&dir.join("model"));
    let config = checkpoint.config();
    let tokenizer = Tokenizer::load(checkpoint.dir(), config.vocab).unwrap();
    let data = documents::load(&[dir.join("text.txt")], &tokenizer, config.longest(), false).unwrap();
    let windows = calibration::sample(&data.documents, SAMPLES, TOKENS, force().seed).unwrap();
    let batch = Batch::of(&windows);
    let cpu = Cpu::new(1).unwrap();
    let model = Model::new(&cpu, &checkpoint).unwrap();
    let size = RoomSize {
        tokens: batch.tokens(),
        copies: 1,
        keep: Keep::Training { recomputed: 0 },
        table_rows: 0,
        ranks: [0; 7],
        dropout: false,
        dtype: DType::F32,
        head: Head::Loss(batch.rows.len()),
    };
    let mut session: Session<Cpu, f32> =
        Session::new(&cpu, &model, Tables::new(config, TOKENS), size).unwrap();
    let input = session.documents(&cpu, batch.ids.clone(), &batch.bounds).unwrap();
    let (none, mut grads) = (Vec::new(), Vec::new());
    session.forward(&model, &cpu, &input, Stack { params: &none, layouts: &[None] }).unwrap();
    let mut nll = vec![0.0; batch.rows.len()];
    let weight = Some(1.0 / nll.len() as f32);
    model
        .loss(&mut nll, &mut session.room, &cpu, &batch.rows, &batch.targets, batch.tokens(), weight)
        .unwrap();
    let mut seen = Capture::default();
    let trained = Trained { layout: None, freeze_a: false };
    model
        .backward(&mut session.room, &mut grads, &cpu, &input, &none, trained, DropoutKey::NONE, &mut seen)
        .unwrap();
    (batch, seen)
}

/// φ of every weight of a module, dense: w g and w² F.
fn dense(w: &[f32], o: usize, i: usize, batch: &Batch, x: &[f32], dy: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let samples = batch.bounds.len() - 1;
    let n = batch.rows.len() as f64;
    let (mut first, mut second) = (vec![0.0; o * i], vec![0.0; o * i]);
    for b in batch.bounds.windows(2) {
        let own = batch.rows.iter().filter(|r| (b[0]..b[1]).contains(r)).count() as f64;
        for (at, (f, s)) in first.iter_mut().zip(&mut second).enumerate() {
            let (r, c) = (at / i, at % i);
            let g: f64 = (b[0] as usize..b[1] as usize)
                .map(|t| f64::from(dy[t * o + r]) * f64::from(x[t * i + c]))
                .sum();
            *f += g;
            *s += (n / own).powi(2) * g * g / samples as f64;
        }
    }
    for at in 0..o * i {
        let w = f64::from(w[at]);
        first[at] *= w;
        second[at] *= w * w;
    }
    (first, second)
}

/// Scores of the rows (columns) of one module.
fn member(importance: Importance, first: &[f64], second: &[f64], i: usize, rows: bool) -> Vec<f64> {
    let n = if rows { first.len() / i } else { i };
    let of = |a: usize| (0..first.len()).filter(move |at| if rows { at / i == a } else { at % i == a });
    (0..n)
        .map(|a| match importance {
            Importance::Taylor1 => of(a).map(|at| first[at].abs()).sum(),
            Importance::Taylor2 => of(a).map(|at| second[at].abs()).sum(),
            Importance::TaylorMix => of(a).map(|at| (first[at] - 0.5 * second[at]).abs()).sum(),
            Importance::Vector1 => of(a).map(|at| first[at]).sum::<f64>().abs(),
            _ => of(a).map(|at| first[at] - 0.5 * second[at]).sum(),
        })
        .collect()
}

fn reduce(how: Reduce, v: &[f64]) -> f64 {
    match how {
        Reduce::Sum => v.iter().sum(),
        Reduce::Mean => v.iter().sum::<f64>() / v.len() as f64,
        Reduce::Max => v.iter().copied().reduce(f64::max).unwrap(),
        Reduce::Prod => v.iter().product(),
    }
}

/// What math.md 1.3 keeps of one layer, from the members' scores.
fn kept(m: &[Vec<f64>; 7], o: &PruneOptions, heads: usize, channels: usize) -> KeptLayer {
    let whole = o.importance == Importance::Vector2;
    let group = |g: usize| -> f64 {
        let owner = |h: usize| if o.gqa == Gqa::Correct { h / 4 } else { h % 8 };
        let row = |j: usize| -> [f64; 4] {
            let over = |x: &Vec<f64>| (0..32).filter(|&h| owner(h) == g).map(|h| x[h * K + j]).sum();
            [m[1][g * K + j], m[2][g * K + j], over(&m[0]), over(&m[3])]
        };
        if whole {
            let sums: Vec<f64> = (0..4).map(|c| (0..K).map(|j| row(j)[c]).sum::<f64>().abs()).collect();
            reduce(o.reduce, &sums)
        } else {
            (0..K).map(|j| reduce(o.reduce, &row(j))).sum()
        }
    };
    let channel = |c: usize| {
        let v = [m[4][c], m[5][c], m[6][c]];
        reduce(o.reduce, &if whole { v.map(f64::abs) } else { v })
    };
    let best = |scores: Vec<f64>, n: usize| {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(n);
        order.sort_unstable();
        order
    };
    KeptLayer {
        kv_heads: best((0..8).map(group).collect(), heads),
        mlp: best((0..50).map(channel).collect(), channels),
    }
}

#[test]
fn every_importance_reduction_and_counting_keeps_what_the_dense_definition_keeps() {
    let dir = world(json!({}), "F32");
    let (batch, seen) = capture(dir.path());
    let base = open(&dir.path().join("model"));
    let mut phi = BTreeMap::new();
    for (&m, (x, dy)) in &seen.0 {
        let (o, i) = base.config().dims(m.target, m.layer);
        let w = base.weights().tensor(&m.weight()).unwrap().to_f32();
        phi.insert(m, dense(&w, o, i, &batch, x, dy));
    }
    let mut plans = Vec::new();
    for importance in Importance::ALL.into_iter().filter(|i| i.needs_calibration()) {
        for reduce in Reduce::ALL {
            for gqa in Gqa::ALL {
                let o = PruneOptions { reduce, gqa, ..options(dir.path(), 0.5, importance) };
                prune(o.clone()).unwrap();
                let plan = Pruning::open(&o.out).unwrap().unwrap();
                assert_eq!(
                    (plan.importance.as_str(), plan.reduce.as_str(), plan.gqa.as_str()),
                    (importance.name(), reduce.name(), gqa.name())
                );
                for (layer, got) in plan.layers.iter().enumerate() {
                    let members = Target::ALL.map(|target| {
                        let m = Module { layer, target };
                        let (first, second) = &phi[&m];
                        let i = base.config().dims(target, layer).1;
                        member(importance, first, second, i, target.prunes_rows())
                    });
                    assert_eq!(got, &kept(&members, &o, 4, 25), "{importance} {reduce} {gqa} layer {layer}");
                }
                plans.push(plan.layers);
            }
        }
    }
    plans.sort_by_key(|p| format!("{p:?}"));
    plans.dedup();
    assert!(plans.len() >= 20, "only {} of 40 plans differ: the test could not fail", plans.len());
}

/// Values of tensor `name`, with its width.
fn values(c: &Checkpoint, name: &str) -> (Vec<f32>, usize) {
    let t = c.weights().tensor(name).unwrap();
    (t.to_f32(), t.shape().last().copied().unwrap())
}

fn check_tensors(base: &Checkpoint, pruned: &Checkpoint, plan: &Pruning) {
    let mut linears = BTreeMap::new();
    for m in base.config().modules() {
        linears.insert(m.weight(), (m, true));
        linears.insert(m.bias(), (m, false));
    }
    for (name, _) in pruned.expected() {
        let ((full, i), (got, _)) = (values(base, &name), values(pruned, &name));
        let expected: Vec<f32> = match linears.get(&name) {
            Some((m, weight)) => {
                let layer = &plan.layers[m.layer];
                let heads = |per: usize| -> Vec<usize> {
                    layer.kv_heads.iter().flat_map(|g| g * per * K..(g + 1) * per * K).collect()
                };
                let axis = match m.target {
                    Target::Q | Target::O => heads(4),
                    Target::K | Target::V => heads(1),
                    _ => layer.mlp.clone(),
                };
                match (weight, matches!(m.target, Target::O | Target::Down)) {
                    (true, false) => axis.iter().flat_map(|r| full[r * i..(r + 1) * i].to_vec()).collect(),
                    (true, true) => full
                        .chunks(i)
                        .flat_map(|row| axis.iter().map(|&c| row[c]).collect::<Vec<_>>())
                        .collect(),
                    (false, false) => axis.iter().map(|&r| full[r]).collect(),
                    (false, true) => full,
                }
            }
            None => full,
        };
        assert_eq!(got, expected, "{name}");
    }
}

#[test]
fn folders_hold_the_rows_and_columns_that_stay() {
    for (changes, dtype, ratio, layers, model_type) in [
        (json!({}), "F32", 0.2, None, "mistral"),
        (json!({}), "BF16", 0.5, None, "llama"),
        (json!({"attention_bias": true, "mlp_bias": true}), "F16", 0.8, None, "llama"),
        (json!({"tie_word_embeddings": true}), "F32", 0.4, None, "mistral"),
        (json!({"attention_bias": true}), "F32", 0.4, Some(1..2), "anabranch-llama"),
    ] {
        let dir = world(changes, dtype);
        for importance in [Importance::L1, Importance::L2, Importance::Random, Importance::Taylor1] {
            let o = PruneOptions { layers: layers.clone(), ..options(dir.path(), ratio, importance) };
            let report = prune(o.clone()).unwrap();
            let (base, pruned) = (open(&o.model), open(&o.out));
            let plan = pruned.pruning().unwrap();
            assert_eq!(plan.base, base.base_model().unwrap());
            assert_eq!((report.model_type, report.ratio), (model_type, ratio));
            assert_eq!(report.transformers_loads, model_type != "anabranch-llama");
            assert_eq!(report.parameters_after, pruned.config().parameters());
            assert_eq!(pruned.config().head_dim, K);
            if layers.is_some() {
                assert_eq!(plan.layers[0].kv_heads.len(), 8);
            }
            check_tensors(&base, &pruned, plan);
            assert!(o.out.join("tokenizer.json").exists());
            assert!(Provenance::verify(&o.out).unwrap().values().all(|v| *v == Verdict::Same));
            let provenance = pruned.provenance().unwrap();
            assert_eq!(provenance.base_fingerprint.as_deref(), Some(base.fingerprint().unwrap()));
            assert_eq!(provenance.model_fingerprint.as_deref(), Some(pruned.fingerprint().unwrap()));
            let text = serde_json::to_string(provenance).unwrap();
            assert!(!text.contains(dir.path().to_str().unwrap()), "a path: {text}");
        }
    }
}

/// The perplexity of `dir`'s model on the calibration samples of `world`.
fn perplexity(world: &Path, model: &Path) -> f64 {
    let base = open(&world.join("model"));
    let c = Calibration::read(&world.join("text.txt"), &base, SAMPLES, TOKENS, force().seed).unwrap();
    c.perplexity::<_, f32>(&Cpu::new(1).unwrap(), &open(model)).unwrap()
}

/// The tensors of the model that [`world`] makes.
fn tensors() -> Vec<seeded::Tensor> {
    seeded::checkpoint(&config(json!({})), 5)
}

/// A folder like `model` beside it, with other weights.
fn variant(dir: &Path, tensors: &[seeded::Tensor]) -> PathBuf {
    let path = dir.join("variant");
    std::fs::create_dir_all(&path).unwrap();
    std::fs::copy(dir.join("model/config.json"), path.join("config.json")).unwrap();
    seeded::write_tensors(&path.join("model.safetensors"), tensors, "F32");
    path
}

#[test]
fn a_pruned_model_is_the_full_one_with_zeros() {
    let dir = world(json!({}), "F32");
    let o = options(dir.path(), 0.6, Importance::Taylor1);
    let report = prune(o.clone()).unwrap();
    let plan = Pruning::open(&o.out).unwrap().unwrap();
    let mut masked = tensors();
    for t in &mut masked {
        let Some(layer) = t.name.strip_prefix("model.layers.").and_then(|r| r[..1].parse::<usize>().ok())
        else {
            continue;
        };
        let kept = &plan.layers[layer];
        let stays = |c: usize| {
            if t.name.contains("o_proj") {
                kept.kv_heads.contains(&(c / (4 * K)))
            } else {
                !t.name.contains("down_proj") || kept.mlp.contains(&c)
            }
        };
        let width = t.shape[t.shape.len() - 1];
        t.values.iter_mut().enumerate().for_each(|(at, x)| *x *= f32::from(u8::from(stays(at % width))));
    }
    let zeroed = perplexity(dir.path(), &variant(dir.path(), &masked));
    let after = report.perplexity_after.unwrap();
    assert!((after / zeroed - 1.0).abs() <= 1e-5, "{after} is not {zeroed}");
    let before = report.perplexity_before.unwrap();
    let full = perplexity(dir.path(), &o.model);
    assert!((before / full - 1.0).abs() <= 1e-6, "{before} is not {full}");
    assert!((after / before - 1.0).abs() >= 1e-3, "pruning by 0.6 changed nothing");
}

#[test]
fn scores_are_derivatives_of_the_loss() {
    let dir = world(json!({}), "F32");
    let base = open(&dir.path().join("model"));
    let c = Calibration::read(&dir.path().join("text.txt"), &base, SAMPLES, TOKENS, force().seed).unwrap();
    let cpu = Cpu::new(1).unwrap();
    let (mut observer, _) = c.gradients::<_, f32>(&cpu, &base, Importance::Vector1, 0..2, 0).unwrap();
    let members = observer.take(1).unwrap();
    for target in Target::ALL {
        let name = Module { layer: 1, target }.weight();
        // The rows (columns) with the largest scores, whose differences stand above the rounding of the loss.
        let scores = &members[target as usize];
        let at = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
        let loss = |factor: f32| {
            let mut all = tensors();
            let t = all.iter_mut().find(|t| t.name == name).unwrap();
            let width = t.shape[1];
            for (n, x) in t.values.iter_mut().enumerate() {
                let place = if target.prunes_rows() { n / width } else { n % width };
                *x *= if place == at { factor } else { 1.0 };
            }
            perplexity(dir.path(), &variant(dir.path(), &all)).ln()
        };
        let e = 0.02;
        let slope = (loss(1.0 + e) - loss(1.0 - e)) / (2.0 * f64::from(e));
        let score = scores[at];
        assert!(
            (slope.abs() - score).abs() <= 0.01 * score + 2e-5,
            "{name} {at}: |dL| {} is not {score}",
            slope.abs()
        );
    }
}

#[test]
fn threads_and_recomputation_change_no_byte_and_bf16_works() {
    let dir = world(json!({}), "BF16");
    let o = options(dir.path(), 0.4, Importance::TaylorMix);
    let read = || {
        let names = ["model.safetensors", "pruning.json", "config.json", "anabranch.json"];
        names.map(|n| std::fs::read(o.out.join(n)).unwrap())
    };
    prune(o.clone()).unwrap();
    let two = read();
    let cpu = Cpu::new(1).unwrap();
    let ready = Prepared::new::<_, f32>(&cpu, o.clone(), &force()).unwrap();
    let total = ready.plan.total();
    ready.run::<_, f32>(&cpu, &force()).unwrap();
    assert_eq!(read(), two);
    let tight = Common { memory_limit: Some(total - 1), ..force() };
    let ready = Prepared::new::<_, f32>(&cpu, o.clone(), &tight).unwrap();
    assert!(ready.plan.total() < total);
    ready.run::<_, f32>(&cpu, &tight).unwrap();
    assert_eq!(read(), two);
    let report =
        Prepared::new::<_, bf16>(&cpu, o.clone(), &force()).unwrap().run::<_, bf16>(&cpu, &force()).unwrap();
    let f32_before = perplexity(dir.path(), &o.model);
    assert!((report.perplexity_before.unwrap() / f32_before - 1.0).abs() <= 0.05);
}

#[test]
fn the_ratio_follows_from_the_memory() {
    let dir = world(json!({}), "F32");
    let base = open(&dir.path().join("model"));
    let shape = TrainingShape { batch: 2, seq: 64, rank: 4, recompute: Some(1), ..TrainingShape::default() };
    let total = |ratio: f64| {
        let pruned = Cut::new(ratio).apply(base.config()).unwrap();
        edge::plan(&pruned, &shape, 1).unwrap().total()
    };
    let memory = total(0.3);
    let expected = (1..100).map(|i| f64::from(i) / 100.0).find(|&r| total(r) <= memory).unwrap();
    let o = PruneOptions {
        amount: Amount::Memory(memory),
        shape: shape.clone(),
        ..options(dir.path(), 0.0, Importance::L2)
    };
    let report = prune(o.clone()).unwrap();
    assert_eq!(report.ratio, expected);
    let training = report.training.unwrap();
    assert_eq!((training.memory, training.recomputed), (memory, 1));
    assert!(training.total <= memory);
    let plan = Pruning::open(&o.out).unwrap().unwrap().training_plan.unwrap();
    assert_eq!((plan.batch, plan.seq, plan.rank, plan.recompute), (2, 64, 4, 1));
    assert_eq!((plan.targets.len(), plan.precision.as_deref()), (7, Some("bf16")));
    for (memory, expected) in [(1, "not even ratio"), (1 << 40, "the full model trains in it")] {
        let err = prune(PruneOptions { amount: Amount::Memory(memory), ..o.clone() }).unwrap_err();
        assert!(err.to_string().contains(expected), "{err}");
    }
}

#[test]
fn bad_input_is_refused_and_nothing_is_left() {
    let dir = world(json!({}), "F32");
    let good = options(dir.path(), 0.4, Importance::Taylor1);
    let refused = |o: PruneOptions, expected: &str| {
        let err = prune(o.clone()).unwrap_err();
        assert!(err.to_string().contains(expected), "expected {expected}, found {err}");
        assert!(!o.out.exists() && !dir.path().join("out.partial").exists(), "something was left");
        err
    };
    for ratio in [0.0, 1.0, f64::NAN, -1.0] {
        let err =
            refused(PruneOptions { amount: Amount::Ratio(ratio), ..good.clone() }, "above 0 and below 1");
        assert_eq!(err.exit_code(), 2);
    }
    refused(PruneOptions { amount: Amount::Ratio(0.999), ..good.clone() }, "each needs at least one");
    refused(PruneOptions { calibration: None, ..good.clone() }, "--calibration FILE");
    refused(PruneOptions { calibration: Some(dir.path().join("gone")), ..good.clone() }, "gone");
    refused(PruneOptions { samples: 9999, ..good.clone() }, "--samples asks for 9999");
    refused(PruneOptions { sample_tokens: 65, ..good.clone() }, "64 positions");
    refused(PruneOptions { layers: Some(1..3), ..good.clone() }, "within 0..2");
    refused(PruneOptions { model: dir.path().join("text.txt"), ..good.clone() }, "expected a model's folder");

    let cpu = Cpu::new(1).unwrap();
    let tight = Common { memory_limit: Some(1000), ..force() };
    let err = Prepared::new::<_, f32>(&cpu, good.clone(), &tight).map(|_| ()).unwrap_err();
    assert!(matches!(err, Error::Memory(_)), "{err}");

    let mut bad = tensors();
    let t = bad.iter_mut().find(|t| t.name == "model.layers.1.mlp.up_proj.weight").unwrap();
    t.values[7] = f32::NAN;
    let path = good.model.join("model.safetensors");
    seeded::write_tensors(&path, &bad, "F32");
    for importance in [Importance::Taylor1, Importance::L1, Importance::Random] {
        refused(PruneOptions { importance, ..good.clone() }, "model.layers.1.mlp.up_proj.weight holds NaN");
    }
    refused(
        PruneOptions { importance: Importance::L1, calibration: None, ..good.clone() },
        "layer 1: the importance of MLP channel 0 is NaN",
    );
    seeded::write_tensors(&path, &tensors(), "F32");
    prune(good.clone()).unwrap();
    let again = PruneOptions { model: good.out.clone(), out: dir.path().join("twice"), ..good.clone() };
    assert!(prune(again).unwrap_err().to_string().contains("is pruned already"));
    let unforced = Common { seed: 3, ..Common::default() };
    let err = Prepared::new::<_, f32>(&cpu, good, &unforced).unwrap().run::<_, f32>(&cpu, &unforced);
    assert!(err.unwrap_err().to_string().contains("--force replaces it"));
}
