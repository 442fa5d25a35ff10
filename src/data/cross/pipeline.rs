//! From two questions to a new one, or to the reason why there is none.

use serde_json::{Map, Value};

use super::answer::{self, Draft};
use super::client::Client;
use super::item::{Call, Item, Written};
use super::ledger::Answer;
use super::pairs::Pair;
use super::prompts::{Prompts, Stage};
use super::sources::Source;
use crate::data::tasks::LETTERS;
use crate::error::Result;

/// How often the model is asked for the same, told what was wrong the time before.
const TRIES: usize = 2;

/// What came of a candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A question that passed every stage.
    Accepted(Box<Candidate>),
    /// None, and why.
    Rejected(Rejection),
}

/// A question as the model wrote it, its options not yet shuffled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    draft: Draft,
    knowledge: [String; 2],
    calls: Vec<Call>,
}

/// Why a candidate gave no question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The stage that it did not pass.
    pub stage: Stage,
    /// Which way.
    pub cause: Cause,
    /// In words.
    pub why: String,
}

/// The ways not to pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The model finds that the two cannot be merged.
    Unmergeable,
    /// What the model said is not what was asked for.
    Malformed,
    /// The endpoint does not take the prompt: it is too long, or filtered.
    Refused,
    /// One domain's knowledge suffices.
    SingleDomain,
}

/// Everything that a candidate is asked with.
pub struct Pipeline<'a> {
    /// Who is asked.
    pub client: &'a Client<'a>,
    /// What is asked.
    pub prompts: &'a Prompts,
    /// Whether what one domain's knowledge suffices for is dropped.
    pub single_domain_check: bool,
}

/// What is read of an answer, or why the candidate ends here.
type Step<T> = Result<std::result::Result<T, Rejection>>;

impl Pipeline<'_> {
    /// Takes the candidate `sources` through the stages.
    pub fn run(&self, sources: [&Source; 2]) -> Result<Outcome> {
        let mut calls = Vec::new();
        Ok(match self.stages(sources, &mut calls)? {
            Ok((draft, knowledge)) => Outcome::Accepted(Box::new(Candidate { draft, knowledge, calls })),
            Err(rejection) => Outcome::Rejected(rejection),
        })
    }

    fn stages(&self, sources: [&Source; 2], calls: &mut Vec<Call>) -> Step<(Draft, [String; 2])> {
        let prompts = self.prompts;
        let merged =
            self.step(Stage::Mergeability, prompts.mergeability(sources)?, calls, answer::mergeability)?;
        match merged {
            Ok((true, _)) => {}
            Ok((false, why)) => return Ok(Err(rejection(Stage::Mergeability, Cause::Unmergeable, why))),
            Err(rejection) => return Ok(Err(rejection)),
        }
        let knowledge =
            match self.step(Stage::Knowledge, prompts.knowledge(sources)?, calls, answer::knowledge)? {
                Ok(knowledge) => knowledge,
                Err(rejection) => return Ok(Err(rejection)),
            };
        let new = |map: &Map<String, Value>| {
            let draft = answer::question(map)?;
            let same = |s: &&&Source| s.question.eq_ignore_ascii_case(&draft.question);
            match sources.iter().find(same) {
                Some(_) => Err("repeats one of the two questions".to_string()),
                None => Ok(draft),
            }
        };
        let draft = match self.step(Stage::Question, prompts.question(sources, &knowledge)?, calls, new)? {
            Ok(draft) => draft,
            Err(rejection) => return Ok(Err(rejection)),
        };
        if self.single_domain_check {
            for (own, other) in [(0, 1), (1, 0)] {
                let domain = &sources[own].domain;
                let prompt = prompts.alone(&draft, domain, &sources[other].domain, &knowledge[own])?;
                match self.step(Stage::Alone, prompt, calls, answer::alone)? {
                    Ok(found) if found == Some(draft.answer) => {
                        let why = format!("{} follows from {domain} alone", LETTERS[draft.answer]);
                        return Ok(Err(rejection(Stage::Alone, Cause::SingleDomain, why)));
                    }
                    Ok(_) => {}
                    Err(rejection) => return Ok(Err(rejection)),
                }
            }
        }
        Ok(Ok((draft, knowledge)))
    }

    /// Asks `prompt`, and again with what was wrong if the answer is not what `read` takes.
    fn step<T>(
        &self,
        stage: Stage,
        prompt: String,
        calls: &mut Vec<Call>,
        read: impl Fn(&Map<String, Value>) -> std::result::Result<T, String>,
    ) -> Step<T> {
        let mut messages = vec![prompt];
        loop {
            let reply = self.client.ask(stage, &messages)?;
            let (content, finish) = match reply.answer {
                Answer::Said { content, finish, .. } => (content, finish),
                Answer::Refused(why) => return Ok(Err(rejection(stage, Cause::Refused, why))),
            };
            let found = answer::read(&content, &read);
            let said = answer::spoken(&content).to_string();
            calls.push(Call { stage, prompt_sha256: reply.prompt_sha256, answer: content });
            let why = match found {
                Ok(value) => return Ok(Ok(value)),
                Err(why) if finish.as_deref() == Some("length") => format!("it was cut off, and {why}"),
                Err(why) => why,
            };
            if messages.len() + 1 >= 2 * TRIES {
                return Ok(Err(rejection(stage, Cause::Malformed, why)));
            }
            let again = self.prompts.again(&why)?;
            messages.extend([if said.is_empty() { "(no answer)".into() } else { said }, again]);
        }
    }
}

fn rejection(stage: Stage, cause: Cause, why: String) -> Rejection {
    Rejection { stage, cause, why }
}

impl Candidate {
    /// The item that candidate `k` of `pair` becomes as the accepted one number `accepted`, by `model`.
    pub fn item(self, pair: &Pair, k: u64, accepted: u64, model: &str) -> Item {
        let Candidate { draft, knowledge, calls } = self;
        let order = pair.shuffle(accepted, k, draft.answer);
        let answer = order.iter().position(|&i| i == draft.answer).unwrap_or_default();
        let choices = order.map(|i| draft.choices[i].clone());
        Item {
            id: id(pair, k),
            written: Written { question: draft.question, choices, answer },
            domains: pair.domains().map(str::to_string),
            explanation: draft.explanation,
            knowledge,
            sources: pair.candidate(k).map(Source::clone),
            model: model.to_string(),
            prompts_sha256: Prompts::hash(),
            calls,
        }
    }
}

/// The id of candidate `k`.
pub fn id(pair: &Pair, k: u64) -> String {
    format!("{}/{k}", pair.name())
}
