//! The questions of one domain each that new ones are written from.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::data::tasks::{self, Form, Item, Task};
use crate::error::{Error, Result};

/// A question of one domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The name of the file that it stands in, without its extension.
    pub file: String,
    /// Its id there.
    pub id: String,
    /// The domain that it belongs to.
    pub domain: String,
    /// What it is about, with underscores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// What is asked.
    pub question: String,
    /// A, B, C, D.
    pub choices: [String; 4],
    /// The right one, from 0.
    pub answer: usize,
}

/// All questions of one domain, in the order of the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The domain's name.
    pub domain: String,
    /// At least one.
    pub sources: Vec<Source>,
}

/// Reads the task files at `paths` and parts their questions by domain, domains in the order in which they first occur.
///
/// It is an error, with the file and the item's id, if an item is no question with four options, has an empty question
/// or option, does not name exactly one domain, or if a file is given twice.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Pool>> {
    let mut pools: Vec<Pool> = Vec::new();
    let mut seen = HashSet::new();
    for path in paths {
        let real = std::fs::canonicalize(path).map_err(Error::io(path))?;
        if !seen.insert(real) {
            return Err(Error::Usage(format!("{} is given twice", path.display())));
        }
        let task = tasks::load(path)?;
        for item in &task.items {
            let source =
                source(&task, item).map_err(|why| Error::file(path, format!("item {:?} {why}", item.id)))?;
            match pools.iter_mut().find(|p| p.domain == source.domain) {
                Some(pool) => pool.sources.push(source),
                None => pools.push(Pool { domain: source.domain.clone(), sources: vec![source] }),
            }
        }
    }
    Ok(pools)
}

fn source(task: &Task, item: &Item) -> Result<Source, String> {
    let Form::Question { question, choices } = &item.form else {
        return Err("is a prompt with continuations, expected a question with four choices".into());
    };
    let [domain] = &item.domains[..] else {
        let domains = item.domains.len();
        return Err(format!("names {domains} domains, expected one, as data mmlu split writes it"));
    };
    if domain.trim().is_empty() {
        return Err("names an empty domain".into());
    }
    Ok(Source {
        file: task.name.clone(),
        id: item.id.clone(),
        domain: domain.clone(),
        subject: item.subject.clone(),
        question: question.trim().to_string(),
        choices: choices.clone(),
        answer: item.gold,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A pool of `count` questions of `domain`.
    pub(crate) fn pool(domain: &str, count: usize) -> Pool {
        let source = |n: usize| Source {
            file: domain.into(),
            id: n.to_string(),
            domain: domain.into(),
            subject: Some(format!("{domain}_basics")),
            question: format!("What is fact {n} of {domain}?"),
            choices: [0, 1, 2, 3].map(|c| format!("{domain} {n} is {c}")),
            answer: n % 4,
        };
        Pool { domain: domain.into(), sources: (0..count).map(source).collect() }
    }

    fn read(text: &str) -> Result<Vec<Pool>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.jsonl");
        std::fs::write(&path, text).unwrap();
        load(&[path])
    }

    #[test]
    fn questions_are_parted_by_domain_and_bad_ones_are_named() {
        let row = |id: u32, question: &str, choices: &str, domains: &str| {
            format!(
                "{{\"id\":{id},\"question\":\"{question}\",\"choices\":{choices},\"answer\":2,\"domains\":{domains}}}\n"
            )
        };
        let four = "[\"1\",\"2\",\"3\",\"4\"]";
        let good = row(0, " q ", four, "[\"sc\"]")
            + &row(1, "q", four, "[\"hum\"]")
            + &row(2, "r", four, "[\"sc\"]");
        let pools = read(&good).unwrap();
        assert_eq!(
            pools.iter().map(|p| (p.domain.as_str(), p.sources.len())).collect::<Vec<_>>(),
            [("sc", 2), ("hum", 1)]
        );
        assert_eq!((pools[0].sources[0].question.as_str(), pools[0].sources[1].id.as_str()), ("q", "2"));
        for (text, expected) in [
            (row(7, "q", "[\"1\",\"2\",\"3\"]", "[\"sc\"]"), "line 1: has 3 choices, expected 4"),
            (row(7, " ", four, "[\"sc\"]"), "line 1: the question is empty"),
            (row(7, "q", "[\"1\",\"2\",\"\",\"4\"]", "[\"sc\"]"), "line 1: option C is empty"),
            (row(7, "q", four, "[]"), "item \"7\" names 0 domains, expected one"),
            (row(7, "q", four, "[\"a\",\"b\"]"), "names 2 domains"),
            (row(7, "q", four, "[\" \"]"), "names an empty domain"),
            (row(7, "q", four, "[\"a\"]").replace("2,", "4,"), "answer is 4"),
            (
                "{\"prompt\":\"p\",\"continuations\":[\"a\",\"b\"],\"answer\":0,\"domains\":[\"a\"]}".into(),
                "is a prompt with continuations",
            ),
        ] {
            let err = read(&text).unwrap_err().to_string();
            assert!(err.contains(expected), "{text}: {err}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.jsonl");
        std::fs::write(&path, &good).unwrap();
        let twice = load(&[path.clone(), dir.path().join("./t.jsonl")]).unwrap_err().to_string();
        assert!(twice.contains("is given twice"), "{twice}");
        std::fs::write(&path, b"{\"question\": \"caf\xe9\"}").unwrap();
        let err = load(&[path]).unwrap_err().to_string();
        assert!(err.contains("UTF-8"), "{err}");
    }
}
