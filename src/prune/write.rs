//! The folder of a pruned model: weights tensor by tensor, config, plan, tokenizer.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::slice::columns;
use crate::checkpoint::checkpoint::{Checkpoint, tensors};
use crate::checkpoint::config::{CONFIG, ModelConfig};
use crate::checkpoint::digest;
use crate::checkpoint::module::Module;
use crate::checkpoint::pruning::{PRUNING, Pruning};
use crate::checkpoint::writer::{ModelWriter, SHARD_BYTES, TensorSpec};
use crate::error::Result;

/// Bytes of the largest tensor that [`write_pruned`] makes a copy of.
pub fn largest_copy(checkpoint: &Checkpoint, pruned: &ModelConfig) -> Result<u64> {
    let mut most = 0;
    for m in pruned.modules() {
        let (o, i) = pruned.dims(m.target, m.layer);
        let size = checkpoint.weights().tensor(&m.weight())?.dtype().size();
        most = most.max(o as u64 * i as u64 * size as u64);
    }
    Ok(most)
}

/// Writes what `pruning` leaves of `checkpoint` to the folder `dir`, whose architecture is `pruned`; gives the SHA-256
/// of each file by name. `each` is called after each tensor.
///
/// Rows of q, k, v, gate and up and columns of o and down are gathered, with the biases of pruned rows; everything else
/// is copied byte for byte. Memory of one tensor. It is an error if a weight is NaN or infinite.
pub fn write_pruned(
    dir: &Path,
    checkpoint: &Checkpoint,
    pruned: &ModelConfig,
    pruning: &Pruning,
    mut each: impl FnMut() -> Result<()>,
) -> Result<BTreeMap<String, String>> {
    let mut linears: HashMap<String, (Module, bool)> = HashMap::new();
    for m in pruned.modules() {
        linears.insert(m.weight(), (m, true));
        linears.insert(m.bias(), (m, false));
    }
    let weights = checkpoint.weights();
    let mut specs = Vec::new();
    for (name, shape) in tensors(pruned) {
        let dtype = weights.tensor(&name)?.dtype();
        specs.push(TensorSpec::new(name, dtype, shape));
    }
    let names: Vec<String> = specs.iter().map(|s| s.name.clone()).collect();
    let mut writer = ModelWriter::create(dir, specs, SHARD_BYTES)?;
    let mut copy = Vec::new();
    for name in &names {
        let t = weights.tensor(name)?;
        t.check_finite()?;
        let size = t.dtype().size();
        match linears.get(name) {
            Some(&(m, true)) => {
                let &[o, i] = t.shape() else {
                    return Err(t.error(format!("has shape {:?}, expected two dimensions", t.shape())));
                };
                let kept = pruning.kept(m.target, m.layer);
                let (width, size) = if m.target.prunes_rows() { (o, i * size) } else { (i, size) };
                if kept.len() == width {
                    writer.write(name, t.bytes())?;
                } else {
                    columns(&mut copy, t.bytes(), width, size, &kept);
                    writer.write(name, &copy)?;
                }
            }
            Some(&(m, false)) if m.target.prunes_rows() => {
                columns(&mut copy, t.bytes(), t.len(), size, &pruning.kept(m.target, m.layer));
                writer.write(name, &copy)?;
            }
            _ => writer.write(name, t.bytes())?,
        }
        each()?;
    }
    let mut hashes = writer.finish()?;
    let config = pruned.to_json(checkpoint.dtype()?);
    hashes.insert(CONFIG.into(), digest::write_json(&dir.join(CONFIG), &config)?);
    hashes.insert(PRUNING.into(), pruning.write(&dir.join(PRUNING))?);
    hashes.extend(checkpoint.copy_companions(dir)?);
    Ok(hashes)
}
