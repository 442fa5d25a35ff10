//! The second output of `fuse`: the base with the fused update in its weights, in the memory of one tensor.

use std::collections::BTreeMap;
use std::path::Path;

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
use crate::fuse::merge::{Merged, merge};
use crate::fuse::{Factors, Frame};

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
        let frames: BTreeMap<String, &Frame> = self.frames.iter().map(|f| (f.module.weight(), f)).collect();
        let names: Vec<String> = base.expected().into_iter().map(|(name, _)| name).collect();
        let specs = names
            .iter()
            .map(|name| {
                base.weights().tensor(name).map(|t| TensorSpec::new(name.as_str(), t.dtype(), t.shape()))
            })
            .collect::<Result<Vec<_>>>()?;
        let bar = common.progress.bar("merge", names.len() as u64);
        let mut writer = ModelWriter::create(dir, specs, SHARD_BYTES)?;
        let mut modules: BTreeMap<Module, ModuleCertificate> = BTreeMap::new();
        for name in &names {
            common.check_stop("nothing was written")?;
            let tensor = base.weights().tensor(name)?;
            match frames.get(name) {
                None => {
                    tensor.check_finite()?;
                    writer.write(name, tensor.bytes())?;
                }
                Some(frame) => {
                    let (merged, certificate) = self.merged(backend, frame, &tensor)?;
                    writer.write(name, &merged.bytes)?;
                    modules.insert(frame.module, certificate);
                }
            }
            bar.inc(1);
        }
        let mut hashes = writer.finish()?;
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
        let outcome = self.recipe().run(backend, std::slice::from_ref(&batch), false)?.swap_remove(0);
        let factors = &outcome.fused.factors;
        let round = |x: &f64| f64::from(*x as f32);
        let used = Factors::new(factors.bt().map(round), factors.a().map(round))?;
        let merged = merge(backend, weight, &used)?;
        let mut certificate = ModuleCertificate::new(&batch, &outcome, &used)?;
        certificate.error = merged.error;
        Ok((merged, certificate))
    }
}
