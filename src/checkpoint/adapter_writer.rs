//! Writing an adapter's folder module by module, in memory of one module.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use super::adapter::{ADAPTER_MODEL, name_a, name_b};
use super::adapter_config::{ADAPTER_CONFIG, AdapterConfig};
use super::module::Module;
use super::provenance::Provenance;
use super::pruning::{PRUNING, Pruning};
use super::writer::{SafetensorsWriter, TensorSpec};
use super::{convert, digest};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// `A[rank, I]` and `scale · B[O, rank]` at the rank `ranks.1`, which is no smaller than theirs, `ranks.0`: rows of A and
/// columns of B beyond it are zeros.
pub fn folded(
    a: &[f64],
    b: &[f64],
    ranks: (usize, usize),
    dims: (usize, usize),
    scale: f64,
) -> (Vec<f64>, Vec<f64>) {
    let mut padded_a = a.to_vec();
    padded_a.resize(ranks.1 * dims.1, 0.0);
    let mut padded_b = vec![0.0; dims.0 * ranks.1];
    for (row, b) in padded_b.chunks_exact_mut(ranks.1).zip(b.chunks_exact(ranks.0)) {
        for (r, &x) in row.iter_mut().zip(b) {
            *r = scale * x;
        }
    }
    (padded_a, padded_b)
}

/// A module that will be written.
#[derive(Clone, Copy, Debug)]
pub struct PairSpec {
    /// Which.
    pub module: Module,
    /// R of the file; a factor of a smaller rank is padded with zeros.
    pub rank: usize,
    /// O, I.
    pub dims: (usize, usize),
    /// The element types of A and B.
    pub dtypes: (DType, DType),
}

/// An adapter's folder being written.
#[derive(Debug)]
pub struct AdapterWriter {
    dir: PathBuf,
    config: AdapterConfig,
    file: SafetensorsWriter,
    pending: VecDeque<PairSpec>,
}

impl AdapterWriter {
    /// Begins `adapter_model.safetensors` in the folder `dir`, which is there: `modules` in the order in which they will
    /// come. The config is written by [`AdapterWriter::finish`].
    pub fn create(dir: &Path, config: AdapterConfig, modules: Vec<PairSpec>) -> Result<AdapterWriter> {
        let specs = modules
            .iter()
            .flat_map(|p| {
                [
                    TensorSpec::new(name_a(p.module), p.dtypes.0, [p.rank, p.dims.1]),
                    TensorSpec::new(name_b(p.module), p.dtypes.1, [p.dims.0, p.rank]),
                ]
            })
            .collect();
        let file = SafetensorsWriter::create(&dir.join(ADAPTER_MODEL), specs, &[])?;
        Ok(AdapterWriter { dir: dir.to_path_buf(), config, file, pending: modules.into() })
    }

    /// Takes the next module, which must be `module`.
    fn next(&mut self, module: Module) -> Result<PairSpec> {
        match self.pending.pop_front() {
            Some(p) if p.module == module => Ok(p),
            Some(p) => {
                Err(Error::file(&self.dir, format!("{module} came to be written, expected {}", p.module)))
            }
            None => Err(Error::file(&self.dir, format!("{module} came to be written, expected no more"))),
        }
    }

    /// Writes `A[R, I]` and `B[O, R]` of the next module as these bytes.
    pub fn write_bytes(&mut self, module: Module, a: &[u8], b: &[u8]) -> Result<()> {
        self.next(module)?;
        self.file.write(&name_a(module), a)?;
        self.file.write(&name_b(module), b)
    }

    /// Writes `A[R, I]` and `B[O, R]` of the next module, each number rounded once to the file's dtype.
    pub fn write_f32(&mut self, module: Module, a: &[f32], b: &[f32]) -> Result<()> {
        let p = self.next(module)?;
        let mut bytes = Vec::new();
        convert::narrow(&mut bytes, a, p.dtypes.0);
        self.file.write(&name_a(module), &bytes)?;
        bytes.clear();
        convert::narrow(&mut bytes, b, p.dtypes.1);
        self.file.write(&name_b(module), &bytes)
    }

    /// Writes `A[rank, I]` and `scale · B[O, rank]` of the next module, each number rounded once to the file's dtype.
    /// Where the file's rank is larger, rows of A and columns of B are zeros. A number that is not finite after that is
    /// an error.
    pub fn write_folded(
        &mut self,
        module: Module,
        a: &[f64],
        b: &[f64],
        rank: usize,
        scale: f64,
    ) -> Result<()> {
        let p = self.next(module)?;
        let (o, i) = p.dims;
        let fits = rank > 0 && rank <= p.rank && a.len() == rank * i && b.len() == o * rank;
        if !fits {
            let why = format!(
                "{module}: A has {} numbers and B {}, expected {o} × {i} at rank {rank} of at most {}",
                a.len(),
                b.len(),
                p.rank
            );
            return Err(Error::file(&self.dir, why));
        }
        let (a, b) = folded(a, b, (rank, p.rank), p.dims, scale);
        self.put(name_a(module), &a, p.dtypes.0)?;
        self.put(name_b(module), &b, p.dtypes.1)
    }

    fn put(&mut self, name: String, x: &[f64], dtype: DType) -> Result<()> {
        let bytes = convert::narrow_finite(x, dtype)
            .map_err(|why| Error::tensor(self.dir.join(ADAPTER_MODEL), name.as_str(), why))?;
        self.file.write(&name, &bytes)
    }

    /// Writes `adapter_config.json`, a copy of `pruning`, and last `anabranch.json` with the hashes of all files.
    pub fn finish(self, pruning: Option<&Pruning>, provenance: Provenance) -> Result<()> {
        let mut known = BTreeMap::new();
        known.insert(ADAPTER_MODEL.to_string(), self.file.finish()?);
        let hash = digest::write_json(&self.dir.join(ADAPTER_CONFIG), self.config.to_json())?;
        known.insert(ADAPTER_CONFIG.to_string(), hash);
        if let Some(pruning) = pruning {
            known.insert(PRUNING.to_string(), pruning.write(&self.dir.join(PRUNING))?);
        }
        provenance.seal(&self.dir, known)
    }
}
