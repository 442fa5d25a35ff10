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
    let scaled: Vec<f64> = b.iter().map(|x| scale * x).collect();
    (padded_a, pad_rows(scaled, ranks.0, ranks.1))
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

/// A safetensors file of pairs being written.
#[derive(Debug)]
pub struct PairWriter {
    path: PathBuf,
    file: SafetensorsWriter,
    pending: VecDeque<PairSpec>,
}

impl PairWriter {
    /// Begins the file at `path`: `modules` in the order in which they will come.
    pub fn create(path: &Path, modules: Vec<PairSpec>) -> Result<PairWriter> {
        let file = SafetensorsWriter::create(path, tensors(&modules), &[])?;
        Ok(PairWriter { path: path.to_path_buf(), file, pending: modules.into() })
    }

    /// Goes on with a file that was begun for these `modules`, of whose first ones the bytes of A and B together have
    /// these SHA-256; gives how many of them are there.
    pub fn resume(path: &Path, modules: Vec<PairSpec>, written: &[&str]) -> Result<(PairWriter, usize)> {
        let sound =
            |n: usize, bytes: &[u8]| written.get(n).is_some_and(|hash| digest::sha256(bytes) == *hash);
        let (file, kept) = SafetensorsWriter::resume(path, tensors(&modules), 2, sound)?;
        let pending = modules.into_iter().skip(kept).collect();
        Ok((PairWriter { path: path.to_path_buf(), file, pending }, kept))
    }

    /// Takes the next module, which must be `module`.
    fn next(&mut self, module: Module) -> Result<PairSpec> {
        match self.pending.pop_front() {
            Some(p) if p.module == module => Ok(p),
            Some(p) => {
                Err(Error::file(&self.path, format!("{module} came to be written, expected {}", p.module)))
            }
            None => Err(Error::file(&self.path, format!("{module} came to be written, expected no more"))),
        }
    }

    /// Writes `A[R, I]` and `B[O, R]` of the next module as these bytes.
    pub fn write(&mut self, module: Module, a: &[u8], b: &[u8]) -> Result<()> {
        self.next(module)?;
        self.file.write(&name_a(module), a)?;
        self.file.write(&name_b(module), b)
    }

    /// Makes the file durable; gives its SHA-256.
    pub fn finish(self) -> Result<String> {
        self.file.finish()
    }
}

/// A and B of each module.
fn tensors(modules: &[PairSpec]) -> Vec<TensorSpec> {
    let both = |p: &PairSpec| {
        [
            TensorSpec::new(name_a(p.module), p.dtypes.0, [p.rank, p.dims.1]),
            TensorSpec::new(name_b(p.module), p.dtypes.1, [p.dims.0, p.rank]),
        ]
    };
    modules.iter().flat_map(both).collect()
}

/// `x`, rows of `row` numbers or bytes, each followed by zeros so that it has `padded`.
pub fn pad_rows<T: Copy + Default>(x: Vec<T>, row: usize, padded: usize) -> Vec<T> {
    if row >= padded {
        return x;
    }
    let mut out = vec![T::default(); x.len() / row.max(1) * padded];
    for (to, from) in out.chunks_exact_mut(padded).zip(x.chunks_exact(row)) {
        to[..row].copy_from_slice(from);
    }
    out
}

/// An adapter's folder being written.
#[derive(Debug)]
pub struct AdapterWriter {
    dir: PathBuf,
    config: AdapterConfig,
    pairs: PairWriter,
}

impl AdapterWriter {
    /// Begins `adapter_model.safetensors` in the folder `dir`, which is there: `modules` in the order in which they will
    /// come. The config is written by [`AdapterWriter::finish`].
    pub fn create(dir: &Path, config: AdapterConfig, modules: Vec<PairSpec>) -> Result<AdapterWriter> {
        Ok(AdapterWriter::of(dir, config, PairWriter::create(&dir.join(ADAPTER_MODEL), modules)?))
    }

    /// Around the `adapter_model.safetensors` of `dir` that is being written.
    pub fn of(dir: &Path, config: AdapterConfig, pairs: PairWriter) -> AdapterWriter {
        AdapterWriter { dir: dir.to_path_buf(), config, pairs }
    }

    /// Writes `A[R, I]` and `B[O, R]` of the next module as these bytes.
    pub fn write_bytes(&mut self, module: Module, a: &[u8], b: &[u8]) -> Result<()> {
        self.pairs.write(module, a, b)
    }

    /// Writes `A[R, I]` and `B[O, R]` of the next module, each number rounded once to the file's dtype.
    pub fn write_f32(&mut self, module: Module, a: &[f32], b: &[f32]) -> Result<()> {
        let p = self.pairs.next(module)?;
        let mut bytes = Vec::new();
        convert::narrow(&mut bytes, a, p.dtypes.0);
        self.pairs.file.write(&name_a(module), &bytes)?;
        bytes.clear();
        convert::narrow(&mut bytes, b, p.dtypes.1);
        self.pairs.file.write(&name_b(module), &bytes)
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
        let p = self.pairs.next(module)?;
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
        self.pairs.file.write(&name, &bytes)
    }

    /// Writes `adapter_config.json`, a copy of `pruning`, and last `anabranch.json` with the hashes of all files.
    pub fn finish(self, pruning: Option<&Pruning>, provenance: Provenance) -> Result<()> {
        let mut known = BTreeMap::new();
        known.insert(ADAPTER_MODEL.to_string(), self.pairs.finish()?);
        let hash = digest::write_json(&self.dir.join(ADAPTER_CONFIG), self.config.to_json())?;
        known.insert(ADAPTER_CONFIG.to_string(), hash);
        if let Some(pruning) = pruning {
            known.insert(PRUNING.to_string(), pruning.write(&self.dir.join(PRUNING))?);
        }
        provenance.seal(&self.dir, known)
    }
}
