//! The stages of a flow, in order; each is done, or kept from an earlier run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use super::ledger::{LEDGER, Ledger, inputs};
use super::results::{
    Column, ConflictResult, EdgeResult, FORMAT, FusionResult, Kind, RESULTS, Results, Sweep, TaskResult,
};
use super::{Edge, Flow, Fusion, Joint, Target, Task};
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::digest;
use crate::checkpoint::output::Output;
use crate::error::{Error, Result};
use crate::fuse::LoraCr;
use crate::model::memory::human_bytes;
use crate::prune::select::Cut;
use crate::stage::budget::Fit;
use crate::stage::common::Common;
use crate::stage::conflict::{self, ConflictOptions};
use crate::stage::evaluate::{self, EvalOptions};
use crate::stage::fuse::{self, FuseOptions};
use crate::stage::prune::{self, Amount, PruneOptions};
use crate::stage::recover::{self, RecoverOptions};
use crate::stage::train::{self, TrainOptions};
use crate::stage::{budget, metrics, report};
use crate::tensor::Real;

/// The most tokens that go through the model together in an evaluation.
const BATCH_TOKENS: usize = 2048;

/// Runs everything of `flow` that is not finished; writes `results.json` and `report.html`.
///
/// A `--resume` is implied: the output is a working folder.
pub fn run<B: Backend, T: Real>(backend: &B, flow: &Flow, common: &Common) -> Result<Results> {
    let start = Instant::now();
    let common = Common { seed: flow.seed, ..common.clone() };
    let base = Checkpoint::open(&flow.base, common.open_options())?;
    // The numbers follow from these files too, whatever the weights are.
    let files = ["config.json", "tokenizer.json"].map(|name| digest::sha256_file(&flow.base.join(name)));
    let [settings, tokenizer] = files;
    let base_print = inputs("base", "", &[base.fingerprint()?, &settings?, &tokenizer?]);
    let config = base.config().clone();
    drop(base);
    let mut run = Runner {
        backend,
        flow,
        ledger: Ledger::open(&flow.output)?,
        common,
        base_print,
        config,
        files: BTreeMap::new(),
        precision: T::DTYPE.name(),
    };
    let mut sweeps = Vec::new();
    for ratio in flow.sweeps() {
        sweeps.push(run.sweep::<T>(ratio)?);
    }
    let mut notes: Vec<String> = sweeps.iter().flat_map(Sweep::left_out).collect();
    if flow.joint == Joint::First && flow.sets().len() > 1 {
        notes.push(format!(
            "The joint adapter, the upper bound, is shown for one of {} sets of edges: each takes as long as two edges.",
            flow.sets().len()
        ));
    }
    let results = Results {
        format: FORMAT.into(),
        seed: flow.seed,
        edges: flow.edges.iter().map(|e| e.name.clone()).collect(),
        sweeps,
        seconds: start.elapsed().as_secs_f64(),
        notes,
    };
    let path = flow.output.join(RESULTS);
    let fresh = flow.output.join(format!("{RESULTS}.new"));
    digest::write_json(&fresh, &results)?;
    std::fs::rename(&fresh, &path).map_err(Error::io(&path))?;
    report::write(&flow.output, &results)?;
    Ok(results)
}

impl Flow {
    /// A round of the flow for each ratio; one round without where every edge has its own.
    fn sweeps(&self) -> Vec<Option<f64>> {
        let own = self.edges.iter().all(|e| e.target.is_some());
        if own { vec![None] } else { self.ratios.iter().map(|&r| Some(r)).collect() }
    }

    /// What [`run`] does, in order, in words.
    pub fn steps(&self) -> Vec<String> {
        let mut steps = Vec::new();
        for ratio in self.sweeps() {
            let size = |edge: &Edge| match edge.target.or(ratio.map(Target::Ratio)) {
                Some(Target::Memory(bytes)) => human_bytes(bytes),
                Some(Target::Ratio(r)) => format!("ratio {r}"),
                None => "no size".into(),
            };
            for e in &self.edges {
                steps.push(format!("prune to {}, train and recover {}", size(e), e.name));
            }
            for set in self.joint_sets() {
                steps.push(format!("train and recover {} jointly", self.names(set).join(" + ")));
            }
            for fusion in &self.fusions {
                steps.push(format!("fuse {} by {}", self.names(&fusion.edges).join(" + "), fusion.name));
            }
            steps.extend(self.tasks.iter().map(|t| format!("evaluate on {}", t.name)));
        }
        steps
    }

    /// The distinct sets of edges that are fused, in the order of the flow.
    fn sets(&self) -> Vec<&[usize]> {
        let mut sets: Vec<&[usize]> = Vec::new();
        for fusion in &self.fusions {
            if !sets.contains(&fusion.edges.as_slice()) {
                sets.push(&fusion.edges);
            }
        }
        sets
    }

    /// Those of them that also get a joint adapter.
    fn joint_sets(&self) -> Vec<&[usize]> {
        let most = match self.joint {
            Joint::None => 0,
            Joint::First => 1,
            Joint::All => usize::MAX,
        };
        self.sets().into_iter().take(most).collect()
    }

    fn names(&self, edges: &[usize]) -> Vec<String> {
        edges.iter().map(|&e| self.edges[e].name.clone()).collect()
    }
}

/// A finished stage: its folder, the fingerprint of its inputs, and its report.
#[derive(Clone)]
struct Done {
    dir: PathBuf,
    print: String,
    report: Value,
}

struct Runner<'a, B: Backend> {
    backend: &'a B,
    flow: &'a Flow,
    ledger: Ledger,
    common: Common,
    base_print: String,
    config: ModelConfig,
    /// SHA-256 of data files that were read already.
    files: BTreeMap<PathBuf, String>,
    precision: &'static str,
}

/// An adapter that tasks are evaluated with.
struct Candidate {
    kind: Kind,
    name: String,
    edges: Vec<usize>,
    /// The model that it was trained on.
    pruned: Option<Done>,
    done: Done,
}

impl<B: Backend> Runner<'_, B> {
    fn sweep<T: Real>(&mut self, ratio: Option<f64>) -> Result<Sweep> {
        let place = ratio.map_or_else(|| "own".to_string(), |r| format!("ratio-{r}"));
        let flow = self.flow;
        let (mut candidates, mut edges, mut joints) = (Vec::new(), Vec::new(), Vec::new());
        for (n, edge) in flow.edges.iter().enumerate() {
            let (pruned, recovered, result) = self.edge::<T>(&place, edge, ratio, 1)?;
            edges.push(result);
            candidates.push(Candidate {
                kind: Kind::Edge,
                name: edge.name.clone(),
                edges: vec![n],
                pruned: Some(pruned),
                done: recovered,
            });
        }
        for set in flow.joint_sets() {
            let first = &flow.edges[set[0]];
            let pooled = Edge {
                name: flow.names(set).join("+"),
                data: set.iter().flat_map(|&e| flow.edges[e].data.clone()).collect(),
                val: None,
                target: first.target,
            };
            let (pruned, recovered, result) = self.edge::<T>(&place, &pooled, ratio, set.len() as u64)?;
            joints.push(result);
            candidates.push(Candidate {
                kind: Kind::Joint,
                name: "joint".into(),
                edges: set.to_vec(),
                pruned: Some(pruned),
                done: recovered,
            });
        }
        let mut conflicts = Vec::new();
        for set in flow.sets().into_iter().filter(|set| set.len() > 1) {
            conflicts.push(self.conflict(&place, set, &candidates)?);
        }
        let mut fusions = Vec::with_capacity(flow.fusions.len());
        for fusion in &flow.fusions {
            let done = self.fuse(&place, fusion, &candidates)?;
            let (edges, report) = (flow.names(&fusion.edges), done.report.clone());
            fusions.push(FusionResult::new(edges, fusion.name.clone(), report));
            candidates.push(Candidate {
                kind: Kind::Fusion,
                name: fusion.name.clone(),
                edges: fusion.edges.clone(),
                pruned: None,
                done,
            });
        }
        let tasks = flow
            .tasks
            .iter()
            .map(|t| self.evaluate::<T>(&place, t, &candidates))
            .collect::<Result<Vec<_>>>()?;
        Ok(Sweep { ratio, edges, joints, conflicts, fusions, tasks })
    }

    /// Prunes, trains `times` as long as the flow says, and recovers one edge: its model, its adapter, its report. One
    /// with memory for the full model trains that, and has nothing to recover.
    fn edge<T: Real>(
        &mut self,
        place: &str,
        edge: &Edge,
        ratio: Option<f64>,
        times: u64,
    ) -> Result<(Done, Done, EdgeResult)> {
        let amount = match edge.target.or(ratio.map(Target::Ratio)) {
            Some(Target::Ratio(r)) => Amount::Ratio(r),
            Some(Target::Memory(m)) => Amount::Memory(m),
            None => {
                return Err(Error::Usage(format!("edge {:?} has neither ratio nor memory", edge.name)));
            }
        };
        let pruned = self.prune::<T>(amount)?;
        let name = format!("{place}/{}/adapter", edge.name);
        let template = &self.flow.train;
        // Edges together have none of their own, and then no best step either.
        let val = edge.val.clone().or_else(|| template.val.clone());
        let keep_best = template.keep_best && (val.is_some() || times == 1);
        let mut read = vec![pruned.print.clone()];
        for file in edge.data.iter().chain(&val) {
            read.push(self.file(file)?);
        }
        if let Some(adapter) = &template.init_adapter {
            read.push(train::adapter_hash(adapter)?);
        }
        let options = TrainOptions {
            model: pruned.dir.clone(),
            data: edge.data.clone(),
            val,
            keep_best,
            out: self.flow.output.join(&name),
            ..template.clone().longer(times)
        };
        // What the joint adapter has seen is as much of each edge's data as the edge itself.
        let described = TrainOptions {
            model: PathBuf::new(),
            data: vec![],
            val: None,
            out: PathBuf::new(),
            ..template.clone().longer(times)
        };
        let backend = self.backend;
        let trained = self.stage(&name, "train", &format!("{described:?}"), &read, move |common| {
            train::Prepared::new::<B, T>(backend, options, common)?.run::<B, T>(backend, common)
        })?;
        let losses = metrics::read(&trained.dir)?.iter().map(|m| m.loss).collect();
        let result = EdgeResult {
            name: edge.name.clone(),
            prune: pruned.report.clone(),
            train: trained.report.clone(),
            losses,
        };
        if pruned.dir == self.flow.base {
            return Ok((pruned, trained, result));
        }
        let name = format!("{place}/{}/recovered", edge.name);
        let options = RecoverOptions {
            adapter: trained.dir.clone(),
            model: Some(self.flow.base.clone()),
            out: self.flow.output.join(&name),
            ..RecoverOptions::default()
        };
        let read = [trained.print.clone(), self.base_print.clone()];
        let recovered = self.stage(&name, "recover", "", &read, |common| recover::run(&options, common))?;
        Ok((pruned, recovered, result))
    }

    /// One pruned model, shared by the edges of one amount; the base itself where that trains in the memory.
    fn prune<T: Real>(&mut self, amount: Amount) -> Result<Done> {
        if let Amount::Memory(memory) = amount
            && self.is_enough(memory)?
        {
            let n = self.config.parameters();
            let report = json!({"ratio": 0.0, "parameters_before": n, "parameters_after": n});
            return Ok(Done { dir: self.flow.base.clone(), print: self.base_print.clone(), report });
        }
        let name = match amount {
            Amount::Ratio(r) => format!("pruned/ratio-{r}"),
            Amount::Memory(m) => format!("pruned/memory-{m}"),
        };
        let mut read = vec![self.base_print.clone()];
        if let Some(file) = self.flow.prune.calibration.clone() {
            read.push(self.file(&file)?);
        }
        let template = &self.flow.prune;
        let options = PruneOptions {
            model: self.flow.base.clone(),
            out: self.flow.output.join(&name),
            amount,
            ..template.clone()
        };
        let described = PruneOptions {
            model: PathBuf::new(),
            out: PathBuf::new(),
            calibration: None,
            amount,
            ..template.clone()
        };
        let backend = self.backend;
        self.stage(&name, "prune", &format!("{described:?}"), &read, move |common| {
            prune::Prepared::new::<B, T>(backend, options, common)?.run::<B, T>(backend, common)
        })
    }

    /// Whether the full model trains in `memory`.
    fn is_enough(&self, memory: u64) -> Result<bool> {
        let how = &self.flow.prune;
        let cut = Cut { ratio: 0.5, layers: how.layers.clone(), round_mlp: how.round_mlp };
        Ok(matches!(budget::smallest(&self.config, &cut, &how.shape, memory)?, Fit::Full))
    }

    /// Compares the recovered adapters of `set`, as LoRA-CR does by default.
    fn conflict(&mut self, place: &str, set: &[usize], candidates: &[Candidate]) -> Result<ConflictResult> {
        let edges = self.flow.names(set);
        let members = members(candidates, set);
        let name = format!("{place}/conflict/{}.html", edges.join("+"));
        let read: Vec<String> = members.iter().map(|c| c.done.print.clone()).collect();
        let options = ConflictOptions {
            adapters: members.iter().map(|c| c.done.dir.clone()).collect(),
            resolve: LoraCr::default(),
            allow_missing: true,
            html: Some(self.flow.output.join(&name)),
            names: edges.clone(),
        };
        let (backend, folder) = (self.backend, self.flow.output.join(format!("{place}/conflict")));
        let done = self.stage(&name, "conflict", "", &read, move |common| {
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            Ok(conflict::run(backend, &options, common)?.report)
        })?;
        let report = serde_json::from_value(done.report)
            .map_err(|e| Error::file(self.flow.output.join(LEDGER), format!("{name}: {e}")))?;
        Ok(ConflictResult { edges, report })
    }

    fn fuse(&mut self, place: &str, fusion: &Fusion, candidates: &[Candidate]) -> Result<Done> {
        let members = members(candidates, &fusion.edges);
        let name = format!("{place}/fused/{}/{}", self.flow.names(&fusion.edges).join("+"), fusion.name);
        let read: Vec<String> = members.iter().map(|c| c.done.print.clone()).collect();
        let options = FuseOptions {
            adapters: members.iter().map(|c| c.done.dir.clone()).collect(),
            out: Some(self.flow.output.join(&name)),
            ..fusion.options.clone()
        };
        let described = format!("{:?}", fusion.options);
        let backend = self.backend;
        self.stage(&name, "fuse", &described, &read, move |common| fuse::run(backend, &options, common))
    }

    /// The base, the task's own edges, and every fusion and joint adapter that knows all of them, in one pass.
    fn evaluate<T: Real>(
        &mut self,
        place: &str,
        task: &Task,
        candidates: &[Candidate],
    ) -> Result<TaskResult> {
        let own: Vec<&Candidate> = candidates
            .iter()
            .filter(|c| match c.kind {
                Kind::Edge => task.edges.contains(&c.edges[0]),
                Kind::Fusion if !task.fusions => false,
                _ => task.edges.iter().all(|e| c.edges.contains(e)),
            })
            .collect();
        let (mut columns, report) = (Vec::new(), format!("{place}/tasks/{}", task.name));
        let label = |c: &Candidate| format!("{}@{}", c.name, self.flow.names(&c.edges).join("+"));
        let mut read = vec![self.base_print.clone(), self.file(&task.file)?];
        read.extend(own.iter().map(|c| c.done.print.clone()));
        let options = EvalOptions {
            adapters: own.iter().map(|c| (label(c), c.done.dir.clone())).collect(),
            ..self.task_options(task, &report)
        };
        let done = self.score::<T>(&report, options, &read)?;
        let heads = std::iter::once((Kind::Base, "base".to_string(), Vec::new()))
            .chain(own.iter().map(|c| (c.kind, c.name.clone(), self.flow.names(&c.edges))));
        for (n, (kind, name, edges)) in heads.enumerate() {
            columns.push(column(&done.report, n, kind, name, edges));
        }
        if task.pruned {
            for model in self.pruned_models(candidates) {
                let name =
                    model.dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                let report = format!("{report} of pruned {name}");
                let options = EvalOptions { model: model.dir.clone(), ..self.task_options(task, &report) };
                let read = [model.print, self.file(&task.file)?];
                let done = self.score::<T>(&report, options, &read)?;
                columns.push(column(&done.report, 0, Kind::Pruned, format!("pruned, {name}"), Vec::new()));
            }
        }
        columns.sort_by_key(|c| c.kind);
        let columns = with_client_means(columns);
        Ok(TaskResult { name: task.name.clone(), edges: self.flow.names(&task.edges), columns })
    }

    /// The base alone on `task`, into the folder `name`.
    fn task_options(&self, task: &Task, name: &str) -> EvalOptions {
        EvalOptions {
            model: self.flow.base.clone(),
            base: true,
            tasks: vec![task.file.clone()],
            batch_tokens: BATCH_TOKENS,
            out: Some(self.flow.output.join(name)),
            ..EvalOptions::default()
        }
    }

    fn score<T: Real>(&mut self, name: &str, options: EvalOptions, read: &[String]) -> Result<Done> {
        let backend = self.backend;
        self.stage(name, "eval", "", read, move |common| evaluate::run::<B, T>(backend, &options, common))
    }

    /// The models that the adapters of one round were trained on, but for the base.
    fn pruned_models(&self, candidates: &[Candidate]) -> Vec<Done> {
        let mut models: Vec<Done> = Vec::new();
        for model in candidates.iter().filter_map(|c| c.pruned.as_ref()) {
            if model.dir != self.flow.base && models.iter().all(|m| m.dir != model.dir) {
                models.push(model.clone());
            }
        }
        models
    }

    /// Does the stage `name`, or keeps it if it was finished with these inputs.
    fn stage<R: Serialize>(
        &mut self,
        name: &str,
        kind: &str,
        options: &str,
        read: &[String],
        work: impl FnOnce(&Common) -> Result<R>,
    ) -> Result<Done> {
        self.common.check_stop(&format!(
            "finished stages are kept in {}; the same command goes on",
            self.flow.output.display()
        ))?;
        let seed = self.flow.seed.to_string();
        let mut all: Vec<&str> = vec![&seed, self.precision];
        all.extend(read.iter().map(String::as_str));
        let print = inputs(kind, options, &all);
        let dir = self.flow.output.join(name);
        if let Some(report) = self.ledger.finished(name, &print) {
            tracing::info!("{name} is kept");
            return Ok(Done { dir, print, report });
        }
        tracing::info!("{name}");
        // Unfinished work of the same inputs goes on; anything else that is there is done again. What it is to replace is
        // replaced in either case.
        let resume = Output::is_unfinished(&dir) && self.ledger.began(name, &print);
        self.ledger.begin(name, print.clone())?;
        let common = Common { resume, force: true, ..self.common.clone() };
        let report = work(&common)?;
        let report = self.ledger.note(name, print.clone(), &report)?;
        Ok(Done { dir, print, report })
    }

    fn file(&mut self, path: &Path) -> Result<String> {
        if let Some(hash) = self.files.get(path) {
            return Ok(hash.clone());
        }
        let hash = digest::sha256_file(path)?;
        self.files.insert(path.to_path_buf(), hash.clone());
        Ok(hash)
    }
}

/// The edges' own adapters among `candidates` that belong to `set`.
fn members<'a>(candidates: &'a [Candidate], set: &[usize]) -> Vec<&'a Candidate> {
    candidates.iter().filter(|c| c.kind == Kind::Edge && set.contains(&c.edges[0])).collect()
}

/// Column `n` of an evaluation's report on one task.
fn column(report: &Value, n: usize, kind: Kind, name: String, edges: Vec<String>) -> Column {
    let at = |field: &str| report.pointer(&format!("/tasks/0/columns/{n}/{field}"));
    let count = |field: &str| at(field).and_then(Value::as_u64).unwrap_or(0) as usize;
    let share = |field: &str| at(field).and_then(Value::as_f64);
    Column {
        kind,
        name,
        edges,
        items: count("items"),
        correct: count("correct"),
        accuracy: share("accuracy"),
        standard_error: share("standard_error"),
    }
}

/// Adds, behind the columns of `fedsa-client-J` for all J of a set, their mean: FedSA's personalised models judged
/// together. Its standard error is the mean of theirs, an upper bound since all answer the same items.
fn with_client_means(columns: Vec<Column>) -> Vec<Column> {
    const PREFIX: &str = "fedsa-client-";
    let mut out: Vec<Column> = Vec::with_capacity(columns.len());
    let split = |c: &Column| {
        let rest = c.name.strip_prefix(PREFIX).filter(|_| c.kind == Kind::Fusion)?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        (digits > 0).then(|| (rest[digits..].to_string(), c.edges.clone()))
    };
    for (n, column) in columns.iter().enumerate() {
        out.push(column.clone());
        let Some(key) = split(column) else { continue };
        let same = |c: &&Column| split(c).as_ref() == Some(&key);
        let all: Vec<&Column> = columns.iter().filter(same).collect();
        let last = columns.iter().rposition(|c| split(c).as_ref() == Some(&key)) == Some(n);
        if last && all.len() == column.edges.len() {
            let mean = |of: fn(&Column) -> Option<f64>| {
                all.iter().map(|c| of(c)).sum::<Option<f64>>().map(|sum| sum / all.len() as f64)
            };
            out.push(Column {
                name: format!("fedsa-client-mean{}", key.0),
                correct: all.iter().map(|c| c.correct).fold(0, usize::saturating_add) / all.len(),
                accuracy: mean(|c| c.accuracy),
                standard_error: mean(|c| c.standard_error),
                ..column.clone()
            });
        }
    }
    out
}
