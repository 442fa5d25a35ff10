//! The adapters that are compared or fused: opened, checked against one another, read module by module.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::checkpoint::adapter::{Adapter, Coordinates};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::factor::Pair;
use crate::checkpoint::input_grams::InputGrams;
use crate::checkpoint::module::{Module, Source};
use crate::checkpoint::weights::OpenOptions;
use crate::error::{Error, Result};
use crate::fuse::factors::{Batch, Factors, Frame, Kept};
use crate::fuse::input_gram::BlockInputs;

/// Whose Grams are the same: the layer, the input, the members.
type Shared = (usize, Source, Vec<usize>);

/// Adapters of one base, at its full dimensions.
#[derive(Debug)]
pub struct Inputs {
    /// In the order of the command line.
    pub adapters: Vec<Adapter>,
    /// Every module that an adapter has, by layer and in the order of the forward pass.
    pub modules: Vec<Module>,
    /// The base's fingerprint, where an adapter knows it.
    pub base_fingerprint: Option<String>,
    /// The Grams of each adapter's inputs, where they were given.
    grams: Vec<InputGrams>,
    /// Those of the input that was asked for last, for the next module that reads it too.
    last: Mutex<Option<(Shared, BlockInputs)>>,
    /// What a user should know and what is no error: base names that differ.
    pub warnings: Vec<String>,
}

impl Inputs {
    /// Opens the folders in `paths`; reads no values.
    ///
    /// An error where there is none, where one is at a pruned model's dimensions, where two have different bases by
    /// fingerprint or shapes, and, unless `allow_missing`, where one lacks a module that another has.
    pub fn open(paths: &[PathBuf], allow_missing: bool, options: OpenOptions) -> Result<Inputs> {
        if paths.is_empty() {
            return Err(Error::Usage("no adapter: give the folders of those to be compared or fused".into()));
        }
        let adapters = paths.iter().map(|p| Adapter::open(p, options)).collect::<Result<Vec<_>>>()?;
        for adapter in &adapters {
            if adapter.coordinates()? == Coordinates::Pruned {
                let path = adapter.path.display();
                return Err(Error::file(
                    &adapter.path,
                    format!(
                        "is at the dimensions of a pruned model, expected the full one's: run first \
                         `anabranch recover --adapter {path} --out {path}-recovered`"
                    ),
                ));
            }
        }
        let base_fingerprint = one_fingerprint(&adapters)?;
        let modules: BTreeSet<Module> = adapters.iter().flat_map(|a| a.modules.keys().copied()).collect();
        for &module in &modules {
            check_module(&adapters, module, allow_missing)?;
        }
        let warnings = base_names(&adapters).into_iter().collect();
        let modules = modules.into_iter().collect();
        let (grams, last) = (Vec::new(), Mutex::default());
        Ok(Inputs { adapters, modules, base_fingerprint, grams, last, warnings })
    }

    /// The same adapters with the Grams of their inputs, folders one an adapter and in their order; reads no values.
    ///
    /// An error where there are more or fewer, where one is of another base, and where one lacks the input of a module
    /// that its adapter has, or has it at another width.
    pub fn with_grams(&self, paths: &[PathBuf], options: OpenOptions) -> Result<Inputs> {
        if paths.len() != self.adapters.len() {
            return Err(Error::Usage(format!(
                "--grams names {} folders for {} adapters, expected one each, in their order",
                paths.len(),
                self.adapters.len()
            )));
        }
        let grams = paths.iter().map(|p| InputGrams::open(p, options)).collect::<Result<Vec<_>>>()?;
        for (grams, adapter) in grams.iter().zip(&self.adapters) {
            if let (Some(expected), Some(found)) = (&self.base_fingerprint, &grams.base_fingerprint)
                && expected != found
            {
                return Err(Error::file(
                    &grams.path,
                    format!(
                        "has Grams of a base with fingerprint {found}, the adapters are of base {expected}"
                    ),
                ));
            }
            for (&module, pair) in &adapter.modules {
                grams.of(module, pair.dims().1)?;
            }
        }
        Ok(Inputs {
            adapters: self.adapters.clone(),
            modules: self.modules.clone(),
            base_fingerprint: self.base_fingerprint.clone(),
            grams,
            last: Mutex::default(),
            warnings: self.warnings.clone(),
        })
    }

    /// The folders with input Grams.
    pub fn grams(&self) -> &[InputGrams] {
        &self.grams
    }

    /// How many samples each adapter was trained on, where it says.
    pub fn samples(&self) -> Vec<Option<u64>> {
        self.adapters.iter().map(|a| a.provenance.as_ref().and_then(|p| p.samples)).collect()
    }

    /// Whether all adapters say that they were trained with A frozen as it was drawn from one seed.
    pub fn frozen(&self) -> bool {
        let seed =
            |a: &Adapter| a.provenance.as_ref().filter(|p| p.freeze_a == Some(true)).map(|p| p.init_seed);
        let first = self.adapters.first().and_then(seed);
        first.is_some_and(|s| s.is_some()) && self.adapters.iter().all(|a| seed(a) == first)
    }

    /// An error where `base` is not the model that the adapters are of, by fingerprint, layers or shapes.
    pub fn check_base(&self, base: &Checkpoint) -> Result<()> {
        for adapter in &self.adapters {
            adapter.check_base(base.config())?;
        }
        match &self.base_fingerprint {
            Some(expected) if base.fingerprint()? != expected => Err(Error::file(
                base.dir(),
                format!("has fingerprint {}, the adapters are of base {expected}", base.fingerprint()?),
            )),
            _ => Ok(()),
        }
    }

    /// The base's name that all adapters agree on.
    pub fn base_name(&self) -> Option<&str> {
        let first = self.adapters.first()?.config.base.as_deref();
        self.adapters.iter().all(|a| a.config.base.as_deref() == first).then_some(first).flatten()
    }

    /// Who has `module`, with what rank and what pruning left of it; weights `1/E`. Reads no values.
    pub fn frame(&self, module: Module) -> Frame {
        let members: Vec<usize> =
            (0..self.adapters.len()).filter(|&e| self.adapters[e].modules.contains_key(&module)).collect();
        let pairs = self.pairs(module);
        let ranks: Vec<usize> = pairs.iter().map(|p| p.rank).collect();
        let size = pairs.first().map_or((0, 0), |p| p.dims());
        let kept = members.iter().map(|&e| kept(&self.adapters[e], module)).collect();
        let mut frame = Frame::new(module, size, &ranks);
        frame.scales = pairs.iter().map(|p| p.scale).collect();
        (frame.members, frame.kept, frame.frozen) = (members, kept, self.frozen());
        frame
    }

    /// The updates of a frame's module in f64, the scales folded into B.
    ///
    /// An error, naming file and tensor, where a value is NaN or infinite.
    pub fn batch(&self, frame: Frame) -> Result<Batch> {
        let pairs = self.pairs(frame.module);
        let mut stack = Factors::zeros(frame.rank(), frame.size);
        for (e, pair) in pairs.iter().enumerate() {
            stack.place(frame.block(e), &pair.b.to_f64(), &pair.a.to_f64(), pair.scale);
        }
        if !stack.is_finite() {
            pairs.iter().try_for_each(|p| p.check_finite())?;
            let why = format!("{}: a scale of {:?} is too large for f64", frame.module, pairs[0].scale);
            return Err(Error::Numeric(why));
        }
        let batch = Batch::new(frame, stack)?;
        if self.grams.is_empty() {
            return Ok(batch);
        }
        let inputs = self.block_inputs(&batch.frame)?;
        Ok(batch.with_inputs(inputs))
    }

    /// The Grams of the input of a frame's module, checked.
    fn block_inputs(&self, frame: &Frame) -> Result<BlockInputs> {
        let key = (frame.module.layer, frame.module.target.source(), frame.members.clone());
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, inputs)) = last.as_ref().filter(|(shared, _)| *shared == key) {
            return Ok(inputs.clone());
        }
        // What follows from another input may be as large as a weight.
        *last = None;
        let gram = |e: &usize| {
            let gram = self.grams[*e].of(frame.module, frame.size.1)?;
            gram.check()?;
            Ok(gram)
        };
        let inputs = BlockInputs::from(frame.members.iter().map(gram).collect::<Result<Vec<_>>>()?);
        *last = Some((key, inputs.clone()));
        Ok(inputs)
    }

    /// [`Inputs::batch`] of each frame.
    pub fn batches(&self, frames: &[Frame]) -> Result<Vec<Batch>> {
        // Gathered before the first error is looked for, so that it is always the same one.
        let read: Vec<_> = frames.par_iter().map(|frame| self.batch(frame.clone())).collect();
        read.into_iter().collect()
    }

    fn pairs(&self, module: Module) -> Vec<&Pair> {
        self.adapters.iter().filter_map(|a| a.modules.get(&module)).collect()
    }
}

/// The rows or columns of `module` that an adapter's pruning kept; none where it knows of none or kept all.
fn kept(adapter: &Adapter, module: Module) -> Kept {
    let Some(pruning) = &adapter.pruning else { return Kept::default() };
    let (o, i) = pruning.full_dims(module.target);
    let rows = module.target.prunes_rows();
    let kept = pruning.kept(module.target, module.layer);
    let some = (kept.len() < if rows { o } else { i }).then_some(kept);
    if rows { Kept { rows: some, columns: None } } else { Kept { rows: None, columns: some } }
}

/// The fingerprint of the base that every adapter which names one agrees on.
fn one_fingerprint(adapters: &[Adapter]) -> Result<Option<String>> {
    let of = |a: &Adapter| {
        let provenance = a.provenance.as_ref().and_then(|p| p.base_fingerprint.clone());
        provenance.or_else(|| a.pruning.as_ref().map(|p| p.base.fingerprint.clone()))
    };
    let mut known = adapters.iter().filter_map(|a| of(a).map(|f| (a, f)));
    let Some((first, fingerprint)) = known.next() else { return Ok(None) };
    match known.find(|(_, f)| *f != fingerprint) {
        None => Ok(Some(fingerprint)),
        Some((other, found)) => Err(Error::file(
            &other.path,
            format!(
                "is of a base with fingerprint {found}, expected {fingerprint} as {}: adapters of different bases \
                 have nothing in common",
                first.path.display()
            ),
        )),
    }
}

/// A warning where the adapters name different bases.
fn base_names(adapters: &[Adapter]) -> Option<String> {
    let mut named = adapters.iter().filter_map(|a| a.config.base.as_deref().map(|b| (a, b)));
    let (first, base) = named.next()?;
    let (other, found) = named.find(|(_, b)| *b != base)?;
    Some(format!(
        "{} names the base {found:?}, {} names {base:?}: taken to be the same model",
        other.path.display(),
        first.path.display()
    ))
}

/// Whether every adapter has the module, or may lack it, and all have one shape.
fn check_module(adapters: &[Adapter], module: Module, allow_missing: bool) -> Result<()> {
    let mut first: Option<(&Adapter, &Pair)> = None;
    for adapter in adapters {
        let Some(pair) = adapter.modules.get(&module) else {
            if allow_missing {
                continue;
            }
            return Err(Error::file(
                &adapter.path,
                format!(
                    "has no {module}, which another adapter has; --allow-missing takes the mean over those who have it"
                ),
            ));
        };
        match first {
            None => first = Some((adapter, pair)),
            Some((other, expected)) if expected.dims() != pair.dims() => {
                return Err(pair.b.error(format!(
                    "and its A make an update of {:?}, expected {:?} as in {}",
                    pair.dims(),
                    expected.dims(),
                    other.path.display()
                )));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
