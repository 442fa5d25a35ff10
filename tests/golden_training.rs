//! Twenty AdamW steps from the same adapter on the same documents as PEFT (`tools/golden/peft_train.py`): losses,
//! gradient norms and the learned change of every module.

#[path = "common/seeded.rs"]
mod seeded;

use anabranch::checkpoint::adapter::{name_a, name_b};
use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::cpu::Cpu;
use anabranch::data::batch::Batch;
use anabranch::data::documents::Document;
use anabranch::model::adapters::Layout;
use anabranch::model::forward::DropoutKey;
use anabranch::model::room::{Head, Keep, RoomSize};
use anabranch::model::rope::Tables;
use anabranch::model::schedule::LearningRate;
use anabranch::model::trainer::Trainer;
use anabranch::model::weights::Model;
use anabranch::ops::adamw::Hyper;
use safetensors::SafeTensors;
use serde_json::Value;

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

/// The run `name`, each step's documents in `accumulate` micro-batches, `recomputed` layers computed twice.
fn follows_peft(name: &str, accumulate: usize, recomputed: usize) {
    let text = std::fs::read(format!("{GOLDEN}/peft_train.json")).expect("stored");
    let golden: Value = serde_json::from_slice(&text).expect("JSON");
    let bytes = std::fs::read(format!("{GOLDEN}/peft_train.safetensors")).expect("stored");
    let stored = SafeTensors::deserialize(&bytes).expect("safetensors");
    let run = golden["runs"].as_array().expect("runs").iter().find(|r| r["name"] == name).expect("the run");
    let seed = number(&golden, "seed") as u64;
    let rank = number(&golden, "rank") as usize;
    let scale = number(&golden, "alpha") / rank as f64;
    let freeze_a = run["freeze_a"] == true;

    let dir = tempfile::tempdir().expect("a temporary folder");
    seeded::write_model(dir.path(), &golden["config"], seed, "F32");
    let backend = Cpu::new(2).expect("threads");
    let checkpoint = Checkpoint::open(dir.path(), OpenOptions::default()).expect("a checkpoint");
    let model = Model::new(&backend, &checkpoint).expect("a model");
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
    let mut trainer: Trainer<'_, Cpu, f32> =
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
            ("losses", got.loss, 1e-4),
            ("grad_norms", got.grad_norm, 1e-4),
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
            change > 0.0 && off <= 5e-3 * change,
            "{}: {off:.1e} off a change of {change:.1e}",
            module.path()
        );
        assert!(!freeze_a || end[a.clone()] == start[a], "{}: A is frozen and changed", module.path());
        worst = worst.max(off / change);
    }
    println!("{name}: the learned change is at most {worst:.1e} off");
}

#[test]
fn cosine_schedule_from_a_zero_b() {
    follows_peft("cosine", 1, 0);
}

#[test]
fn linear_schedule_with_weight_decay_from_a_trained_adapter() {
    follows_peft("linear_decay", 1, 0);
}

#[test]
fn frozen_a() {
    follows_peft("freeze_a", 1, 0);
}

#[test]
fn accumulated_over_two_parts_of_each_step_and_recomputed() {
    follows_peft("linear_decay", 2, 1);
}
