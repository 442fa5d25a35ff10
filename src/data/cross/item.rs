//! A question that needs two domains, with all that it came from.

use serde::{Deserialize, Serialize};

use super::prompts::Stage;
use super::sources::Source;
use crate::checkpoint::digest;

/// One request and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// What was asked for.
    pub stage: Stage,
    /// SHA-256 of the request: the answer's key in the ledger.
    pub prompt_sha256: String,
    /// The answer as it came.
    pub answer: String,
}

/// What people are asked to judge, and what `eval` reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// What is asked.
    pub question: String,
    /// A, B, C, D.
    pub choices: [String; 4],
    /// The right one, from 0.
    pub answer: usize,
}

impl Written {
    /// SHA-256 of the question, its options and its answer: a decision holds for what was seen.
    pub fn sha256(&self) -> String {
        let [a, b, c, d] = &self.choices;
        let text =
            [&self.question, a, b, c, d, &self.answer.to_string()].map(|s| format!("{}\0{s}", s.len()));
        digest::sha256(text.concat().as_bytes())
    }
}

/// A question that needs two domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// The pair's name and the candidate's number: `humanities-stem/17`.
    pub id: String,
    /// The question.
    #[serde(flatten)]
    pub written: Written,
    /// The domains that it needs.
    pub domains: [String; 2],
    /// What each domain contributes, in the model's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<String>,
    /// The knowledge behind each source, in the model's words.
    pub knowledge: [String; 2],
    /// The questions that it was written from.
    pub sources: [Source; 2],
    /// Who wrote it.
    pub model: String,
    /// SHA-256 of the prompts' texts.
    pub prompts_sha256: String,
    /// All that was asked and answered on the way.
    pub calls: Vec<Call>,
}

/// The line of a task file that `eval` reads.
#[derive(Debug, Serialize)]
pub struct TaskLine<'a> {
    /// The item's id.
    pub id: &'a str,
    /// The question.
    #[serde(flatten)]
    pub written: &'a Written,
    /// The domains that it needs.
    pub domains: &'a [String; 2],
}

impl TaskLine<'_> {
    /// The keys of a line, in order.
    pub const KEYS: [&'static str; 5] = ["id", "question", "choices", "answer", "domains"];
}

impl Item {
    /// The item as a line of a task file.
    pub fn task_line(&self) -> TaskLine<'_> {
        TaskLine { id: &self.id, written: &self.written, domains: &self.domains }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_lines_have_their_keys_and_texts_their_hash() {
        let written =
            Written { question: "q".into(), choices: ["1", "2", "3", "4"].map(String::from), answer: 1 };
        let domains = ["a".to_string(), "b".to_string()];
        let line =
            serde_json::to_value(TaskLine { id: "a-b/0", written: &written, domains: &domains }).unwrap();
        assert!(line.as_object().unwrap().keys().eq(TaskLine::KEYS));
        let moved =
            Written { question: "q1".into(), choices: ["", "2", "3", "4"].map(String::from), answer: 1 };
        assert_ne!(written.sha256(), moved.sha256());
        assert_ne!(written.sha256(), Written { answer: 2, ..written.clone() }.sha256());
        assert_eq!(written.sha256(), written.clone().sha256());
    }
}
