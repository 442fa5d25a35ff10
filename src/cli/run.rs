//! What each command does: options to the stage, its report to stdout.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::CommandFactory;
use half::bf16;

use rayon::ThreadPoolBuilder;

use super::args::{Cli, Command, Global, PrecisionArg};
use super::{dry_run, plan, print};
use crate::backend::Backend;
use crate::checkpoint::config::ModelConfig;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::stage::common::Common;
use crate::stage::{
    budget, conflict, demo, doctor, evaluate, flow, fuse, generate, inspect, logits, measure, prune, recover,
    report, train,
};
use crate::tensor::Real;

/// Calls a generic function with the precision that was asked for.
macro_rules! at_precision {
    ($precision:expr, $f:ident :: < $b:ty, T > ( $($arg:expr),* )) => {
        match $precision {
            PrecisionArg::F32 => $f::<$b, f32>($($arg),*),
            PrecisionArg::Bf16 => $f::<$b, bf16>($($arg),*),
        }
    };
}

/// Runs `cli`.
pub fn run(cli: &Cli, stop: Arc<AtomicBool>) -> Result<()> {
    let global = &cli.global;
    let common = plan::common(global, stop);
    let out = print::Output { json: global.json };
    if global.dry_run {
        let outline = dry_run::outline(cli, &common)?;
        return out.report(&outline, || outline.to_string());
    }
    match &cli.command {
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "anabranch", &mut text);
            print::text(&String::from_utf8_lossy(&text))
        }
        Command::Train(args) => {
            let machine = plan::machine(global)?;
            let options = plan::train(args)?;
            at_precision!(machine.precision, train_on::<Cpu, T>(&machine.backend, options, &common, out))
        }
        Command::Generate(args) => {
            let machine = plan::machine(global)?;
            let options = plan::generate(args);
            use generate::run as generate_run;
            let done = at_precision!(
                machine.precision,
                generate_run::<Cpu, T>(&machine.backend, &options, &common)
            )?;
            out.report(&done, || done.text.clone())
        }
        Command::Logits(args) => {
            let machine = plan::machine(global)?;
            let options = plan::logits(args);
            use logits::run as logits_run;
            let done =
                at_precision!(machine.precision, logits_run::<Cpu, T>(&machine.backend, &options, &common))?;
            out.report(&done, || format!("{}: logits [{}, {}]", done.out.display(), done.tokens, done.vocab))
        }
        Command::Budget(args) => {
            let config = match (&args.config, &args.model) {
                (Some(file), _) => ModelConfig::read(file)?,
                (None, Some(dir)) => ModelConfig::open(dir)?,
                (None, None) => return Err(Error::Usage("budget needs --model or --config".into())),
            };
            let report = budget::budget(&config, &plan::budget(args))?;
            let Some(dir) = args.model.as_deref().filter(|_| args.measure) else {
                return out.report(&report, || report.to_string());
            };
            let machine = plan::machine(global)?;
            let size = plan::step_size(args);
            use measure::measure as measure_one;
            let measured = at_precision!(
                machine.precision,
                measure_one::<Cpu, T>(&machine.backend, dir, args.of, &size, &common)
            )?;
            let both = serde_json::json!({"budget": report, "measured": measured});
            out.report(&both, || format!("{report}\n{}", print::measured(&measured)))
        }
        Command::Prune(args) => {
            let machine = plan::machine(global)?;
            let options = plan::prune(args)?;
            at_precision!(machine.precision, prune_on::<Cpu, T>(&machine.backend, options, &common, out))
        }
        Command::Recover(args) => {
            let options = plan::recover(args);
            let report = recover::run(&options, &common)?;
            out.report(&report, || print::recover(&report))
        }
        Command::Conflict(args) => {
            let outcome = in_pool(global, || conflict::run(&plan::conflict(args), &common))?;
            print::warnings(&outcome.warnings);
            out.report(&outcome.report, || print::conflict(&outcome.report, &args.adapters))
        }
        Command::Fuse(args) => {
            let options = plan::fuse(args)?;
            let report = in_pool(global, || fuse::run(&options, &common))?;
            print::warnings(&report.warnings);
            out.report(&report, || print::fuse(&report))
        }
        Command::Run(args) => {
            let machine = plan::machine(global)?;
            let flow = super::flow::read(&args.flow, global.seed)?;
            use flow::run as flow_run;
            let results =
                at_precision!(machine.precision, flow_run::<Cpu, T>(&machine.backend, &flow, &common))?;
            out.report(&results, || print::results(&results, &flow.output))
        }
        Command::Doctor => {
            let machine = plan::machine(global)?;
            let threads = machine.backend.threads();
            let report = doctor::run("cpu".into(), machine.reason, threads, plan::cgroup_limit());
            out.report(&report, || report.to_string())
        }
        Command::Demo(args) => {
            let machine = plan::machine(global)?;
            let file = demo::unpack(args.out.as_deref())?;
            let mut flow = super::flow::read(&file, global.seed)?;
            flow.joint = if args.full { flow::Joint::All } else { flow::Joint::First };
            use flow::run as flow_run;
            let results =
                at_precision!(machine.precision, flow_run::<Cpu, T>(&machine.backend, &flow, &common))?;
            out.report(&results, || print::results(&results, &flow.output))
        }
        Command::Eval(args) => {
            let machine = plan::machine(global)?;
            let options = plan::eval(args)?;
            use evaluate::run as evaluate_run;
            let report = at_precision!(
                machine.precision,
                evaluate_run::<Cpu, T>(&machine.backend, &options, &common)
            )?;
            out.report(&report, || print::eval(&report))
        }
        Command::Inspect(args) => {
            let report = inspect::inspect(&args.path, args.verify, common.open_options())?;
            out.report(&report, || report.to_string())?;
            report.check()
        }
        Command::Report(args) => {
            let path = report::run(&args.dir)?;
            out.report(&path, || path.display().to_string())
        }
    }
}

/// Runs `work` on as many threads as were asked for.
fn in_pool<R: Send>(global: &Global, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    let threads = plan::threads(global)?;
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|e| Error::Usage(format!("cannot start {threads} threads: {e}")))?;
    pool.install(work)
}

fn prune_on<B: Backend, T: Real>(
    backend: &B,
    options: prune::PruneOptions,
    common: &Common,
    out: print::Output,
) -> Result<()> {
    let prepared = prune::Prepared::new::<B, T>(backend, options, common)?;
    let report = prepared.run::<B, T>(backend, common)?;
    out.report(&report, || print::prune(&report))
}

fn train_on<B: Backend, T: Real>(
    backend: &B,
    options: train::TrainOptions,
    common: &Common,
    out: print::Output,
) -> Result<()> {
    let prepared = train::Prepared::new::<B, T>(backend, options, common)?;
    let report = prepared.run::<B, T>(backend, common)?;
    out.report(&report, || print::train(&report))
}
