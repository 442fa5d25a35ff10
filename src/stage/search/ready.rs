//! A search that was checked and has not begun: its items, adapters and candidates.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::candidates::{self, Candidate, WeightChoice};
use super::scorer::{Needs, Questions};
use super::table::{Kind, Row, Search};
use super::{SEARCH, SearchOptions, check};
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::provenance::Provenance;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::fuse::Recipe;
use crate::fuse::certificate::Certificate;
use crate::fuse::inputs::Inputs;
use crate::fuse::options::Method;
use crate::fuse::weights::Weights;
use crate::model::memory::Plan;
use crate::model::packing::PackedWeights;
use crate::stage::adapters;
use crate::stage::admit::{Admission, Candidates, admit, keep};
use crate::stage::common::Common;
use crate::stage::fuse::{FuseOptions, FusePlan, settle};
use crate::tensor::Real;

/// A candidate that can be fused, and its rank.
type Ranked = (Candidate, usize);

/// A search that was checked and has not begun.
pub(super) struct Ready<'a> {
    /// What was asked.
    pub options: &'a SearchOptions,
    /// What the fusions have in common, of the adapters that were not left out.
    pub fuse: FuseOptions,
    /// The base.
    pub checkpoint: Checkpoint,
    /// The items that choose.
    pub questions: Questions,
    /// Held-out items.
    pub test: Option<Questions>,
    /// The adapters.
    pub inputs: Arc<Inputs>,
    /// The same with the Grams of their inputs, where a method needs those.
    pub with_grams: Option<Arc<Inputs>>,
    /// Which of those that were given they are.
    pub admission: Admission,
    /// The adapters' names.
    pub edges: Vec<String>,
    /// The fusions, the simpler first.
    pub candidates: Vec<Ranked>,
    /// What scoring any of them takes.
    pub needs: Needs,
    /// What fusing any of them takes.
    fusing: Plan,
}

impl<'a> Ready<'a> {
    /// Reads the items, opens and admits the adapters, and checks each candidate.
    pub fn new(options: &'a SearchOptions, common: &Common) -> Result<Ready<'a>> {
        check(options)?;
        let checkpoint = Checkpoint::open(&options.model, common.open_options())?;
        let tokenizer = Tokenizer::load(&options.model, checkpoint.config().vocab)?;
        let shots = (options.shots, options.shots_from.as_deref());
        let load =
            |files: &[PathBuf]| Questions::load(files, &checkpoint, &tokenizer, shots, options.batch_tokens);
        let questions = load(&options.tasks)?;
        let test = (!options.test.is_empty()).then(|| load(&options.test)).transpose()?;
        let Some(needs) = Needs::of(test.iter().chain([&questions])) else {
            return Err(Error::Usage("--task has no item that can be scored".into()));
        };

        let mut fuse = options.fuse.clone();
        let fedsa = options.fusions.iter().find(|f| f.method == Method::Fedsa);
        fuse.recipe.fusion = *fedsa.or(options.fusions.first()).unwrap_or(&fuse.recipe.fusion);
        let (inputs, admission) = admit(Candidates::open(&fuse, common)?, &mut fuse, common)?;
        inputs.check_base(&checkpoint)?;
        inputs.adapters.iter().try_for_each(|a| adapters::check_model(a, &checkpoint))?;
        let with_grams = match fuse.grams.is_empty() {
            true => None,
            false => Some(Arc::new(inputs.with_grams(&fuse.grams, common.open_options())?)),
        };
        let kept = admission.kept();
        let mut weights = options.weights.clone();
        for choice in &mut weights {
            if let WeightChoice::One(Weights::List(w)) = choice {
                keep(w, &kept, admission.adapters.len());
            }
        }
        // The personal model of an adapter that was given is that of another place where some were left out.
        let mut fusions = options.fusions.clone();
        for fusion in fusions.iter_mut().filter(|f| f.method == Method::Fedsa) {
            fusion.fedsa = fuse.recipe.fusion.fedsa;
        }
        let all = candidates::candidates(
            &fusions,
            &options.resolves,
            &weights,
            inputs.adapters.len(),
            options.max_candidates,
        )?;
        let edges = names(&fuse.adapters);
        let mut ready = Ready {
            options,
            fuse,
            checkpoint,
            questions,
            test,
            inputs: Arc::new(inputs),
            with_grams,
            admission,
            edges,
            candidates: Vec::with_capacity(all.len()),
            needs,
            fusing: Plan::default(),
        };
        let mut seen = HashSet::new();
        for candidate in all {
            let plan = ready.fusion(&candidate, common)?;
            // Two spellings of the same weights are one candidate.
            if seen.insert(format!("{:?} {:?}", candidate.recipe, plan.weights)) {
                ready.needs.hold(&plan.layout());
                if plan.memory().total() > ready.fusing.total() {
                    ready.fusing = plan.memory();
                }
                ready.candidates.push((candidate, plan.rank()));
            }
        }
        for adapter in &ready.inputs.adapters {
            ready.needs.hold(&adapters::layout(adapter, 0));
        }
        Ok(ready)
    }

    /// One candidate as `fuse` would make it.
    pub fn fusion(&self, candidate: &Candidate, common: &Common) -> Result<FusePlan> {
        let needs = candidate.recipe.fusion.method.needs_input_grams();
        let mut options = FuseOptions {
            recipe: candidate.recipe,
            weights: candidate.weights.clone(),
            grams: if needs { self.fuse.grams.clone() } else { Vec::new() },
            out: Some(self.options.out.clone()),
            ..self.fuse.clone()
        };
        settle(&mut options, common)?;
        let inputs = self.with_grams.as_ref().filter(|_| needs).unwrap_or(&self.inputs);
        FusePlan::new(inputs.clone(), self.admission.clone(), options, common)
    }

    /// Every buffer: a candidate is fused beside those that it is scored in.
    pub fn memory<B: Backend, T: Real>(&self, backend: &B) -> Result<Plan> {
        let mut plan = self.needs.plan::<B, T>(backend, &self.checkpoint)?;
        if backend.shares_memory() {
            plan.rows.extend(self.fusing.rows.iter().cloned());
        }
        Ok(plan)
    }

    /// That plan with the weights that are packed, and which they are.
    pub fn packing<B: Backend, T: Real>(
        &self,
        backend: &B,
        plan: Plan,
        common: &Common,
    ) -> Result<(Plan, PackedWeights)> {
        common.packing::<T>(backend, self.checkpoint.config(), PackedWeights::INFERENCE, plan)
    }

    /// What the result follows from.
    pub fn fingerprint<T: Real>(&self, common: &Common) -> Result<String> {
        let (o, f) = (self.options, &self.fuse);
        let candidates: Vec<(Recipe, &Weights)> =
            self.candidates.iter().map(|(c, _)| (c.recipe, &c.weights)).collect();
        let asked = json!({
            "edges": self.edges,
            "candidates": candidates,
            "weights": o.weights.iter().map(WeightChoice::to_string).collect::<Vec<_>>(),
            "fuse": (f.allow_missing, f.dtype.name(), f.profile),
            "precision": T::DTYPE.name(),
            "prompts": (o.shots, o.batch_tokens),
            "required": (&o.required, o.level),
            "tasks": (o.tasks.len(), o.test.len()),
            "seed": common.seed,
        });
        let mut hasher = Hasher::default();
        hasher.update(asked.to_string().as_bytes());
        hasher.update(self.checkpoint.fingerprint()?.as_bytes());
        // What a fingerprint of the weights leaves out, and worked examples.
        for name in ["config.json", "tokenizer.json"] {
            hasher.update(digest::sha256_file(&self.checkpoint.dir().join(name))?.as_bytes());
        }
        for prompt in std::iter::once(&self.questions).chain(&self.test).flat_map(|q| &q.items.prompts) {
            hasher.update(digest::sha256(prompt.context.as_bytes()).as_bytes());
        }
        for file in o.tasks.iter().chain(&o.test) {
            hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes());
            hasher.update(digest::sha256_file(file)?.as_bytes());
        }
        if let Some((first, _)) = self.candidates.first() {
            self.fusion(first, common)?.hash_inputs(&mut hasher)?;
        }
        for grams in self.with_grams.iter().flat_map(|inputs| inputs.grams()) {
            hasher.update(digest::sha256_file(&grams.file())?.as_bytes());
        }
        Ok(hasher.finish())
    }

    /// The rows, nothing answered yet: the base, the adapters, the candidates.
    pub fn rows(&self) -> Vec<Row> {
        let mut rows = vec![Row::base()];
        let edges = self.edges.iter().zip(&self.inputs.adapters);
        rows.extend(edges.map(|(name, adapter)| Row::edge(name, adapter.max_rank())));
        rows.extend(self.candidates.iter().map(|(candidate, rank)| Row::fusion(candidate, *rank)));
        rows
    }

    /// Writes the best candidate into the folder `dir`, which is there.
    pub fn write<B: Backend>(
        &self,
        backend: &B,
        dir: &Path,
        search: &Search,
        common: &Common,
    ) -> Result<Certificate> {
        let (candidate, _) = &self.candidates[search.best - self.edges.len() - 1];
        let plan = self.fusion(candidate, common)?;
        digest::write_json(&dir.join(SEARCH), search)?;
        plan.write_adapter_of(backend, dir, self.provenance(&plan, search), common)
    }

    /// `anabranch.json`: that of the fusion, and among what it was chosen.
    fn provenance(&self, plan: &FusePlan, search: &Search) -> Provenance {
        let o = self.options;
        let correct = |row: Option<usize>| row.map(|n| search.table.rows[n].overall.correct);
        let mut p = plan.provenance();
        p.command = "search".into();
        p.other.insert(
            "search".into(),
            json!({
                "candidates": self.candidates.len(),
                "failed": search.failed().count(),
                "methods": o.fusions.iter().map(|f| f.method.word()).collect::<Vec<_>>(),
                "resolve": o.resolves.iter().map(|r| r.map_or("none", |_| "lora-cr")).collect::<Vec<_>>(),
                "weights": o.weights.iter().map(WeightChoice::to_string).collect::<Vec<_>>(),
                "require_better_than": o.required,
                "level": o.level,
                "items": search.table.items,
                "correct": correct(Some(search.best)),
                "base_correct": correct(Some(0)),
                "best_edge_correct": correct(search.table.best(Kind::Edge)),
            }),
        );
        p
    }
}

/// The folders' own names, with their places behind them where two are called the same: paths stay at home.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let own: Vec<String> = paths
        .iter()
        .map(|p| p.file_name().map_or_else(|| "adapter".into(), |n| n.to_string_lossy().into_owned()))
        .collect();
    if own.iter().collect::<HashSet<_>>().len() == own.len() {
        return own;
    }
    own.iter().enumerate().map(|(place, name)| format!("{name} {place}")).collect()
}
