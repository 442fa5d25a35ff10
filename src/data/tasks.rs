//! Multiple-choice tasks: MMLU's CSV files, and JSON lines with questions or with prompts to continue.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::lines;
use crate::checkpoint::json;
use crate::error::{Error, Result};

/// The options of a question.
pub const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// A file of items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The file's name without its extension.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// At least one.
    pub items: Vec<Item>,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// As the file says, else the item's number in it, from 0. No two items of a file share one.
    pub id: String,
    /// What the question is about, with underscores; the subset that its result counts for.
    pub subject: Option<String>,
    /// The domains whose facts it needs.
    pub domains: Vec<String>,
    /// What is asked.
    pub form: Form,
    /// The right option, from 0.
    pub gold: usize,
}

/// What an item asks, and how its options are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Put into the template; the letters are scored.
    Question {
        /// As it stands in the file.
        question: String,
        /// A, B, C, D.
        choices: [String; 4],
    },
    /// Taken as it stands; the continuations are scored.
    Prompt {
        /// The text before.
        prompt: String,
        /// Two or more.
        continuations: Vec<String>,
    },
}

impl Item {
    /// The item as a task's line has it: `id`, `subject` and `domains` where it has such, `question`, `choices` and
    /// `answer`, or `prompt`, `continuations` and `answer`.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut map = self.document();
        if !self.domains.is_empty() {
            map.insert("domains".into(), self.domains.clone().into());
        }
        map
    }

    /// What of the item is asked and answered: [`Item::to_json`] without the domains. Every item of one subject has the
    /// same keys, as the columns of a table do.
    pub fn document(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), self.id.clone().into());
        if let Some(subject) = &self.subject {
            map.insert("subject".into(), subject.clone().into());
        }
        match &self.form {
            Form::Question { question, choices } => {
                map.insert("question".into(), question.clone().into());
                map.insert("choices".into(), choices.to_vec().into());
            }
            Form::Prompt { prompt, continuations } => {
                map.insert("prompt".into(), prompt.clone().into());
                map.insert("continuations".into(), continuations.clone().into());
            }
        }
        map.insert("answer".into(), self.gold.into());
        map
    }
}

impl Form {
    /// A question, unless it is empty or an option is.
    pub fn question(question: String, choices: [String; 4]) -> Result<Form, String> {
        if question.trim().is_empty() {
            return Err("the question is empty".into());
        }
        if let Some((letter, _)) = LETTERS.iter().zip(&choices).find(|(_, c)| c.trim().is_empty()) {
            return Err(format!("option {letter} is empty"));
        }
        Ok(Form::Question { question, choices })
    }

    /// How many options there are.
    pub fn options(&self) -> usize {
        match self {
            Form::Question { choices, .. } => choices.len(),
            Form::Prompt { continuations, .. } => continuations.len(),
        }
    }
}

/// Reads a task: a `.csv` file in MMLU's layout (no header; question, A, B, C, D, letter; the subject is the file's
/// name without `_dev`, `_val` or `_test`), else a JSON object a line: `question`, `choices` (4), `answer` (0..3 or a
/// letter), optional `id`, `subject`, `domains`; or `prompt`, `continuations` (2 or more), `answer`.
///
/// Anything else, and a file without items, is an error with file and line.
pub fn load(path: &Path) -> Result<Task> {
    let text = lines::read_text(path)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let csv = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv"));
    let numbered = if csv { csv_items(path, &text, &name)? } else { json_items(path, &text)? };
    let mut lines_of = HashMap::new();
    for (line, item) in &numbered {
        if let Some(first) = lines_of.insert(item.id.as_str(), *line) {
            return Err(at(path, *line, &format!("id {:?} stands in line {first} too", item.id)));
        }
    }
    if numbered.is_empty() {
        return Err(Error::file(path, "has no items"));
    }
    let items = numbered.into_iter().map(|(_, item)| item).collect();
    Ok(Task { name, path: path.to_path_buf(), items })
}

/// The subject of an MMLU file's name: without the split.
pub fn subject_of(name: &str) -> &str {
    ["_dev", "_val", "_validation", "_test"].iter().find_map(|split| name.strip_suffix(split)).unwrap_or(name)
}

fn at(path: &Path, line: usize, why: &str) -> Error {
    Error::file(path, format!("line {line}: {why}"))
}

fn csv_items(path: &Path, text: &str, name: &str) -> Result<Vec<(usize, Item)>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut items = Vec::new();
    for (number, record) in reader.records().enumerate() {
        let record = record.map_err(|e| Error::file(path, e.to_string()))?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        let fields: Vec<&str> = record.iter().collect();
        let [question, a, b, c, d, letter] = fields[..] else {
            let why = "expected 6 (question, A, B, C, D, letter)";
            return Err(at(path, line, &format!("has {} columns, {why}", fields.len())));
        };
        let gold = letter_index(letter, 4).ok_or_else(|| {
            at(path, line, &format!("the answer is {letter:?}, expected A, B, C or D (and no header line)"))
        })?;
        let choices = [a, b, c, d].map(str::to_string);
        let form = Form::question(question.to_string(), choices).map_err(|why| at(path, line, &why))?;
        let subject = Some(subject_of(name).to_string());
        items.push((line, Item { id: number.to_string(), subject, domains: Vec::new(), form, gold }));
    }
    Ok(items)
}

/// A question as a record of a `.csv` file; none of a prompt.
pub fn csv_record(item: &Item) -> Option<[&str; 6]> {
    let Form::Question { question, choices: [a, b, c, d] } = &item.form else { return None };
    Some([question, a, b, c, d, LETTERS[item.gold]])
}

fn json_items(path: &Path, text: &str) -> Result<Vec<(usize, Item)>> {
    lines::numbered(text)
        .enumerate()
        .map(|(number, (line, text))| {
            let item = lines::object(text).and_then(|map| json_item(&map, number));
            Ok((line, item.map_err(|why| at(path, line, &why))?))
        })
        .collect()
}

/// The item that a line's object is; `number` is its id if it has none.
pub(super) fn json_item(map: &Map<String, Value>, number: usize) -> Result<Item, String> {
    let form = match (map.contains_key("question"), map.contains_key("prompt")) {
        (true, false) => {
            let choices = strings(map, "choices")?;
            let count = choices.len();
            let choices = choices.try_into().map_err(|_| format!("has {count} choices, expected 4"))?;
            Form::question(lines::string(map, "question")?, choices)?
        }
        (false, true) => {
            let continuations = strings(map, "continuations")?;
            if continuations.len() < 2 {
                return Err(format!("has {} continuations, expected 2 or more", continuations.len()));
            }
            Form::Prompt { prompt: lines::string(map, "prompt")?, continuations }
        }
        (true, true) => return Err("has both question and prompt".into()),
        (false, false) => return Err("has neither question nor prompt".into()),
    };
    let options = form.options();
    let gold = match map.get("answer") {
        Some(Value::Number(n)) => n.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n < options),
        Some(Value::String(s)) => letter_index(s, options),
        _ => None,
    };
    let gold = gold.ok_or_else(|| {
        let found = map.get("answer").map_or("missing".to_string(), json::kind);
        let last = char::from(b'A' + (options - 1).min(25) as u8);
        format!("answer is {found}, expected 0..{} or A..{last}", options - 1)
    })?;
    let id = match map.get("id") {
        None | Some(Value::Null) => number.to_string(),
        Some(Value::String(s)) => s.clone(),
        Some(Value::Number(n)) => n.to_string(),
        Some(other) => return Err(format!("id is {}, expected a string or a number", json::kind(other))),
    };
    let subject = match map.get("subject") {
        None | Some(Value::Null) => None,
        Some(_) => Some(lines::string(map, "subject")?),
    };
    let domains = match map.get("domains") {
        None | Some(Value::Null) => Vec::new(),
        Some(_) => strings(map, "domains")?,
    };
    Ok(Item { id, subject, domains, form, gold })
}

fn strings(map: &Map<String, Value>, key: &str) -> Result<Vec<String>, String> {
    let Some(Value::Array(list)) = map.get(key) else {
        let found = map.get(key).map_or("missing".to_string(), json::kind);
        return Err(format!("{key} is {found}, expected an array of strings"));
    };
    let one = |v: &Value| {
        v.as_str().map(str::to_string).ok_or_else(|| format!("{key} has {}, expected strings", json::kind(v)))
    };
    list.iter().map(one).collect()
}

/// A is 0, B is 1, …
fn letter_index(letter: &str, options: usize) -> Option<usize> {
    match letter.trim().as_bytes() {
        [c @ b'A'..=b'Z'] => Some(usize::from(c - b'A')).filter(|&i| i < options),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::fixture;

    fn read(name: &str, text: &str) -> Result<Task> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        load(&path)
    }

    #[test]
    fn mmlu_rows_with_quotes_and_line_breaks() {
        let task =
            read("high_school_x_test.csv", "\"Say \"\"hi\"\",\nnow?\",1,2,\"3,5\",4,C\nQ,a,b,c,d,A\r\n")
                .unwrap();
        assert_eq!(task.name, "high_school_x_test");
        assert_eq!(task.items.len(), 2);
        let first = &task.items[0];
        assert_eq!(
            (first.id.as_str(), first.subject.as_deref(), first.gold),
            ("0", Some("high_school_x"), 2)
        );
        let choices = ["1", "2", "3,5", "4"].map(String::from);
        assert_eq!(first.form, Form::Question { question: "Say \"hi\",\nnow?".into(), choices });
    }

    #[test]
    fn all_of_mmlu() {
        let Some(dir) = fixture::shared("mmlu") else { return };
        for (split, expected) in [("dev", 285), ("val", 1531), ("test", 14042)] {
            let mut rows = 0;
            for entry in std::fs::read_dir(dir.join(split)).unwrap() {
                rows += load(&entry.unwrap().path()).unwrap().items.len();
            }
            assert_eq!(rows, expected, "{split}");
        }
    }

    #[test]
    fn json_lines_of_both_forms() {
        let text = r#"{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 3, "id": 17, "subject": "s_t", "domains": ["x", "y"]}

{"question": "q", "choices": ["1", "2", "3", "4"], "answer": "B", "id": null}
{"prompt": "p", "continuations": [" a", " b c"], "answer": 1, "id": "z"}"#;
        let task = read("t.jsonl", text).unwrap();
        let ids: Vec<&str> = task.items.iter().map(|i| i.id.as_str()).collect();
        assert_eq!(ids, ["17", "1", "z"]);
        assert_eq!(task.items.iter().map(|i| i.gold).collect::<Vec<_>>(), [3, 1, 1]);
        assert_eq!(task.items[0].domains, ["x", "y"]);
        assert_eq!((task.items[0].subject.as_deref(), task.items[1].subject.as_deref()), (Some("s_t"), None));
        assert_eq!(task.items[2].form.options(), 2);
    }

    #[test]
    fn items_are_written_as_they_are_read() {
        let text = r#"{"id":"a","subject":"s_t","question":"q\"\n","choices":["1","2","3","4"],"answer":3,"domains":["x"]}
{"id":"b","question":"é","choices":["1","2","3","4"],"answer":0}
{"id":"c","prompt":"p ","continuations":[" a",""],"answer":1}
"#;
        let task = read("t.jsonl", text).unwrap();
        assert_eq!(lines::of_objects(task.items.iter().map(Item::to_json)), text);
        assert!(!task.items[0].document().contains_key("domains"));
    }

    #[test]
    fn bad_items_name_file_and_line() {
        for (name, text, expected) in [
            ("t.csv", "question,A,B,C,D,answer\nq,1,2,3,4,A\n", "line 1: the answer is \"answer\""),
            ("t.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", "line 2: the answer is \"E\""),
            ("t.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", "line 2: has 5 columns, expected 6"),
            ("t.csv", "q,1,2,3,4,A\n\" \n\",1,2,3,4,A\n", "line 2: the question is empty"),
            ("t.csv", "q,1,2,3,,A\n", "line 1: option D is empty"),
            ("t.csv", "", "has no items"),
            ("t.jsonl", "\n", "has no items"),
            ("t.jsonl", "{}\n", "line 1: has neither question nor prompt"),
            ("t.jsonl", "{\"prompt\": \"p\", \"question\": \"q\"}", "has both"),
            (
                "t.jsonl",
                "{\"question\": \"q\", \"choices\": [\"1\"], \"answer\": 0}",
                "has 1 choices, expected 4",
            ),
            (
                "t.jsonl",
                "{\"question\": \"\", \"choices\": [\"1\",\"2\",\"3\",\"4\"], \"answer\": 0}",
                "line 1: the question is empty",
            ),
            (
                "t.jsonl",
                "{\"question\": \"q\", \"choices\": [\"1\",\"2\",\"3\",4], \"answer\": 0}",
                "choices has 4",
            ),
            ("t.jsonl", "{\"question\": \"q\", \"choices\": \"1234\", \"answer\": 0}", "choices is \"1234\""),
            (
                "t.jsonl",
                "{\"question\": \"q\", \"choices\": [\"1\",\"2\",\"3\",\"4\"], \"answer\": 4}",
                "answer is 4, expected 0..3 or A..D",
            ),
            ("t.jsonl", "{\"question\": \"q\", \"choices\": [\"1\",\"2\",\"3\",\"4\"]}", "answer is missing"),
            (
                "t.jsonl",
                "{\"prompt\": \"p\", \"continuations\": [\"1\"], \"answer\": 0}",
                "has 1 continuations",
            ),
            (
                "t.jsonl",
                "{\"prompt\": \"p\", \"continuations\": [\"1\",\"2\"], \"answer\": -1}",
                "answer is -1",
            ),
            (
                "t.jsonl",
                "{\"prompt\":\"p\",\"continuations\":[\"1\",\"2\"],\"answer\":0,\"id\":1}\n{\"prompt\":\"p\",\"continuations\":[\"1\",\"2\"],\"answer\":0}",
                "line 2: id \"1\" stands in line 1 too",
            ),
        ] {
            let err = read(name, text).unwrap_err().to_string();
            assert!(err.contains(expected), "{text}: {err}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_file_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), csv: bool) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(if csv { "t.csv" } else { "t.jsonl" });
            std::fs::write(&path, bytes).unwrap();
            let _ = load(&path);
        }

        #[test]
        fn any_fields_are_read_or_refused(answer in "[A-Z0-9\\-\"]{0,3}", choices in "[\\[\\]\",a1]{0,12}") {
            let _ = read("t.jsonl", &format!("{{\"question\": \"q\", \"choices\": {choices}, \"answer\": {answer}}}"));
            let _ = read("t.csv", &format!("{choices},{answer}"));
        }
    }
}
