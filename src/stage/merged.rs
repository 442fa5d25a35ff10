//! The second output of `fuse`: the base with the fused update in its weights, in the memory of a few tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use indicatif::ProgressBar;

use super::common::Common;
use super::fuse::FusePlan;
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::digest;
use crate::checkpoint::module::Module;
use crate::checkpoint::weights::TensorRef;
use crate::checkpoint::writer::{ModelWriter, SHARD_BYTES, TensorSpec};
use crate::error::{Error, Result};
use crate::fuse::certificate::{CERTIFICATE, Certificate, ModuleCertificate};
use crate::fuse::compare::Compared;
use crate::fuse::elementwise::{Elementwise, Sums};
use crate::fuse::measure::Measured;
use crate::fuse::merge::{Merged, lost_rows, merge, merge_rows};
use crate::fuse::{Batch, Factors, Frame, Fusion};

/// The base's config, copied as it is.
const CONFIG: &str = "config.json";

impl FusePlan {
    /// Writes `base` with the fused update in its weights into the folder `dir`, which is there and empty.
    ///
    /// Weights without an update, and everything else that the model needs, are copied. The errors in the certificate
    /// are those of `W' − W` in the base's dtype.
    pub fn write_merged<B: Backend>(
        &self,
        backend: &B,
        base: &Checkpoint,
        dir: &Path,
        common: &Common,
    ) -> Result<Certificate> {
        let frames = self.frames(backend, (common, "nothing was written"))?;
        let frames: BTreeMap<String, &Frame> = frames.iter().map(|f| (f.module.weight(), f)).collect();
        let names: Vec<String> = base.expected().into_iter().map(|(name, _)| name).collect();
        let specs = names
            .iter()
            .map(|name| {
                base.weights().tensor(name).map(|t| TensorSpec::new(name.as_str(), t.dtype(), t.shape()))
            })
            .collect::<Result<Vec<_>>>()?;
        let bar = common.progress.bar("merge", names.len() as u64);
        let writer = ModelWriter::create(dir, specs, SHARD_BYTES)?;
        let mut modules: BTreeMap<Module, ModuleCertificate> = BTreeMap::new();
        // A tensor is written while the next one is made.
        let (send, receive) = sync_channel::<(&str, Cow<'_, [u8]>)>(1);
        let mut hashes = thread::scope(|scope| {
            let writing = scope.spawn(|| write_all(writer, receive, &bar));
            let mut make = || {
                for name in &names {
                    common.check_stop("nothing was written")?;
                    let tensor = base.weights().tensor(name)?;
                    let bytes = match frames.get(name) {
                        None => {
                            tensor.check_finite()?;
                            Cow::Borrowed(tensor.bytes())
                        }
                        Some(frame) => {
                            let (merged, certificate) = self.merged(backend, frame, &tensor)?;
                            modules.insert(frame.module, certificate);
                            Cow::Owned(merged.bytes)
                        }
                    };
                    if send.send((name, bytes)).is_err() {
                        break;
                    }
                }
                Ok(())
            };
            let made = make();
            drop(send);
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // A writer that stopped early says why; one that was not given everything only that something is missing.
            made.and(written)
        })?;
        bar.finish_and_clear();
        hashes.extend(base.copy_companions(dir)?);
        let config = base.dir().join(CONFIG);
        let bytes = std::fs::read(&config).map_err(Error::io(&config))?;
        hashes.insert(CONFIG.into(), digest::write_file(&dir.join(CONFIG), &bytes)?);
        let certificate = self.certificate(base.dtype()?, modules.into_values().collect());
        hashes.insert(CERTIFICATE.into(), digest::write_json(&dir.join(CERTIFICATE), &certificate)?);
        let mut provenance = self.provenance();
        provenance.base_fingerprint = Some(base.fingerprint()?.to_owned());
        // What it now is has weights of its own, and so a fingerprint of its own.
        provenance.model_fingerprint = None;
        provenance.seal(dir, hashes)?;
        Ok(certificate)
    }

    /// The merged weight of one module and its certificate.
    fn merged<B: Backend>(
        &self,
        backend: &B,
        frame: &Frame,
        weight: &TensorRef<'_>,
    ) -> Result<(Merged, ModuleCertificate)> {
        let batch = self.inputs.batch(frame.clone())?;
        let fusion = &self.recipe().fusion;
        if !fusion.has_factors() {
            let compared = self.recipe().compare(backend, std::slice::from_ref(&batch))?.swap_remove(0);
            return merge_entries(fusion, &batch, &compared, weight);
        }
        let outcome = self.recipe().run(backend, std::slice::from_ref(&batch), false)?.swap_remove(0);
        let factors = outcome.made.factors(&batch)?;
        let round = |x: &f64| f64::from(*x as f32);
        let used = Factors::new(factors.bt().map(round), factors.a().map(round))?;
        let merged = merge(backend, weight, &used)?;
        let mut certificate = outcome.certify(&batch, &used)?;
        certificate.error = match &outcome.entries {
            None => merged.error,
            Some(entries) => entries.distance(|rows, delta| lost_rows(weight, &merged, rows, delta))?.0,
        };
        Ok((merged, certificate))
    }
}

/// The merged weight of a module whose update is made entry by entry, and its certificate.
fn merge_entries(
    fusion: &Fusion,
    read: &Batch,
    compared: &Compared,
    weight: &TensorRef<'_>,
) -> Result<(Merged, ModuleCertificate)> {
    let frame = &read.frame;
    let before = compared.resolved.as_ref().map(|_| read);
    let entries = Elementwise::new(fusion, compared.updates(read), before)?;
    let (merged, sums) = merge_rows(weight, frame.size, |rows, out| entries.rows(rows, out, true))?;
    let sums = Sums::total(&sums, frame.edges());
    let measured =
        Measured::new(merged.error, sums.size, &sums.along_read, &sums.along, &frame.weights, compared)?;
    let rank = fusion.rank_of(frame, false)?;
    let mut certificate = ModuleCertificate::of(frame, compared, fusion.method.word(), rank, measured);
    certificate.kept = Some(entries.kept(&sums));
    Ok((merged, certificate))
}

/// Writes tensors as they come; the hashes of the files.
fn write_all(
    mut writer: ModelWriter,
    receive: Receiver<(&str, Cow<'_, [u8]>)>,
    bar: &ProgressBar,
) -> Result<BTreeMap<String, String>> {
    for (name, bytes) in receive {
        writer.write(name, &bytes)?;
        bar.inc(1);
    }
    writer.finish()
}
