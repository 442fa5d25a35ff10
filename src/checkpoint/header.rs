//! The header of a safetensors file: eight bytes of length, JSON, then the data.
//!
//! Checked against the file's own length before anything is believed: sizes in checked arithmetic, tensors that cover
//! the data without gap or overlap, no name twice.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::{Error, Result};

/// The longest header that is read, as the format's own library has it.
pub const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name in the header.
    pub name: String,
    /// The element type, one of those the format knows.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub range: Range<usize>,
}

/// A checked header.
#[derive(Debug)]
pub struct Header {
    /// Tensors in the order of their data.
    pub entries: Vec<Entry>,
    /// The strings under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

struct RawHeader {
    entries: Vec<(String, RawEntry)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<RawHeader, D::Error> {
        d.deserialize_map(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry a tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut seen = HashSet::new();
        let mut raw = RawHeader { entries: Vec::new(), metadata: BTreeMap::new() };
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("key {name:?} twice")));
            }
            if name == "__metadata__" {
                raw.metadata = map.next_value::<Option<BTreeMap<String, String>>>()?.unwrap_or_default();
            } else {
                let entry =
                    map.next_value().map_err(|e| A::Error::custom(format!("tensor {name:?}: {e}")))?;
                raw.entries.push((name, entry));
            }
        }
        Ok(raw)
    }
}

/// Reads and checks the header of the safetensors file `data`; `path` is for the errors' text.
pub fn parse(path: &Path, data: &[u8]) -> Result<Header> {
    let file = |why: String| Error::file(path, why);
    let Some((length, rest)) = data.split_first_chunk::<8>() else {
        return Err(file(format!("has {} bytes, a safetensors file has at least 8", data.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(file(format!(
            "announces a header of {length} bytes, the most is {MAX_HEADER}: no safetensors file"
        )));
    }
    let text = usize::try_from(length).ok().and_then(|n| rest.get(..n)).ok_or_else(|| {
        file(format!("is truncated: a header of {length} bytes is announced, {} are left", rest.len()))
    })?;
    let raw: RawHeader = serde_json::from_slice(text)
        .map_err(|e| file(format!("its header is not the JSON expected: {e}")))?;
    let start = 8 + text.len();
    let mut entries = Vec::with_capacity(raw.entries.len());
    for (name, raw) in raw.entries {
        entries.push(check_entry(path, name, raw, start, data.len())?);
    }
    entries.sort_by_key(|e| (e.range.start, e.range.end));
    check_cover(path, &entries, start, data.len())?;
    Ok(Header { entries, metadata: raw.metadata })
}

/// One entry: its length is that of its shape and dtype, and it lies in the file.
fn check_entry(path: &Path, name: String, raw: RawEntry, start: usize, end: usize) -> Result<Entry> {
    let fail = |why: String| Error::tensor(path, name.clone(), why);
    let dtype: Dtype = serde_json::from_value(raw.dtype.clone().into())
        .map_err(|_| fail(format!("has dtype {:?}, which the format does not know", raw.dtype)))?;
    let bits = raw.shape.iter().try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d));
    let bytes = bits.filter(|b| b % 8 == 0).map(|b| b / 8).ok_or_else(|| {
        fail(format!("has shape {:?} of {}, which is no possible size", raw.shape, raw.dtype))
    })?;
    let (first, last) = raw.data_offsets;
    let held = last
        .checked_sub(first)
        .ok_or_else(|| fail(format!("ends at {last}, before its start at {first}")))?;
    if held != bytes {
        return Err(fail(format!(
            "has {held} bytes ({first}..{last}), shape {:?} of {} needs {bytes}",
            raw.shape, raw.dtype
        )));
    }
    let room = end - start;
    if last > room as u64 {
        return Err(fail(format!(
            "ends at byte {last} of the data, the file has {room}: the file is truncated, or the offset is wrong"
        )));
    }
    // Both offsets are at most `room`, a usize; each dimension divides a size that is, unless one of them is 0.
    let offset = |x: u64| usize::try_from(x).ok().and_then(|x| x.checked_add(start));
    let shape = raw.shape.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<Vec<_>>>();
    match (offset(first), offset(last), shape) {
        (Some(first), Some(last), Some(shape)) => Ok(Entry { name, dtype, shape, range: first..last }),
        _ => Err(fail(format!("has shape {:?}, too large for this machine", raw.shape))),
    }
}

/// Entries sorted by offset cover `start..end` without gap or overlap.
fn check_cover(path: &Path, entries: &[Entry], start: usize, end: usize) -> Result<()> {
    let mut at = start;
    let mut before = "the header";
    for e in entries {
        let (found, expected) = (e.range.start - start, at - start);
        if found < expected {
            return Err(Error::tensor(
                path,
                e.name.as_str(),
                format!("starts at byte {found} of the data and overlaps {before}, which ends at {expected}"),
            ));
        }
        if found > expected {
            return Err(Error::tensor(
                path,
                e.name.as_str(),
                format!(
                    "starts at byte {found} of the data, {before} ends at {expected}: bytes between them belong to no tensor"
                ),
            ));
        }
        (at, before) = (e.range.end, &e.name);
    }
    if at != end {
        return Err(Error::file(
            path,
            format!(
                "has {} bytes of data, its tensors take {}: bytes at the end belong to no tensor",
                end - start,
                at - start
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut v = (json.len() as u64).to_le_bytes().to_vec();
        v.extend(json.bytes());
        v.extend(std::iter::repeat_n(0u8, data));
        v
    }

    fn error(json: &str, data: usize) -> String {
        parse(Path::new("m.safetensors"), &file(json, data)).unwrap_err().to_string()
    }

    #[test]
    fn good_headers() {
        let h = parse(
            Path::new("m"),
            &file(
                r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"e":{"dtype":"I64","shape":[0],"data_offsets":[14,14]}}   "#,
                14,
            ),
        )
        .unwrap();
        assert_eq!(h.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["a", "b", "e"]);
        assert_eq!(h.metadata["format"], "pt");
        assert_eq!(h.entries[1].range.len(), 6);
        assert!(parse(Path::new("m"), &file("{}", 0)).unwrap().entries.is_empty());
    }

    #[test]
    fn bad_headers_say_what_is_wrong() {
        let cases = [
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                8,
                "\"a\" twice",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}"#,
                9,
                "has 9 bytes (0..9), shape [2] of F32 needs 8",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                7,
                "the file has 7: the file is truncated",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                9,
                "bytes at the end belong to no tensor",
            ),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8, "before its start"),
            (r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#, 8, "dtype \"F33\""),
            (
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
                0,
                "no possible size",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
                "b starts at byte 4 of the data and overlaps a, which ends at 8",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}"#,
                20,
                "belong to no tensor",
            ),
            (r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8, "not the JSON expected"),
            (r#"[]"#, 0, "not the JSON expected"),
            (r#"{"a":{"dtype":"F32","shape":[2]}}"#, 8, "data_offsets"),
        ];
        for (json, data, expected) in cases {
            let err = error(json, data);
            assert!(err.contains(expected), "{json}: {err}");
        }
        let p = Path::new("m");
        assert!(parse(p, &[1, 2, 3]).unwrap_err().to_string().contains("has 3 bytes"));
        assert!(parse(p, &100u64.to_le_bytes()).unwrap_err().to_string().contains("truncated"));
        assert!(parse(p, &u64::MAX.to_le_bytes()).unwrap_err().to_string().contains("the most is 100000000"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(Path::new("m"), &data);
        }

        #[test]
        fn arbitrary_entries_never_panic(
            shape in proptest::collection::vec(any::<u64>(), 0..4), first in any::<u64>(), last in any::<u64>(),
            small in 0u64..40, len in 0usize..64, dtype in "BF16|F16|F32|F4|BOOL|I64|F6_E2M3|X",
        ) {
            for (first, last) in [(first, last), (0, small), (small, small)] {
                let json = format!(
                    r#"{{"a":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{first},{last}]}}}}"#
                );
                if let Ok(h) = parse(Path::new("m"), &file(&json, len)) {
                    prop_assert_eq!(h.entries[0].range.end, 8 + json.len() + len);
                }
            }
        }

        /// What the format's own library takes, this takes with the same tensors; what it refuses, this refuses.
        #[test]
        fn agrees_with_the_formats_library(
            sizes in proptest::collection::vec((0u64..4, 0u64..3), 0..4), cut in 0usize..3, shift in 0u64..2,
        ) {
            let (mut at, mut json) = (0, Vec::new());
            for (i, (a, b)) in sizes.iter().enumerate() {
                let end = at + a * b * 4;
                json.push(format!(r#""t{i}":{{"dtype":"F32","shape":[{a},{b}],"data_offsets":[{},{}]}}"#, at + shift, end + shift));
                at = end;
            }
            let bytes = file(&format!("{{{}}}", json.join(",")), (at as usize + cut).saturating_sub(1));
            let theirs = safetensors::SafeTensors::deserialize(&bytes);
            let ours = parse(Path::new("m"), &bytes);
            prop_assert_eq!(ours.is_ok(), theirs.is_ok());
            if let (Ok(ours), Ok(theirs)) = (ours, theirs) {
                for e in ours.entries {
                    let t = theirs.tensor(&e.name).unwrap();
                    prop_assert_eq!(t.shape(), &e.shape[..]);
                    prop_assert_eq!(t.data(), &bytes[e.range]);
                }
            }
        }
    }
}
