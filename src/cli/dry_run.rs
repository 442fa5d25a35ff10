//! `--dry-run`: what a command would read and write, on which device, in how much memory. All that can be checked
//! without computing is checked, so a plan that prints is a command that starts.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::{Cli, Command};
use super::plan::on_machine;
use super::run::in_pool;
use super::{plan, print};
use crate::checkpoint::output::{Output, Standing};
use crate::checkpoint::output_file::{self, OutputFile};
use crate::error::{Error, Result, human_bytes};
use crate::fuse::inputs::Inputs;
use crate::model::memory::Plan;
use crate::stage::common::Common;
use crate::stage::export::Format;
use crate::stage::join::Parts;
use crate::stage::{evaluate, export, fuse, generate, grams, logits, prune, recover, train};

/// What a command would do.
#[derive(Debug, Default, Serialize)]
pub struct Outline {
    /// Where it would compute and in what; none for commands that only move factors.
    pub device: Option<String>,
    /// Files and folders.
    pub reads: Vec<PathBuf>,
    /// What would come to be.
    pub writes: Vec<Write>,
    /// What would be done, in order, where it is more than one thing.
    pub steps: Vec<String>,
    /// Buffers; none where the memory is that of one module or tensor a thread.
    pub memory: Option<Plan>,
}

/// A file or folder that would come to be.
#[derive(Debug, Serialize)]
pub struct Write {
    /// Where.
    pub path: PathBuf,
    /// What is there now.
    pub found: Standing,
}

/// The plan on the machine's back end and its terms, as `f::<B, T>(backend, …)`.
macro_rules! planned {
    ($outline:ident, $global:expr, $common:ident, |$backend:ident: $B:ident, $T:ident| $plan:expr) => {{
        let machine = plan::machine($global)?;
        let $common = &machine.common($global, $common)?;
        let plan = on_machine!(machine, |$backend: $B, $T| $plan)?;
        $outline.device = Some(machine.describe());
        $outline.memory = Some(plan);
    }};
}

/// What `cli` would do. An error where it would fail before any work, and for commands that only print.
pub fn outline(cli: &Cli, common: &Common) -> Result<Outline> {
    let global = &cli.global;
    let mut o = Outline::default();
    match &cli.command {
        Command::Train(args) => {
            let options = plan::train(args)?;
            o.reads(
                std::iter::once(&options.model)
                    .chain(&options.data)
                    .chain(&options.val)
                    .chain(&options.init_adapter),
            );
            o.folder(&options.out, common)?;
            planned!(o, global, common, |b: B, T| {
                train::Prepared::new::<B, T>(b, options, common).map(|ready| ready.plan)
            });
        }
        Command::Prune(args) => {
            let options = plan::prune(args)?;
            o.reads(std::iter::once(&options.model).chain(&options.calibration));
            o.folder(&options.out, common)?;
            planned!(o, global, common, |b: B, T| {
                prune::Prepared::new::<B, T>(b, options, common).map(|ready| ready.plan)
            });
        }
        Command::Recover(args) => {
            let options = plan::recover(args);
            o.reads(std::iter::once(&options.adapter).chain(&options.model));
            o.folder(&options.out, common)?;
            recover::check(&options, common)?;
        }
        Command::Conflict(args) => {
            let options = plan::conflict(args);
            o.reads(&options.adapters);
            if let Some(file) = &options.html {
                o.file(file, common, output_file::made_here)?;
            }
            Inputs::open(&options.adapters, options.allow_missing, common.open_options())?;
        }
        Command::Fuse(args) => {
            let options = plan::fuse(args)?;
            o.reads(options.adapters.iter().chain(&options.grams).chain(&options.model));
            for out in options.out.iter().chain(&options.merged) {
                o.folder(out, common)?;
            }
            let screen = &options.screen;
            if screen.reject_outliers || screen.max_norm.is_some() {
                o.steps.push("measure each update, which may refuse an adapter or leave it out".into());
            }
            let (modules, rank, memory) = in_pool(global, || {
                let ready = fuse::outline(&options, common)?;
                Ok((ready.asked().len(), ready.rank(), ready.memory()))
            })?;
            o.steps.push(format!("fuse {modules} modules, largest rank {rank}"));
            o.memory = Some(memory).filter(|plan| plan.total() > 0);
        }
        Command::Join(args) => {
            let options = plan::join(args);
            o.reads(&options.parts);
            o.folder(&options.out, common)?;
            let parts = Parts::open(&options.parts)?;
            o.steps.push(format!("join {} modules of {} parts", parts.modules(), options.parts.len()));
        }
        Command::Grams(args) => {
            let options = plan::grams(args);
            o.reads(std::iter::once(&options.model).chain(&options.adapter).chain(&options.data));
            o.folder(&options.out, common)?;
            let mut does = String::new();
            planned!(o, global, common, |b: B, T| {
                grams::Prepared::new::<T>(b, options, common).and_then(|ready: grams::Prepared<B>| {
                    does = format!(
                        "collect {} of Grams over {} tokens",
                        human_bytes(ready.bytes()?),
                        ready.tokens()
                    );
                    Ok(ready.plan)
                })
            });
            o.steps.push(does);
        }
        Command::Eval(args) => {
            let options = plan::eval(args)?;
            let adapters = options.adapters.iter().map(|(_, dir)| dir);
            o.reads(
                std::iter::once(&options.model).chain(adapters).chain(&options.tasks).chain(&options.text),
            );
            if let Some(out) = &options.out {
                o.folder(out, common)?;
            }
            if let Some(file) = &options.predictions {
                o.file(file, common, evaluate::write::made_here)?;
            }
            planned!(o, global, common, |b: B, T| evaluate::plan::<B, T>(b, &options, common));
        }
        Command::Logits(args) => {
            let options = plan::logits(args);
            o.reads(std::iter::once(&options.model).chain(&options.adapter));
            o.file(&options.out, common, output_file::made_here)?;
            planned!(o, global, common, |b: B, T| logits::plan::<B, T>(b, &options, common));
        }
        Command::Generate(args) => {
            let options = plan::generate(args);
            o.reads(std::iter::once(&options.model).chain(&options.adapter));
            planned!(o, global, common, |b: B, T| generate::plan::<B, T>(b, &options, common));
        }
        Command::Export(args) => {
            let options = plan::export(args)?;
            o.reads(std::iter::once(&options.adapter).chain(&options.model));
            match options.to {
                Format::Gguf => o.file(&options.out, common, output_file::made_here)?,
                Format::Peft => o.folder(&options.out, common)?,
            }
            export::Ready::new(&options, common)?;
        }
        Command::Run(args) => {
            let flow = super::flow::read(&args.flow, global.seed)?;
            let data = flow.edges.iter().flat_map(|e| e.data.iter().chain(&e.val));
            o.reads(
                [&args.flow, &flow.base].into_iter().chain(data).chain(flow.tasks.iter().map(|t| &t.file)),
            );
            o.writes.push(Write { path: flow.output.clone(), found: Standing::New });
            o.steps = flow.steps();
            o.device = Some(plan::machine(global)?.describe());
        }
        Command::Demo(_) | Command::Report(_) => {
            return Err(Error::Usage(
                "--dry-run goes with run, prune, train, recover, conflict, fuse, grams, eval, logits, generate and export; demo and report only write a folder of their own".into(),
            ));
        }
        Command::Keys { .. } | Command::Sign(_) => {
            return Err(Error::Usage(
                "--dry-run goes with commands that plan a work; keys and sign take a moment".into(),
            ));
        }
        Command::Budget(_)
        | Command::Inspect(_)
        | Command::Verify(_)
        | Command::Doctor
        | Command::Completions { .. } => {
            return Err(Error::Usage(
                "--dry-run goes with commands that compute or write; this one only prints".into(),
            ));
        }
    }
    Ok(o)
}

impl Outline {
    fn reads<'a>(&mut self, paths: impl IntoIterator<Item = &'a PathBuf>) {
        self.reads.extend(paths.into_iter().cloned());
    }

    fn folder(&mut self, out: &Path, common: &Common) -> Result<()> {
        let found = Output::look_ahead(out, common.output())?;
        self.writes.push(Write { path: out.to_path_buf(), found });
        Ok(())
    }

    fn file(&mut self, out: &Path, common: &Common, made_here: fn(&[u8]) -> bool) -> Result<()> {
        OutputFile::look_ahead(out, common.force, made_here)?;
        let found = if out.exists() { Standing::Replaced } else { Standing::New };
        self.writes.push(Write { path: out.to_path_buf(), found });
        Ok(())
    }
}

impl fmt::Display for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(device) = &self.device {
            writeln!(f, "device  {device}")?;
        }
        for path in &self.reads {
            writeln!(f, "reads   {}", path.display())?;
        }
        for Write { path, found } in &self.writes {
            let now = match found {
                Standing::New => "new",
                Standing::Unfinished => "goes on from unfinished work",
                Standing::Replaced => "replaces what is there",
                Standing::Finished => "already finished",
            };
            writeln!(f, "writes  {} ({now})", path.display())?;
        }
        for step in &self.steps {
            writeln!(f, "does    {step}")?;
        }
        match &self.memory {
            Some(plan) => write!(f, "memory\n{}", print::plan(plan)),
            None => Ok(()),
        }
    }
}
