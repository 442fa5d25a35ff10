//! Typed access to the fields of a JSON object; errors name the file, the field, what was found and what was expected.

use std::path::Path;

use serde_json::{Map, Value};

use super::json::kind;
use crate::error::{Error, Result};

/// The fields of one JSON object of a file. A field that is `null` counts as absent, as in Python's readers.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    path: &'a Path,
    /// What stands before a field's name in an error: empty, or `rope_scaling.`.
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of `map`, which is at `prefix` in the file at `path`.
    pub fn new(path: &'a Path, prefix: &'a str, map: &'a Map<String, Value>) -> Fields<'a> {
        Fields { path, prefix, map }
    }

    /// The file.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// The field `key`, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the field `key` stands there, null or not.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// An error about the field `key`.
    pub fn error(&self, key: &str, why: impl AsRef<str>) -> Error {
        Error::file(self.path, format!("{}{key} {}", self.prefix, why.as_ref()))
    }

    fn typed<T>(&self, key: &str, what: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        read(v).map(Some).ok_or_else(|| self.error(key, format!("is {}, expected {what}", kind(v))))
    }

    /// A whole number of at least 0.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// `true` or `false`.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An object.
    pub fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.typed(key, "an object", Value::as_object)
    }

    /// An array.
    pub fn array(&self, key: &str) -> Result<Option<&'a Vec<Value>>> {
        self.typed(key, "an array", Value::as_array)
    }

    /// A whole number from 1 to `most`.
    pub fn count(&self, key: &str, most: usize) -> Result<Option<usize>> {
        match self.size(key)? {
            Some(n) if n == 0 || n > most => Err(self.error(key, format!("is {n}, expected 1 to {most}"))),
            n => Ok(n),
        }
    }

    /// A whole number from 1 to `most`, which must be there.
    pub fn required(&self, key: &str, most: usize) -> Result<usize> {
        self.count(key, most)?.ok_or_else(|| Error::file(self.path, format!("has no {}{key}", self.prefix)))
    }

    /// A number larger than 0.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => Err(self.error(key, format!("is {x}, expected more than 0"))),
            x => Ok(x),
        }
    }

    /// One token id or an array of them; empty where there is none.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(key, "a token id or an array of them", |v| match v {
            Value::Array(a) => a.iter().map(id).collect(),
            v => id(v).map(|i| vec![i]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}
