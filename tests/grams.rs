//! `grams`: the Gram matrices of a small model's inputs against a plain forward pass in f64.

#[path = "common/seeded.rs"]
mod seeded;

use std::path::{Path, PathBuf};

use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::input_grams::{INPUT_GRAMS, InputGrams};
use anabranch::checkpoint::module::{Module, Source, Target};
use anabranch::checkpoint::provenance::{Provenance, Verdict};
use anabranch::checkpoint::weights::{OpenOptions, Weights};
use anabranch::cpu::Cpu;
use anabranch::stage::common::Common;
use anabranch::stage::grams::{GramsOptions, GramsReport, Prepared};
use anabranch::tensor::DType;
use faer::{Mat, Row};
use serde_json::{Value, json};
use tempfile::TempDir;

const VOCAB: usize = 40;
/// D, H, G, K, F.
const SIZES: [usize; 5] = [12, 4, 2, 3, 17];
const LAYERS: usize = 2;
const EPS: f64 = 1e-5;
const THETA: f64 = 10000.0;

fn config() -> Value {
    let [d, h, g, k, f] = SIZES;
    json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": d,
           "num_attention_heads": h, "num_key_value_heads": g, "head_dim": k + 1, "intermediate_size": f,
           "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "max_position_embeddings": 64,
           "rms_norm_eps": EPS, "rope_theta": THETA, "tie_word_embeddings": false})
}

/// K: an even one.
fn head_dim() -> usize {
    SIZES[3] + 1
}

const DOCUMENTS: [&str; 4] = ["t4 t5 t6 t7 t5", "t20 t4", "t9 t9 t9 t30 t31 t5 t8", "t33 t12 t4 t6"];

fn model() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    seeded::write_model(dir.path(), &config(), 3, "F32");
    seeded::write_tokenizer(dir.path(), VOCAB);
    std::fs::write(dir.path().join("data.txt"), DOCUMENTS.join("\n\n")).unwrap();
    dir
}

fn options(dir: &TempDir, out: &str) -> GramsOptions {
    GramsOptions {
        model: dir.path().into(),
        adapter: None,
        data: vec![dir.path().join("data.txt")],
        out: dir.path().join(out),
        tokens: 8192,
        seq: 32,
        batch_tokens: 2048,
        skip_bad: false,
    }
}

fn collect(options: GramsOptions, threads: usize) -> anabranch::Result<GramsReport> {
    let cpu = Cpu::new(threads).unwrap();
    Prepared::new::<f32>(&cpu, options, &Common::default())?.run::<f32>(&cpu, &Common::default())
}

/// One adapter's B A by module, and the weights.
struct Plain {
    weights: Weights,
    adapter: Vec<(Module, Mat<f64>)>,
}

impl Plain {
    fn matrix(&self, name: &str) -> Mat<f64> {
        let t = self.weights.tensor(name).unwrap();
        let (x, columns) = (t.to_f32(), *t.shape().last().unwrap());
        Mat::from_fn(x.len() / columns, columns, |i, j| f64::from(x[i * columns + j]))
    }

    fn linear(&self, layer: usize, target: Target, x: &Mat<f64>) -> Mat<f64> {
        let module = Module { layer, target };
        let mut w = self.matrix(&module.weight());
        for (m, d) in &self.adapter {
            if *m == module {
                w += d;
            }
        }
        x * w.transpose()
    }

    fn norm(&self, layer: usize, which: &str, x: &Mat<f64>) -> Mat<f64> {
        let w = self.matrix(&format!("model.layers.{layer}.{which}.weight"));
        Mat::from_fn(x.nrows(), x.ncols(), |t, j| {
            let mean: f64 = (0..x.ncols()).map(|j| x[(t, j)].powi(2)).sum::<f64>() / x.ncols() as f64;
            x[(t, j)] / (mean + EPS).sqrt() * w[(0, j)]
        })
    }

    /// What the four inputs of each layer are, for one document.
    fn inputs(&self, ids: &[usize]) -> Vec<[Mat<f64>; 4]> {
        let [d, h, g, _, f] = SIZES;
        let (k, t) = (head_dim(), ids.len());
        let embed = self.matrix("model.embed_tokens.weight");
        let mut x = Mat::from_fn(t, d, |i, j| embed[(ids[i], j)]);
        let rope = |x: Mat<f64>| {
            Mat::from_fn(t, x.ncols(), |p, j| {
                let (head, at) = (j / k * k, j % k);
                let i = at % (k / 2);
                let angle = p as f64 * THETA.powf(-2.0 * i as f64 / k as f64);
                let (a, b) = (x[(p, head + i)], x[(p, head + i + k / 2)]);
                if at < k / 2 { a * angle.cos() - b * angle.sin() } else { b * angle.cos() + a * angle.sin() }
            })
        };
        let mut out = Vec::new();
        for l in 0..LAYERS {
            let n = self.norm(l, "input_layernorm", &x);
            let q = rope(self.linear(l, Target::Q, &n));
            let keys = rope(self.linear(l, Target::K, &n));
            let v = self.linear(l, Target::V, &n);
            let mut o = Mat::zeros(t, h * k);
            for head in 0..h {
                let kv = head / (h / g) * k;
                for p in 0..t {
                    let score = |s: usize| {
                        let dot: f64 = (0..k).map(|c| q[(p, head * k + c)] * keys[(s, kv + c)]).sum();
                        (dot / (k as f64).sqrt()).exp()
                    };
                    let p_of = Row::<f64>::from_fn(p + 1, score);
                    let total: f64 = p_of.iter().sum();
                    for c in 0..k {
                        o[(p, head * k + c)] = (0..=p).map(|s| p_of[s] * v[(s, kv + c)]).sum::<f64>() / total;
                    }
                }
            }
            let mid = &x + self.linear(l, Target::O, &o);
            let n2 = self.norm(l, "post_attention_layernorm", &mid);
            let (gate, up) = (self.linear(l, Target::Gate, &n2), self.linear(l, Target::Up, &n2));
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let act = Mat::from_fn(t, f, |i, j| silu(gate[(i, j)]) * up[(i, j)]);
            x = &mid + self.linear(l, Target::Down, &act);
            out.push([n, o, n2, act]);
        }
        out
    }
}

/// `XᵀX / T` of each layer's inputs over these documents, whose tokens are BOS, their words, and EOS.
fn plain_grams(plain: &Plain, documents: &[&str]) -> (usize, Vec<[Mat<f64>; 4]>) {
    let [d, h, _, _, f] = SIZES;
    let widths = [d, h * head_dim(), d, f];
    let mut sums: Vec<[Mat<f64>; 4]> = (0..LAYERS).map(|_| widths.map(|w| Mat::zeros(w, w))).collect();
    let mut tokens = 0;
    for text in documents {
        let words = text.split(' ').map(|w| w[1..].parse().unwrap());
        let ids: Vec<usize> = [1].into_iter().chain(words).chain([2]).collect();
        tokens += ids.len();
        for (sums, inputs) in sums.iter_mut().zip(plain.inputs(&ids)) {
            for (sum, x) in sums.iter_mut().zip(inputs) {
                *sum += x.transpose() * &x;
            }
        }
    }
    for sum in sums.iter_mut().flatten() {
        *sum = faer::Scale(1.0 / tokens as f64) * &*sum;
    }
    (tokens, sums)
}

fn read(dir: &Path, layer: usize, source: Source) -> Mat<f64> {
    let grams = InputGrams::open(dir, OpenOptions::default()).unwrap();
    let [d, h, _, _, f] = SIZES;
    let width = [d, h * head_dim(), d, f][source as usize];
    let gram = grams.of(Module { layer, target: source.target() }, width).unwrap();
    gram.check().unwrap();
    let mut out = Mat::zeros(width, width);
    let mut row = vec![0.0; width];
    for k in 0..width {
        gram.row(k, &mut row);
        for (j, g) in row[..width - k].iter().enumerate() {
            (out[(k, k + j)], out[(k + j, k)]) = (*g, *g);
        }
    }
    out
}

#[track_caller]
fn close(dir: &Path, want: &[[Mat<f64>; 4]]) {
    for (l, want) in want.iter().enumerate() {
        for (source, want) in Source::ALL.into_iter().zip(want) {
            let err = (read(dir, l, source) - want).norm_max() / want.norm_max();
            assert!(err <= 1e-5, "layer {l} {}: {err:e}", source.name());
        }
    }
}

#[test]
fn grams_are_those_of_a_plain_forward_pass() {
    let dir = model();
    let report = collect(options(&dir, "all"), 2).unwrap();
    let plain =
        Plain { weights: Weights::open(dir.path(), OpenOptions::default()).unwrap(), adapter: vec![] };
    let (tokens, want) = plain_grams(&plain, &DOCUMENTS);
    assert_eq!((report.tokens, report.documents, report.inputs), (tokens, 4, 8));
    let out = dir.path().join("all");
    close(&out, &want);
    assert_eq!(InputGrams::open(&out, OpenOptions::default()).unwrap().tokens, tokens as u64);
    let verdicts = Provenance::verify(&out).unwrap();
    assert!(verdicts.contains_key(INPUT_GRAMS) && verdicts.values().all(|v| *v == Verdict::Same));
    let provenance = std::fs::read_to_string(out.join("anabranch.json")).unwrap();
    assert!(!provenance.contains("data.txt") && !provenance.contains(dir.path().to_str().unwrap()));
    // Batches of one document each, and any number of threads: the same sums, the same bytes.
    let small = GramsOptions { batch_tokens: 1, ..options(&dir, "small") };
    collect(small.clone(), 2).unwrap();
    close(&dir.path().join("small"), &want);
    collect(GramsOptions { out: dir.path().join("one"), ..small }, 1).unwrap();
    let bytes = |name: &str| std::fs::read(dir.path().join(name).join(INPUT_GRAMS)).unwrap();
    assert!(bytes("small") == bytes("one"));
}

#[test]
fn an_adapter_is_part_of_the_model() {
    let dir = model();
    let modules: Vec<Module> = (0..LAYERS)
        .flat_map(|layer| [Target::V, Target::Gate, Target::Down].map(|target| Module { layer, target }))
        .collect();
    let [d, _, g, _, f] = SIZES;
    let dims = |m: Module| match m.target {
        Target::V => (g * head_dim(), d),
        Target::Gate => (f, d),
        _ => (d, f),
    };
    let at = dir.path().join("adapter");
    std::fs::create_dir(&at).unwrap();
    let config = AdapterConfig::peft(2, 4.0, 0.0, &[Target::V, Target::Gate, Target::Down], None);
    let spec =
        |&module: &Module| PairSpec { module, rank: 2, dims: dims(module), dtypes: (DType::F32, DType::F32) };
    let mut writer = AdapterWriter::create(&at, config, modules.iter().map(spec).collect()).unwrap();
    let mut updates = vec![];
    for &m in &modules {
        let (o, i) = dims(m);
        let name = format!("{m}");
        let a = seeded::normal(8, &name, 2 * i, 0.0, 0.3);
        let b = seeded::normal(9, &name, o * 2, 0.0, 0.3);
        writer.write_f32(m, &a, &b).unwrap();
        let a = Mat::from_fn(2, i, |k, j| f64::from(a[k * i + j]));
        updates.push((m, Mat::from_fn(o, 2, |x, k| 2.0 * f64::from(b[x * 2 + k])) * a));
    }
    writer.finish(None, Provenance::new("train")).unwrap();
    let ask = GramsOptions { adapter: Some(at), ..options(&dir, "with") };
    collect(ask, 2).unwrap();
    let plain =
        Plain { weights: Weights::open(dir.path(), OpenOptions::default()).unwrap(), adapter: updates };
    close(&dir.path().join("with"), &plain_grams(&plain, &DOCUMENTS).1);
}

#[test]
fn tokens_are_a_limit_in_whole_documents() {
    let dir = model();
    let report = collect(GramsOptions { tokens: 12, ..options(&dir, "few") }, 1).unwrap();
    assert!(report.tokens <= 12 && report.documents >= 1 && report.documents < 4, "{report:?}");
    // At least one document.
    let report = collect(GramsOptions { tokens: 1, ..options(&dir, "one") }, 1).unwrap();
    assert_eq!(report.documents, 1);
}

#[test]
fn what_cannot_be_collected_is_refused_and_nothing_is_left() {
    let dir = model();
    let refused = |options: GramsOptions, common: &Common| {
        let cpu = Cpu::new(1).unwrap();
        let done = Prepared::new::<f32>(&cpu, options, common).and_then(|p| p.run::<f32>(&cpu, common));
        done.map(|_| "not refused".to_string()).unwrap_or_else(|e| e.to_string())
    };
    let all = Common::default();
    let text = refused(GramsOptions { tokens: 0, ..options(&dir, "x") }, &all);
    assert!(text.contains("--tokens is 0"), "{text}");
    let text = refused(GramsOptions { batch_tokens: 0, ..options(&dir, "x") }, &all);
    assert!(text.contains("--batch-tokens is 0"), "{text}");
    let text = refused(GramsOptions { seq: 65, ..options(&dir, "x") }, &all);
    assert!(text.contains("64"), "{text}");
    let limited = Common { memory_limit: Some(1000), ..Common::default() };
    let text = refused(options(&dir, "x"), &limited);
    assert!(text.contains("the limit is 1000 B"), "{text}");
    let empty = dir.path().join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let text = refused(GramsOptions { data: vec![empty], ..options(&dir, "x") }, &all);
    assert!(text.contains("no training data"), "{text}");
    // A weight that is NaN is named, and no folder stays.
    let weights: Vec<_> = seeded::checkpoint(&config(), 3)
        .into_iter()
        .map(|mut t| {
            if t.name.ends_with("layers.1.mlp.up_proj.weight") {
                t.values[5] = f32::NAN;
            }
            t
        })
        .collect();
    seeded::write_tensors(&dir.path().join("model.safetensors"), &weights, "F32");
    let text = refused(options(&dir, "x"), &all);
    assert!(text.contains("layers.1.mlp.up_proj.weight holds NaN"), "{text}");
    let left: Vec<PathBuf> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.iter().all(|p| !p.to_str().unwrap().contains("/x")), "{left:?}");
}
