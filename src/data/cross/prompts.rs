//! What is asked at each stage. The texts are files beside this one.

use minijinja::{Environment, Value, context};
use serde::{Deserialize, Serialize};

use super::answer::Draft;
use super::sources::Source;
use crate::checkpoint::digest;
use crate::data::mmlu::domains;
use crate::data::tasks::LETTERS;
use crate::error::{Error, Result};

const FILES: [(&str, &str); 6] = [
    ("again.txt", include_str!("prompts/again.txt")),
    ("alone.txt", include_str!("prompts/alone.txt")),
    ("knowledge.txt", include_str!("prompts/knowledge.txt")),
    ("mergeability.txt", include_str!("prompts/mergeability.txt")),
    ("pair.txt", include_str!("prompts/pair.txt")),
    ("question.txt", include_str!("prompts/question.txt")),
];

/// What is asked of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Whether the two questions can be merged.
    Mergeability,
    /// What knowledge is behind each.
    Knowledge,
    /// The new question.
    Question,
    /// What somebody would answer who has one domain's knowledge only.
    Alone,
}

impl Stage {
    /// As in files: `mergeability`, `knowledge`, `question`, `alone`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Mergeability => "mergeability",
            Stage::Knowledge => "knowledge",
            Stage::Question => "question",
            Stage::Alone => "alone",
        }
    }
}

/// The prompts of all stages.
pub struct Prompts {
    texts: Environment<'static>,
}

impl Prompts {
    /// The prompts of this version.
    pub fn new() -> Result<Prompts> {
        let mut texts = Environment::new();
        for (name, text) in FILES {
            texts.add_template(name, text).map_err(wrong)?;
        }
        Ok(Prompts { texts })
    }

    /// SHA-256 of all texts, by which an item tells which prompts made it.
    pub fn hash() -> String {
        digest::sha256(FILES.map(|(name, text)| format!("{name}\0{text}\0")).concat().as_bytes())
    }

    /// Can these two be merged?
    pub fn mergeability(&self, sources: [&Source; 2]) -> Result<String> {
        self.pair("mergeability.txt", sources, ["", ""])
    }

    /// What knowledge is behind each of these two?
    pub fn knowledge(&self, sources: [&Source; 2]) -> Result<String> {
        self.pair("knowledge.txt", sources, ["", ""])
    }

    /// A new question from these two and the `knowledge` behind each.
    pub fn question(&self, sources: [&Source; 2], knowledge: &[String; 2]) -> Result<String> {
        self.pair("question.txt", sources, knowledge.each_ref().map(String::as_str))
    }

    /// The new question, to be answered with one domain's `knowledge` and none of the domain `other`.
    pub fn alone(&self, draft: &Draft, domain: &str, other: &str, knowledge: &str) -> Result<String> {
        let fields = context! {
            domain => field(domain), other => field(other), knowledge,
            question => draft.question.as_str(), options => lettered(&draft.choices)
        };
        self.render("alone.txt", fields)
    }

    /// The answer before cannot be used, and `why`.
    pub fn again(&self, why: &str) -> Result<String> {
        self.render("again.txt", context! { why })
    }

    fn pair(&self, name: &str, sources: [&Source; 2], knowledge: [&str; 2]) -> Result<String> {
        let one = |source: &Source, knowledge: &str| {
            let options = lettered(&source.choices);
            context! {
                domain => field(&source.domain), subject => source.subject.as_ref().map(|s| s.replace('_', " ")),
                question => source.question.as_str(), right => options[source.answer].clone(), options, knowledge
            }
        };
        let [first, second] = sources;
        self.render(name, context! { first => one(first, knowledge[0]), second => one(second, knowledge[1]) })
    }

    fn render(&self, name: &str, fields: Value) -> Result<String> {
        let text = self.texts.get_template(name).and_then(|t| t.render(fields)).map_err(wrong)?;
        Ok(text.trim_end().to_string())
    }
}

/// A domain within a sentence: humanities, STEM.
fn field(domain: &str) -> String {
    let name = domains::name(domain).replace('_', " ");
    if name.contains(char::is_lowercase) { name.to_lowercase() } else { name }
}

/// `A. text` for each option.
fn lettered(choices: &[String; 4]) -> Vec<String> {
    LETTERS.iter().zip(choices).map(|(letter, choice)| format!("{letter}. {choice}")).collect()
}

fn wrong(e: minijinja::Error) -> Error {
    Error::Usage(format!("a prompt cannot be made: {e:#}"))
}

#[cfg(test)]
mod tests {
    use super::super::sources::tests::pool;
    use super::*;

    #[test]
    fn prompts_hold_both_sources_and_ask_for_what_is_read() {
        let (a, b) = (pool("law", 3), pool("biology", 3));
        let sources = [&a.sources[1], &b.sources[2]];
        let prompts = Prompts::new().unwrap();
        let knowledge = ["that contracts bind".to_string(), "that cells divide".to_string()];
        let text = prompts.mergeability(sources).unwrap();
        let part = "Question 1, from law (law basics):\nWhat is fact 1 of law?\nA. law 1 is 0\nB. law 1 is 1\n\
                    C. law 1 is 2\nD. law 1 is 3\nRight answer: B. law 1 is 1\n\nQuestion 2, from biology";
        assert!(text.contains(part), "{text}");
        assert!(text.ends_with("\"reason\": \"one short sentence\"}"), "{text}");
        assert!(prompts.knowledge(sources).unwrap().contains("{\"first\":"));
        let text = prompts.question(sources, &knowledge).unwrap();
        assert!(text.contains("behind question 2: that cells divide\n\nFirst find"), "{text}");
        assert!(text.contains("knows only law, nor by somebody who knows only biology"), "{text}");
        let draft = Draft {
            question: "May <cells> & courts?".into(),
            choices: ["w", "x", "y", "z"].map(String::from),
            answer: 2,
            explanation: None,
        };
        let text = prompts.alone(&draft, "law", "biology", &knowledge[0]).unwrap();
        assert!(text.contains("that contracts bind\n\nMay <cells> & courts?\nA. w\nB. x"), "{text}");
        assert!(!text.contains("law 1") && !text.contains("divide"), "{text}");
        let text = prompts.alone(&draft, "hum", "natural_history", "").unwrap();
        assert!(
            text.contains("an expert of humanities would who has no knowledge of natural history"),
            "{text}"
        );
        assert_eq!(Prompts::hash().len(), 64);
    }
}
