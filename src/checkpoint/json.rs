//! JSON files: read whole with a bound, a key twice in one object is an error; and the text that they are written as.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::bytes;
use crate::error::{Error, Result};

/// The most bytes a JSON file may have: more than the index of any model, less than what fills memory.
const MAX_JSON: u64 = 256 << 20;

/// A JSON value of which no object has a key twice.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Unique, D::Error> {
        d.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(Unique(v)) = seq.next_element()? {
            out.push(v);
        }
        Ok(Value::Array(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if out.contains_key(&key) {
                return Err(A::Error::custom(format!("key {key:?} twice in one object")));
            }
            let Unique(v) = map.next_value()?;
            out.insert(key, v);
        }
        Ok(Value::Object(out))
    }
}

/// The bytes of the file at `path`; an error above 256 MiB.
pub fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, MAX_JSON)
}

/// The bytes of the file at `path`; an error above `most`.
pub fn read_at_most(path: &Path, most: u64) -> Result<Vec<u8>> {
    let (file, _) = bytes::open(path)?;
    let mut text = Vec::new();
    file.take(most + 1).read_to_end(&mut text).map_err(Error::io(path))?;
    if text.len() as u64 > most {
        return Err(Error::file(path, format!("has more than {most} bytes, which no such file needs")));
    }
    Ok(text)
}

/// The JSON value in `text`; a key twice in one object is an error. `path` is for the error's text.
pub fn parse(path: &Path, text: &[u8]) -> Result<Value> {
    parse_line(text).map_err(|e| Error::file(path, format!("is not the JSON expected: {e}")))
}

/// The JSON value in `text`, one line of a file say; a key twice in one object is an error.
pub fn parse_line(text: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(text).map(|Unique(v)| v)
}

/// The JSON object in the file at `path`.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    object(path, &read_bounded(path)?)
}

/// The JSON object in `text`; `path` is for the errors' text.
pub fn object(path: &Path, text: &[u8]) -> Result<Map<String, Value>> {
    match parse(path, text)? {
        Value::Object(map) => Ok(map),
        other => Err(Error::file(path, format!("holds {}, expected an object", kind(&other)))),
    }
}

/// The JSON object in `text` whose `format` is `expected`; `path` is for the errors' text.
pub fn parse_format(path: &Path, text: &[u8], expected: &str) -> Result<Value> {
    let value = parse(path, text)?;
    match value.get("format").and_then(Value::as_str) {
        Some(found) if found == expected => Ok(value),
        Some(other) => Err(Error::file(path, format!("format is {other:?}, expected {expected:?}"))),
        None => Err(Error::file(path, format!("has no format, expected {expected:?}"))),
    }
}

/// `value` as a `T`, or an error about `path` that names the field.
pub fn typed<T: DeserializeOwned>(path: &Path, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        let why = match e.path().to_string() {
            // Of the whole, not of a field in it.
            at if at == "." => e.inner().to_string(),
            at => format!("{at}: {}", e.inner()),
        };
        Error::file(path, why)
    })
}

/// `value` in one line, its line feed included; `path` is for the error's text.
pub fn line(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    ended(path, serde_json::to_vec(value))
}

/// `value` in indented lines, the last line feed included; `path` is for the error's text.
pub fn pretty(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    ended(path, serde_json::to_vec_pretty(value))
}

fn ended(path: &Path, text: serde_json::Result<Vec<u8>>) -> Result<Vec<u8>> {
    let mut text = text.map_err(|e| Error::file(path, e.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

/// What a value is, for error texts: `null`, `true`, `3`, `a string`, `an array`, `an object`.
pub fn kind(value: &Value) -> String {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(s) if s.chars().count() <= 60 => format!("{s:?}"),
        Value::String(_) => "a long string".into(),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_twice_is_an_error_at_any_depth() {
        let p = Path::new("f.json");
        assert!(parse(p, br#"{"a":1,"b":[{"c":null}],"d":1.5,"e":-3,"f":"x","g":true}"#).is_ok());
        let err = parse(p, br#"{"a":[{"c":1,"c":2}]}"#).unwrap_err().to_string();
        assert!(err.contains("key \"c\" twice"), "{err}");
        assert!(parse(p, "[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn what_is_written_ends_its_line_or_names_the_file() {
        let p = Path::new("f.json");
        assert_eq!(line(p, &serde_json::json!({"a": "b\n"})).unwrap(), b"{\"a\":\"b\\n\"}\n");
        assert_eq!(pretty(p, &serde_json::json!({"a": 1})).unwrap(), b"{\n  \"a\": 1\n}\n");
        // JSON has no keys but strings.
        let err = line(p, &std::collections::BTreeMap::from([((1, 2), 3)])).unwrap_err().to_string();
        assert!(err.contains("f.json") && err.contains("key must be a string"), "{err}");
    }

    #[test]
    fn numbers_keep_their_value() {
        let p = Path::new("f.json");
        let v = parse(p, b"[18446744073709551615, 0.1, 1e-5]").unwrap();
        assert_eq!(v[0].as_u64(), Some(u64::MAX));
        assert_eq!(v[1].as_f64(), Some(0.1));
        assert_eq!(v[2].as_f64(), Some(1e-5));
    }
}
