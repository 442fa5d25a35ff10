//! What a reviewer decided: a file that only grows, a line a decision, durable before it counts.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{json, place};
use crate::data::cross::item::{Item, Written};
use crate::data::tasks::LETTERS;
use crate::error::{Error, Result};

/// The folder, in that of the items, that holds a file for each reviewer.
pub const REVIEWS: &str = "reviews";

/// Why an item is no good: what MMLU-CD's human verification removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The question does not hold together.
    Incoherent,
    /// One domain's knowledge suffices.
    SingleDomain,
    /// The option that is marked is not the right one, or not the only one.
    WrongAnswer,
}

impl Reason {
    /// All of them, in the order in which they are offered.
    pub const ALL: [Reason; 3] = [Reason::Incoherent, Reason::SingleDomain, Reason::WrongAnswer];

    /// As people read it.
    pub fn label(self) -> &'static str {
        match self {
            Reason::Incoherent => "incoherent",
            Reason::SingleDomain => "one domain suffices",
            Reason::WrongAnswer => "wrong answer",
        }
    }
}

/// What a reviewer says about an item.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// Good as it is.
    Accept,
    /// Good as it now reads.
    Edit {
        /// What is asked.
        question: String,
        /// A, B, C, D.
        choices: [String; 4],
        /// The right one, from 0.
        answer: usize,
    },
    /// No good.
    Reject {
        /// Why.
        reason: Reason,
    },
    /// The decision before is taken back.
    Undo,
}

/// How each line of a reviewer's file begins.
const BEGINS: &str = "{\"item\":";

/// A line of a reviewer's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The item's id.
    pub item: String,
    /// SHA-256 of what was seen ([`Written::sha256`]): a decision about another text is none about this one.
    pub sha256: String,
    /// What was decided.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// The last verdict on each item, by its place among the items.
pub type Verdicts = HashMap<usize, Verdict>;

/// One reviewer's file, open and locked.
#[derive(Debug)]
pub struct Decisions {
    path: PathBuf,
    file: File,
    verdicts: Verdicts,
}

/// Whether `reviewer` can be the name of a file in [`REVIEWS`].
pub fn check_name(reviewer: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    if reviewer.is_empty() || reviewer.len() > 64 || !reviewer.chars().all(plain) {
        let why = format!("--reviewer is {reviewer:?}, expected up to 64 letters, digits, - and _");
        return Err(Error::Usage(why));
    }
    Ok(())
}

/// The reviewers' files of the items' folder `dir`, by name, sorted.
pub fn reviewers(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let folder = dir.join(REVIEWS);
    let mut found = Vec::new();
    if !folder.exists() {
        return Ok(found);
    }
    for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
        let path = entry.map_err(Error::io(&folder))?.path();
        if path.extension().is_some_and(|e| e == "jsonl")
            && let Some(name) = path.file_stem().and_then(|s| s.to_str())
        {
            found.push((name.to_string(), path));
        }
    }
    found.sort();
    Ok(found)
}

/// What the file at `path` says about `items`, and how many of its decisions are about other texts.
pub fn read(path: &Path, items: &[Item]) -> Result<(Verdicts, usize)> {
    let text = json::read_bounded(path)?;
    let (verdicts, stale, _) = parse(path, &text, items)?;
    Ok((verdicts, stale))
}

/// The verdicts in `text`, the decisions about other texts, and where the last whole line ends.
fn parse(path: &Path, text: &[u8], items: &[Item]) -> Result<(Verdicts, usize, usize)> {
    let places: HashMap<&str, usize> = items.iter().enumerate().map(|(n, i)| (i.id.as_str(), n)).collect();
    let (mut verdicts, mut stale, mut end) = (Verdicts::new(), 0, 0);
    for (n, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
        if !line.ends_with(b"\n") {
            break;
        }
        let none = |why: String| Error::file(path, format!("line {}: is no decision: {why}", n + 1));
        let decision: Decision =
            json::parse_line(line).and_then(serde_json::from_value).map_err(|e| none(e.to_string()))?;
        if let Some(written) = edited(&decision.verdict) {
            check(&written).map_err(none)?;
        }
        end += line.len();
        let place = places.get(decision.item.as_str());
        match place.filter(|&&at| items[at].written.sha256() == decision.sha256) {
            Some(&at) if decision.verdict == Verdict::Undo => drop(verdicts.remove(&at)),
            Some(&at) => drop(verdicts.insert(at, decision.verdict)),
            None => stale += 1,
        }
    }
    Ok((verdicts, stale, end))
}

impl Decisions {
    /// Opens the file of `reviewer` in the folder `dir` of `items`, made if it is not there, behind its last whole line.
    ///
    /// It is an error if the name is no plain file name, another session has the file open, or a line is no decision.
    pub fn open(dir: &Path, reviewer: &str, items: &[Item]) -> Result<Decisions> {
        check_name(reviewer)?;
        let folder = dir.join(REVIEWS);
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let path = folder.join(format!("{reviewer}.jsonl"));
        // A link from somebody's folder could name any file of the reviewer's.
        let open = File::options()
            .create(true)
            .read(true)
            .append(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path);
        if path.is_symlink() {
            return Err(Error::file(&path, "is a link, expected a file: name another --reviewer"));
        }
        let file = open.map_err(Error::io(&path))?;
        if !place::lock(&file, &path)? {
            return Err(Error::Usage(format!(
                "{} is open in another review: give each person a --reviewer of their own",
                path.display()
            )));
        }
        place::sync_dir(&folder)?;
        let text = json::read_bounded(&path)?;
        let (verdicts, _, end) = parse(&path, &text, items)?;
        if end < text.len() {
            let (torn, begins) = (&text[end..], BEGINS.as_bytes());
            if !torn.starts_with(begins) && !begins.starts_with(torn) {
                return Err(Error::file(
                    &path,
                    "ends with text that is no decision: name another --reviewer",
                ));
            }
            file.set_len(end as u64).map_err(Error::io(&path))?;
        }
        Ok(Decisions { path, file, verdicts })
    }

    /// Takes a decision about `items`; it counts when it is on the disk. An error says why it is none.
    pub fn decide(&mut self, items: &[Item], decision: &Decision) -> Result<std::result::Result<(), String>> {
        let Some(at) = items.iter().position(|i| i.id == decision.item) else {
            return Ok(Err(format!("there is no item {:?}", decision.item)));
        };
        if items[at].written.sha256() != decision.sha256 {
            return Ok(Err(format!("item {:?} has another text: load the page anew", decision.item)));
        }
        if let Some(written) = edited(&decision.verdict)
            && let Err(why) = check(&written)
        {
            return Ok(Err(why));
        }
        let line = json::line(&self.path, decision)?;
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.map_err(Error::io(&self.path))?;
        match &decision.verdict {
            Verdict::Undo => drop(self.verdicts.remove(&at)),
            verdict => drop(self.verdicts.insert(at, verdict.clone())),
        }
        Ok(Ok(()))
    }

    /// The last verdict on each item.
    pub fn verdicts(&self) -> &Verdicts {
        &self.verdicts
    }
}

/// The text that an edit gives an item.
pub fn edited(verdict: &Verdict) -> Option<Written> {
    match verdict {
        Verdict::Edit { question, choices, answer } => {
            Some(Written { question: question.clone(), choices: choices.clone(), answer: *answer })
        }
        Verdict::Accept | Verdict::Reject { .. } | Verdict::Undo => None,
    }
}

/// Whether an edited text is a question with four different options, one of them right.
fn check(written: &Written) -> std::result::Result<(), String> {
    if written.question.trim().is_empty() {
        return Err("the question is empty".into());
    }
    for (n, choice) in written.choices.iter().enumerate() {
        if choice.trim().is_empty() {
            return Err(format!("option {} is empty", LETTERS[n]));
        }
        if written.choices[..n].iter().any(|c| c.trim() == choice.trim()) {
            return Err(format!("the option {choice:?} stands there twice"));
        }
    }
    if written.answer > 3 {
        return Err(format!("the answer is {}, expected 0 to 3", written.answer));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::super::cross::sources::tests::pool;
    use super::*;

    /// `count` items of two domains.
    pub(crate) fn items(count: usize) -> Vec<Item> {
        let (a, b) = (pool("law", count), pool("biology", count));
        let item = |n: usize| Item {
            id: format!("law-biology/{n}"),
            written: Written {
                question: format!("Question {n}?"),
                choices: ["one", "two", "three", "four"].map(|s| format!("{s} {n}")),
                answer: n % 4,
            },
            domains: ["law".into(), "biology".into()],
            explanation: None,
            knowledge: ["k".into(), "l".into()],
            sources: [a.sources[n].clone(), b.sources[n].clone()],
            model: "m".into(),
            prompts_sha256: "p".into(),
            calls: Vec::new(),
        };
        (0..count).map(item).collect()
    }

    pub(crate) fn decision(item: &Item, verdict: Verdict) -> Decision {
        Decision { item: item.id.clone(), sha256: item.written.sha256(), verdict }
    }

    const REJECT: Verdict = Verdict::Reject { reason: Reason::SingleDomain };

    #[test]
    fn decisions_are_lines_that_outlive_a_torn_end() {
        let dir = tempfile::tempdir().unwrap();
        let items = items(4);
        let edit = Verdict::Edit {
            question: "Better?".into(),
            choices: ["w", "x", "y", "z"].map(String::from),
            answer: 3,
        };
        let mut open = Decisions::open(dir.path(), "ann", &items).unwrap();
        for (n, verdict) in
            [(0, Verdict::Accept), (1, REJECT), (2, edit.clone()), (1, Verdict::Accept), (0, Verdict::Undo)]
        {
            open.decide(&items, &decision(&items[n], verdict)).unwrap().unwrap();
        }
        let expected = Verdicts::from([(1, Verdict::Accept), (2, edit)]);
        assert_eq!(open.verdicts(), &expected);
        let busy = Decisions::open(dir.path(), "ann", &items).unwrap_err().to_string();
        assert!(busy.contains("open in another review"), "{busy}");
        drop(open);
        let path = dir.path().join(REVIEWS).join("ann.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        let first = format!(
            "{{\"item\":\"law-biology/0\",\"sha256\":\"{}\",\"verdict\":\"accept\"}}",
            items[0].written.sha256()
        );
        assert_eq!(text.lines().next(), Some(first.as_str()));
        assert!(text.contains("\"verdict\":\"reject\",\"reason\":\"single-domain\"}"), "{text}");
        std::fs::write(&path, text.clone() + "{\"item\":\"law-bio").unwrap();
        let mut open = Decisions::open(dir.path(), "ann", &items).unwrap();
        assert_eq!(open.verdicts(), &expected);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        open.decide(&items, &decision(&items[3], REJECT)).unwrap().unwrap();
        drop(open);
        assert_eq!(read(&path, &items).unwrap().0.len(), 3);
        assert_eq!(reviewers(dir.path()).unwrap(), [("ann".to_string(), path.clone())]);
        let outside = text.replace("\"answer\":3", "\"answer\":4");
        for (text, expected) in [
            (text + "{}\n", "line 6: is no decision: missing field"),
            (outside, "line 3: is no decision: the answer is 4"),
        ] {
            std::fs::write(&path, text).unwrap();
            let err = read(&path, &items).unwrap_err().to_string();
            assert!(err.contains(expected), "{err}");
        }
    }

    #[test]
    fn what_is_no_review_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (items, secret) = (items(1), dir.path().join("secret"));
        std::fs::create_dir(dir.path().join(REVIEWS)).unwrap();
        let path = dir.path().join(REVIEWS).join("ann.jsonl");
        let refused = || Decisions::open(dir.path(), "ann", &items).unwrap_err().to_string();
        std::fs::write(&path, "token").unwrap();
        assert!(refused().contains("is no decision"));
        assert_eq!(std::fs::read(&path).unwrap(), b"token");
        std::fs::rename(&path, &secret).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        assert!(refused().contains("is a link"));
        assert_eq!(std::fs::read(&secret).unwrap(), b"token");
        std::fs::remove_file(&secret).unwrap();
        assert!(refused().contains("is a link"));
        assert!(!secret.exists());
    }

    #[test]
    fn a_decision_holds_for_the_text_that_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut items = items(2);
        let mut open = Decisions::open(dir.path(), "ann", &items).unwrap();
        let seen = decision(&items[0], Verdict::Accept);
        open.decide(&items, &seen).unwrap().unwrap();
        items[0].written.answer += 1;
        assert!(open.decide(&items, &seen).unwrap().unwrap_err().contains("has another text"));
        let path = dir.path().join(REVIEWS).join("ann.jsonl");
        assert_eq!(read(&path, &items).unwrap(), (Verdicts::new(), 1));
    }

    #[test]
    fn what_is_no_decision_is_refused_and_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let items = items(1);
        let mut open = Decisions::open(dir.path(), "ann", &items).unwrap();
        let edit = |question: &str, last: &str, answer: usize| Verdict::Edit {
            question: question.into(),
            choices: ["w", "x", "y", last].map(String::from),
            answer,
        };
        for (verdict, expected) in [
            (edit(" ", "z", 0), "the question is empty"),
            (edit("q", "", 0), "option D is empty"),
            (edit("q", "x ", 0), "stands there twice"),
            (edit("q", "z", 4), "the answer is 4"),
        ] {
            let why = open.decide(&items, &decision(&items[0], verdict)).unwrap().unwrap_err();
            assert!(why.contains(expected), "{why}");
        }
        let mut other = decision(&items[0], Verdict::Accept);
        other.item = "x".into();
        assert!(open.decide(&items, &other).unwrap().unwrap_err().contains("no item \"x\""));
        assert_eq!(std::fs::metadata(dir.path().join(REVIEWS).join("ann.jsonl")).unwrap().len(), 0);
        for name in ["", "../x", "a/b", "ann.b", &"x".repeat(65)] {
            assert!(
                Decisions::open(dir.path(), name, &items).unwrap_err().to_string().contains("--reviewer is")
            );
        }
    }
}
