//! `fuse`: several adapters become one, module by module, in memory of a few modules.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::{iter, thread};

use indicatif::ProgressBar;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::admit::{Admission, Screen, admit};
use super::common::Common;
use super::trust::TrustOptions;
use crate::backend::Backend;
use crate::checkpoint::adapter_config::AdapterConfig;
use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::convert;
use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::module::{Module, Target};
use crate::checkpoint::output::{Begun, Output, OutputOptions};
use crate::checkpoint::provenance::Provenance;
use crate::error::{Error, Result};
use crate::fuse::certificate::{CERTIFICATE, Certificate, ModuleCertificate};
use crate::fuse::inputs::Inputs;
use crate::fuse::options::Method;
use crate::fuse::weights::{Weights, renormalised};
use crate::fuse::{Batch, Factors, Frame, Outcome, Recipe, spd};
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
    let fingerprint = plan.fingerprint()?;
    let begin = |out: &Path| {
        Output::begin(out, "fuse", &fingerprint, OutputOptions { force: common.force, resume: common.resume })
    };
    let mut report = FuseReport {
        out: options.out.clone(),
        merged: options.merged.clone(),
        modules: plan.frames.len(),
        rank: options.out.as_ref().map(|_| plan.rank()),
        certificate: None,
        merged_certificate: None,
        admission: plan.admission.clone(),
        warnings: plan.inputs.warnings.clone(),
    };
    if let Some(out) = &options.out
        && let Begun::Work(output) = begin(out)?
    {
        report.certificate = Some(plan.write_adapter(backend, output.dir(), common)?);
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
    pub inputs: Inputs,
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
}

/// Opens and checks the adapters, measures them, and checks everything that can be known before they are fused.
pub fn plan(options: &FuseOptions, common: &Common) -> Result<FusePlan> {
    options.recipe.fusion.check()?;
    match (&options.out, &options.model, &options.merged) {
        (None, _, None) => return Err(Error::Usage("nowhere to write: give --out, --merged or both".into())),
        (_, None, Some(_)) => return Err(Error::Usage("--merged needs the base: give --model".into())),
        _ => {}
    }
    let mut options = options.clone();
    let method = options.recipe.fusion.method;
    if method.draws() {
        options.recipe.fusion.seed = common.seed;
    }
    match (method.needs_input_grams(), options.grams.is_empty()) {
        (true, true) => {
            return Err(Error::Usage(format!(
                "--method {method} needs --grams DIR,…: what `anabranch grams` made of each adapter's data, in the \
                 adapters' order"
            )));
        }
        (false, false) => {
            return Err(Error::Usage(format!(
                "--grams goes with --method regmean and cat-merging, not with {method}"
            )));
        }
        _ => {}
    }
    let (mut inputs, admission) = admit(&mut options, common)?;
    if !options.grams.is_empty() {
        inputs = inputs.with_grams(&options.grams, common.open_options())?;
    }
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
    let plan = FusePlan { inputs, frames, ranks, weights, base, admission, options };
    if let Some(limit) = common.memory_limit {
        plan.memory().fit(limit)?;
    }
    Ok(plan)
}

/// One module ready to be written.
struct Written {
    module: Module,
    a: Vec<u8>,
    b: Vec<u8>,
    certificate: ModuleCertificate,
}

impl FusePlan {
    /// The largest rank of a module's result.
    pub fn rank(&self) -> usize {
        self.ranks.iter().copied().max().unwrap_or(0)
    }

    /// What the result follows from.
    fn fingerprint(&self) -> Result<String> {
        let o = &self.options;
        let asked = (&o.recipe, &o.weights, o.allow_missing, o.dtype.name(), o.profile);
        let mut hasher = Hasher::default();
        hasher.update(serde_json::json!(asked).to_string().as_bytes());
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
        Ok(hasher.finish())
    }

    /// The rank in the file of a module whose result has rank `rank`.
    fn file_rank(&self, rank: usize) -> usize {
        match self.options.profile {
            Profile::Portable => self.rank(),
            Profile::Peft => rank,
        }
    }

    /// The buffers that are as large as a weight: none but for `regmean`.
    pub fn memory(&self) -> Plan {
        let mut plan = Plan::default();
        if self.recipe().fusion.method == Method::Regmean {
            let widest = self.frames.iter().map(|f| f.size.1).max().unwrap_or(0);
            plan.add(Part::Scratch, format!("sum of input Grams of width {widest}"), spd::bytes(widest));
        }
        plan
    }

    /// Bytes of the factors that will be written.
    pub fn bytes(&self) -> u64 {
        let numbers =
            |(f, &r): (&Frame, &usize)| self.file_rank(r) as u64 * (f.size.0 as u64 + f.size.1 as u64);
        self.frames.iter().zip(&self.ranks).map(numbers).sum::<u64>() * self.options.dtype.size() as u64
    }

    /// Writes the fused adapter into the folder `dir`, which is there and empty, with `certificate.json`.
    ///
    /// A few modules are computed at once while those before them are written; results do not depend on the threads.
    pub fn write_adapter<B: Backend>(&self, backend: &B, dir: &Path, common: &Common) -> Result<Certificate> {
        let bar = common.progress.bar("fuse", self.frames.len() as u64);
        let dtype = self.options.dtype;
        let specs: Vec<PairSpec> = iter::zip(&self.frames, &self.ranks)
            .map(|(f, &r)| PairSpec {
                module: f.module,
                rank: self.file_rank(r),
                dims: f.size,
                dtypes: (dtype, dtype),
            })
            .collect();
        let writer = AdapterWriter::create(dir, self.config()?, specs)?;
        let (send, receive) = sync_channel::<Vec<Written>>(1);
        let (writer, modules) = thread::scope(|scope| {
            let writing = scope.spawn(|| write_all(writer, receive, &bar));
            let computed = self.compute(backend, common, |chunk| send.send(chunk).is_ok());
            drop(send);
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // The writer's error first: it is why computing stopped.
            written.and_then(|w| computed.map(|()| w))
        })?;
        bar.finish_and_clear();
        let certificate = self.certificate(dtype, modules);
        digest::write_json(&dir.join(CERTIFICATE), &certificate)?;
        writer.finish(None, self.provenance())?;
        Ok(certificate)
    }

    /// Computes the modules in order, a few at once, and hands them on until `take` says no.
    fn compute<B: Backend>(
        &self,
        backend: &B,
        common: &Common,
        mut take: impl FnMut(Vec<Written>) -> bool,
    ) -> Result<()> {
        let work: Vec<_> = iter::zip(&self.frames, &self.ranks).collect();
        // One sum of input Grams takes as much as many modules' factors, and is factored by all threads.
        let at_once = match self.recipe().fusion.method.needs_input_grams() {
            true => 1,
            false => 2 * rayon::current_num_threads(),
        };
        for chunk in work.chunks(at_once) {
            common.check_stop("nothing was written")?;
            // Gathered before the first error is looked for, so that it is always the same one.
            let read: Vec<_> =
                chunk.par_iter().map(|(frame, _)| self.inputs.batch((*frame).clone())).collect();
            let batches = read.into_iter().collect::<Result<Vec<_>>>()?;
            let outcomes = self.options.recipe.run(backend, &batches, true)?;
            let work = (chunk, &batches, &outcomes).into_par_iter();
            let done: Vec<_> = work.map(|((_, rank), batch, one)| self.module(batch, one, **rank)).collect();
            if !take(done.into_iter().collect::<Result<_>>()?) {
                break;
            }
        }
        Ok(())
    }

    /// Rounds one fused module to the file's dtype; the certificate is of what the bytes say.
    fn module(&self, batch: &Batch, outcome: &Outcome, rank: usize) -> Result<Written> {
        let (frame, dtype) = (&batch.frame, self.options.dtype);
        let padded = outcome.fused.factors.clone().padded(self.file_rank(rank));
        let (mut a, mut b) = (Vec::new(), Vec::new());
        convert::narrow_f64(&mut a, &padded.a_rows(), dtype);
        convert::narrow_f64(&mut b, &padded.b_rows(), dtype);
        if convert::first_non_finite(&a, dtype).or(convert::first_non_finite(&b, dtype)).is_some() {
            return Err(Error::Numeric(format!(
                "{}: a factor of the result is no number, or too large for {dtype} (--dtype f32 has the widest range)",
                frame.module
            )));
        }
        let got = read_back(&padded, &a, &b, dtype);
        let certificate = ModuleCertificate::new(batch, outcome, &got)?;
        Ok(Written { module: frame.module, a, b, certificate })
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

/// The factors as the bytes of a file say.
fn read_back(shape: &Factors, a: &[u8], b: &[u8], dtype: DType) -> Factors {
    let (o, i) = shape.size();
    let (mut wide_a, mut wide_b) = (vec![0.0; shape.rank() * i], vec![0.0; o * shape.rank()]);
    convert::widen_f64(&mut wide_a, a, dtype);
    convert::widen_f64(&mut wide_b, b, dtype);
    let mut out = Factors::zeros(shape.rank(), shape.size());
    out.place(0..shape.rank(), &wide_b, &wide_a, 1.0);
    out
}

/// Writes modules as they come.
fn write_all(
    mut writer: AdapterWriter,
    receive: Receiver<Vec<Written>>,
    bar: &ProgressBar,
) -> Result<(AdapterWriter, Vec<ModuleCertificate>)> {
    let mut certificates = Vec::new();
    for done in receive.into_iter().flatten() {
        writer.write_bytes(done.module, &done.a, &done.b)?;
        certificates.push(done.certificate);
        bar.inc(1);
    }
    Ok((writer, certificates))
}
