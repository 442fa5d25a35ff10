//! What was typed, made into what it means: device, precision, limits, and the options of each stage.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::args::{
    BudgetArgs, Cli, Command, ConflictArgs, EvalArgs, ExportArgs, FuseArgs, FuseHow, FuseSettings,
    GenerateArgs, Global, GramsArgs, JoinArgs, LogitsArgs, OccasionArgs, PrecisionArg, PruneArgs, PruneHow,
    RecoverArgs, ResolveArgs, SearchArgs, ShapeArgs, SignArgs, TrainCommand, TrainHow, TrustArgs, VerifyArgs,
};
use crate::checkpoint::manifest::Occasion;
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::data::schedule::Extent;
use crate::error::{Error, Result};
use crate::fuse::elementwise::Sparse;
use crate::fuse::options::Method;
use crate::fuse::weights::Weights;
use crate::fuse::{Fusion, LoraCr, Recipe, goes_with};
use crate::model::packing::PackWeights;
use crate::model::shape::TrainingShape;
use crate::stage::admit::Screen;
use crate::stage::budget::BudgetOptions;
use crate::stage::common::Common;
use crate::stage::conflict::ConflictOptions;
use crate::stage::doctor::{self, Doctor};
use crate::stage::evaluate::EvalOptions;
use crate::stage::export::ExportOptions;
use crate::stage::fuse::{FuseOptions, Profile};
use crate::stage::generate::GenerateOptions;
use crate::stage::grams::GramsOptions;
use crate::stage::join::JoinOptions;
use crate::stage::logits::LogitsOptions;
use crate::stage::measure::StepSize;
use crate::stage::progress::Progress;
use crate::stage::prune::{Amount, PruneOptions};
use crate::stage::recover::RecoverOptions;
use crate::stage::search::SearchOptions;
use crate::stage::sign::SignOptions;
use crate::stage::train::TrainOptions;
use crate::stage::trust::TrustOptions;
use crate::tensor::DType;

/// A device that is ready.
pub enum Device {
    /// Threads of this machine.
    Cpu(Cpu),
    /// An NVIDIA device and its number.
    Cuda(Box<Cuda>, usize),
}

/// Where a command computes, and in what.
pub struct Machine {
    /// The device.
    pub device: Device,
    /// Activations and matrix inputs.
    pub precision: PrecisionArg,
    /// Why this device.
    pub reason: String,
}

/// `work` with the machine's back end, its type and the type of activations.
macro_rules! on_machine {
    ($machine:expr, |$backend:ident: $B:ident, $T:ident| $work:expr) => {
        match (&$machine.device, $machine.precision) {
            ($crate::cli::plan::Device::Cpu($backend), $crate::cli::args::PrecisionArg::F32) => {
                type $B = $crate::cpu::Cpu;
                type $T = f32;
                $work
            }
            ($crate::cli::plan::Device::Cpu($backend), $crate::cli::args::PrecisionArg::Bf16) => {
                type $B = $crate::cpu::Cpu;
                type $T = half::bf16;
                $work
            }
            ($crate::cli::plan::Device::Cuda($backend, _), _) => {
                type $B = $crate::cuda::Cuda;
                type $T = half::bf16;
                let $backend = &**$backend;
                $work
            }
        }
    };
}
pub(crate) use on_machine;

/// `work` with the machine's back end, where activations have no part in it.
macro_rules! on_device {
    ($machine:expr, |$backend:ident| $work:expr) => {
        match &$machine.device {
            $crate::cli::plan::Device::Cpu($backend) => $work,
            $crate::cli::plan::Device::Cuda($backend, _) => {
                let $backend = &**$backend;
                $work
            }
        }
    };
}
pub(crate) use on_device;

/// The device that `--device` means, on as many threads as asked for.
pub fn machine(global: &Global) -> Result<Machine> {
    let cpu = |reason: String| -> Result<Machine> {
        let backend = Cpu::new(threads(global)?)?;
        let default = if backend.multiplies_halves() { PrecisionArg::Bf16 } else { PrecisionArg::F32 };
        let precision = global.precision.unwrap_or(default);
        Ok(Machine { device: Device::Cpu(backend), precision, reason })
    };
    match global.device.as_str() {
        "cpu" => cpu("asked for".into()),
        "auto" if global.precision == Some(PrecisionArg::F32) => cpu("for --precision f32".into()),
        "auto" if global.pack_weights == PackWeights::On => cpu("for --pack-weights on".into()),
        "auto" => match cuda(global, 0) {
            Ok(device) => {
                Ok(Machine { device, precision: PrecisionArg::Bf16, reason: "found by itself".into() })
            }
            Err(why) => cpu(why.to_string()),
        },
        typed => {
            let number = typed.strip_prefix("cuda").and_then(|rest| match rest.strip_prefix(':') {
                None => rest.is_empty().then_some(0),
                Some(digits) => digits.parse::<u16>().ok().map(usize::from),
            });
            let Some(number) = number else {
                return Err(Error::Usage(format!(
                    "--device is {typed:?}, expected auto, cpu, cuda or cuda:N"
                )));
            };
            if global.precision == Some(PrecisionArg::F32) {
                return Err(Error::Usage(format!(
                    "--precision f32 with --device {typed}: the CUDA back end computes in bf16; leave --precision \
                     out, or use --device cpu"
                )));
            }
            let device = cuda(global, number)?;
            Ok(Machine { device, precision: PrecisionArg::Bf16, reason: "asked for".into() })
        }
    }
}

fn cuda(global: &Global, number: usize) -> Result<Device> {
    if global.pack_weights == PackWeights::On {
        return Err(Error::Usage(
            "--pack-weights on: the CUDA back end's products read weights as they are kept; leave it out, or use --device \
             cpu"
            .into(),
        ));
    }
    let backend = Cuda::new(number, global.memory_limit.map(|s| s.0))?;
    Ok(Device::Cuda(Box::new(backend), number))
}

impl Machine {
    /// `cpu, 2 threads, f32 (asked for)`.
    pub fn describe(&self) -> String {
        match &self.device {
            Device::Cpu(cpu) => {
                let precision = match self.precision {
                    PrecisionArg::F32 => "f32",
                    PrecisionArg::Bf16 => "bf16",
                };
                format!("cpu, {} threads, {precision} ({})", cpu.threads(), self.reason)
            }
            Device::Cuda(cuda, number) => format!("cuda:{number}, {}, bf16 ({})", cuda.name(), self.reason),
        }
    }

    /// `common` with the memory limit of this device: what is free on it now, and no more than was typed. Where the
    /// device shares the system's memory, the control group's limit holds too.
    pub fn common(&self, global: &Global, common: &Common) -> Result<Common> {
        let Device::Cuda(cuda, _) = &self.device else { return Ok(common.clone()) };
        let (free, _) = cuda.free_and_total()?;
        let typed = if cuda.unified() { common.memory_limit } else { global.memory_limit.map(|s| s.0) };
        Ok(Common { memory_limit: Some(typed.map_or(free, |t| t.min(free))), ..common.clone() })
    }
}

/// `doctor`'s report on the device that `--device` means.
pub fn doctor(global: &Global) -> Result<Doctor> {
    let machine = machine(global)?;
    let found = crate::cuda::find();
    let mut gpu = doctor::Cuda {
        driver: found.driver.map_err(|e| e.to_string()),
        least: found.least,
        kernels: found.kernels,
        architectures: found.architectures.to_string(),
        device: None,
    };
    if let Device::Cuda(cuda, _) = &machine.device {
        let (free, total) = cuda.free_and_total()?;
        let (name, capability, unified) = (cuda.name().to_string(), cuda.capability(), cuda.unified());
        gpu.device = Some(doctor::CudaDevice { name, capability, free, total, unified });
    }
    let label = match &machine.device {
        Device::Cpu(_) => "cpu".to_string(),
        Device::Cuda(_, number) => format!("cuda:{number}"),
    };
    Ok(doctor::run(label, machine.reason, threads(global)?, cgroup_limit(), gpu))
}

/// Fails where weights are to be packed by a command that packs none.
pub fn check_packing(cli: &Cli) -> Result<()> {
    use Command::{Budget, Demo, Eval, Grams, Run, Search, Train};
    match &cli.command {
        Train(_) | Eval(_) | Search(_) | Grams(_) | Run(_) | Demo(_) | Budget(_) => Ok(()),
        _ if cli.global.pack_weights != PackWeights::On => Ok(()),
        _ => Err(Error::Usage(
            "--pack-weights on: train, eval, search, grams, run, demo and budget --measure pack weights, this command does \
             not; leave it out"
                .into(),
        )),
    }
}

/// How many threads: all that the process may run on, unless told.
pub fn threads(global: &Global) -> Result<usize> {
    match global.threads {
        Some(0) => Err(Error::Usage("--threads is 0, expected at least 1".into())),
        Some(n) if n > 4096 => Err(Error::Usage(format!("--threads is {n}, expected at most 4096"))),
        Some(n) => Ok(n),
        None => Ok(std::thread::available_parallelism().map_or(1, |n| n.get())),
    }
}

/// What all stages share. The memory limit is the smaller of `--memory-limit` and the cgroup's.
pub fn common(global: &Global, stop: Arc<AtomicBool>) -> Common {
    let typed = global.memory_limit.map(|s| s.0);
    let limit = match (typed, cgroup_limit()) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    Common {
        no_mmap: global.no_mmap,
        memory_limit: limit,
        pack_weights: global.pack_weights,
        seed: global.seed,
        force: global.force,
        resume: global.resume,
        stop,
        progress: Progress::new(global.quiet),
    }
}

/// The memory that this process's control group may take, if the kernel says that it is limited.
pub fn cgroup_limit() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::"))?;
    let mut folder = PathBuf::from("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let mut least: Option<u64> = None;
    loop {
        if let Ok(text) = std::fs::read_to_string(folder.join("memory.max"))
            && let Ok(bytes) = text.trim().parse::<u64>()
        {
            least = Some(least.map_or(bytes, |l| l.min(bytes)));
        }
        if folder.as_os_str() == "/sys/fs/cgroup" || !folder.pop() {
            return least;
        }
    }
}

/// A training run's options without model, data and out, which a flow fills in.
pub fn train_template(how: &TrainHow, shape: &ShapeArgs) -> Result<TrainOptions> {
    let extent = match (how.steps, how.epochs) {
        (Some(steps), _) => Extent::Steps(steps as u64),
        (None, epochs) => Extent::Epochs(epochs.unwrap_or(1.0)),
    };
    let keep_best = match how.keep.as_str() {
        "last" => false,
        "best" => true,
        other => return Err(Error::Usage(format!("--keep is {other:?}, expected last or best"))),
    };
    Ok(TrainOptions {
        model: PathBuf::new(),
        data: Vec::new(),
        out: PathBuf::new(),
        shape: TrainingShape {
            dropout: how.lora_dropout > 0.0,
            freeze_a: how.freeze_a,
            ..self::shape(shape)
        },
        alpha: shape.alpha,
        grad_accum: shape.grad_accum,
        extent,
        lr: how.lr,
        decay: how.schedule.parse()?,
        warmup: how.warmup,
        weight_decay: how.weight_decay,
        max_grad_norm: how.max_grad_norm,
        dropout: how.lora_dropout,
        pack: !how.no_pack,
        shuffle: !how.no_shuffle,
        init_seed: how.init_seed,
        init_adapter: how.init_adapter.clone(),
        val: how.val.clone(),
        eval_every: how.eval_every.map(|n| n as u64),
        keep_best,
        checkpoint_every: how.checkpoint_every as u64,
        skip_bad: how.skip_bad,
        data_key: None,
        sign: None,
    })
}

/// The shape of a training run, by what decides it without the options of learning.
pub fn shape(shape: &ShapeArgs) -> TrainingShape {
    let mut targets = shape.targets.clone();
    targets.sort_unstable();
    targets.dedup();
    TrainingShape {
        batch: shape.batch,
        seq: shape.seq,
        rank: shape.rank,
        targets,
        dropout: false,
        freeze_a: false,
        recompute: shape.recompute,
    }
}

/// `train`'s options.
pub fn train(command: &TrainCommand) -> Result<TrainOptions> {
    Ok(TrainOptions {
        model: command.model.clone(),
        data: command.data.clone(),
        out: command.out.clone(),
        data_key: command.data_fingerprint.clone(),
        sign: command.key.as_ref().map(|key| SignOptions {
            key: key.clone(),
            occasion: Occasion { run: command.run.clone(), round: command.round },
        }),
        ..train_template(&command.how, &command.shape)?
    })
}

/// `budget`'s options.
pub fn budget(args: &BudgetArgs) -> BudgetOptions {
    BudgetOptions {
        ratios: args.ratio.clone(),
        memory: args.memory.map(|s| s.0),
        layers: args.layers.map(|l| l.start..l.end),
        round_mlp: args.round_mlp,
        shape: shape(&args.shape),
    }
}

/// What `budget --measure` runs; the calibration of `prune` has its defaults.
pub fn step_size(args: &BudgetArgs) -> StepSize {
    StepSize { shape: shape(&args.shape), samples: 10, sample_tokens: 64 }
}

/// `eval`'s options.
pub fn eval(args: &EvalArgs) -> Result<EvalOptions> {
    let adapters = args.adapter.iter().map(|typed| match typed.split_once('=') {
        Some((name, dir)) if !name.is_empty() => (name.to_string(), PathBuf::from(dir)),
        _ => {
            let dir = PathBuf::from(typed);
            let name = dir.file_name().map_or_else(|| typed.clone(), |n| n.to_string_lossy().into_owned());
            (name, dir)
        }
    });
    Ok(EvalOptions {
        model: args.model.clone(),
        adapters: adapters.collect(),
        base: args.base,
        tasks: args.task.clone(),
        text: args.text.clone(),
        seq: args.seq,
        shots: args.prompts.shots,
        shots_from: args.prompts.shots_from.clone(),
        batch_tokens: args.prompts.batch_tokens,
        show: args.show.clone(),
        predictions: args.predictions.clone(),
        out: args.out.clone(),
    })
}

/// `generate`'s options.
pub fn generate(args: &GenerateArgs) -> GenerateOptions {
    GenerateOptions {
        model: args.model.clone(),
        adapter: args.adapter.clone(),
        prompt: args.prompt.clone(),
        max_tokens: args.max_tokens,
        temperature: args.temperature,
    }
}

/// `grams`' options.
pub fn grams(args: &GramsArgs) -> GramsOptions {
    GramsOptions {
        model: args.model.clone(),
        adapter: args.adapter.clone(),
        data: args.data.clone(),
        out: args.out.clone(),
        tokens: args.tokens,
        seq: args.seq,
        batch_tokens: args.batch_tokens,
        skip_bad: args.skip_bad,
    }
}

/// `logits`' options.
pub fn logits(args: &LogitsArgs) -> LogitsOptions {
    LogitsOptions {
        model: args.model.clone(),
        adapter: args.adapter.clone(),
        ids: args.ids.clone(),
        out: args.out.clone(),
    }
}

/// `recover`'s options.
pub fn recover(args: &RecoverArgs) -> RecoverOptions {
    RecoverOptions {
        adapter: args.adapter.clone(),
        model: args.model.clone(),
        out: args.out.clone(),
        key: args.key.clone(),
        trust: trust(&args.trust),
    }
}

fn occasion(args: &OccasionArgs) -> Occasion {
    Occasion { run: args.run.clone(), round: args.round }
}

fn trust(args: &TrustArgs) -> TrustOptions {
    TrustOptions { trusted: args.trusted.clone(), expected: occasion(&args.expected) }
}

/// `sign`'s options.
pub fn sign(args: &SignArgs) -> SignOptions {
    SignOptions { key: args.key.clone(), occasion: occasion(&args.occasion) }
}

/// `verify`'s options.
pub fn verify(args: &VerifyArgs) -> TrustOptions {
    TrustOptions { trusted: Some(args.trusted.clone()), expected: occasion(&args.expected) }
}

/// `export`'s options.
pub fn export(args: &ExportArgs) -> Result<ExportOptions> {
    Ok(ExportOptions {
        adapter: args.adapter.clone(),
        to: args.to,
        model: args.model.clone(),
        dtype: dtype(&args.dtype)?,
        out: args.out.clone(),
    })
}

/// The dtype that `--dtype` means.
fn dtype(typed: &str) -> Result<DType> {
    DType::from_name(&typed.to_uppercase())
        .ok_or_else(|| Error::Usage(format!("--dtype is {typed:?}, expected f32, bf16 or f16")))
}

/// A pruning's options without model, out and amount, which a flow fills in.
pub fn prune_template(how: &PruneHow, shape: &ShapeArgs) -> PruneOptions {
    PruneOptions {
        model: PathBuf::new(),
        out: PathBuf::new(),
        amount: Amount::Ratio(0.0),
        calibration: how.calibration.clone(),
        samples: how.samples,
        sample_tokens: how.sample_tokens,
        importance: how.importance,
        reduce: how.reduce,
        gqa: how.gqa,
        layers: how.layers.map(|l| l.start..l.end),
        round_mlp: how.round_mlp,
        shape: self::shape(shape),
    }
}

/// `prune`'s options.
pub fn prune(args: &PruneArgs) -> Result<PruneOptions> {
    let amount = match (args.ratio, args.memory) {
        (Some(ratio), None) => Amount::Ratio(ratio),
        (None, Some(size)) => Amount::Memory(size.0),
        _ => return Err(Error::Usage("prune needs either --ratio or --memory".into())),
    };
    Ok(PruneOptions {
        model: args.model.clone(),
        out: args.out.clone(),
        amount,
        ..prune_template(&args.how, &args.shape)
    })
}

fn lora_cr(args: &ResolveArgs) -> LoraCr {
    LoraCr { shared_rank: args.shared_rank, side: args.side, gate: args.gate, restore: args.restore }
}

/// An option of fusion that some methods take.
struct Particular {
    name: &'static str,
    given: fn(&FuseSettings) -> bool,
    fits: fn(Method) -> bool,
    clear: fn(&mut FuseSettings),
}

/// Those that a method which does not take them refuses.
const PARTICULAR: [Particular; 7] = [
    Particular {
        name: "--fedsa",
        given: |s| s.fedsa.is_some(),
        fits: |m| m == Method::Fedsa,
        clear: |s| s.fedsa = None,
    },
    Particular {
        name: "--lambda",
        given: |s| s.lambda != 1.0,
        fits: Method::scales,
        clear: |s| s.lambda = 1.0,
    },
    Particular {
        name: "--density",
        given: |s| s.density.is_some(),
        fits: trims,
        clear: |s| s.density = None,
    },
    Particular {
        name: "--density-of",
        given: |s| s.density_of.is_some(),
        fits: trims,
        clear: |s| s.density_of = None,
    },
    Particular {
        name: "--density-scope",
        given: |s| s.density_scope.is_some(),
        fits: |m| m == Method::Ties,
        clear: |s| s.density_scope = None,
    },
    Particular {
        name: "--drop",
        given: |s| s.drop.is_some(),
        fits: |m| matches!(Sparse::of(m), Some(Sparse::Drop(_))),
        clear: |s| s.drop = None,
    },
    Particular {
        name: "--clusters",
        given: |s| s.clusters.is_some(),
        fits: |m| m == Method::LoraLego,
        clear: |s| s.clusters = None,
    },
];

fn trims(method: Method) -> bool {
    matches!(Sparse::of(method), Some(Sparse::Trim(_)))
}

/// What is done to the entries of each update, by the methods that work on them.
fn sparse(method: Method, settings: &FuseSettings) -> Option<Sparse> {
    let mut sparse = Sparse::of(method);
    match &mut sparse {
        Some(Sparse::Trim(trim)) => {
            trim.density = settings.density.unwrap_or(trim.density);
            trim.of = settings.density_of.unwrap_or(trim.of);
            trim.scope = settings.density_scope.unwrap_or(trim.scope);
        }
        Some(Sparse::Drop(drop)) => drop.drop = settings.drop.unwrap_or(drop.drop),
        None => {}
    }
    sparse
}

/// `method` with its settings; an error for one that it does not take.
fn fusion(method: Method, settings: &FuseSettings) -> Result<Fusion> {
    for option in PARTICULAR.iter().filter(|option| (option.given)(settings)) {
        goes_with(option.name, method, option.fits)?;
    }
    let fusion = Fusion {
        method,
        fedsa: settings.fedsa,
        lambda: settings.lambda,
        rank: settings.rank,
        coverage: settings.coverage,
        sparse: sparse(method, settings),
        clusters: settings.clusters,
        seed: 0,
    };
    fusion.check()?;
    Ok(fusion)
}

/// Each of `methods` with the settings that it takes; an error for one that none of them does.
fn fusions(methods: &[Method], settings: &FuseSettings) -> Result<Vec<Fusion>> {
    for option in PARTICULAR.iter().filter(|option| (option.given)(settings)) {
        if let Some(first) = methods.first()
            && !methods.iter().any(|m| (option.fits)(*m))
        {
            goes_with(option.name, *first, option.fits)?;
        }
    }
    let own = |&method: &Method| {
        let mut settings = settings.clone();
        for option in PARTICULAR.iter().filter(|option| !(option.fits)(method)) {
            (option.clear)(&mut settings);
        }
        fusion(method, &settings)
    };
    methods.iter().map(own).collect()
}

/// The resolution that `--resolve` means.
fn resolution(typed: &str, how: &ResolveArgs) -> Result<Option<LoraCr>> {
    match typed {
        "none" => Ok(None),
        "lora-cr" => Ok(Some(lora_cr(how))),
        other => Err(Error::Usage(format!("--resolve is {other:?}, expected none or lora-cr"))),
    }
}

/// A fusion's options without adapters and outputs, which a flow fills in.
pub fn fuse_template(how: &FuseHow) -> Result<FuseOptions> {
    let resolve = resolution(&how.resolve, &how.settings.conflict)?;
    let recipe = Recipe { resolve, fusion: fusion(how.method, &how.settings)? };
    fuse_with(recipe, &how.weights, &how.settings)
}

fn fuse_with(recipe: Recipe, weights: &Weights, settings: &FuseSettings) -> Result<FuseOptions> {
    let screen = Screen { max_norm: settings.max_norm, reject_outliers: settings.reject_outliers };
    screen.check()?;
    let profile = match settings.profile.as_str() {
        "portable" => Profile::Portable,
        "peft" => Profile::Peft,
        other => return Err(Error::Usage(format!("--profile is {other:?}, expected portable or peft"))),
    };
    Ok(FuseOptions {
        adapters: Vec::new(),
        recipe,
        weights: weights.clone(),
        grams: Vec::new(),
        allow_missing: settings.conflict.allow_missing,
        dtype: dtype(&settings.dtype)?,
        profile,
        out: None,
        model: None,
        merged: None,
        layers: None,
        screen,
        trust: TrustOptions::default(),
    })
}

/// `search`'s options.
pub fn search(args: &SearchArgs) -> Result<SearchOptions> {
    let settings = &args.settings;
    let fusions = fusions(&args.methods, settings)?;
    let Some(first) = fusions.first() else {
        return Err(Error::Usage("--methods names no method".into()));
    };
    let needs = |f: &Fusion| f.method.needs_input_grams();
    if !args.grams.is_empty() && !fusions.iter().any(needs) {
        goes_with("--grams", first.method, Method::needs_input_grams)?;
    }
    let resolves = args.resolve.iter().map(|typed| resolution(typed, &settings.conflict));
    let recipe = Recipe { resolve: None, fusion: *first };
    Ok(SearchOptions {
        fuse: FuseOptions {
            adapters: args.adapters.clone(),
            grams: args.grams.clone(),
            trust: trust(&args.trust),
            ..fuse_with(recipe, &Weights::Uniform, settings)?
        },
        resolves: resolves.collect::<Result<_>>()?,
        fusions,
        weights: args.weights.clone(),
        max_candidates: args.max_candidates,
        model: args.model.clone(),
        tasks: args.task.clone(),
        test: args.test.clone(),
        shots: args.prompts.shots,
        shots_from: args.prompts.shots_from.clone(),
        batch_tokens: args.prompts.batch_tokens,
        required: args.require_better_than.clone(),
        level: args.level,
        out: args.out.clone(),
    })
}

/// `fuse`'s options.
pub fn fuse(args: &FuseArgs) -> Result<FuseOptions> {
    Ok(FuseOptions {
        adapters: args.adapters.clone(),
        out: args.out.clone(),
        model: args.model.clone(),
        merged: args.merged.clone(),
        layers: args.layers.map(|l| l.start..l.end),
        grams: args.grams.clone(),
        trust: trust(&args.trust),
        ..fuse_template(&args.how)?
    })
}

/// `join`'s options.
pub fn join(args: &JoinArgs) -> JoinOptions {
    JoinOptions { parts: args.parts.clone(), out: args.out.clone() }
}

/// `conflict`'s options.
pub fn conflict(args: &ConflictArgs) -> ConflictOptions {
    ConflictOptions {
        adapters: args.adapters.clone(),
        resolve: lora_cr(&args.resolve),
        allow_missing: args.resolve.allow_missing,
        names: Vec::new(),
        html: args.html.clone(),
    }
}
