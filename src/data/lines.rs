//! Files of lines: JSON objects one a line, or plain text.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::checkpoint::digest::HashedFile;
use crate::checkpoint::{bytes, json};
use crate::error::{Error, Result};

/// Whether the file's name says that it holds a JSON object a line: `.jsonl`, `.ndjson` or `.json`.
pub fn is_jsonl(path: &Path) -> bool {
    path.extension().is_some_and(|e| ["jsonl", "ndjson", "json"].iter().any(|x| e.eq_ignore_ascii_case(x)))
}

/// All of the file at `path`, which is UTF-8, without a byte-order mark.
pub fn read_text(path: &Path) -> Result<String> {
    let (mut file, len) = bytes::open(path)?;
    let mut bytes = Vec::new();
    if usize::try_from(len).ok().is_none_or(|n| bytes.try_reserve_exact(n).is_err()) {
        return Err(Error::file(path, format!("has {len} bytes, for which there is no memory")));
    }
    file.read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.starts_with("\u{feff}".as_bytes()) {
        bytes.drain(.."\u{feff}".len());
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = e.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count() + 1;
        let byte = e.as_bytes()[at];
        Error::file(
            path,
            format!(
                "line {line}: byte {byte:#04x} is not UTF-8 (`iconv -f latin1 -t utf-8` converts Latin-1 text)"
            ),
        )
    })
}

/// The lines of `text` that are not blank, with their numbers from 1.
pub fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim().is_empty())
}

/// The JSON object in one line.
pub fn object(line: &str) -> Result<Map<String, Value>, String> {
    match json::parse_line(line.as_bytes()) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(format!("is {}, expected a JSON object", json::kind(&other))),
        // The parser counts lines within what it was given.
        Err(e) => Err(format!("is no JSON object: {e}").replace(" at line 1 column ", " at column ")),
    }
}

/// A line of compact JSON for each of `objects`.
pub fn of_objects(objects: impl IntoIterator<Item = Map<String, Value>>) -> String {
    objects.into_iter().map(|map| Value::Object(map).to_string() + "\n").collect()
}

/// The string under `key`; an error says what stands there instead.
pub fn string(map: &Map<String, Value>, key: &str) -> Result<String, String> {
    match map.get(key) {
        Some(Value::String(s)) => Ok(s.clone()),
        Some(other) => Err(format!("{key} is {}, expected a string", json::kind(other))),
        None => Err(format!("has no {key}")),
    }
}

/// Writes a JSON object a line to the file at `path`, durably; gives its SHA-256.
pub fn write<T: Serialize>(path: &Path, objects: impl IntoIterator<Item = T>) -> Result<String> {
    let mut file = HashedFile::create(path)?;
    for object in objects {
        file.put(&json::line(path, &object)?)?;
    }
    file.finish()
}

/// What parts documents in plain text whose author says so.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The documents in plain text, as byte ranges without the white space around them.
///
/// Where `<|endoftext|>` occurs it alone parts documents, so that they may have paragraphs; else blank lines do.
pub fn plain_documents(text: &str) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    if text.contains(END_OF_TEXT) {
        let mut start = 0;
        for piece in text.split(END_OF_TEXT) {
            parts.push(start..start + piece.len());
            start += piece.len() + END_OF_TEXT.len();
        }
    } else {
        let (mut start, mut at) = (0, 0);
        for line in text.split_inclusive('\n') {
            if line.trim().is_empty() {
                parts.push(start..at);
                start = at + line.len();
            }
            at += line.len();
        }
        parts.push(start..at);
    }
    parts
        .into_iter()
        .map(|r| {
            let piece = &text[r.clone()];
            let start = r.start + (piece.len() - piece.trim_start().len());
            start..(r.start + piece.trim_end().len()).max(start)
        })
        .filter(|r| !r.is_empty())
        .collect()
}

/// The number, from 1, of the line that each of the ascending `places` (bytes) of `text` is in.
pub fn lines_of(text: &str, places: impl IntoIterator<Item = usize>) -> impl Iterator<Item = usize> {
    let (mut line, mut from) = (1, 0);
    places.into_iter().map(move |at| {
        line += text.as_bytes()[from..at].iter().filter(|&&b| b == b'\n').count();
        from = at;
        line
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(text: &str) -> Vec<&str> {
        plain_documents(text).into_iter().map(|r| &text[r]).collect()
    }

    #[test]
    fn plain_text_is_parted_by_blank_lines_or_by_the_mark() {
        assert_eq!(parts("a\nb\n\n \nc\r\n\r\nd"), ["a\nb", "c", "d"]);
        assert_eq!(parts("\na\n\nb\n<|endoftext|>\nc<|endoftext|>"), ["a\n\nb", "c"]);
        assert_eq!(parts(" \n\n"), Vec::<&str>::new());
        assert_eq!(lines_of("a\nb\nc", [0, 2, 2, 4]).collect::<Vec<_>>(), [1, 2, 2, 3]);
    }

    #[test]
    fn lines_say_what_is_wrong_with_them() {
        let all: Vec<_> = numbered("{}\n\n  \n{\"a\": 1}\r\n").collect();
        assert_eq!(all, [(1, "{}"), (4, "{\"a\": 1}")]);
        assert_eq!(object("[1]").unwrap_err(), "is an array, expected a JSON object");
        let err = object("{\"a\": }").unwrap_err();
        assert!(err.starts_with("is no JSON object: ") && err.ends_with("at column 7"), "{err}");
        assert!(object("{\"a\":1,\"a\":2}").unwrap_err().contains("twice"));
        let map = object("{\"a\": 3}").unwrap();
        assert_eq!(string(&map, "a").unwrap_err(), "a is 3, expected a string");
        assert_eq!(string(&map, "b").unwrap_err(), "has no b");
    }

    #[test]
    fn bytes_that_are_no_text_are_named_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.txt");
        std::fs::write(&path, b"a\nb\n\xff").unwrap();
        assert!(read_text(&path).unwrap_err().to_string().contains("line 3: byte 0xff is not UTF-8"));
        assert!(read_text(dir.path()).is_err());
        std::fs::write(&path, "\u{feff}a\u{feff}").unwrap();
        assert_eq!(read_text(&path).unwrap(), "a\u{feff}", "a byte-order mark is no text");
    }

    proptest! {
        #[test]
        fn documents_hold_all_that_is_not_white_space(text in "(a|b| |\n|\r\n|<\\|endoftext\\|>|é)*") {
            let kept: String = parts(&text).concat();
            let squeeze = |s: &str| s.replace(END_OF_TEXT, "").split_whitespace().collect::<String>();
            prop_assert_eq!(squeeze(&kept), squeeze(&text));
            prop_assert!(parts(&text).iter().all(|p| !p.is_empty() && p.trim() == *p));
        }

        #[test]
        fn any_line_is_read_or_refused(line in ".*") {
            let _ = object(&line);
        }
    }
}
