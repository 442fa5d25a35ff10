//! The canonical file: a task's line for each question, with its subject, its domain and the split that it came in.

use std::collections::HashMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::domains::{self, DOMAINS};
use crate::data::lines;
use crate::data::tasks::{self, Form, Item};
use crate::error::{Error, Result, nearest};

/// The canonical file's name.
pub const ROWS: &str = "mmlu.jsonl";

/// A part of MMLU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Five rows of a subject, the worked examples.
    Dev,
    /// `val` in MMLU's own files.
    Validation,
    /// The questions that accuracies are of.
    Test,
}

impl Split {
    /// `dev`, `validation` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Split::Dev => "dev",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }

    /// [`Split::name`]'s, or `val`.
    pub fn parse(name: &str) -> Option<Split> {
        match name {
            "dev" => Some(Split::Dev),
            "val" | "validation" => Some(Split::Validation),
            "test" => Some(Split::Test),
            _ => None,
        }
    }
}

/// A question of MMLU, or of a set in its form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// A question with a subject and at least one domain.
    pub item: Item,
    /// Where it came in.
    pub split: Split,
}

impl Row {
    /// The row of `item`. Its domain is that of its subject, unless it says another. An error if it is no question, has
    /// no subject, or is of an unknown subject and says no domain; and if either is no name for a file.
    pub fn new(mut item: Item, split: Split) -> Result<Row, String> {
        let Form::Question { .. } = item.form else { return Err("is a prompt, expected a question".into()) };
        let subject = item.subject.as_deref().ok_or("has no subject")?;
        named("subject", subject)?;
        if item.domains.is_empty() {
            let domain = domains::of(subject).ok_or_else(|| unknown(subject))?;
            item.domains = vec![domain.id.into()];
        }
        item.domains.iter().try_for_each(|d| named("domain", d))?;
        Ok(Row { item, split })
    }

    /// The subject, which every row has.
    pub fn subject(&self) -> &str {
        self.item.subject.as_deref().unwrap_or_default()
    }

    /// The row of a line's object, whose number in the file is its id if it has none: whether it has one is told. What
    /// the object lacks of subject and split is `subject` and `split`.
    pub(super) fn of_json(
        map: &Map<String, Value>,
        number: usize,
        subject: Option<&str>,
        split: Option<Split>,
    ) -> Result<(Row, bool), String> {
        let mut item = tasks::json_item(map, number)?;
        item.subject = item.subject.or(subject.map(String::from));
        let split = match map.get("split") {
            None | Some(Value::Null) => split.ok_or("has no split, expected dev, validation or test")?,
            Some(_) => {
                let name = lines::string(map, "split")?;
                Split::parse(&name)
                    .ok_or_else(|| format!("split is {name:?}, expected dev, validation or test"))?
            }
        };
        let has_id = map.get("id").is_some_and(|id| !id.is_null());
        Ok((Row::new(item, split)?, has_id))
    }
}

/// Whether `name` can be a part of a file's name, which subjects and domains become.
pub(crate) fn named(what: &str, name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match !name.is_empty() && name.chars().all(fits) {
        true => Ok(()),
        false => Err(format!("{what} is {name:?}, expected letters, digits, _ and -")),
    }
}

fn unknown(subject: &str) -> String {
    let hint = match nearest(subject, DOMAINS.iter().flat_map(|d| d.subjects).copied()) {
        Some(near) => format!("did you mean {near}?"),
        None => "name its domain in a JSON line's `domains`".into(),
    };
    format!("subject {subject} is none of MMLU's 57: {hint}")
}

/// Reads a canonical file. Ids are told apart, and every row says its split.
pub fn load(path: &Path) -> Result<Vec<Row>> {
    let text = lines::read_text(path)?;
    let rows = of_lines(path, &text, None, None)?;
    let mut seen = HashMap::new();
    for (line, (row, _)) in &rows {
        if let Some(first) = seen.insert(row.item.id.as_str(), *line) {
            let why = format!("line {line}: id {:?} stands in line {first} too", row.item.id);
            return Err(Error::file(path, why));
        }
    }
    match rows.is_empty() {
        true => Err(Error::file(path, "has no rows")),
        false => Ok(rows.into_iter().map(|(_, (row, _))| row).collect()),
    }
}

/// The rows of JSON lines with their line numbers, as [`Row::of_json`] gives them.
pub(super) fn of_lines(
    path: &Path,
    text: &str,
    subject: Option<&str>,
    split: Option<Split>,
) -> Result<Vec<(usize, (Row, bool))>> {
    lines::numbered(text)
        .enumerate()
        .map(|(number, (line, text))| {
            let row = lines::object(text).and_then(|map| Row::of_json(&map, number, subject, split));
            Ok((line, row.map_err(|why| Error::file(path, format!("line {line}: {why}")))?))
        })
        .collect()
}

/// The canonical file's text.
pub fn text(rows: &[Row]) -> String {
    lines::of_objects(rows.iter().map(|row| {
        let mut map = row.item.to_json();
        map.insert("split".into(), row.split.name().into());
        map
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ROWS);
        std::fs::write(&path, text).unwrap();
        load(&path)
    }

    #[test]
    fn rows_are_written_as_they_are_read() {
        let text = r#"{"id":"anatomy/dev/0","subject":"anatomy","question":"q\n","choices":["1","2","3","4"],"answer":3,"domains":["stem"],"split":"dev"}
{"id":"z","subject":"cooking","question":"é","choices":["1","2","3","4"],"answer":0,"domains":["food","art"],"split":"validation"}
"#;
        let rows = read(text).unwrap();
        assert_eq!((rows[0].subject(), rows[1].split), ("anatomy", Split::Validation));
        assert_eq!(super::text(&rows), text);
    }

    #[test]
    fn bad_rows_are_named() {
        let row = |subject: &str, more: &str| {
            format!(
                "{{\"question\": \"q\", \"choices\": [\"1\",\"2\",\"3\",\"4\"], \"answer\": 1, \"subject\": {subject}{more}}}"
            )
        };
        for (text, expected) in [
            (row("\"anatomy\"", ""), "line 1: has no split"),
            (row("\"anatomy\"", ", \"split\": \"train\""), "split is \"train\", expected dev"),
            (row("\"anatomi\"", ", \"split\": \"dev\""), "none of MMLU's 57: did you mean anatomy?"),
            (row("\"xyz\"", ", \"split\": \"dev\""), "none of MMLU's 57: name its domain"),
            (row("\"../a\"", ", \"split\": \"dev\", \"domains\": [\"x\"]"), "subject is \"../a\""),
            (row("\"a\"", ", \"split\": \"dev\", \"domains\": [\"\"]"), "domain is \"\""),
            (row("null", ", \"split\": \"dev\""), "has no subject"),
            (
                "{\"prompt\": \"p\", \"continuations\": [\"a\",\"b\"], \"answer\": 0, \"split\": \"dev\"}"
                    .into(),
                "is a prompt",
            ),
            (
                format!("{0}\n{0}", row("\"anatomy\"", ", \"split\": \"dev\", \"id\": 4")),
                "line 2: id \"4\" stands in line 1 too",
            ),
            (String::new(), "has no rows"),
        ] {
            let err = read(&text).unwrap_err().to_string();
            assert!(err.contains(expected), "{text}: {err}");
        }
    }
}
