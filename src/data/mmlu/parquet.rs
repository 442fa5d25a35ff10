//! Rows of Hugging Face's parquet files: `question`, `subject`, `choices` (a list of four strings), `answer` (0..3).

use std::fs::File;
use std::path::Path;

use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use crate::checkpoint::bytes;
use crate::data::foreign;
use crate::data::tasks::{Form, Item};
use crate::error::{Error, Result};

const COLUMNS: [&str; 4] = ["question", "subject", "choices", "answer"];

/// The items of the file at `path` in their order, an item's number its id. Columns but the four are not looked at.
pub fn items(path: &Path) -> Result<Vec<Item>> {
    let (file, _) = bytes::open(path)?;
    let read = foreign::apart(move || read(file)).and_then(|items| items);
    read.map_err(|why| Error::file(path, why))
}

fn read(file: File) -> Result<Vec<Item>, String> {
    let reader = SerializedFileReader::new(file).map_err(|e| format!("is no parquet file: {e}"))?;
    let schema = reader.metadata().file_metadata().schema();
    let fields = COLUMNS.map(|name| schema.get_fields().iter().find(|f| f.name() == name).cloned());
    if let Some(missing) = fields.iter().position(Option::is_none) {
        let found: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
        return Err(format!(
            "has no column {}: found {}, expected {}",
            COLUMNS[missing],
            found.join(", "),
            COLUMNS.join(", ")
        ));
    }
    for column in reader.metadata().row_groups().iter().flat_map(|group| group.columns()) {
        match column.compression() {
            Compression::UNCOMPRESSED | Compression::SNAPPY => {}
            other => return Err(format!("is compressed as {other}, expected snappy or nothing")),
        }
    }
    let wanted = Type::group_type_builder(schema.name()).with_fields(fields.into_iter().flatten().collect());
    let wanted = wanted.build().map_err(|e| e.to_string())?;
    let rows = reader.get_row_iter(Some(wanted)).map_err(|e| e.to_string())?;
    rows.enumerate()
        .map(|(number, row)| {
            let item = row.map_err(|e| e.to_string()).and_then(|row| item(&row, number));
            item.map_err(|why| format!("row {number}: {why}"))
        })
        .collect()
}

fn item(row: &Row, number: usize) -> Result<Item, String> {
    let choices = match column(row, "choices")? {
        Field::ListInternal(list) => {
            list.elements().iter().map(|f| string("choices", f)).collect::<Result<Vec<_>, _>>()?
        }
        other => return Err(format!("choices is {other}, expected a list of strings")),
    };
    let count = choices.len();
    let choices = choices.try_into().map_err(|_| format!("has {count} choices, expected 4"))?;
    let answer = column(row, "answer")?;
    let gold = match *answer {
        Field::Long(n) => usize::try_from(n).ok(),
        Field::Int(n) => usize::try_from(n).ok(),
        Field::Short(n) => usize::try_from(n).ok(),
        Field::Byte(n) => usize::try_from(n).ok(),
        _ => None,
    };
    let gold = gold.filter(|&n| n < 4).ok_or_else(|| format!("answer is {answer}, expected 0..3"))?;
    Ok(Item {
        id: number.to_string(),
        subject: Some(string("subject", column(row, "subject")?)?),
        domains: Vec::new(),
        form: Form::question(string("question", column(row, "question")?)?, choices)?,
        gold,
    })
}

fn column<'a>(row: &'a Row, name: &str) -> Result<&'a Field, String> {
    let found = row.get_column_iter().find(|(n, _)| n.as_str() == name);
    found.map(|(_, field)| field).ok_or_else(|| format!("has no {name}"))
}

fn string(name: &str, field: &Field) -> Result<String, String> {
    match field {
        Field::Str(text) => Ok(text.clone()),
        other => Err(format!("{name} has {other}, expected a string")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> Result<Vec<Item>> {
        items(&Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mmlu")).join(name))
    }

    #[test]
    fn rows_as_hugging_face_writes_them() {
        let items = fixture("hub/anatomy/test-00000-of-00001.parquet").unwrap();
        assert_eq!(items.len(), 3);
        let first = &items[0];
        assert_eq!((first.id.as_str(), first.subject.as_deref(), first.gold), ("0", Some("anatomy"), 2));
        let choices = ["1", "2", "3,5", "é"].map(String::from);
        assert_eq!(first.form, Form::Question { question: "Say \"hi\",\nnow?".into(), choices });
    }

    #[test]
    fn other_files_are_refused_by_what_they_hold() {
        for (name, expected) in [
            (
                "columns.parquet",
                "has no column subject: found question, options, answer, expected question, subject",
            ),
            ("three.parquet", "row 1: has 3 choices, expected 4"),
            ("answer.parquet", "row 0: answer is 4, expected 0..3"),
            ("letters.parquet", "answer is \"A\", expected 0..3"),
            ("text.parquet", "choices is \"1 2 3 4\", expected a list of strings"),
            ("null.parquet", "question has null, expected a string"),
            ("empty.parquet", "row 0: the question is empty"),
            ("zstd.parquet", "is compressed as ZSTD"),
        ] {
            let err = fixture(&format!("bad/{name}")).unwrap_err().to_string();
            assert!(err.contains(name) && err.contains(expected), "{name}: {err}");
        }
    }

    #[test]
    fn a_file_that_is_cut_or_changed_is_read_or_refused() {
        let whole = std::fs::read(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/mmlu/hub/anatomy/test-00000-of-00001.parquet"
        ))
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.parquet");
        for end in (0..whole.len()).step_by(97) {
            std::fs::write(&path, &whole[..end]).unwrap();
            assert!(items(&path).is_err(), "{end} bytes");
        }
        for at in (0..whole.len()).step_by(7) {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            std::fs::write(&path, changed).unwrap();
            let _ = items(&path);
        }
    }
}
