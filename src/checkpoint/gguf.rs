//! GGUF files, version 3, as llama.cpp reads them: magic, counts, metadata, tensor infos, then the tensors, all
//! little-endian, the data and each tensor in it at a multiple of 32 bytes. Sizes stand innermost first.

use std::path::Path;

use super::module::Target;
use super::writer::{TensorFile, TensorSpec};
use crate::error::{Error, Result};
use crate::tensor::DType;

const ALIGNMENT: usize = 32;
/// The most bytes of a tensor's name that llama.cpp takes, the NUL at its end left out.
const MAX_NAME: usize = 63;

/// A value of the metadata.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// `GGUF_TYPE_UINT32`.
    U32(u32),
    /// `GGUF_TYPE_FLOAT32`.
    F32(f32),
    /// `GGUF_TYPE_STRING`.
    Text(&'a str),
}

/// A GGUF file being written, in memory of one tensor.
#[derive(Debug)]
pub struct GgufWriter(TensorFile);

impl GgufWriter {
    /// Creates the file at `path` and writes all but the data: `tensors`, with their sizes outermost first, in the order
    /// in which their data will come.
    pub fn create(
        path: &Path,
        metadata: &[(&str, Value<'_>)],
        tensors: Vec<TensorSpec>,
    ) -> Result<GgufWriter> {
        let header = header(path, metadata, &tensors)?;
        Ok(GgufWriter(TensorFile::create(path, &header, tensors, ALIGNMENT)?))
    }

    /// Writes the whole of the next tensor. It is an error if that is not `name` or `bytes` has another length.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.0.write(name, bytes)
    }

    /// Makes the file durable. It is an error if a tensor has not come.
    pub fn finish(self) -> Result<()> {
        self.0.finish().map(drop)
    }
}

fn header(path: &Path, metadata: &[(&str, Value<'_>)], tensors: &[TensorSpec]) -> Result<Vec<u8>> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        match value {
            Value::U32(x) => {
                out.extend(4u32.to_le_bytes());
                out.extend(x.to_le_bytes());
            }
            Value::F32(x) => {
                out.extend(6u32.to_le_bytes());
                out.extend(x.to_le_bytes());
            }
            Value::Text(x) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, x);
            }
        }
    }
    let mut at = 0u64;
    for t in tensors {
        let fail = |why: String| Error::tensor(path, t.name.as_str(), why);
        if t.name.len() > MAX_NAME {
            return Err(fail(format!("has a name of {} bytes, llama.cpp takes {MAX_NAME}", t.name.len())));
        }
        text(&mut out, &t.name);
        out.extend((t.shape.len() as u32).to_le_bytes());
        t.shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        out.extend(kind(t.dtype).to_le_bytes());
        out.extend(at.to_le_bytes());
        let bytes = t.bytes().and_then(|n| n.checked_next_multiple_of(ALIGNMENT as u64));
        at = bytes
            .and_then(|n| at.checked_add(n))
            .ok_or_else(|| fail(format!("has shape {:?}, larger than any file", t.shape)))?;
    }
    Ok(out)
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.bytes());
}

/// `ggml_type`.
fn kind(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 30,
    }
}

/// `general.file_type` of a file whose matrices are all of one dtype.
pub fn file_type(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 32,
    }
}

/// What llama.cpp calls a linear of a layer: `attn_q`, …
pub fn linear(target: Target) -> &'static str {
    match target {
        Target::Q => "attn_q",
        Target::K => "attn_k",
        Target::V => "attn_v",
        Target::O => "attn_output",
        Target::Gate => "ffn_gate",
        Target::Up => "ffn_up",
        Target::Down => "ffn_down",
    }
}

/// The row of a q or k projection that llama.cpp expects at `row`: Hugging Face rotates the two halves of a head of width
/// `k` against each other, llama.cpp its even and odd rows, so that row `2j + i` of a head is its row `i k/2 + j`.
pub fn rotated(row: usize, k: usize) -> usize {
    let (head, within) = (row / k, row % k);
    head * k + within % 2 * (k / 2) + within / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_in_pairs() {
        let rows: Vec<_> = (0..12).map(|r| rotated(r, 6)).collect();
        assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert_eq!((0..4).map(|r| rotated(r, 2)).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }

    #[test]
    fn bytes_of_a_small_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.gguf");
        let specs = vec![TensorSpec::new("a", DType::F32, [1, 3]), TensorSpec::new("b", DType::BF16, [2, 1])];
        let meta = [("k", Value::Text("v")), ("x", Value::F32(1.0)), ("n", Value::U32(7))];
        let mut w = GgufWriter::create(&path, &meta, specs).unwrap();
        w.write("a", &[1; 12]).unwrap();
        assert!(w.write("c", &[2; 4]).unwrap_err().to_string().contains("expected b"));
        let specs = vec![TensorSpec::new("a", DType::F32, [1, 3]), TensorSpec::new("b", DType::BF16, [2, 1])];
        let mut w = GgufWriter::create(&path, &meta, specs).unwrap();
        w.write("a", &[1; 12]).unwrap();
        w.write("b", &[2; 4]).unwrap();
        w.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[..24], b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0");
        // key (8 + 1), type 4, value: (8 + 1), 4, 4; infos: (8 + 1) + 4 + 16 + 4 + 8.
        let end: usize = 24 + (9 + 4 + 9) + (9 + 4 + 4) * 2 + 2 * (9 + 4 + 16 + 4 + 8);
        let data = end.next_multiple_of(32);
        assert_eq!(bytes.len(), data + 64);
        assert_eq!(
            (&bytes[data..data + 13], &bytes[data + 32..data + 37]),
            (&[[1; 12].as_slice(), &[0]].concat()[..], &[2, 2, 2, 2, 0][..])
        );
        // The second tensor: its sizes from the inside, its dtype, its place.
        let info = [&1u64.to_le_bytes()[..], &2u64.to_le_bytes(), &30u32.to_le_bytes(), &32u64.to_le_bytes()]
            .concat();
        assert_eq!(bytes[end - 28..end], info);
        let long = vec![TensorSpec::new("n".repeat(64), DType::F32, [1, 1])];
        assert!(
            GgufWriter::create(&path, &meta, long).unwrap_err().to_string().contains("llama.cpp takes 63")
        );
    }
}
