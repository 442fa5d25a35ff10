//! Streaming safetensors files: names, dtypes and shapes first, then the tensors one at a time, in memory of one.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::digest::Hasher;
use super::header::MAX_HEADER;
use super::weights::{INDEX, SINGLE};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Bytes of a shard of a checkpoint, where a single tensor is not larger.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor that will be written.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// The name in the file.
    pub name: String,
    /// The element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor of this name, dtype and shape.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    /// Bytes of its data; none where they are more than a file can have.
    pub fn bytes(&self) -> Option<u64> {
        self.shape.iter().try_fold(self.dtype.size() as u64, |n, &d| n.checked_mul(d as u64))
    }

    /// An error unless it is the tensor `name` that came with this many bytes.
    fn check(&self, path: &Path, name: &str, came: u64) -> Result<()> {
        if self.name == name && self.bytes() == Some(came) {
            return Ok(());
        }
        let why = format!(
            "of {came} bytes came, expected {} of shape {:?} in {}",
            self.name, self.shape, self.dtype
        );
        Err(Error::tensor(path, name, why))
    }
}

/// A file of tensors being written, with its SHA-256: a header, then the data in the order of the header.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    file: File,
    hasher: Hasher,
    pending: VecDeque<TensorSpec>,
    /// What the header and each tensor are padded with zeros to a multiple of.
    alignment: usize,
}

impl TensorFile {
    /// Creates the file at `path` and writes `header`; `tensors` in the order in which their data will come.
    pub(super) fn create(
        path: &Path,
        header: &[u8],
        tensors: Vec<TensorSpec>,
        alignment: usize,
    ) -> Result<TensorFile> {
        let file = File::create(path).map_err(Error::io(path))?;
        let hasher = Hasher::default();
        let mut w = TensorFile { path: path.to_path_buf(), file, hasher, pending: tensors.into(), alignment };
        w.put(header)?;
        w.pad(header.len() as u64)?;
        Ok(w)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Zeros behind `len` bytes, up to the next multiple of the alignment.
    fn pad(&mut self, len: u64) -> Result<()> {
        let padding = len.next_multiple_of(self.alignment as u64) - len;
        self.put(&vec![0; padding as usize])
    }

    /// Writes the whole of the next tensor. It is an error if that is not `name` or `bytes` has another length.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let next = self.next(name)?;
        next.check(&self.path, name, bytes.len() as u64)?;
        self.put(bytes)?;
        self.pad(bytes.len() as u64)
    }

    /// Writes the whole of the next tensor as its parts come, one after another. It is an error if that is not `name`,
    /// or if the parts together have another length.
    pub(super) fn write_parts(&mut self, name: &str, parts: impl IntoIterator<Item = Vec<u8>>) -> Result<()> {
        let next = self.next(name)?;
        let mut came = 0u64;
        for part in parts {
            came += part.len() as u64;
            self.put(&part)?;
        }
        next.check(&self.path, name, came)?;
        self.pad(came)
    }

    fn next(&mut self, name: &str) -> Result<TensorSpec> {
        self.pending.pop_front().ok_or_else(|| Error::tensor(&self.path, name, "was not announced"))
    }

    /// Makes the file durable; gives its SHA-256 in hexadecimal. It is an error if a tensor has not come.
    pub(super) fn finish(self) -> Result<String> {
        if let Some(t) = self.pending.front() {
            return Err(Error::tensor(&self.path, t.name.as_str(), "was announced and has not come"));
        }
        self.file.sync_all().map_err(Error::io(&self.path))?;
        Ok(self.hasher.finish())
    }
}

/// One safetensors file being written, with its SHA-256.
#[derive(Debug)]
pub struct SafetensorsWriter(TensorFile);

impl SafetensorsWriter {
    /// Creates the file at `path` and writes the header: `tensors` in the order in which their data will come, the
    /// strings of `metadata` beside `format: pt`, padded so that the data start at a multiple of 8.
    pub fn create(
        path: &Path,
        tensors: Vec<TensorSpec>,
        metadata: &[(&str, &str)],
    ) -> Result<SafetensorsWriter> {
        let header = header(path, &tensors, metadata)?;
        Ok(SafetensorsWriter(TensorFile::create(path, &header, tensors, 1)?))
    }

    /// Writes the whole of the next tensor. It is an error if that is not `name` or `bytes` has another length.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.0.write(name, bytes)
    }

    /// Writes the whole of the next tensor as its parts come, one after another. It is an error if that is not `name`,
    /// or if the parts together have another length.
    pub fn write_parts(&mut self, name: &str, parts: impl IntoIterator<Item = Vec<u8>>) -> Result<()> {
        self.0.write_parts(name, parts)
    }

    /// Makes the file durable; gives its SHA-256 in hexadecimal. It is an error if a tensor has not come.
    pub fn finish(self) -> Result<String> {
        self.0.finish()
    }
}

/// The eight bytes of length and the header, padded with spaces.
fn header(path: &Path, tensors: &[TensorSpec], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut strings = Map::new();
    strings.insert("format".into(), "pt".into());
    strings.extend(metadata.iter().map(|(k, v)| (k.to_string(), Value::from(*v))));
    let mut object = Map::new();
    object.insert("__metadata__".into(), strings.into());
    let mut at = 0u64;
    for t in tensors {
        let end = t.bytes().and_then(|n| at.checked_add(n)).ok_or_else(|| {
            Error::tensor(path, t.name.as_str(), format!("has shape {:?}, larger than any file", t.shape))
        })?;
        let entry = json!({"dtype": t.dtype.name(), "shape": t.shape, "data_offsets": [at, end]});
        if object.insert(t.name.clone(), entry).is_some() {
            return Err(Error::tensor(path, t.name.as_str(), "was announced twice"));
        }
        at = end;
    }
    let mut text = Value::Object(object).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    if text.len() as u64 > MAX_HEADER {
        return Err(Error::file(
            path,
            format!("would have a header of {} bytes, the most is {MAX_HEADER}", text.len()),
        ));
    }
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.append(&mut text);
    Ok(out)
}

/// The weights of a checkpoint being written: one file, or shards and their index.
#[derive(Debug)]
pub struct ModelWriter {
    dir: PathBuf,
    /// Shards not yet begun, with their names.
    rest: VecDeque<(String, Vec<TensorSpec>)>,
    current: Option<(String, SafetensorsWriter)>,
    index: Option<Value>,
    hashes: BTreeMap<String, String>,
}

impl ModelWriter {
    /// Begins the weights in the folder `dir`: `tensors` in the order in which they will come, in shards of at most
    /// `shard_bytes` ([`SHARD_BYTES`]) unless one tensor is larger.
    pub fn create(dir: &Path, tensors: Vec<TensorSpec>, shard_bytes: u64) -> Result<ModelWriter> {
        let mut names = HashSet::new();
        let (mut shards, mut held, mut total, mut elements) = (vec![Vec::new()], 0u64, 0u64, 0u64);
        for t in tensors {
            if !names.insert(t.name.clone()) {
                return Err(Error::tensor(dir, t.name, "was announced twice"));
            }
            let n = t.bytes().filter(|n| total.checked_add(*n).is_some()).ok_or_else(|| {
                Error::tensor(dir, t.name.as_str(), format!("has shape {:?}, larger than any file", t.shape))
            })?;
            total += n;
            elements += n / t.dtype.size() as u64;
            if held > 0 && held.saturating_add(n) > shard_bytes {
                shards.push(Vec::new());
                held = 0;
            }
            held += n;
            if let Some(shard) = shards.last_mut() {
                shard.push(t);
            }
        }
        let count = shards.len();
        let name = |i: usize| match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let rest: VecDeque<_> = shards.into_iter().enumerate().map(|(i, s)| (name(i), s)).collect();
        let index = (count > 1).then(|| {
            let map: BTreeMap<_, _> =
                rest.iter().flat_map(|(f, s)| s.iter().map(move |t| (t.name.clone(), f.clone()))).collect();
            json!({"metadata": {"total_size": total, "total_parameters": elements}, "weight_map": map})
        });
        let mut w =
            ModelWriter { dir: dir.to_path_buf(), rest, current: None, index, hashes: BTreeMap::new() };
        w.advance()?;
        Ok(w)
    }

    /// Ends the current shard and begins the next one, if there is one.
    fn advance(&mut self) -> Result<()> {
        if let Some((name, writer)) = self.current.take() {
            self.hashes.insert(name, writer.finish()?);
        }
        if let Some((name, tensors)) = self.rest.pop_front() {
            let writer = SafetensorsWriter::create(&self.dir.join(&name), tensors, &[])?;
            self.current = Some((name, writer));
        }
        Ok(())
    }

    /// Writes the whole of the next tensor. It is an error if that is not `name` or `bytes` has another length.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        if self.current.as_ref().is_some_and(|(_, w)| w.0.pending.is_empty()) {
            self.advance()?;
        }
        match &mut self.current {
            Some((_, w)) => w.write(name, bytes),
            None => Err(Error::tensor(&self.dir, name, "was not announced")),
        }
    }

    /// Makes all files durable and writes the index; gives the SHA-256 of each file by name.
    pub fn finish(mut self) -> Result<BTreeMap<String, String>> {
        while self.current.is_some() {
            self.advance()?;
        }
        if let Some(index) = self.index.take() {
            let hash = super::digest::write_json(&self.dir.join(INDEX), &index)?;
            self.hashes.insert(INDEX.into(), hash);
        }
        Ok(self.hashes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::weights::{OpenOptions, Weights};
    use super::*;

    #[test]
    fn the_formats_library_reads_it_and_the_hash_is_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.safetensors");
        let specs = vec![TensorSpec::new("b", DType::F32, [2, 3]), TensorSpec::new("a", DType::BF16, [5])];
        let mut w = SafetensorsWriter::create(&path, specs, &[("by", "test")]).unwrap();
        w.write("b", &[7; 24]).unwrap();
        w.write("a", &[9; 10]).unwrap();
        let hash = w.finish().unwrap();
        assert_eq!(hash, super::super::digest::sha256_file(&path).unwrap());
        let bytes = std::fs::read(&path).unwrap();
        let st = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(st.tensor("b").unwrap().data(), &[7; 24]);
        assert_eq!(
            (st.tensor("a").unwrap().shape(), st.tensor("a").unwrap().data()),
            (&[5][..], &[9; 10][..])
        );
        assert_eq!(bytes.len(), 8 + (bytes.len() - 42) + 34);
        assert_eq!((bytes.len() - 34) % 8, 0);
        let (_, meta) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(meta.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn the_order_and_the_sizes_are_those_announced() {
        let dir = tempfile::tempdir().unwrap();
        let specs = || vec![TensorSpec::new("a", DType::F32, [1]), TensorSpec::new("b", DType::F32, [1])];
        let open = |n: &str| SafetensorsWriter::create(&dir.path().join(n), specs(), &[]).unwrap();
        assert!(open("1").write("b", &[0; 4]).is_err());
        assert!(open("2").write("a", &[0; 5]).is_err());
        let mut w = open("3");
        w.write("a", &[0; 4]).unwrap();
        assert!(w.finish().unwrap_err().to_string().contains("b was announced and has not come"));
        let twice = vec![specs().remove(0), specs().remove(0)];
        assert!(SafetensorsWriter::create(&dir.path().join("4"), twice.clone(), &[]).is_err());
        assert!(ModelWriter::create(dir.path(), twice, 1).is_err());
        let huge = vec![TensorSpec::new("a", DType::F32, [usize::MAX, 2])];
        assert!(SafetensorsWriter::create(&dir.path().join("5"), huge.clone(), &[]).is_err());
        assert!(ModelWriter::create(dir.path(), huge, 1).is_err());
    }

    #[test]
    fn shards_hold_at_most_the_limit_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let specs: Vec<_> = (0..5)
            .map(|i| TensorSpec::new(format!("t{i}"), DType::F32, [if i == 2 { 9 } else { 2 }]))
            .collect();
        let mut w = ModelWriter::create(dir.path(), specs.clone(), 16).unwrap();
        for (i, t) in specs.iter().enumerate() {
            w.write(&t.name, &vec![i as u8; t.bytes().unwrap() as usize]).unwrap();
        }
        assert!(w.write("t9", &[]).is_err());
        let mut w = ModelWriter::create(dir.path(), specs.clone(), 16).unwrap();
        for (i, t) in specs.iter().enumerate() {
            w.write(&t.name, &vec![i as u8; t.bytes().unwrap() as usize]).unwrap();
        }
        let hashes = w.finish().unwrap();
        assert_eq!(
            hashes.keys().collect::<Vec<_>>(),
            [
                "model-00001-of-00003.safetensors",
                "model-00002-of-00003.safetensors",
                "model-00003-of-00003.safetensors",
                INDEX
            ]
        );
        for (name, hash) in &hashes {
            assert_eq!(*hash, super::super::digest::sha256_file(&dir.path().join(name)).unwrap());
        }
        let back = Weights::open(dir.path(), OpenOptions::default()).unwrap();
        assert_eq!(back.files().count(), 3);
        for i in 0..5u8 {
            assert!(back.tensor(&format!("t{i}")).unwrap().bytes().iter().all(|&b| b == i));
        }
    }
}
