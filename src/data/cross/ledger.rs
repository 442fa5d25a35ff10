//! What was asked and answered: a file that only grows, a line an answer, by the hash of what was asked.
//!
//! It is written to before an answer is used, so that what was paid for is not asked again, by the run that goes on
//! after a kill or by any other that names the same file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::prompts::Stage;
use crate::checkpoint::{json, place};
use crate::error::{Error, Result};

const FORMAT: &str = "anabranch-ledger/1";
/// How long answers may lie in the system's buffers. A kill loses nothing of them, a power cut does.
const SYNC: Duration = Duration::from_secs(1);

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// What the model said.
    Said {
        /// As it came, thinking in it included.
        content: String,
        /// What it thought, where the endpoint parts that from the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reasoning: Option<String>,
        /// Why it ended: `stop`, `length`, …
        #[serde(default, skip_serializing_if = "Option::is_none")]
        finish: Option<String>,
        /// Tokens of the prompt and the answer.
        tokens: u64,
    },
    /// Why the endpoint will never answer this.
    Refused(String),
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// SHA-256 of the request.
    prompt_sha256: String,
    stage: Stage,
    model: String,
    /// Requests that it took, those included that failed.
    requests: u64,
    answer: Answer,
}

#[derive(Debug, Serialize)]
struct Head {
    format: &'static str,
}

/// A ledger, open and locked.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    /// Where the last whole line ends, and whether there is more behind it that was not written to its end.
    end: u64,
    torn: bool,
    answers: HashMap<String, Answer>,
    synced: Instant,
    /// Requests and tokens of all lines.
    spent: (u64, u64),
}

impl Ledger {
    /// Opens the ledger at `path`, which is made if it is not there, behind its last whole line: one that was torn by
    /// the end of a run is cut off.
    ///
    /// It is an error if the file is no ledger, a line before the last is none of a ledger, or another run has it open.
    pub fn open(path: &Path) -> Result<Ledger> {
        let mut file =
            File::options().create(true).read(true).append(true).open(path).map_err(Error::io(path))?;
        if !place::lock(&file, path)? {
            return Err(Error::Usage(format!("another run is writing the ledger {}", path.display())));
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(Error::io(path))?;
        let mut ledger = Ledger {
            path: path.to_path_buf(),
            file,
            end: 0,
            torn: false,
            answers: HashMap::new(),
            synced: Instant::now(),
            spent: (0, 0),
        };
        let whole = ledger.take(&text)?;
        (ledger.end, ledger.torn) = (whole as u64, whole < text.len());
        ledger.mend()?;
        if whole == 0 {
            ledger.append(&Head { format: FORMAT })?;
            place::sync_dir(place::parent(path))?;
        }
        Ok(ledger)
    }

    /// Takes the answers in `text`; gives where its last whole line ends.
    fn take(&mut self, text: &[u8]) -> Result<usize> {
        let head = format!("{{\"format\":\"{FORMAT}\"}}\n");
        // A head that was torn is no line yet.
        if text.len() < head.len() && head.as_bytes().starts_with(text) {
            return Ok(0);
        }
        if !text.starts_with(head.as_bytes()) {
            let why = format!("is no ledger, whose first line is {}: name another file", head.trim_end());
            return Err(Error::file(&self.path, why));
        }
        let mut end = head.len();
        for (n, line) in text[end..].split_inclusive(|b| *b == b'\n').enumerate() {
            let torn = !line.ends_with(b"\n");
            let parsed = json::parse_line(line).and_then(serde_json::from_value::<Line>);
            match parsed {
                Ok(parsed) if !torn => self.note(parsed),
                Err(e) if end + line.len() < text.len() => {
                    let why = format!("line {} is none of a ledger: {e}", n + 2);
                    return Err(Error::file(&self.path, why));
                }
                // The last line; after a power cut it may be of any bytes.
                _ => break,
            }
            end += line.len();
        }
        Ok(end)
    }

    /// The first answer to a request is the one that counts.
    fn note(&mut self, line: Line) {
        self.spent.0 = self.spent.0.saturating_add(line.requests);
        if let Answer::Said { tokens, .. } = &line.answer {
            self.spent.1 = self.spent.1.saturating_add(*tokens);
        }
        self.answers.entry(line.prompt_sha256).or_insert(line.answer);
    }

    /// Cuts off what was not written to its end, behind which no line may stand.
    fn mend(&mut self) -> Result<()> {
        if self.torn {
            self.file.set_len(self.end).map_err(Error::io(&self.path))?;
            self.torn = false;
        }
        Ok(())
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        self.mend()?;
        let line = json::line(&self.path, line)?;
        self.torn = true;
        self.file.write_all(&line).map_err(Error::io(&self.path))?;
        (self.end, self.torn) = (self.end + line.len() as u64, false);
        if self.synced.elapsed() >= SYNC {
            self.sync()?;
        }
        Ok(())
    }

    /// Makes all answers durable.
    pub fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        self.file.sync_data().map_err(Error::io(&self.path))
    }

    /// The answer to the request with this hash.
    pub fn get(&self, prompt_sha256: &str) -> Option<&Answer> {
        self.answers.get(prompt_sha256)
    }

    /// Writes an answer down; gives the one that counts, the first to that request.
    pub fn record(
        &mut self,
        prompt_sha256: &str,
        stage: Stage,
        model: &str,
        requests: u64,
        answer: Answer,
    ) -> Result<Answer> {
        let (prompt_sha256, model) = (prompt_sha256.to_string(), model.to_string());
        let line = Line { prompt_sha256, stage, model, requests, answer };
        self.append(&line)?;
        let key = line.prompt_sha256.clone();
        self.note(line);
        Ok(self.answers[&key].clone())
    }

    /// Requests and tokens of all answers.
    pub fn spent(&self) -> (u64, u64) {
        self.spent
    }

    /// How many different requests have an answer.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether nothing was answered.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Answer {
        Answer::Said { content: text.into(), reasoning: None, finish: Some("stop".into()), tokens: 7 }
    }

    #[test]
    fn answers_outlive_a_torn_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l.jsonl");
        let mut ledger = Ledger::open(&path).unwrap();
        for (key, text) in [("a", "one"), ("b", "two"), ("a", "other")] {
            let counts = ledger.record(key, Stage::Question, "m", 2, said(text)).unwrap();
            assert_eq!(counts, said(if key == "a" { "one" } else { "two" }));
        }
        let refused = Answer::Refused("too long".into());
        ledger.record("c", Stage::Alone, "m", 1, refused.clone()).unwrap();
        assert!(Ledger::open(&path).unwrap_err().to_string().contains("another run is writing"));
        drop(ledger);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut ledger = Ledger::open(&path).unwrap();
            let lines = whole[..cut].iter().filter(|&&b| b == b'\n').count().saturating_sub(1);
            assert_eq!(ledger.spent().0, [0, 2, 4, 6, 7][lines], "{cut}");
            ledger.record("z", Stage::Mergeability, "m", 1, said("after")).unwrap();
            drop(ledger);
            let again = Ledger::open(&path).unwrap();
            assert_eq!(again.get("z"), Some(&said("after")), "{cut}");
            assert_eq!(again.get("c").is_some(), lines == 4);
        }
        std::fs::write(&path, [&whole[..], b"\0\0\0\n"].concat()).unwrap();
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!((ledger.len(), ledger.spent()), (3, (7, 21)));
        assert_eq!(ledger.get("c"), Some(&refused));
    }

    #[test]
    fn no_line_follows_one_that_could_not_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l.jsonl");
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.record("a", Stage::Question, "m", 1, said("one")).unwrap();
        // A full disk takes a part of a line and then nothing.
        let file = std::mem::replace(&mut ledger.file, File::open(&path).unwrap());
        assert!(ledger.record("b", Stage::Question, "m", 1, said("two")).is_err());
        (&file).write_all(b"{\"prompt_sha").unwrap();
        assert!(ledger.record("c", Stage::Question, "m", 1, said("three")).is_err());
        ledger.file = file;
        ledger.record("d", Stage::Question, "m", 1, said("four")).unwrap();
        drop(ledger);
        let again = Ledger::open(&path).unwrap();
        assert_eq!((again.len(), again.get("d")), (2, Some(&said("four"))));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l.jsonl");
        for (text, expected) in [
            ("my notes", "is no ledger"),
            ("{\"format\":\"anabranch-ledger/2\"}\n", "is no ledger"),
            ("{\"format\":\"anabranch-ledger/1\"}\n{}\n{}\n", "line 2 is none of a ledger: missing field"),
        ] {
            std::fs::write(&path, text).unwrap();
            let err = Ledger::open(&path).unwrap_err().to_string();
            assert!(err.contains(expected), "{text}: {err}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
