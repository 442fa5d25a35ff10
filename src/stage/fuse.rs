//! `fuse`: several adapters become one, module by module, in memory of a few modules.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::{iter, thread};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::admit::{Admission, Candidates, Screen, admit};
use super::common::Common;
use super::join::{self, PART_MODEL, Whole};
use super::journal::{self, Line};
use super::modules::in_order;
use super::trust::TrustOptions;
use crate::backend::Backend;
use crate::checkpoint::adapter::ADAPTER_MODEL;
use crate::checkpoint::adapter_config::AdapterConfig;
use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec, PairWriter, pad_rows};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::convert;
use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::module::{Module, Target};
use crate::checkpoint::output::{Begun, Output, OutputOptions};
use crate::checkpoint::provenance::Provenance;
use crate::error::{Error, Result};
use crate::fuse::certificate::{CERTIFICATE, Certificate, ModuleCertificate};
use crate::fuse::elementwise::entries;
use crate::fuse::inputs::Inputs;
use crate::fuse::options::Method;
use crate::fuse::ties;
use crate::fuse::weights::{Weights, renormalised};
use crate::fuse::{self, Batch, Frame, Outcome, Recipe, low_rank, spd};
use crate::model::adapters::Layout;
use crate::model::memory::{Part, Plan};
use crate::tensor::DType;

/// `--profile`: the form of the adapter that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// One rank for all modules, padded with zeros, `lora_alpha = r`: right in every reader.
    #[default]
    Portable,
    /// A rank by module, as PEFT's patterns.
    Peft,
}

/// What `fuse` is asked.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// The adapters' folders.
    pub adapters: Vec<PathBuf>,
    /// The method and the resolution before it.
    pub recipe: Recipe,
    /// How much each adapter counts.
    pub weights: Weights,
    /// The folders with the Grams of each adapter's inputs, for the methods that need them.
    pub grams: Vec<PathBuf>,
    /// Fuse, in each module, those who have it.
    pub allow_missing: bool,
    /// The dtype of the factors.
    pub dtype: DType,
    /// The form of the adapter.
    pub profile: Profile,
    /// Where to write the fused adapter.
    pub out: Option<PathBuf>,
    /// The base that is merged into; where given, the adapters must fit it.
    pub model: Option<PathBuf>,
    /// Where to write the base with the fused update in its weights.
    pub merged: Option<PathBuf>,
    /// Fuse these layers only, end exclusive, into a part that `join` takes.
    pub layers: Option<Range<usize>>,
    /// How large an update may be.
    pub screen: Screen,
    /// Whose adapters are taken.
    pub trust: TrustOptions,
}

/// What was fused.
#[derive(Clone, Debug, Serialize)]
pub struct FuseReport {
    /// The adapter's folder, where one was asked for.
    pub out: Option<PathBuf>,
    /// The merged checkpoint's folder, where one was asked for.
    pub merged: Option<PathBuf>,
    /// Modules that carry an update.
    pub modules: usize,
    /// The rank of the adapter, where one was asked for; the largest where it differs by module.
    pub rank: Option<usize>,
    /// Of the adapter; none where its folder was there already, under `--resume`.
    pub certificate: Option<Certificate>,
    /// Of the merged checkpoint: its errors are those of the weights in the base's dtype.
    pub merged_certificate: Option<Certificate>,
    /// Whose adapters were given, how large they are, and which were left out.
    pub admission: Admission,
    /// What a user should know and what is no error.
    pub warnings: Vec<String>,
}

/// Fuses the adapters into a new one, a merged checkpoint, or both.
pub fn run<B: Backend>(backend: &B, options: &FuseOptions, common: &Common) -> Result<FuseReport> {
    let plan = plan(options, common)?;
    let whole = plan.fingerprint()?;
    let fingerprint = match &options.layers {
        Some(layers) => format!("{whole} {}..{}", layers.start, layers.end),
        None => whole.clone(),
    };
    let begin = |out: &Path| {
        Output::begin(out, "fuse", &fingerprint, OutputOptions { force: common.force, resume: common.resume })
    };
    let mut report = FuseReport {
        out: options.out.clone(),
        merged: options.merged.clone(),
        modules: plan.asked().len(),
        rank: options.out.as_ref().map(|_| plan.rank()),
        certificate: None,
        merged_certificate: None,
        admission: plan.admission.clone(),
        warnings: plan.inputs.warnings.clone(),
    };
    if let Some(out) = &options.out
        && let Begun::Work(mut output) = begin(out)?
    {
        let written = match &options.layers {
            Some(layers) => plan.write_part(backend, output.dir(), layers, whole, common),
            None => plan.write_adapter(backend, output.dir(), common),
        };
        if written.as_ref().is_err_and(Error::passes) {
            output.keep();
        }
        report.certificate = Some(written?);
        output.finish()?;
    }
    if let (Some(out), Some(base)) = (&options.merged, &plan.base)
        && let Begun::Work(output) = begin(out)?
    {
        report.merged_certificate = Some(plan.write_merged(backend, base, output.dir(), common)?);
        output.finish()?;
    }
    Ok(report)
}

/// A fusion that was checked and has not begun.
#[derive(Debug)]
pub struct FusePlan {
    /// The adapters.
    pub inputs: Arc<Inputs>,
    /// Each module's members, with their weights.
    pub frames: Vec<Frame>,
    /// The rank of each module's result.
    pub ranks: Vec<usize>,
    /// The weight of each adapter.
    pub weights: Vec<f64>,
    /// The base, where one was given.
    pub base: Option<Checkpoint>,
    /// Whose adapters were given, and which were left out.
    pub admission: Admission,
    /// Of the adapters that were not left out.
    options: FuseOptions,
    /// The frames with thresholds that follow from all modules, once they were looked for.
    whole: OnceLock<Vec<Frame>>,
}

/// Opens and checks the adapters, measures them, and checks everything that can be known before they are fused.
pub fn plan(options: &FuseOptions, common: &Common) -> Result<FusePlan> {
    let mut options = checked(options, common)?;
    let (inputs, admission) = admit(Candidates::open(&options, common)?, &mut options, common)?;
    FusePlan::new(with_grams(inputs, &options, common)?, admission, options, common)
}

/// What [`plan`] gives where no adapter is left out for what its values are; reads none of them.
pub fn outline(options: &FuseOptions, common: &Common) -> Result<FusePlan> {
    let options = checked(options, common)?;
    let inputs = Candidates::open(&options, common)?.all();
    FusePlan::new(with_grams(inputs, &options, common)?, Admission::default(), options, common)
}

/// The options, where they go together, with the seed in them: all that can be known before a file is opened.
fn checked(options: &FuseOptions, common: &Common) -> Result<FuseOptions> {
    options.recipe.fusion.check()?;
    match (&options.out, &options.model, &options.merged) {
        (None, _, None) => return Err(Error::Usage("nowhere to write: give --out, --merged or both".into())),
        (_, None, Some(_)) => return Err(Error::Usage("--merged needs the base: give --model".into())),
        (_, _, Some(_)) if options.layers.is_some() => {
            return Err(Error::Usage(
                "--layers makes a part of an adapter, not of a merged checkpoint: give --out alone".into(),
            ));
        }
        _ => {}
    }
    let mut options = options.clone();
    settle(&mut options, common)?;
    Ok(options)
}

/// `inputs` with the Grams that the options name.
fn with_grams(inputs: Inputs, options: &FuseOptions, common: &Common) -> Result<Arc<Inputs>> {
    let inputs = match options.grams.is_empty() {
        true => inputs,
        false => inputs.with_grams(&options.grams, common.open_options())?,
    };
    Ok(Arc::new(inputs))
}

/// Fills in the seed of methods that draw; an error where the method and `--grams` do not go together.
pub(super) fn settle(options: &mut FuseOptions, common: &Common) -> Result<()> {
    let method = options.recipe.fusion.method;
    if options.recipe.fusion.draws() {
        options.recipe.fusion.seed = common.seed;
    }
    if options.out.is_some() {
        options.recipe.fusion.check_factors()?;
    }
    match (method.needs_input_grams(), options.grams.is_empty()) {
        (true, true) => Err(Error::Usage(format!(
            "--method {method} needs --grams DIR,…: what `anabranch grams` made of each adapter's data, in the \
             adapters' order"
        ))),
        (false, false) => Err(Error::Usage(format!(
            "--grams goes with --method regmean and cat-merging, not with {method}"
        ))),
        _ => Ok(()),
    }
}

/// One module ready to be written.
struct Written {
    module: Module,
    a: Vec<u8>,
    b: Vec<u8>,
    line: Line,
}

impl FusePlan {
    /// A fusion of adapters that are admitted already: `options` are settled, and about these alone.
    pub(super) fn new(
        inputs: Arc<Inputs>,
        admission: Admission,
        options: FuseOptions,
        common: &Common,
    ) -> Result<FusePlan> {
        let method = options.recipe.fusion.method;
        let weights = match method {
            Method::TaskArithmetic => options.weights.as_given(inputs.adapters.len())?,
            _ => options.weights.normalised(&inputs.samples())?,
        };
        let mut frames = Vec::with_capacity(inputs.modules.len());
        let mut ranks = Vec::with_capacity(inputs.modules.len());
        for &module in &inputs.modules {
            let mut frame = inputs.frame(module);
            frame.weights = match method {
                Method::TaskArithmetic => frame.members.iter().map(|&e| weights[e]).collect(),
                _ => renormalised(&weights, &frame.members),
            };
            ranks.push(options.recipe.fusion.rank_of(&frame, options.out.is_some())?);
            frames.push(frame);
        }
        let base = match &options.model {
            None => None,
            Some(dir) => {
                let base = Checkpoint::open(dir, common.open_options())?;
                inputs.check_base(&base)?;
                Some(base)
            }
        };
        let end = frames.last().map_or(0, |f| f.module.layer + 1);
        if let Some(layers) = &options.layers {
            let (start, stop) = (layers.start, layers.end);
            if start >= stop || stop > end {
                return Err(Error::Usage(format!(
                    "--layers {start}..{stop}: expected a range that is not empty of the layers 0..{end}"
                )));
            }
        }
        let plan =
            FusePlan { inputs, frames, ranks, weights, base, admission, options, whole: OnceLock::new() };
        common.fit(&plan.memory())?;
        Ok(plan)
    }

    /// The largest rank of a module's result.
    pub fn rank(&self) -> usize {
        self.ranks.iter().copied().max().unwrap_or(0)
    }

    /// The modules that were asked for: those of `--layers`, or all.
    pub fn asked(&self) -> &[Frame] {
        &self.frames[self.places()]
    }

    /// Where the modules that were asked for are among all.
    fn places(&self) -> Range<usize> {
        let before = |layer: usize| self.frames.partition_point(|f| f.module.layer < layer);
        match &self.options.layers {
            Some(layers) => before(layers.start)..before(layers.end),
            None => 0..self.frames.len(),
        }
    }

    /// The frames, with what must be known of all modules before the first is fused: thresholds of the whole model.
    /// `kept` says what there is when the process is asked to stop.
    pub(super) fn frames<B: Backend>(
        &self,
        backend: &B,
        (common, kept): (&Common, &str),
    ) -> Result<&[Frame]> {
        let recipe = &self.options.recipe;
        let Some(trim) = recipe.fusion.whole_model() else { return Ok(&self.frames) };
        if let Some(frames) = self.whole.get() {
            return Ok(frames);
        }
        let thresholds = ties::thresholds(trim, &self.frames, self.inputs.adapters.len(), |visit| {
            for frame in &self.frames {
                common.check_stop(kept)?;
                let batch = self.inputs.batch(frame.clone())?;
                let compared = recipe.compare(backend, std::slice::from_ref(&batch))?.swap_remove(0);
                visit(frame, &entries(compared.updates(&batch)));
            }
            Ok(())
        })?;
        let with = |frame: &Frame| {
            let mut frame = frame.clone();
            frame.least = Some(frame.members.iter().map(|&e| thresholds[e]).collect());
            frame
        };
        Ok(self.whole.get_or_init(|| self.frames.iter().map(with).collect()))
    }

    /// What the result follows from.
    fn fingerprint(&self) -> Result<String> {
        let o = &self.options;
        let asked = (&o.recipe, &o.weights, o.allow_missing, o.dtype.name(), o.profile);
        let mut hasher = Hasher::default();
        hasher.update(serde_json::json!(asked).to_string().as_bytes());
        self.hash_inputs(&mut hasher)?;
        Ok(hasher.finish())
    }

    /// Takes in what the adapters, their Grams and the base hold.
    pub(super) fn hash_inputs(&self, hasher: &mut Hasher) -> Result<()> {
        let files: Vec<_> = self
            .inputs
            .adapters
            .par_iter()
            .map(|a| Ok([digest::sha256_file(&a.config.path)?, digest::sha256_file(&a.file())?]))
            .collect::<Result<_>>()?;
        files.iter().flatten().for_each(|hash| hasher.update(hash.as_bytes()));
        let grams: Vec<_> =
            self.inputs.grams().par_iter().map(|g| digest::sha256_file(&g.file())).collect::<Result<_>>()?;
        grams.iter().for_each(|hash| hasher.update(hash.as_bytes()));
        if let Some(base) = &self.base {
            hasher.update(base.fingerprint()?.as_bytes());
        }
        Ok(())
    }

    /// The rank in the file of a module with this frame.
    fn file_rank(&self, frame: &Frame) -> usize {
        match self.options.profile {
            Profile::Portable => self.rank(),
            Profile::Peft => {
                let at = self.frames.partition_point(|f| f.module < frame.module);
                self.ranks.get(at).copied().unwrap_or(0)
            }
        }
    }

    /// Bytes of a module's factors that will be written.
    fn bytes_of(&self, frame: &Frame) -> u64 {
        let numbers = self.file_rank(frame) as u64 * (frame.size.0 as u64 + frame.size.1 as u64);
        numbers * self.options.dtype.size() as u64
    }

    /// The buffers that may be as large as a weight: what `regmean` and a search for singular vectors need, on as many
    /// threads as the pool has that it is called in.
    pub fn memory(&self) -> Plan {
        let (mut plan, fusion) = (Plan::default(), &self.recipe().fusion);
        if fusion.method == Method::Regmean {
            let widest = self.asked().iter().map(|f| f.size.1).max().unwrap_or(0);
            plan.add(Part::Scratch, format!("sum of input Grams of width {widest}"), spd::bytes(widest));
        }
        if let Some(q) = fusion.rank.filter(|_| fusion.method.is_elementwise()) {
            let bytes = |f: &Frame| low_rank::bytes(f.size, q, rayon::current_num_threads());
            let most = self.asked().iter().map(bytes).max().unwrap_or(0);
            plan.add(Part::Scratch, format!("search for {q} singular vectors of an update"), most);
        }
        plan
    }

    /// Bytes of the factors that will be written.
    pub fn bytes(&self) -> u64 {
        self.asked().iter().map(|f| self.bytes_of(f)).sum()
    }

    /// Writes the fused adapter into the folder `dir`, which is there, with `certificate.json`; goes on behind the modules
    /// that are there already.
    pub fn write_adapter<B: Backend>(&self, backend: &B, dir: &Path, common: &Common) -> Result<Certificate> {
        self.write_adapter_of(backend, dir, self.provenance(), common)
    }

    /// [`FusePlan::write_adapter`] with this `anabranch.json`.
    pub(super) fn write_adapter_of<B: Backend>(
        &self,
        backend: &B,
        dir: &Path,
        provenance: Provenance,
        common: &Common,
    ) -> Result<Certificate> {
        let (pairs, modules) = self.write_modules(backend, dir, ADAPTER_MODEL, common)?;
        let certificate = self.certificate(self.options.dtype, modules);
        digest::write_json(&dir.join(CERTIFICATE), &certificate)?;
        AdapterWriter::of(dir, self.config()?, pairs).finish(None, provenance)?;
        Ok(certificate)
    }

    /// Writes the modules of `layers` into the folder `dir`, which is there, as a part of the fusion with this
    /// fingerprint.
    fn write_part<B: Backend>(
        &self,
        backend: &B,
        dir: &Path,
        layers: &Range<usize>,
        fingerprint: String,
        common: &Common,
    ) -> Result<Certificate> {
        let (pairs, modules) = self.write_modules(backend, dir, PART_MODEL, common)?;
        let whole = Whole {
            fingerprint,
            layers: self.frames.last().map_or(0, |f| f.module.layer + 1),
            modules: self.frames.len(),
            recipe: self.options.recipe,
            weights: self.weights.clone(),
            dtype: self.options.dtype.name().into(),
            config: self.config()?.to_json().clone(),
            provenance: self.provenance(),
        };
        let certificate = whole.certificate(modules.clone());
        join::Part::new(whole, [layers.start, layers.end], modules).seal(dir, pairs.finish()?)?;
        Ok(certificate)
    }

    /// Writes the factors of the modules asked for into the file `name` in `dir`, behind those that an earlier run left
    /// there.
    ///
    /// Modules are computed while those before them are written; results do not depend on the threads.
    fn write_modules<B: Backend>(
        &self,
        backend: &B,
        dir: &Path,
        name: &str,
        common: &Common,
    ) -> Result<(PairWriter, Vec<ModuleCertificate>)> {
        let kept = "the modules so far are kept, --resume goes on from them";
        let (frames, dtype) = (self.frames(backend, (common, kept))?, self.options.dtype);
        let asked = &frames[self.places()];
        let spec = |f: &Frame| {
            let rank = self.file_rank(f);
            PairSpec { module: f.module, rank, dims: f.size, dtypes: (dtype, dtype) }
        };
        let (mut pairs, mut journal, mut certificates) =
            journal::open(dir, name, asked.iter().map(spec).collect())?;
        let bar = common.progress.bar("fuse", asked.len() as u64);
        bar.inc(certificates.len() as u64);
        let rest = &asked[certificates.len()..];
        let (send, receive) = sync_channel::<Vec<Written>>(1);
        thread::scope(|scope| {
            let writing = scope.spawn(|| -> Result<()> {
                for done in receive.into_iter().flatten() {
                    pairs.write(done.module, &done.a, &done.b)?;
                    journal.append(&done.line)?;
                    certificates.push(done.line.certificate);
                    bar.inc(1);
                }
                Ok(())
            });
            let computed = self.each(backend, rest, (common, kept), |done| send.send(done).is_ok());
            drop(send);
            // The writer's error first: it is why computing stopped.
            writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            computed
        })?;
        bar.finish_and_clear();
        journal.remove()?;
        Ok((pairs, certificates))
    }

    /// Fuses the modules of `frames` and hands them on in order, until `take` says no; `kept` says what there is when the
    /// process is asked to stop.
    fn each<B: Backend>(
        &self,
        backend: &B,
        frames: &[Frame],
        stop: (&Common, &str),
        take: impl FnMut(Vec<Written>) -> bool,
    ) -> Result<()> {
        // One sum of input Grams takes as much as many modules' factors, and all threads factor it; all threads make
        // the entries of one update, too.
        let method = self.recipe().fusion.method;
        let alone = method.needs_input_grams() || method.is_elementwise();
        let bytes = |f: &Frame| (!alone && !f.is_large()).then(|| self.bytes_of(f));
        in_order(backend, frames, bytes, stop, |frames| self.compute(backend, frames), take)
    }

    /// Where the factors of the adapter lie in an arena: those of [`FusePlan::values`].
    pub(super) fn layout(&self) -> Layout {
        let mut layout = Layout::default();
        for frame in &self.frames {
            layout.push(frame.module, frame.size, self.file_rank(frame), 1.0);
        }
        layout
    }

    /// The factors of the adapter as its file would hold them, each A and B in turn, widened to f32.
    pub(super) fn values<B: Backend>(&self, backend: &B, stop: (&Common, &str)) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.layout().end());
        self.each(backend, self.frames(backend, stop)?, stop, |done| {
            for bytes in done.iter().flat_map(|one| [&one.a, &one.b]) {
                let start = values.len();
                values.resize(start + bytes.len() / self.options.dtype.size(), 0.0);
                convert::widen(&mut values[start..], bytes, self.options.dtype);
            }
            true
        })?;
        Ok(values)
    }

    /// Reads and fuses a few modules.
    fn compute<B: Backend>(&self, backend: &B, frames: &[Frame]) -> Result<Vec<Written>> {
        let batches = self.inputs.batches(frames)?;
        let outcomes = self.options.recipe.run(backend, &batches, true)?;
        let work = (&batches, outcomes).into_par_iter();
        let done: Vec<_> = work.map(|(batch, one)| self.module(batch, &one)).collect();
        done.into_iter().collect()
    }

    /// One fused module in the file's dtype, padded to its rank.
    fn module(&self, batch: &Batch, outcome: &Outcome) -> Result<Written> {
        let (frame, size) = (&batch.frame, self.options.dtype.size());
        let (rank, file_rank) = (outcome.made.rank(frame) * size, self.file_rank(frame) * size);
        let fuse::Written { mut a, b, certificate } = outcome.write(batch, self.options.dtype)?;
        a.resize(file_rank * frame.size.1, 0);
        let b = pad_rows(b, rank, file_rank);
        let mut hasher = Hasher::default();
        hasher.update(&a);
        hasher.update(&b);
        Ok(Written { module: frame.module, a, b, line: Line { sha256: hasher.finish(), certificate } })
    }

    /// `adapter_config.json`.
    fn config(&self) -> Result<AdapterConfig> {
        let base = self.inputs.base_name();
        match self.options.profile {
            Profile::Portable => {
                let targets: Vec<Target> = Target::ALL
                    .into_iter()
                    .filter(|t| self.inputs.modules.iter().any(|m| m.target == *t))
                    .collect();
                Ok(AdapterConfig::portable(self.rank(), &targets, base))
            }
            Profile::Peft => {
                let ranks = iter::zip(&self.inputs.modules, &self.ranks).map(|(m, r)| (*m, *r)).collect();
                AdapterConfig::patterned(&ranks, base)
            }
        }
    }

    /// What is done to every module.
    pub(super) fn recipe(&self) -> &Recipe {
        &self.options.recipe
    }

    /// `certificate.json` of what was written in `dtype`.
    pub(super) fn certificate(&self, dtype: DType, modules: Vec<ModuleCertificate>) -> Certificate {
        let fingerprint = self.inputs.base_fingerprint.as_deref();
        Certificate::new(self.options.recipe, &self.weights, fingerprint, dtype.name(), modules)
    }

    /// `anabranch.json`: the options, and what all inputs agree on.
    pub(super) fn provenance(&self) -> Provenance {
        let mut p = Provenance::new("fuse");
        p.base_fingerprint = self.inputs.base_fingerprint.clone();
        p.model_fingerprint = self.inputs.base_fingerprint.clone();
        p.samples = self.inputs.samples().into_iter().try_fold(0, |n: u64, s| n.checked_add(s?));
        if let Ok(serde_json::Value::Object(recipe)) = serde_json::to_value(self.options.recipe) {
            p.options = recipe;
        }
        p.options.insert("weights".into(), self.options.weights.to_string().into());
        p.options.insert("adapters".into(), self.inputs.adapters.len().into());
        let left_out = self.admission.left_out();
        if left_out > 0 {
            p.options.insert("left_out".into(), left_out.into());
        }
        p
    }
}
