//! `train`: a LoRA adapter for a (pruned) model, from private data.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::adapters::check_model;
use super::common::{Common, blame};
use super::metrics::{MetricsFile, StepMetrics, anonymous_bytes};
use super::sign::{SignOptions, Signer};
use super::train_state::{self, Saved};
use crate::backend::Backend;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::adapter_config::AdapterConfig;
use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::module::Module;
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::checkpoint::pruning::Pruning;
use crate::data::batch::Batch;
use crate::data::documents::{self, Document, TrainingData};
use crate::data::schedule::{Extent, Packing, Schedule};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::adapters::{Layout, init_a};
use crate::model::forward::DropoutKey;
use crate::model::memory::{Part, Plan};
use crate::model::packing::PackedWeights;
use crate::model::paper::Paper;
use crate::model::recompute;
use crate::model::room::{Head, Keep, RoomSize};
use crate::model::rope::Tables;
use crate::model::schedule::{Decay, LearningRate};
use crate::model::shape::TrainingShape;
use crate::model::trainer::{Buffers, Trainer};
use crate::ops::adamw::Hyper;
use crate::tensor::{DType, Real, Store};

/// What is trained, on what, and how.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// The model's folder.
    pub model: PathBuf,
    /// Training data.
    pub data: Vec<PathBuf>,
    /// Where to write.
    pub out: PathBuf,
    /// Rank, targets, batch, row length, recomputation, and whether B alone is trained.
    pub shape: TrainingShape,
    /// The update is `alpha / R · B A`.
    pub alpha: f64,
    /// Batches of an optimizer step.
    pub grad_accum: usize,
    /// How long.
    pub extent: Extent,
    /// Step size.
    pub lr: f64,
    /// After the warm-up.
    pub decay: Decay,
    /// Below 1 a fraction of the steps, else steps.
    pub warmup: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Clipping; 0 turns it off.
    pub max_grad_norm: f64,
    /// Dropout on the adapters' input.
    pub dropout: f64,
    /// Several documents in one row.
    pub pack: bool,
    /// A new order each epoch.
    pub shuffle: bool,
    /// Seed of the common A₀.
    pub init_seed: u64,
    /// Go on from an adapter.
    pub init_adapter: Option<PathBuf>,
    /// Validation data.
    pub val: Option<PathBuf>,
    /// Steps between validations; none is at the end only.
    pub eval_every: Option<u64>,
    /// Keep the step with the least validation loss.
    pub keep_best: bool,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Count and leave out bad lines.
    pub skip_bad: bool,
    /// Key of the data's fingerprint.
    pub data_key: Option<PathBuf>,
    /// The key that signs the adapter, and for which run and round.
    pub sign: Option<SignOptions>,
}

impl TrainOptions {
    /// The same run `times` as long: on the pooled data of so many edges, each edge's data is seen as often.
    pub fn longer(self, times: u64) -> TrainOptions {
        let extent = match self.extent {
            Extent::Steps(steps) => Extent::Steps(steps.saturating_mul(times)),
            // An epoch of the pooled data is as much longer already.
            Extent::Epochs(epochs) => Extent::Epochs(epochs),
        };
        TrainOptions { extent, ..self }
    }
}

/// What a training run did.
#[derive(Clone, Debug, Serialize)]
pub struct TrainReport {
    /// Where the adapter lies.
    pub out: PathBuf,
    /// Optimizer steps.
    pub steps: u64,
    /// Documents in the data.
    pub documents: usize,
    /// Lines that were left out.
    pub skipped: usize,
    /// Trained parameters.
    pub parameters: usize,
    /// Loss of the first step.
    pub first_loss: Option<f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// The step that was kept, and its validation loss.
    pub validation: Option<Validation>,
    /// Tokens by seconds over the whole run.
    pub tokens_per_second: f64,
    /// The memory plan.
    pub plan: Plan,
    /// The output was there already.
    pub already_finished: bool,
}

/// The validation loss of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// The step, counted from 1.
    pub step: u64,
    /// Mean over the validation data.
    pub loss: f64,
}

/// A run that is ready: data read, plan made, nothing written yet.
pub struct Prepared {
    options: TrainOptions,
    checkpoint: Checkpoint,
    pruning: Option<Pruning>,
    data: TrainingData,
    validation: Vec<Document>,
    layout: Layout,
    size: RoomSize,
    steps: u64,
    rate: LearningRate,
    signer: Option<Signer>,
    /// The adapter that training starts from, where it is not a new one.
    given: Option<Adapter>,
    /// All buffers.
    pub plan: Plan,
    packed: PackedWeights,
}

impl Prepared {
    /// Reads the data and plans the memory, on `backend`'s terms.
    pub fn new<B: Backend, T: Real>(backend: &B, options: TrainOptions, common: &Common) -> Result<Prepared> {
        let signer = options.sign.as_ref().map(Signer::new).transpose()?;
        let checkpoint = Checkpoint::open(&options.model, common.open_options())?;
        let config = checkpoint.config();
        check_options(&options, &checkpoint)?;
        let given =
            options.init_adapter.as_ref().map(|dir| Adapter::open(dir, Default::default())).transpose()?;
        given.iter().try_for_each(|adapter| check_model(adapter, &checkpoint))?;
        let pruning = Pruning::open(&options.model)?;
        let tokenizer = Tokenizer::load(&options.model, config.vocab)?;
        config.check_length(options.shape.seq)?;
        let data = documents::load(&options.data, &tokenizer, options.shape.seq, options.skip_bad)?;
        let validation = match &options.val {
            Some(file) => {
                documents::load(std::slice::from_ref(file), &tokenizer, options.shape.seq, false)?.documents
            }
            None => Vec::new(),
        };
        let mut schedule = Schedule::new(&data.documents, packing(&options, common.seed), options.extent)?;
        let steps = schedule.steps();
        let rate = LearningRate::new(options.lr, options.decay, options.warmup, steps)?;
        let scale = (options.alpha / options.shape.rank as f64) as f32;
        let layout = Layout::uniform(config, &options.shape.targets, options.shape.rank, scale);
        let (mut tokens, mut rows) = largest(&mut schedule, &options.shape, steps, common)?;
        for batch in val_batches(&validation, options.shape.batch * options.shape.seq) {
            tokens = tokens.max(batch.tokens());
            rows = rows.max(batch.rows.len());
        }
        let tables = Tables::new(config, options.shape.seq);
        let base = RoomSize {
            tokens,
            copies: 1,
            keep: Keep::Training { recomputed: 0 },
            table_rows: tables.rows(tokens),
            ranks: layout.ranks(),
            dropout: options.dropout > 0.0,
            dtype: checkpoint.scratch_dtype()?,
            head: Head::Loss(rows),
        };
        let held = data_bytes(&data.documents) + data_bytes(&validation);
        let plan_of = |size: RoomSize| -> Result<Plan> {
            let mut paper = Paper::<B::Store>::new(Plan::default());
            paper.model(&checkpoint)?;
            Buffers::<_, T>::new(&mut paper, backend, config, &layout, options.shape.freeze_a, size)?;
            paper.plan.add(Part::Scratch, "kept by threads", backend.kept_bytes(config.head_dim) as u64);
            if backend.shares_memory() {
                let copy = layout.end() as u64 * 4;
                paper.plan.add(Part::Optimizer, "copy while a checkpoint is written", copy);
                if options.keep_best {
                    paper.plan.add(Part::Adapter, "A and B of the best step", copy);
                }
                paper.plan.add(Part::Data, "tokens of the data", held);
            }
            Ok(paper.plan)
        };
        let asked = options.shape.recompute;
        let choice = recompute::choose(config.layers, asked, common.memory_limit, |recomputed| {
            plan_of(RoomSize { keep: Keep::Training { recomputed }, ..base })
        })?;
        let size = RoomSize { keep: Keep::Training { recomputed: choice.recomputed }, ..base };
        let (plan, packed) = common.packing::<T>(backend, config, PackedWeights::TRAINING, choice.plan)?;
        Ok(Prepared {
            options,
            checkpoint,
            pruning,
            data,
            validation,
            layout,
            size,
            steps,
            rate,
            signer,
            given,
            plan,
            packed,
        })
    }

    /// Trains and writes the adapter.
    pub fn run<B: Backend, T: Real>(self, backend: &B, common: &Common) -> Result<TrainReport> {
        let fingerprint = self.fingerprint(T::DTYPE, common)?;
        let mut report = TrainReport {
            out: self.options.out.clone(),
            steps: self.steps,
            documents: self.data.documents.len(),
            skipped: self.data.skipped.len(),
            parameters: self.layout.trained(self.options.shape.freeze_a).len(),
            first_loss: None,
            last_loss: None,
            validation: None,
            tokens_per_second: 0.0,
            plan: self.plan.clone(),
            already_finished: false,
        };
        let mut output = match Output::begin(&self.options.out, "train", &fingerprint, common.output())? {
            Begun::Finished => {
                report.already_finished = true;
                return Ok(report);
            }
            Begun::Work(output) => output,
        };
        let model = common.model::<B, T>(backend, &self.checkpoint, self.packed)?;
        let tables = Tables::new(self.checkpoint.config(), self.options.shape.seq);
        let mut trainer: Trainer<'_, B, T> = Trainer::new(
            backend,
            &model,
            self.layout.clone(),
            self.options.shape.freeze_a,
            tables,
            self.size,
        )?;
        let mut saved = match train_state::load(output.dir(), &mut trainer.state, backend)? {
            Some(saved) => saved,
            None => {
                let params = self.initial()?;
                let all = 0..params.len();
                backend.upload(B::Store::view_mut(&mut trainer.state.params, all), &params)?;
                Saved::default()
            }
        };
        if saved.step > self.steps {
            let why = format!("holds a checkpoint of step {}, the run has {} steps", saved.step, self.steps);
            return Err(Error::file(output.dir(), why));
        }
        let mut metrics = MetricsFile::open(output.dir(), saved.step)?;
        let mut schedule =
            Schedule::new(&self.data.documents, packing(&self.options, common.seed), self.options.extent)?;
        let bar = common.progress.bar("train", self.steps);
        bar.set_position(saved.step);
        let (mut peak, mut tokens, start) = (0, 0usize, Instant::now());
        while saved.step < self.steps {
            let began = Instant::now();
            let k = saved.step;
            let batches = schedule.step(k)?;
            let lr = self.rate.at(k);
            let hyper = Hyper {
                lr,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: self.options.weight_decay,
                max_norm: self.options.max_grad_norm,
            };
            let dropout = DropoutKey {
                p: self.options.dropout as f32,
                seed: common.seed,
                step: k * self.options.grad_accum as u64,
            };
            let result = trainer.step(&batches, hyper, dropout, k + 1).map_err(blame(&self.checkpoint))?;
            saved.step += 1;
            saved.first_loss.get_or_insert(result.loss);
            saved.last_loss = Some(result.loss);
            tokens += result.tokens;
            peak = peak.max(anonymous_bytes().unwrap_or(0));
            let speed = result.tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
            let last = saved.step == self.steps;
            let due = self.options.eval_every.is_some_and(|n| saved.step.is_multiple_of(n)) || last;
            let val_loss =
                if due && !self.validation.is_empty() { Some(self.validate(&mut trainer)?) } else { None };
            if let Some(loss) = val_loss {
                let better = saved.validation.is_none_or(|best| loss < best.loss);
                if better || !self.options.keep_best {
                    saved.validation = Some(Validation { step: saved.step, loss });
                    if self.options.keep_best {
                        let mut best = vec![0.0; self.layout.end()];
                        trainer.download(&mut best, &trainer.state.params)?;
                        saved.best = Some(best);
                    }
                }
            }
            metrics.write(&StepMetrics {
                step: saved.step,
                tokens: result.tokens as u64,
                loss: result.loss,
                learning_rate: lr,
                grad_norm: result.grad_norm,
                tokens_per_second: speed,
                peak_memory_bytes: peak,
                val_loss,
            })?;
            bar.set_position(saved.step);
            bar.set_message(format!("loss {:.4} · {speed:.0} tokens/s", result.loss));
            let stopped = common.stopped();
            if !last && (stopped || saved.step.is_multiple_of(self.options.checkpoint_every)) {
                train_state::save(output.dir(), &saved, &trainer.state, backend)?;
                output.keep();
            }
            if stopped && !last {
                bar.abandon();
                return Err(Error::Interrupted(format!(
                    "step {} of {} is saved in {}; go on with --resume",
                    saved.step,
                    self.steps,
                    output.dir().display()
                )));
            }
        }
        bar.finish_and_clear();
        let params = match saved.best.take() {
            Some(best) => best,
            None => {
                let mut params = vec![0.0; self.layout.end()];
                trainer.download(&mut params, &trainer.state.params)?;
                params
            }
        };
        // The loss of a step tells of the updates before it, and nothing tells of the last.
        if params.iter().any(|x| !x.is_finite()) {
            return Err(Error::Numeric(format!(
                "{}: training diverged, the adapter holds NaN or infinity after {} steps: lower --lr or --alpha",
                self.options.model.display(),
                self.steps
            )));
        }
        report.first_loss = saved.first_loss;
        report.last_loss = saved.last_loss;
        report.validation = saved.validation;
        report.tokens_per_second = tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
        train_state::remove(output.dir())?;
        self.write(output.dir(), &params, &saved, common)?;
        if let Some(signer) = &self.signer {
            signer.sign(output.dir(), true)?;
        }
        output.finish()?;
        Ok(report)
    }

    /// The adapter that training starts from.
    fn initial(&self) -> Result<Vec<f32>> {
        let mut params = vec![0.0f32; self.layout.end()];
        let config = self.checkpoint.config();
        if let Some(adapter) = &self.given {
            adapter.check_finite()?;
        }
        for (module, lora) in self.layout.iter() {
            let (o, i) = config.dims(module.target, module.layer);
            let a = lora.a..lora.a + lora.rank * i;
            let b = lora.b..lora.b + o * lora.rank;
            match &self.given {
                Some(adapter) => {
                    let pair = same_pair(adapter, module, lora.rank, f64::from(lora.scale))?;
                    params[a].copy_from_slice(&pair.a.to_f32());
                    params[b].copy_from_slice(&pair.b.to_f32());
                }
                None => {
                    let columns = match &self.pruning {
                        Some(p) if !module.target.prunes_rows() => Some(p.kept(module.target, module.layer)),
                        _ => None,
                    };
                    let full = match &self.pruning {
                        Some(p) => p.full_dims(module.target).1,
                        None => i,
                    };
                    init_a(&mut params[a], module, full, columns.as_deref(), self.options.init_seed);
                }
            }
        }
        if let Some(extra) =
            self.given.as_ref().and_then(|g| g.modules.keys().find(|m| self.layout.get(**m).is_none()))
        {
            return Err(Error::Usage(format!(
                "--init-adapter has an update of {extra}, which --targets leaves out"
            )));
        }
        Ok(params)
    }

    fn validate<B: Backend, T: Real>(&self, trainer: &mut Trainer<'_, B, T>) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for batch in val_batches(&self.validation, self.size.tokens) {
            let (nll, n) = trainer.nll(&batch)?;
            sum += nll;
            count += n;
        }
        if count == 0 {
            return Err(Error::Numeric("the validation data has no supervised token".into()));
        }
        Ok(sum / count as f64)
    }

    fn write(&self, dir: &Path, params: &[f32], saved: &Saved, common: &Common) -> Result<()> {
        let config = self.checkpoint.config();
        let specs: Vec<PairSpec> = self
            .layout
            .iter()
            .map(|(module, lora)| PairSpec {
                module,
                rank: lora.rank,
                dims: config.dims(module.target, module.layer),
                dtypes: (DType::F32, DType::F32),
            })
            .collect();
        let o = &self.options;
        let peft = AdapterConfig::peft(o.shape.rank, o.alpha, o.dropout, &o.shape.targets, None);
        let mut writer = AdapterWriter::create(dir, peft, specs)?;
        for (module, lora) in self.layout.iter() {
            let (out, inner) = config.dims(module.target, module.layer);
            let a = &params[lora.a..lora.a + lora.rank * inner];
            let b = &params[lora.b..lora.b + out * lora.rank];
            writer.write_f32(module, a, b)?;
        }
        let mut provenance = Provenance::new("train");
        let own = self.checkpoint.fingerprint()?;
        provenance.base_fingerprint =
            Some(self.pruning.as_ref().map_or(own, |p| &p.base.fingerprint).to_string());
        provenance.model_fingerprint = Some(own.to_string());
        // Of the A that training started from, where that is known.
        provenance.init_seed = match &self.given {
            None => Some(o.init_seed),
            Some(given) => given.provenance.as_ref().and_then(|p| p.init_seed),
        };
        provenance.freeze_a = Some(o.shape.freeze_a);
        provenance.seed = Some(common.seed);
        provenance.steps = Some(self.steps);
        provenance.samples = Some(self.data.documents.len() as u64);
        provenance.losses = losses(saved);
        provenance.data_fingerprint = match &o.data_key {
            Some(key) => Some(keyed_fingerprint(key, &o.data)?),
            None => None,
        };
        provenance.options = self.options_json().as_object().cloned().unwrap_or_default();
        writer.finish(self.pruning.as_ref(), provenance)
    }

    /// The options that change the result, without paths.
    fn options_json(&self) -> serde_json::Value {
        let o = &self.options;
        json!({
            "rank": o.shape.rank, "alpha": o.alpha, "targets": o.shape.targets.iter().map(|t| t.short()).collect::<Vec<_>>(),
            "batch": o.shape.batch, "grad_accum": o.grad_accum, "seq": o.shape.seq, "steps": self.steps, "lr": o.lr,
            "schedule": format!("{:?}", o.decay).to_lowercase(), "warmup": o.warmup,
            "weight_decay": o.weight_decay, "max_grad_norm": o.max_grad_norm, "lora_dropout": o.dropout,
            "pack": o.pack, "shuffle": o.shuffle, "keep_best": o.keep_best,
        })
    }

    /// What `--resume` compares: all that changes the bytes of the result.
    fn fingerprint(&self, dtype: DType, common: &Common) -> Result<String> {
        let o = &self.options;
        let mut hash = crate::checkpoint::digest::Hasher::default();
        let text = json!({
            "options": self.options_json(), "seed": common.seed, "init_seed": o.init_seed,
            "freeze_a": o.shape.freeze_a, "eval_every": o.eval_every, "precision": dtype.name(),
            "model": self.checkpoint.fingerprint()?,
            "config": crate::checkpoint::digest::sha256_file(&o.model.join("config.json"))?,
            "init_adapter": o.init_adapter.as_ref().map(|d| adapter_hash(d)).transpose()?,
            "signer": self.signer.as_ref().map(Signer::fingerprint),
        });
        hash.update(text.to_string().as_bytes());
        for document in self.data.documents.iter().chain(&self.validation) {
            hash.update(&(document.ids.len() as u64).to_le_bytes());
            hash.update(bytemuck::cast_slice(&document.ids));
            let mask: Vec<u8> = document.supervised.iter().map(|&s| u8::from(s)).collect();
            hash.update(&mask);
        }
        Ok(hash.finish())
    }
}

fn packing(o: &TrainOptions, seed: u64) -> Packing {
    Packing {
        batch: o.shape.batch,
        grad_accum: o.grad_accum,
        seq: o.shape.seq,
        pack: o.pack,
        shuffle: o.shuffle,
        seed,
    }
}

fn check_options(o: &TrainOptions, checkpoint: &Checkpoint) -> Result<()> {
    let config = checkpoint.config();
    let usage = |why: String| Err(Error::Usage(why));
    o.shape.check(config)?;
    if !(o.alpha.is_finite() && o.alpha > 0.0) {
        return usage(format!("--alpha is {}, expected a number above 0", o.alpha));
    }
    if !(0.0..1.0).contains(&o.dropout) {
        return usage(format!("--lora-dropout is {}, expected 0 or more and below 1", o.dropout));
    }
    for (name, x) in [("--weight-decay", o.weight_decay), ("--max-grad-norm", o.max_grad_norm)] {
        if !(x.is_finite() && x >= 0.0) {
            return usage(format!("{name} is {x}, expected 0 or more"));
        }
    }
    if o.checkpoint_every == 0 || o.eval_every == Some(0) {
        return usage("--checkpoint-every and --eval-every must be at least 1".into());
    }
    if o.keep_best && o.val.is_none() {
        return usage("--keep best needs --val".into());
    }
    Ok(())
}

/// The most rows of a run whose micro-batches are all looked at before it.
const LOOKED_AT: u64 = 1 << 20;

/// The most tokens and supervised rows of any micro-batch of the run; those of full rows where it is too long to look at
/// each.
fn largest(
    schedule: &mut Schedule<'_>,
    shape: &TrainingShape,
    steps: u64,
    common: &Common,
) -> Result<(usize, usize)> {
    if schedule.rows() > LOOKED_AT {
        return Ok((shape.tokens(), shape.tokens()));
    }
    let (mut tokens, mut rows) = (0, 0);
    for step in 0..steps {
        for batch in schedule.step(step)? {
            tokens = tokens.max(batch.tokens());
            rows = rows.max(batch.rows.len());
        }
        common.check_stop("nothing was written yet")?;
    }
    Ok((tokens, rows))
}

/// Validation documents, in batches of at most `tokens` tokens.
fn val_batches(documents: &[Document], tokens: usize) -> Vec<Batch> {
    let mut batches = Vec::new();
    let (mut start, mut held) = (0, 0);
    for (n, document) in documents.iter().enumerate() {
        if n > start && held + document.ids.len() > tokens {
            batches.push(Batch::of(&documents[start..n]));
            (start, held) = (n, 0);
        }
        held += document.ids.len();
    }
    if start < documents.len() {
        batches.push(Batch::of(&documents[start..]));
    }
    batches
}

fn data_bytes(documents: &[Document]) -> u64 {
    let of = |d: &Document| 5 * d.ids.len() + size_of::<Document>();
    documents.iter().map(|d| of(d) as u64).sum()
}

fn same_pair(
    adapter: &Adapter,
    module: Module,
    rank: usize,
    scale: f64,
) -> Result<&crate::checkpoint::factor::Pair> {
    let pair = adapter.modules.get(&module).ok_or_else(|| {
        Error::file(adapter.file(), format!("has no update of {module}, which --targets names"))
    })?;
    if pair.rank != rank || (pair.scale - scale).abs() > 1e-6 * scale {
        return Err(Error::file(
            adapter.file(),
            format!(
                "{module} has rank {} and scale {}, expected rank {rank} and scale {scale}: pass its --rank and --alpha",
                pair.rank, pair.scale
            ),
        ));
    }
    Ok(pair)
}

fn losses(saved: &Saved) -> BTreeMap<String, f64> {
    let mut losses = BTreeMap::new();
    losses.extend(saved.first_loss.map(|l| ("first".to_string(), l)));
    losses.extend(saved.last_loss.map(|l| ("last".to_string(), l)));
    losses.extend(saved.validation.map(|v| ("validation".to_string(), v.loss)));
    losses
}

pub(super) fn adapter_hash(dir: &Path) -> Result<String> {
    crate::checkpoint::digest::sha256_file(&dir.join(crate::checkpoint::adapter::ADAPTER_MODEL))
}

/// SHA-256 over the key and the data's bytes, so that the data cannot be guessed from it without the key.
fn keyed_fingerprint(key: &Path, files: &[PathBuf]) -> Result<String> {
    let mut hash = crate::checkpoint::digest::Hasher::default();
    let key_bytes = crate::checkpoint::json::read_bounded(key)?;
    if key_bytes.len() < 16 {
        return Err(Error::file(
            key,
            format!("holds {} bytes, expected a key of at least 16", key_bytes.len()),
        ));
    }
    hash.update(&key_bytes);
    for file in files {
        hash.update(crate::checkpoint::digest::sha256_file(file)?.as_bytes());
    }
    hash.update(&key_bytes);
    Ok(hash.finish())
}
