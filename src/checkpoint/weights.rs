//! Tensors by name: one safetensors file, or a folder with one or with shards.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::bytes::{self, Bytes, Owner};
use super::{convert, header, json};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// The file that a folder with one file of weights has.
pub const SINGLE: &str = "model.safetensors";
/// The index that a folder with shards has.
pub const INDEX: &str = "model.safetensors.index.json";

/// How files are opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Read the files into memory rather than map them (`--no-mmap`).
    pub no_mmap: bool,
}

struct Shard {
    path: PathBuf,
    owner: Owner,
    metadata: BTreeMap<String, String>,
}

struct Tensor {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// The tensors of one file or of all shards of a folder.
pub struct Weights {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Tensor>,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl Weights {
    /// Opens the safetensors file at `path`, or the folder at `path` with `model.safetensors` or an index and shards.
    ///
    /// An error names the file where a header is wrong (see [`header::parse`]), a tensor stands in two shards, or the
    /// index names a file outside the folder or a tensor that its file has not.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Weights> {
        let mut weights = Weights { path: path.to_path_buf(), shards: Vec::new(), tensors: BTreeMap::new() };
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            weights.add(path.to_path_buf(), options)?;
            return Ok(weights);
        }
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        if single.exists() {
            weights.add(single, options)?;
        } else if index.exists() {
            weights.add_shards(path, &index, options)?;
        } else {
            return Err(no_weights(path));
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf, options: OpenOptions) -> Result<()> {
        let owner = bytes::load(&path, options.no_mmap)?;
        let header = header::parse(&path, (*owner).as_ref())?;
        let shard = self.shards.len();
        for e in header.entries {
            if let Some(other) = self.tensors.get(&e.name) {
                let other = self.shards[other.shard].path.display();
                return Err(Error::tensor(
                    &path,
                    e.name,
                    format!("is also in {other}: a tensor belongs to one shard"),
                ));
            }
            self.tensors.insert(e.name, Tensor { shard, dtype: e.dtype, shape: e.shape, range: e.range });
        }
        self.shards.push(Shard { path, owner, metadata: header.metadata });
        Ok(())
    }

    fn add_shards(&mut self, dir: &Path, index: &Path, options: OpenOptions) -> Result<()> {
        let mut object = json::read_object(index)?;
        let map = match object.remove("weight_map") {
            Some(Value::Object(map)) => map,
            Some(other) => {
                let found = json::kind(&other);
                return Err(Error::file(index, format!("weight_map is {found}, expected an object")));
            }
            None => return Err(Error::file(index, "has no weight_map")),
        };
        let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in &map {
            let Value::String(file) = file else {
                let found = json::kind(file);
                return Err(Error::tensor(
                    index,
                    tensor,
                    format!("is in {found}, expected the name of a file"),
                ));
            };
            let inside = Path::new(file).components().all(|c| matches!(c, Component::Normal(_)));
            if !inside || file.is_empty() {
                let why = format!("is said to be in {file:?}, which is not inside the folder");
                return Err(Error::tensor(index, tensor, why));
            }
            files.entry(file).or_default().push(tensor);
        }
        if files.is_empty() {
            return Err(Error::file(index, "weight_map names no tensor"));
        }
        for (file, tensors) in files {
            let path = dir.join(file);
            self.add(path.clone(), options)?;
            let shard = self.shards.len() - 1;
            for name in tensors {
                if self.tensors.get(name).is_none_or(|t| t.shard != shard) {
                    return Err(Error::tensor(
                        &path,
                        name,
                        "is missing, though the index says that it is there",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|s| s.path.as_path())
    }

    /// The strings under `__metadata__` of the first file.
    pub fn metadata(&self) -> Option<&BTreeMap<String, String>> {
        self.shards.first().map(|s| &s.metadata)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.range.len() as u64).sum()
    }

    /// The element type's name and the shape of the tensor `name`, of any dtype that the format knows.
    pub fn info(&self, name: &str) -> Option<(String, &[usize])> {
        self.tensors.get(name).map(|t| (t.dtype.to_string(), &t.shape[..]))
    }

    /// The tensor `name`, which must be of a dtype that is computed with: BF16, F16 or F32.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let Some((name, t)) = self.tensors.get_key_value(name) else {
            let at = self.shards.first().filter(|_| self.shards.len() == 1).map_or(&self.path, |s| &s.path);
            return Err(Error::tensor(at, name, "is missing"));
        };
        let shard = &self.shards[t.shard];
        let dtype = match t.dtype {
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            other => {
                let why = format!("has dtype {other}, expected BF16, F16 or F32");
                return Err(Error::tensor(&shard.path, name, why));
            }
        };
        Ok(TensorRef { name, dtype, shape: &t.shape, shard, range: t.range.clone() })
    }

    /// The tensor `name`, which must have this shape.
    pub fn shaped(&self, name: &str, shape: &[usize]) -> Result<TensorRef<'_>> {
        let t = self.tensor(name)?;
        if t.shape != shape {
            return Err(t.error(format!("has shape {:?}, expected {shape:?}", t.shape)));
        }
        Ok(t)
    }
}

/// The error for a folder without weights, with what may be there instead.
fn no_weights(dir: &Path) -> Error {
    let pickle =
        ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().find(|f| dir.join(f).exists());
    let why = match pickle {
        Some(f) => format!("has {f}, which is not read because a pickle can run code: save it as {SINGLE}"),
        None => format!("has neither {SINGLE} nor {INDEX}"),
    };
    Error::file(dir, why)
}

/// One tensor of an open file.
#[derive(Clone)]
pub struct TensorRef<'a> {
    name: &'a str,
    dtype: DType,
    shape: &'a [usize],
    shard: &'a Shard,
    range: Range<usize>,
}

impl<'a> TensorRef<'a> {
    /// The name in the file.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// The file that it is in.
    pub fn file(&self) -> &'a Path {
        &self.shard.path
    }

    /// Its bytes, from the start of the file.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Its bytes, little-endian.
    pub fn bytes(&self) -> &'a [u8] {
        // The range was checked against the file's length when the header was read.
        &(*self.shard.owner).as_ref()[self.range.clone()]
    }

    /// A handle on its bytes that outlives this view.
    pub fn handle(&self) -> Result<Bytes> {
        Bytes::new(self.shard.owner.clone(), self.range())
            .ok_or_else(|| self.error("lies outside the file".into()))
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.range.len() / self.dtype.size()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Whether its first byte lies at a multiple of the element's size in memory, so that it can be used as it is.
    pub fn is_aligned(&self) -> bool {
        (self.bytes().as_ptr() as usize).is_multiple_of(self.dtype.size())
    }

    /// The values, exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        convert::widen(&mut out, self.bytes(), self.dtype);
        out
    }

    /// An error where an element is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        match convert::first_non_finite(self.bytes(), self.dtype) {
            None => Ok(()),
            Some(i) => Err(self.error(format!("holds NaN or infinity at element {i} of {}", self.len()))),
        }
    }

    /// An error about this tensor.
    pub fn error(&self, why: String) -> Error {
        Error::tensor(&self.shard.path, self.name, why)
    }
}

#[cfg(test)]
mod tests {
    use super::super::writer::{SafetensorsWriter, TensorSpec};
    use super::*;

    fn write(path: &Path, tensors: &[(&str, DType, &[usize])]) {
        let specs: Vec<_> = tensors.iter().map(|(n, d, s)| TensorSpec::new(*n, *d, *s)).collect();
        let mut w = SafetensorsWriter::create(path, specs, &[]).unwrap();
        for (i, (n, d, s)) in tensors.iter().enumerate() {
            let bytes = vec![i as u8; s.iter().product::<usize>() * d.size()];
            w.write(n, &bytes).unwrap();
        }
        w.finish().unwrap();
    }

    fn index(dir: &Path, json: &str) -> String {
        std::fs::write(dir.join(INDEX), json).unwrap();
        Weights::open(dir, OpenOptions::default()).map(|_| "ok".into()).unwrap_or_else(|e| e.to_string())
    }

    #[test]
    fn one_file_or_folder_mapped_or_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(SINGLE);
        write(&file, &[("a", DType::F32, &[2, 3]), ("b", DType::BF16, &[5])]);
        for no_mmap in [false, true] {
            for path in [dir.path(), &file] {
                let w = Weights::open(path, OpenOptions { no_mmap }).unwrap();
                assert_eq!(w.names().collect::<Vec<_>>(), ["a", "b"]);
                let b = w.shaped("b", &[5]).unwrap();
                assert_eq!((b.dtype(), b.len(), b.bytes()), (DType::BF16, 5, &[1u8; 10][..]));
                assert!(b.is_aligned());
                let handle = b.handle().unwrap();
                let err = w.shaped("b", &[4]).err().unwrap().to_string();
                assert!(err.contains("b has shape [5], expected [4]"), "{err}");
                let err = w.tensor("c").err().unwrap().to_string();
                assert!(err.contains("model.safetensors: c is missing"), "{err}");
                drop(w);
                assert_eq!(&handle[..], &[1u8; 10]);
            }
        }
    }

    #[test]
    fn shards_and_what_can_be_wrong_with_their_index() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        assert!(Weights::open(d, OpenOptions::default()).unwrap_err().to_string().contains("has neither"));
        write(&d.join("s1"), &[("a", DType::F32, &[2])]);
        write(&d.join("s2"), &[("b", DType::F32, &[2]), ("c", DType::F16, &[1])]);
        assert_eq!(index(d, r#"{"weight_map":{"a":"s1","b":"s2","c":"s2"}}"#), "ok");
        for (json, expected) in [
            (
                r#"{"weight_map":{"a":"../s1"}}"#,
                "a is said to be in \"../s1\", which is not inside the folder",
            ),
            (r#"{"weight_map":{"a":"/etc/passwd"}}"#, "not inside the folder"),
            (r#"{"weight_map":{"a":""}}"#, "not inside the folder"),
            (r#"{"weight_map":{"a":"s2","b":"s2"}}"#, "s2: a is missing"),
            (r#"{"weight_map":{"a":"s1","a":"s1"}}"#, "key \"a\" twice"),
            (r#"{"weight_map":{"a":3}}"#, "a is in 3, expected the name of a file"),
            (r#"{"weight_map":{}}"#, "names no tensor"),
            (r#"{"weight_map":[]}"#, "weight_map is an array"),
            (r#"{}"#, "has no weight_map"),
            (r#"{"weight_map":{"a":"s9"}}"#, "s9: No such file"),
        ] {
            let found = index(d, json);
            assert!(found.contains(expected), "{json}: {found}");
        }
        write(&d.join("s3"), &[("a", DType::F32, &[2]), ("d", DType::F16, &[1])]);
        let found = index(d, r#"{"weight_map":{"a":"s1","d":"s3"}}"#);
        assert!(found.contains("s3: a is also in") && found.contains("belongs to one shard"), "{found}");
        std::fs::remove_file(d.join(INDEX)).unwrap();
        std::fs::write(d.join("pytorch_model.bin"), "").unwrap();
        assert!(
            Weights::open(d, OpenOptions::default()).unwrap_err().to_string().contains("pickle can run code")
        );
    }

    #[test]
    fn other_dtypes_are_listed_but_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let json = r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.bytes().chain([0; 8]));
        std::fs::write(&path, bytes).unwrap();
        let w = Weights::open(&path, OpenOptions::default()).unwrap();
        assert_eq!(w.info("a").unwrap().0, "I64");
        assert!(w.tensor("a").err().unwrap().to_string().contains("dtype I64, expected BF16, F16 or F32"));
    }

    #[test]
    fn nan_is_found_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut w =
            SafetensorsWriter::create(&path, vec![TensorSpec::new("a", DType::F32, [3])], &[]).unwrap();
        w.write("a", bytemuck::cast_slice(&[1.0f32, 2.0, f32::NAN])).unwrap();
        w.finish().unwrap();
        let w = Weights::open(&path, OpenOptions::default()).unwrap();
        let err = w.tensor("a").unwrap().check_finite().unwrap_err().to_string();
        assert!(err.contains("a holds NaN or infinity at element 2 of 3"), "{err}");
    }
}
