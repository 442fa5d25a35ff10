//! A training run's checkpoint: one file in the folder of work in progress, replaced in one step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::train::Validation;
use crate::backend::Backend;
use crate::checkpoint::weights::{OpenOptions, Weights};
use crate::checkpoint::writer::{SafetensorsWriter, TensorSpec};
use crate::error::{Error, Result};
use crate::model::backward::Buf;
use crate::model::trainer::State;
use crate::tensor::{DType, Store};

const FILE: &str = "checkpoint.safetensors";
const KEY: &str = "anabranch";

/// Where a run is, besides what lies on the device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Steps that are done.
    pub step: u64,
    /// Loss of the first step.
    pub first_loss: Option<f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// The validation that counts.
    pub validation: Option<Validation>,
    /// A and B of the best step, where it is kept.
    #[serde(skip)]
    pub best: Option<Vec<f32>>,
}

/// Writes the state into `dir`; a kill at any moment leaves this checkpoint or the one before it.
pub fn save<B: Backend>(dir: &Path, saved: &Saved, state: &State<B::Store>, backend: &B) -> Result<()> {
    let path = dir.join(FILE);
    let fresh = dir.join(format!("{FILE}.new"));
    let parts = [("params", &state.params), ("m", &state.m), ("v", &state.v)];
    let mut specs: Vec<TensorSpec> =
        parts.iter().map(|(name, buf)| TensorSpec::new(*name, DType::F32, [B::Store::len(buf)])).collect();
    specs.extend(saved.best.as_ref().map(|b| TensorSpec::new("best", DType::F32, [b.len()])));
    let text = serde_json::to_string(saved).map_err(|e| Error::file(&fresh, e.to_string()))?;
    let mut file = SafetensorsWriter::create(&fresh, specs, &[(KEY, &text)])?;
    let mut host = Vec::new();
    for (name, buf) in parts {
        let len = B::Store::len(buf);
        host.resize(len, 0.0f32);
        backend.download(&mut host, B::Store::view(buf, 0..len))?;
        file.write(name, bytemuck::cast_slice(&host))?;
    }
    if let Some(best) = &saved.best {
        file.write("best", bytemuck::cast_slice(best))?;
    }
    file.finish()?;
    std::fs::rename(&fresh, &path).map_err(Error::io(&path))
}

/// Reads the state from `dir` onto the device; none where no checkpoint was written.
pub fn load<B: Backend>(dir: &Path, state: &mut State<B::Store>, backend: &B) -> Result<Option<Saved>> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let file = Weights::open(&path, OpenOptions { no_mmap: true })?;
    let text = file
        .metadata()
        .and_then(|m: &BTreeMap<String, String>| m.get(KEY))
        .ok_or_else(|| Error::file(&path, format!("has no {KEY} in its header: it is no checkpoint")))?;
    let mut saved: Saved = serde_json::from_str(text).map_err(|e| Error::file(&path, e.to_string()))?;
    put::<B>(&file, "params", &mut state.params, backend)?;
    put::<B>(&file, "m", &mut state.m, backend)?;
    put::<B>(&file, "v", &mut state.v, backend)?;
    if file.contains("best") {
        saved.best = Some(floats(&file, "best", B::Store::len(&state.params))?);
    }
    Ok(Some(saved))
}

/// Removes the checkpoint from `dir`: it stays at home.
pub fn remove(dir: &Path) -> Result<()> {
    for name in [FILE.to_string(), format!("{FILE}.new")] {
        let path: PathBuf = dir.join(name);
        if path.exists() {
            std::fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

fn put<B: Backend>(file: &Weights, name: &str, buf: &mut Buf<B, f32>, backend: &B) -> Result<()> {
    let len = B::Store::len(buf);
    let host = floats(file, name, len)?;
    backend.upload(B::Store::view_mut(buf, 0..len), &host)
}

fn floats(file: &Weights, name: &str, len: usize) -> Result<Vec<f32>> {
    let t = file.shaped(name, &[len])?;
    let mut host = vec![0.0; len];
    crate::checkpoint::convert::widen(&mut host, t.bytes(), t.dtype());
    Ok(host)
}
