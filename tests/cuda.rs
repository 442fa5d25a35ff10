//! The CUDA back end beside the CPU's, both in bf16, on whole models: training steps, logits, decoding through a
//! cache, and the memory of a step. On the emulated driver with the feature `emulator`, else on a real device, else skipped.

#[path = "common/seeded.rs"]
mod seeded;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anabranch::Error;
use anabranch::backend::Backend;
use anabranch::checkpoint::adapter::{name_a, name_b};
use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::cpu::Cpu;
use anabranch::cuda::{self, Cuda};
use anabranch::data::batch::Batch;
use anabranch::data::documents::Document;
use anabranch::model::adapters::Layout;
use anabranch::model::forward::DropoutKey;
use anabranch::model::room::{Head, Keep, RoomSize};
use anabranch::model::rope::Tables;
use anabranch::model::session::Adapters;
use anabranch::model::trainer::Trainer;
use anabranch::model::weights::Model;
use anabranch::ops::adamw::Hyper;
use anabranch::random::{Philox, Purpose};
use anabranch::stage::common::Common;
use anabranch::stage::generate::Decoder;
use anabranch::stage::{logits, measure};
use anabranch::tensor::{DType, Store};
use half::bf16;
use serde_json::json;

const SEED: u64 = 11;
const RANK: usize = 6;
const SCALE: f32 = 2.0;
const STEPS: u64 = 20;

/// One test at a time: what a device has free is everybody's.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first device; none, and a word about it, where no driver answers.
fn device(limit: Option<u64>) -> Option<Cuda> {
    let found = cuda::find();
    let answers = matches!(found.driver, Ok((_, 1..))) && found.kernels > 0;
    if !answers {
        if cfg!(feature = "emulator") {
            panic!("the emulator does not answer: {found:?}");
        }
        eprintln!("skipped, no CUDA device or no kernels: {found:?}");
        return None;
    }
    Some(Cuda::new(0, limit).expect("cuda:0"))
}

/// Two layers, grouped heads, F no multiple of 8.
fn write(dir: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 72, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 107, "num_hidden_layers": 2,
        "vocab_size": 131, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128,
        "tie_word_embeddings": false, "hidden_act": "silu", "attention_bias": false, "mlp_bias": false,
        "torch_dtype": "bfloat16",
    });
    seeded::write_model(dir, &config, SEED, "BF16");
}

/// Packed documents of odd lengths.
fn batch(step: u64) -> Batch {
    let numbers = Philox::new(SEED, Purpose::Test.stream(step));
    let lengths = [13usize, 1, 22, 7];
    let mut at = 0;
    let documents: Vec<Document> = lengths
        .iter()
        .map(|&n| {
            at += n as u64;
            let ids = (0..n as u64).map(|i| numbers.below(at + i, 131) as u32).collect();
            Document::supervised_from(ids, n / 3)
        })
        .collect();
    Batch::of(&documents)
}

/// Losses, and A and B before and after.
struct Run {
    losses: Vec<f64>,
    start: Vec<f32>,
    end: Vec<f32>,
}

fn train<B: Backend>(backend: &B, dir: &Path, dropout: f32, recomputed: usize) -> anabranch::Result<Run> {
    let checkpoint = Checkpoint::open(dir, OpenOptions::default())?;
    let model = Model::new(backend, &checkpoint)?;
    let layout = Layout::uniform(&model.config, &Target::ALL, RANK, SCALE);
    let tokens = batch(0).tokens();
    let size = RoomSize {
        tokens,
        copies: 1,
        keep: Keep::Training { recomputed },
        table_rows: 0,
        ranks: layout.ranks(),
        dropout: dropout > 0.0,
        dtype: DType::BF16,
        head: Head::Loss(tokens),
    };
    let tables = Tables::new(&model.config, 64);
    let mut trainer: Trainer<'_, B, bf16> =
        Trainer::new(backend, &model, layout.clone(), false, tables, size)?;
    let mut start = vec![f32::NAN; layout.end()];
    for (module, lora) in layout.iter() {
        let (o, i) = model.config.dims(module.target, module.layer);
        let a = seeded::normal(SEED, &name_a(module), RANK * i, 0.0, 0.1);
        let b = seeded::normal(SEED, &name_b(module), o * RANK, 0.0, 0.02);
        start[lora.a..lora.a + RANK * i].copy_from_slice(&a);
        start[lora.b..lora.b + o * RANK].copy_from_slice(&b);
    }
    let all = 0..layout.end();
    backend.upload(B::Store::view_mut(&mut trainer.state.params, all), &start)?;
    let hyper = Hyper { lr: 5e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_norm: 1.0 };
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let key = DropoutKey { p: dropout, seed: SEED, step };
        losses.push(trainer.step(&[batch(step % 4)], hyper, key, step + 1)?.loss);
    }
    let mut end = vec![f32::NAN; layout.end()];
    trainer.download(&mut end, &trainer.state.params)?;
    Ok(Run { losses, start, end })
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn twenty_steps_learn_what_the_cpu_learns() {
    let _alone = alone();
    let Some(gpu) = device(None) else { return };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let cpu = Cpu::new(2).unwrap();
    for (dropout, recomputed) in [(0.0, 0), (0.1, 1)] {
        let want = train(&cpu, dir.path(), dropout, recomputed).unwrap();
        let got = train(&gpu, dir.path(), dropout, recomputed).unwrap();
        let again = train(&gpu, dir.path(), dropout, recomputed).unwrap();
        assert!(got.end == again.end && got.losses == again.losses, "another result the second time");
        for (step, (got, want)) in got.losses.iter().zip(&want.losses).enumerate() {
            // A number that one of them rounds up and the other down leads a little elsewhere: after twenty steps the
            // CPU's own instruction sets are as far from each other. What was learned is the same (below).
            let most = if step < 2 { 3e-4 } else { 3e-3 };
            assert!((got - want).abs() <= most * want.abs(), "step {step}: loss {got}, the CPU's {want}");
        }
        let off = got.losses.iter().zip(&want.losses).map(|(got, want)| (got - want).abs() / want.abs());
        let mean = off.sum::<f64>() / got.losses.len() as f64;
        assert!(mean <= 1e-3, "losses are {mean:e} from the CPU's in the mean");
        assert!(got.losses[STEPS as usize - 1] < got.losses[0], "nothing is learned: {:?}", got.losses);
        let off = norm(got.end.iter().zip(&want.end).map(|(x, y)| f64::from(*x) - f64::from(*y)));
        let learned = norm(want.end.iter().zip(&want.start).map(|(x, y)| f64::from(*x) - f64::from(*y)));
        assert!(off <= 2e-2 * learned, "{off:e} off after a change of {learned:e}");
    }
}

#[test]
fn logits_are_the_cpus() {
    let _alone = alone();
    let Some(gpu) = device(None) else { return };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let options = logits::LogitsOptions {
        model: dir.path().to_path_buf(),
        adapter: None,
        ids: batch(1).ids,
        out: dir.path().join("unused"),
    };
    let common = Common::default();
    let want = logits::compute::<_, bf16>(&Cpu::new(1).unwrap(), &options, &common).unwrap();
    let got = logits::compute::<_, bf16>(&gpu, &options, &common).unwrap();
    let scale = norm(want.iter().map(|&x| f64::from(x)));
    let off = norm(got.iter().zip(&want).map(|(x, y)| f64::from(*x) - f64::from(*y)));
    assert!(off <= 1e-2 * scale, "{off:e} off of {scale:e}");
}

/// The logits after a prompt and after each of the tokens that follow it, through the cache.
fn decode<B: Backend>(backend: &B, dir: &Path) -> anabranch::Result<Vec<Vec<f32>>> {
    let checkpoint = Checkpoint::open(dir, OpenOptions::default())?;
    let model = Model::new(backend, &checkpoint)?;
    let adapters = Adapters::base(backend)?;
    let ids = batch(2).ids;
    let mut decoder: Decoder<'_, B, bf16> = Decoder::new(backend, &model, &adapters, &checkpoint, (9, 4))?;
    let mut all = vec![decoder.feed(&ids[..9])?.to_vec()];
    for id in &ids[9..12] {
        all.push(decoder.feed(std::slice::from_ref(id))?.to_vec());
    }
    Ok(all)
}

#[test]
fn a_cache_gives_the_cpus_logits() {
    let _alone = alone();
    let Some(gpu) = device(None) else { return };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let want = decode(&Cpu::new(1).unwrap(), dir.path()).unwrap();
    for (n, (got, want)) in decode(&gpu, dir.path()).unwrap().iter().zip(&want).enumerate() {
        let scale = norm(want.iter().map(|&x| f64::from(x)));
        let off = norm(got.iter().zip(want).map(|(x, y)| f64::from(*x) - f64::from(*y)));
        assert!(off <= 1e-2 * scale, "token {n}: {off:e} off of {scale:e}");
    }
}

#[test]
fn a_step_takes_what_was_planned_and_no_more() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let size = measure::StepSize {
        shape: anabranch::model::shape::TrainingShape { batch: 3, seq: 32, rank: 4, ..Default::default() },
        samples: 4,
        sample_tokens: 16,
    };
    for of in [measure::Of::Train, measure::Of::Eval] {
        let Some(gpu) = device(None) else { return };
        let measured = measure::measure::<_, bf16>(&gpu, dir.path(), of, &size, &Common::default()).unwrap();
        let (planned, peak) = (measured.planned as f64, measured.peak.unwrap() as f64);
        assert!((peak / planned - 1.0).abs() <= 0.05, "{of:?}: {peak} bytes, {planned} were planned");
        let limited = |limit| {
            let gpu = device(Some(limit)).unwrap();
            let common = Common { memory_limit: Some(limit), ..Common::default() };
            measure::measure::<_, bf16>(&gpu, dir.path(), of, &size, &common)
        };
        let exact = limited(measured.planned).map(|m| m.planned);
        assert!(matches!(exact, Ok(p) if p == measured.planned), "{of:?}: {exact:?}");
        // Refused, or done with more recomputation.
        match limited(measured.planned - 1) {
            Err(Error::Memory(_)) => {}
            Ok(less) => assert!(less.planned < measured.planned, "{of:?}: {} planned", less.planned),
            Err(other) => panic!("{of:?}: {other}"),
        }
    }
}
