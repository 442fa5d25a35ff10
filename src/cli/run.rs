//! What each command does: options to the stage, its report to stdout.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::CommandFactory;

use rayon::ThreadPoolBuilder;

use super::args::{Cli, Command, Global, KeysCommand};
use super::plan::{on_device, on_machine};
use super::{dry_run, plan, print};
use crate::backend::Backend;
use crate::checkpoint::config::ModelConfig;
use crate::error::{Error, Result};
use crate::stage::common::Common;
use crate::stage::{
    budget, conflict, demo, evaluate, export, flow, fuse, generate, grams, inspect, join, keys, logits,
    measure, prune, recover, report, search, sign, train, verify,
};
use crate::tensor::Real;

/// Runs `cli`.
pub fn run(cli: &Cli, stop: Arc<AtomicBool>) -> Result<()> {
    let global = &cli.global;
    plan::check_packing(cli)?;
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
            let common = machine.common(global, &common)?;
            let options = plan::train(args)?;
            on_machine!(machine, |b: B, T| train_on::<B, T>(b, options, &common, out))
        }
        Command::Generate(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let options = plan::generate(args);
            let done = on_machine!(machine, |b: B, T| generate::run::<B, T>(b, &options, &common))?;
            out.report(&done, || done.text.clone())
        }
        Command::Logits(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let options = plan::logits(args);
            let done = on_machine!(machine, |b: B, T| logits::run::<B, T>(b, &options, &common))?;
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
            let common = machine.common(global, &common)?;
            let size = plan::step_size(args);
            let measured =
                on_machine!(machine, |b: B, T| measure::measure::<B, T>(b, dir, args.of, &size, &common))?;
            let both = serde_json::json!({"budget": report, "measured": measured});
            out.report(&both, || format!("{report}\n{}", print::measured(&measured)))
        }
        Command::Prune(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let options = plan::prune(args)?;
            on_machine!(machine, |b: B, T| prune_on::<B, T>(b, options, &common, out))
        }
        Command::Recover(args) => {
            let options = plan::recover(args);
            let report = recover::run(&options, &common)?;
            out.report(&report, || print::recover(&report))
        }
        Command::Conflict(args) => {
            let (machine, options) = (plan::machine(global)?, plan::conflict(args));
            let outcome = on_device!(machine, |b| in_pool(global, || conflict::run(b, &options, &common)))?;
            print::warnings(&outcome.warnings);
            out.report(&outcome.report, || print::conflict(&outcome.report, &args.adapters))
        }
        Command::Fuse(args) => {
            let options = plan::fuse(args)?;
            let machine = plan::machine(global)?;
            let report = on_device!(machine, |b| in_pool(global, || fuse::run(b, &options, &common)))?;
            print::warnings(&report.warnings);
            out.report(&report, || print::fuse(&report))
        }
        Command::Search(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let options = plan::search(args)?;
            let report = on_machine!(machine, |b: B, T| {
                in_pool(global, || search::run::<B, T>(b, &options, &common))
            })?;
            print::warnings(&report.warnings);
            out.report(&report, || print::search(&report))?;
            report.check()
        }
        Command::Join(args) => {
            let report = join::run(&plan::join(args), &common)?;
            out.report(&report, || print::join(&report))
        }
        Command::Grams(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let options = plan::grams(args);
            let report = on_machine!(machine, |b: B, T| grams_on::<B, T>(b, options, &common))?;
            out.report(&report, || print::grams(&report))
        }
        Command::Run(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let flow = super::flow::read(&args.flow, global.seed)?;
            let results = on_machine!(machine, |b: B, T| flow::run::<B, T>(b, &flow, &common))?;
            out.report(&results, || print::results(&results, &flow.output))
        }
        Command::Doctor => {
            let report = plan::doctor(global)?;
            out.report(&report, || report.to_string())
        }
        Command::Demo(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let file = demo::unpack(args.out.as_deref())?;
            let mut flow = super::flow::read(&file, global.seed)?;
            flow.joint = if args.full { flow::Joint::All } else { flow::Joint::First };
            let results = on_machine!(machine, |b: B, T| flow::run::<B, T>(b, &flow, &common))?;
            out.report(&results, || print::results(&results, &flow.output))
        }
        Command::Eval(args) => {
            let machine = plan::machine(global)?;
            let common = machine.common(global, &common)?;
            let options = plan::eval(args)?;
            let report = on_machine!(machine, |b: B, T| evaluate::run::<B, T>(b, &options, &common))?;
            out.report(&report, || print::eval(&report))
        }
        Command::Inspect(args) => {
            let mut report = inspect::inspect(&args.path, args.verify, common.open_options())?;
            if let Some(count) = args.spectrum {
                let machine = plan::machine(global)?;
                let common = machine.common(global, &common)?;
                let found =
                    on_device!(machine, |b| inspect::spectrum::spectra(b, &args.path, count.get(), &common))?;
                report.spectrum = Some(found);
            }
            out.report(&report, || report.to_string())?;
            report.check()
        }
        Command::Data { command } => command.run(global, &common, out),
        Command::Keys { command: KeysCommand::New { path } } => {
            let report = keys::new(path)?;
            out.report(&report, || print::keys(&report))
        }
        Command::Sign(args) => {
            let report = sign::run(&args.dir, &plan::sign(args), &common)?;
            out.report(&report, || print::sign(&report))
        }
        Command::Verify(args) => {
            let report = verify::run(&args.dir, &plan::verify(args))?;
            out.report(&report, || print::verify(&report))
        }
        Command::Export(args) => {
            let report = export::run(&plan::export(args)?, &common)?;
            print::warnings(&report.warnings);
            out.report(&report, || print::export(&report))
        }
        Command::Report(args) => {
            let path = report::run(&args.dir)?;
            out.report(&path, || path.display().to_string())
        }
    }
}

/// Runs `work` on as many threads as were asked for.
pub(super) fn in_pool<R: Send>(global: &Global, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
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

fn grams_on<B: Backend, T: Real>(
    backend: &B,
    options: grams::GramsOptions,
    common: &Common,
) -> Result<grams::GramsReport> {
    grams::Prepared::new::<T>(backend, options, common)?.run::<T>(backend, common)
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
