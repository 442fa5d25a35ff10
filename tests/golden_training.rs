//! Twenty AdamW steps from the same adapter on the same documents as PEFT (`tools/golden/peft_train.py`): losses,
//! gradient norms and the learned change of every module.

#[path = "common/seeded.rs"]
mod seeded;

use std::process::Command;

use anabranch::checkpoint::adapter::{name_a, name_b};
use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::cpu::Cpu;
use anabranch::data::batch::Batch;
use anabranch::data::documents::Document;
use anabranch::model::adapters::Layout;
use anabranch::model::forward::DropoutKey;
use anabranch::model::packing::PackedWeights;
use anabranch::model::room::{Head, Keep, RoomSize};
use anabranch::model::rope::Tables;
use anabranch::model::schedule::LearningRate;
use anabranch::model::trainer::Trainer;
use anabranch::model::weights::Model;
use anabranch::ops::adamw::Hyper;
use anabranch::tensor::Real;
use half::bf16;
use safetensors::SafeTensors;
use serde_json::{Value, json};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn number(v: &Value, key: &str) -> f64 {
    v[key].as_f64().unwrap_or_else(|| panic!("{key} is {}", v[key]))
}

/// `B A` of `B[O, R]` and `A[R, I]`, in f64.
fn product(b: &[f32], a: &[f32], rank: usize) -> Vec<f64> {
    let i = a.len() / rank;
    let mut w = vec![0.0; b.len() / rank * i];
    for (row, b) in w.chunks_exact_mut(i).zip(b.chunks_exact(rank)) {
        for (&b, a) in b.iter().zip(a.chunks_exact(i)) {
            row.iter_mut().zip(a).for_each(|(w, &a)| *w += f64::from(b) * f64::from(a));
        }
    }
    w
}

/// The Frobenius norm of `x − y`.
fn distance(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt()
}

/// What PEFT did: the JSON and the trained factors.
fn stored() -> (Value, Vec<u8>) {
    let read = |name: &str| std::fs::read(format!("{GOLDEN}/{name}")).expect("stored");
    (serde_json::from_slice(&read("peft_train.json")).expect("JSON"), read("peft_train.safetensors"))
}

fn run_of<'a>(golden: &'a Value, name: &str) -> &'a Value {
    golden["runs"].as_array().expect("runs").iter().find(|r| r["name"] == name).expect("the run")
}

/// How near a run comes to PEFT's in f32.
struct Near {
    /// Losses and norms of gradients, of themselves.
    numbers: f64,
    /// What is learned, of the change.
    learned: f64,
}

/// What sums in another order do.
const SINGLE: Near = Near { numbers: 1e-4, learned: 5e-3 };
/// What activations, weights and adapters in eight bits do.
const HALF: Near = Near { numbers: 2e-2, learned: 0.08 };

/// The run `name` on `threads` threads, each step's documents in `accumulate` micro-batches, `recomputed` layers computed
/// twice; the trained parameters.
fn follows_peft(name: &str, threads: usize, accumulate: usize, recomputed: usize) -> Vec<f32> {
    follows::<f32>(name, threads, accumulate, recomputed, PackedWeights::NONE, SINGLE)
}

/// The same in `T`, with the weights of `packed` packed.
fn follows<T: Real>(
    name: &str,
    threads: usize,
    accumulate: usize,
    recomputed: usize,
    packed: PackedWeights,
    near: Near,
) -> Vec<f32> {
    let (golden, bytes) = stored();
    let stored = SafeTensors::deserialize(&bytes).expect("safetensors");
    let run = run_of(&golden, name);
    let seed = number(&golden, "seed") as u64;
    let rank = number(&golden, "rank") as usize;
    let scale = number(&golden, "alpha") / rank as f64;
    let freeze_a = run["freeze_a"] == true;

    let dir = tempfile::tempdir().expect("a temporary folder");
    seeded::write_model(dir.path(), &golden["config"], seed, "F32");
    let backend = Cpu::new(threads).expect("threads");
    let checkpoint = Checkpoint::open(dir.path(), OpenOptions::default()).expect("a checkpoint");
    let mut model = Model::new(&backend, &checkpoint).expect("a model");
    model.pack::<T>(&backend, packed, || Ok(())).expect("memory");
    let layout = Layout::uniform(&model.config, &Target::ALL, rank, scale as f32);
    let documents: Vec<Document> = golden["documents"]
        .as_array()
        .expect("documents")
        .iter()
        .map(|d| {
            let ids = serde_json::from_value(d["ids"].clone()).expect("ids");
            Document::supervised_from(ids, number(d, "supervised_from") as usize)
        })
        .collect();
    let longest = documents.iter().map(|d| d.ids.len()).max().expect("documents");
    let per_step = number(&golden, "documents_per_step") as usize;
    let tokens = per_step / accumulate * longest;
    let size = RoomSize {
        tokens,
        copies: 1,
        keep: Keep::Training { recomputed },
        table_rows: 0,
        ranks: layout.ranks(),
        dropout: false,
        dtype: checkpoint.dtype().expect("a dtype"),
        head: Head::Loss(tokens),
    };
    let tables = Tables::new(&model.config, longest);
    let mut trainer: Trainer<'_, Cpu, T> =
        Trainer::new(&backend, &model, layout.clone(), freeze_a, tables, size).expect("buffers");

    let mut start = vec![f32::NAN; layout.end()];
    for (module, lora) in layout.iter() {
        let (o, i) = model.config.dims(module.target, module.layer);
        let a = seeded::normal(seed, &name_a(module), rank * i, 0.0, number(&golden, "a_std"));
        let b = seeded::normal(seed, &name_b(module), o * rank, 0.0, number(run, "b_std"));
        start[lora.a..lora.a + rank * i].copy_from_slice(&a);
        start[lora.b..lora.b + o * rank].copy_from_slice(&b);
    }
    trainer.state.params.copy_from_slice(&start);

    let steps = number(&golden, "steps") as u64;
    let decay = run["schedule"].as_str().expect("a schedule").parse().expect("a known schedule");
    let rate = LearningRate::new(number(&golden, "lr"), decay, number(run, "warmup"), steps).expect("a rate");
    for step in 0..steps as usize {
        let taken: Vec<&Document> =
            (0..per_step).map(|i| &documents[(step * per_step + i) % documents.len()]).collect();
        let batches: Vec<Batch> =
            taken.chunks(per_step / accumulate).map(|d| Batch::of(d.iter().copied())).collect();
        let hyper = Hyper {
            lr: rate.at(step as u64),
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: number(run, "weight_decay"),
            max_norm: number(&golden, "max_grad_norm"),
        };
        let got = trainer.step(&batches, hyper, DropoutKey::NONE, step as u64 + 1).expect("a step");
        for (key, got, tolerance) in [
            ("losses", got.loss, near.numbers),
            ("grad_norms", got.grad_norm, near.numbers),
            ("learning_rates", hyper.lr, 1e-12),
        ] {
            let want = run[key][step].as_f64().expect("a number");
            assert!((got - want).abs() <= tolerance * want.abs(), "step {step}: {key} {got}, PEFT's {want}");
        }
    }

    let end = &trainer.state.params;
    let mut worst = 0.0f64;
    for (module, lora) in layout.iter() {
        let (o, i) = model.config.dims(module.target, module.layer);
        let (a, b) = (lora.a..lora.a + rank * i, lora.b..lora.b + o * rank);
        let [their_a, their_b] = [name_a(module), name_b(module)]
            .map(|n| seeded::f32s(&stored.tensor(&format!("{name}/{n}")).expect("a factor")));
        let before = product(&start[b.clone()], &start[a.clone()], rank);
        let theirs = product(&their_b, &their_a, rank);
        let (off, change) =
            (distance(&product(&end[b], &end[a.clone()], rank), &theirs), distance(&theirs, &before));
        assert!(
            change > 0.0 && off <= near.learned * change,
            "{}: {off:.1e} off a change of {change:.1e}",
            module.path()
        );
        assert!(!freeze_a || end[a.clone()] == start[a], "{}: A is frozen and changed", module.path());
        worst = worst.max(off / change);
    }
    println!("{name}: the learned change is at most {worst:.1e} off");
    trainer.state.params.to_vec()
}

#[test]
fn cosine_schedule_from_a_zero_b() {
    follows_peft("cosine", 2, 1, 0);
}

#[test]
fn linear_schedule_with_weight_decay_from_a_trained_adapter() {
    follows_peft("linear_decay", 2, 1, 0);
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let one = follows_peft("linear_decay", 1, 1, 0);
    for threads in [2, 3] {
        assert!(follows_peft("linear_decay", threads, 1, 0) == one, "{threads} threads");
    }
}

#[test]
fn in_half_precision_the_same_bytes_on_any_number_of_threads() {
    let one = follows::<bf16>("linear_decay", 1, 1, 0, PackedWeights::NONE, HALF);
    for threads in [2, 3] {
        assert!(
            follows::<bf16>("linear_decay", threads, 1, 0, PackedWeights::NONE, HALF) == one,
            "{threads} threads"
        );
    }
}

#[test]
fn the_same_bytes_whichever_weights_are_packed() {
    let none = follows::<f32>("linear_decay", 2, 1, 0, PackedWeights::NONE, SINGLE);
    let halves = follows::<bf16>("linear_decay", 2, 1, 0, PackedWeights::NONE, HALF);
    for count in 1..=PackedWeights::TRAINING.passes() {
        let packed = PackedWeights::TRAINING.first(count);
        assert!(follows::<f32>("linear_decay", 2, 1, 0, packed, SINGLE) == none, "{packed:?}");
        assert!(follows::<bf16>("linear_decay", 2, 1, 0, packed, HALF) == halves, "{packed:?}");
    }
}

/// These runs with other instructions, in a process of its own that is asked for them; tiles are made one at a time where
/// the processor has none.
#[test]
#[cfg(target_arch = "x86_64")]
fn with_other_instructions() {
    let wide = is_x86_feature_detected!("avx512f");
    for (set, sensible) in [
        ("baseline", is_x86_feature_detected!("avx2")),
        ("avx2", wide),
        ("avx512", wide),
        ("avx512-bf16", is_x86_feature_detected!("avx512bf16")),
        ("amx", wide && cfg!(feature = "emulator")),
    ] {
        if !sensible {
            println!("skipped {set}: this processor has nothing wider, or not this");
            continue;
        }
        let tests = [
            "zero_b",
            "trained_adapter",
            "frozen_a",
            "any_number_of_threads",
            "and_recomputed",
            "weights_are_packed",
        ];
        let mut run = Command::new(std::env::current_exe().expect("this program"));
        let done = run.args(tests).env("ANABRANCH_INSTRUCTIONS", set).output().expect("it starts");
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && said.contains("7 passed"), "{set}: {said}");
    }
}

#[test]
fn frozen_a() {
    follows_peft("freeze_a", 2, 1, 0);
}

#[test]
fn accumulated_over_two_parts_of_each_step_and_recomputed() {
    follows_peft("linear_decay", 2, 2, 1);
}

/// The same through the command line: documents from a file, the start from a PEFT folder.
#[test]
fn the_train_command_does_the_same() {
    let name = "linear_decay";
    let (golden, bytes) = stored();
    let stored = SafeTensors::deserialize(&bytes).expect("safetensors");
    let run = run_of(&golden, name);
    let seed = number(&golden, "seed") as u64;
    let rank = number(&golden, "rank") as usize;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [model, start, data, out] = ["model", "start", "data.jsonl", "out"].map(|n| dir.path().join(n));
    std::fs::create_dir(&model).expect("a folder");
    seeded::write_model(&model, &golden["config"], seed, "F32");
    seeded::write_tokenizer(&model, number(&golden["config"], "vocab_size") as usize);

    // Text where all but BOS is supervised, else a prompt and its completion.
    let mut lines = String::new();
    for doc in golden["documents"].as_array().expect("documents") {
        let ids: Vec<u32> = serde_json::from_value(doc["ids"].clone()).expect("ids");
        let inner = &ids[1..ids.len() - 1];
        let (prompt, completion) = inner.split_at(number(doc, "supervised_from") as usize - 1);
        let line = match prompt {
            [] => json!({"text": seeded::words(inner)}),
            _ => {
                json!({"prompt": seeded::words(prompt), "completion": format!(" {}", seeded::words(completion))})
            }
        };
        lines += &format!("{line}\n");
    }
    std::fs::write(&data, lines).expect("data written");

    let prefix = format!("{name}/");
    let factors: Vec<seeded::Tensor> = stored
        .tensors()
        .into_iter()
        .filter_map(|(full, t)| {
            let tensor = full.strip_prefix(&prefix)?.to_string();
            let std = match tensor.contains("lora_A") {
                true => number(&golden, "a_std"),
                false => number(run, "b_std"),
            };
            Some(seeded::Tensor::seeded(seed, tensor, t.shape().to_vec(), 0.0, std))
        })
        .collect();
    let targets: Vec<&str> = Target::ALL.iter().map(|t| t.proj()).collect();
    let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": golden["rank"],
                        "lora_alpha": golden["alpha"], "target_modules": targets});
    std::fs::create_dir(&start).expect("a folder");
    std::fs::write(start.join("adapter_config.json"), config.to_string())
        .expect("adapter_config.json written");
    seeded::write_tensors(&start.join("adapter_model.safetensors"), &factors, "F32");

    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.args([
        "train",
        "--device",
        "cpu",
        "--precision",
        "f32",
        "--no-shuffle",
        "--no-pack",
        "--seq",
        "64",
        "-q",
    ]);
    for (flag, path) in [("--model", &model), ("--init-adapter", &start), ("--data", &data), ("--out", &out)]
    {
        command.arg(flag).arg(path);
    }
    for (flag, value) in [
        ("--rank", &golden["rank"]),
        ("--alpha", &golden["alpha"]),
        ("--steps", &golden["steps"]),
        ("--batch", &golden["documents_per_step"]),
        ("--lr", &golden["lr"]),
        ("--max-grad-norm", &golden["max_grad_norm"]),
        ("--warmup", &run["warmup"]),
        ("--weight-decay", &run["weight_decay"]),
    ] {
        command.arg(flag).arg(value.to_string());
    }
    command.arg("--schedule").arg(run["schedule"].as_str().expect("a schedule"));
    let done = command.output().expect("the binary runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));

    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).expect("metrics.jsonl");
    let losses = run["losses"].as_array().expect("losses");
    assert_eq!(metrics.lines().count(), losses.len());
    for (line, want) in metrics.lines().zip(losses) {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let (got, want) = (number(&line, "loss"), want.as_f64().expect("a loss"));
        assert!((got - want).abs() <= 1e-4 * want, "{line}: PEFT's loss is {want}");
    }
    let trained = std::fs::read(out.join("adapter_model.safetensors")).expect("an adapter");
    let trained = SafeTensors::deserialize(&trained).expect("safetensors");
    assert_eq!(trained.len(), factors.len());
    for a in factors.iter().filter(|t| t.name.contains("lora_A")) {
        let b_name = a.name.replace("lora_A", "lora_B");
        let b = factors.iter().find(|t| t.name == b_name).expect("B beside A");
        let update = |file: &SafeTensors<'_>, prefix: &str| {
            let [b, a] = [&b_name, &a.name]
                .map(|n| seeded::f32s(&file.tensor(&format!("{prefix}{n}")).expect("a factor")));
            product(&b, &a, rank)
        };
        let (ours, theirs) = (update(&trained, ""), update(&stored, &prefix));
        let (off, change) =
            (distance(&ours, &theirs), distance(&theirs, &product(&b.values, &a.values, rank)));
        assert!(
            change > 0.0 && off <= SINGLE.learned * change,
            "{}: {off:.1e} off a change of {change:.1e}",
            a.name
        );
    }
}
