//! What a model says, read: thinking left out, the JSON object found and checked.

use serde_json::{Deserializer, Map, Value};

use crate::checkpoint::json;
use crate::data::lines;
use crate::data::tasks::LETTERS;

/// Braces at which an object is looked for: more than any answer has, and few enough for a model that writes braces
/// without end.
const BRACES: usize = 4000;

/// A question as it was written, its options in the order of writing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// What is asked.
    pub question: String,
    /// A, B, C, D.
    pub choices: [String; 4],
    /// The right one, from 0.
    pub answer: usize,
    /// What each domain contributes, in the model's words.
    pub explanation: Option<String>,
}

/// `content` without what the model thought: all up to the last `</think>`, and all from a `<think>` that does not end.
pub fn spoken(content: &str) -> &str {
    let said = content.rfind("</think>").map_or(content, |at| &content[at + "</think>".len()..]);
    said.find("<think>").map_or(said, |at| &said[..at]).trim()
}

/// What `read` makes of the last JSON object in `content` that it takes; an object may stand between other text. An
/// error says what is wrong with the last one.
pub fn read<T>(content: &str, read: impl Fn(&Map<String, Value>) -> Result<T, String>) -> Result<T, String> {
    let said = spoken(content);
    if said.is_empty() {
        let thought =
            if content.trim().is_empty() { "it is empty" } else { "it ends before the thinking does" };
        return Err(format!("there is no answer: {thought}"));
    }
    let mut why = None;
    for text in objects(said).into_iter().rev() {
        match lines::object(text).and_then(|map| read(&map)) {
            Ok(value) => return Ok(value),
            Err(e) => _ = why.get_or_insert(format!("the JSON object {e}")),
        }
    }
    Err(why.unwrap_or_else(|| "it holds no whole JSON object".into()))
}

/// The JSON objects in `text` that lie in no other and begin at one of its last [`BRACES`] opening braces.
fn objects(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut at = text.rmatch_indices('{').nth(BRACES - 1).map_or(0, |(at, _)| at);
    while let Some(open) = text[at..].find('{') {
        let from = at + open;
        // A value, not an ignored one: its depth is limited, which bounds the work on braces that never close.
        let mut stream = Deserializer::from_str(&text[from..]).into_iter::<Value>();
        at = match stream.next() {
            Some(Ok(_)) => {
                let end = from + stream.byte_offset();
                found.push(&text[from..end]);
                end
            }
            _ => from + 1,
        };
    }
    found
}

/// Whether two questions can be merged, and why (not).
pub fn mergeability(map: &Map<String, Value>) -> Result<(bool, String), String> {
    let reason = text(map, "reason").unwrap_or_default();
    match map.get("mergeable") {
        Some(Value::Bool(yes)) => Ok((*yes, reason)),
        Some(Value::String(s)) if s.trim().eq_ignore_ascii_case("yes") => Ok((true, reason)),
        Some(Value::String(s)) if s.trim().eq_ignore_ascii_case("no") => Ok((false, reason)),
        other => Err(instead("mergeable", other, "\"Yes\" or \"No\"")),
    }
}

/// The knowledge behind each of two questions.
pub fn knowledge(map: &Map<String, Value>) -> Result<[String; 2], String> {
    Ok([text(map, "first")?, text(map, "second")?])
}

/// A question with exactly four different options and one answer.
pub fn question(map: &Map<String, Value>) -> Result<Draft, String> {
    let question = text(map, "question")?;
    let choices = unlabelled(options(map)?);
    for (n, choice) in choices.iter().enumerate() {
        if let Some(m) = choices[..n].iter().position(|c| same(c, choice)) {
            return Err(format!("has options {} and {} that are the same", LETTERS[m], LETTERS[n]));
        }
        if speaks_of_others(choice) {
            return Err(format!("has option {} {choice:?}, which speaks of other options", LETTERS[n]));
        }
    }
    let answer = right(map, &choices)?;
    let explanation = match map.get("explanation") {
        None | Some(Value::Null) => None,
        Some(Value::String(s)) if s.trim().is_empty() => None,
        Some(_) => Some(text(map, "explanation")?),
    };
    Ok(Draft { question, choices, answer, explanation })
}

/// The option, from 0, that one domain's knowledge leads to; none if it leads to no single one.
pub fn alone(map: &Map<String, Value>) -> Result<Option<usize>, String> {
    match map.get("answer") {
        None => Err("has no answer".into()),
        Some(Value::Null) => Ok(None),
        Some(Value::String(s)) if s.trim().eq_ignore_ascii_case("none") => Ok(None),
        Some(Value::String(s)) => lettered(s)
            .filter(|(_, rest)| rest.is_empty())
            .map(|(n, _)| Some(n))
            .ok_or_else(|| instead("answer", map.get("answer"), "A, B, C, D or \"none\"")),
        other => Err(instead("answer", other, "A, B, C, D or \"none\"")),
    }
}

fn instead(key: &str, found: Option<&Value>, expected: &str) -> String {
    match found {
        None => format!("has no {key}"),
        Some(value) => format!("has {key} {}, expected {expected}", json::kind(value)),
    }
}

/// The string under `key`, readable and trimmed.
fn text(map: &Map<String, Value>, key: &str) -> Result<String, String> {
    readable(key, &lines::string(map, key)?)
}

/// `text` without the white space around it. An error where that is empty, or where it holds what a backslash of LaTeX
/// becomes in JSON (`\times` a tab, `\frac` a form feed), which at its beginning passes for white space.
fn readable(name: &str, text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err(format!("has an empty {name}"));
    }
    match text.trim_end().chars().find(|c| c.is_control() && *c != '\n') {
        Some(c) => {
            Err(format!("has {c:?} in {name}, as LaTeX leaves it: mathematics is written in plain text"))
        }
        None => Ok(text.trim().to_string()),
    }
}

fn same(a: &str, b: &str) -> bool {
    a.to_lowercase() == b.to_lowercase()
}

/// The four options: under their letters, or a list.
fn options(map: &Map<String, Value>) -> Result<[String; 4], String> {
    let values: Vec<&Value> = match map.get("options").or_else(|| map.get("choices")) {
        Some(Value::Object(by_letter)) => {
            if let Some(key) = by_letter.keys().find(|k| !LETTERS.contains(&k.as_str())) {
                return Err(format!("has an option {key:?}, expected A, B, C and D"));
            }
            LETTERS.iter().filter_map(|l| by_letter.get(*l)).collect()
        }
        Some(Value::Array(list)) => list.iter().collect(),
        other => return Err(instead("options", other, "A, B, C and D with a text each")),
    };
    let count = values.len();
    let four: [&Value; 4] =
        values.try_into().map_err(|_| format!("has {count} options, expected exactly 4"))?;
    let mut choices: [String; 4] = Default::default();
    for (n, (choice, value)) in choices.iter_mut().zip(four).enumerate() {
        *choice = match value {
            Value::String(s) => readable(&format!("option {}", LETTERS[n]), s)?,
            Value::Number(number) => number.to_string(),
            other => return Err(format!("has {} as an option, expected a text", json::kind(other))),
        };
    }
    Ok(choices)
}

/// The options without their letters, where each begins with its own.
fn unlabelled(choices: [String; 4]) -> [String; 4] {
    let bare: Vec<String> = choices
        .iter()
        .enumerate()
        .filter_map(|(n, c)| lettered(c).filter(|(m, rest)| *m == n && !rest.is_empty()))
        .map(|(_, rest)| rest.to_string())
        .collect();
    bare.try_into().unwrap_or(choices)
}

/// `(B) text`, `B. text`, `B: text`, `B) text` or `B` as 1 and what follows the letter.
fn lettered(text: &str) -> Option<(usize, &str)> {
    let text = text.trim();
    let open = text.strip_prefix('(');
    let mut chars = open.unwrap_or(text).chars();
    let n = match chars.next()? {
        c @ 'A'..='D' => c as usize - 'A' as usize,
        _ => return None,
    };
    let rest = chars.as_str();
    let closed = if open.is_some() { rest.strip_prefix(')')? } else { rest };
    let marked = closed.strip_prefix([')', '.', ':']).unwrap_or(closed);
    // A letter alone, or parted from what follows; "Ability" is no A.
    (rest.is_empty() || marked.len() < rest.len()).then_some((n, marked.trim()))
}

/// The option under `answer`: its letter, its letter and text, or its text. An error where it means one option by its
/// letter and another by its text.
fn right(map: &Map<String, Value>, choices: &[String; 4]) -> Result<usize, String> {
    let expected = "the letter of one option";
    let Some(Value::String(answer)) = map.get("answer") else {
        return Err(instead("answer", map.get("answer"), expected));
    };
    let answer = answer.trim();
    let by_letter =
        lettered(answer).filter(|(n, rest)| rest.is_empty() || same(rest, &choices[*n])).map(|(n, _)| n);
    // What is a letter is no text in other capitals: "A" does not mean the option "a".
    let by_text = choices
        .iter()
        .position(|c| c == answer)
        .or_else(|| choices.iter().position(|c| by_letter.is_none() && same(c, answer)));
    // A small letter is not what was asked for, but where it is a text it may still be meant as a letter.
    let small = by_text.and_then(|_| ["a", "b", "c", "d"].iter().position(|l| *l == answer));
    match (by_letter.or(small), by_text) {
        (Some(n), Some(m)) if n != m => Err(format!(
            "has answer {answer:?}, which is the letter of option {} and the text of option {}: expected {expected}, with options that are no letters",
            LETTERS[n], LETTERS[m]
        )),
        (Some(n), _) | (None, Some(n)) => Ok(n),
        (None, None) => Err(instead("answer", map.get("answer"), expected)),
    }
}

/// Whether an option means others, which no longer holds when they stand in another order.
fn speaks_of_others(choice: &str) -> bool {
    let lower = choice.to_lowercase();
    let mut words = choice.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
    let several = words.clone().count() > 1;
    let only_letters = words.all(|w| {
        matches!(w, "A" | "B" | "C" | "D")
            || ["both", "and", "or", "only", "neither", "nor", "options", "option"]
                .contains(&w.to_lowercase().as_str())
    });
    (several && only_letters)
        || ["all of the above", "none of the above", "all of these", "none of these", "the options above"]
            .iter()
            .any(|phrase| lower.contains(phrase))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn thinking_is_left_out() {
        for (content, said) in [
            ("plain ", "plain"),
            ("<think>{\"a\": 1}</think>\n{}", "{}"),
            ("no opening tag</think>x", "x"),
            ("<think>one</think>y<think>two</think>z", "z"),
            ("<think>never ends {\"a\": 1}", ""),
            ("said<think>and then some", "said"),
            ("", ""),
        ] {
            assert_eq!(spoken(content), said, "{content}");
        }
    }

    #[test]
    fn the_last_object_that_fits_is_taken() {
        let get = |content: &str| read(content, mergeability).map(|(yes, _)| yes);
        assert_eq!(get("{\"mergeable\": \"Yes\", \"reason\": \"r\"}"), Ok(true));
        assert_eq!(get("As asked:\n```json\n{\"mergeable\": \"no\"}\n```\nI hope {this} helps."), Ok(false));
        assert_eq!(get("{\"mergeable\": true} or rather {\"mergeable\": false}"), Ok(false));
        assert_eq!(get("{\"mergeable\": \"Yes\"} {\"note\": 1}"), Ok(true));
        assert_eq!(get("<think>{\"mergeable\": \"No\"}</think>{\"mergeable\": \"Yes\"}"), Ok(true));
        for (content, expected) in [
            ("", "there is no answer: it is empty"),
            ("<think>hm", "there is no answer: it ends before the thinking does"),
            ("Yes.", "it holds no whole JSON object"),
            ("{\"mergeable\": \"Yes\", \"reason\": \"half an ans", "it holds no whole JSON object"),
            (
                "{\"mergeable\": \"Perhaps\"}",
                "the JSON object has mergeable \"Perhaps\", expected \"Yes\" or \"No\"",
            ),
            ("{\"a\": 1} {\"mergeable\": 3}", "the JSON object has mergeable 3"),
            ("{\"mergeable\": \"Yes\", \"mergeable\": \"No\"}", "twice in one object"),
            ("{}", "has no mergeable"),
        ] {
            let err = get(content).unwrap_err();
            assert!(err.contains(expected), "{content}: {err}");
        }
    }

    fn written(options: &str, answer: &str) -> Result<Draft, String> {
        let text = format!("{{\"question\": \"q\\n?\", \"options\": {options}, \"answer\": {answer}}}");
        read(&text, question)
    }

    #[test]
    fn questions_have_four_options_and_one_answer() {
        let four = "{\"B\": \"two\", \"A\": \" one\", \"C\": \"three\", \"D\": \"four\"}";
        for answer in ["\"B\"", "\"(B)\"", "\"B.\"", "\"B) two\"", "\"two\"", "\"TWO\""] {
            let draft = written(four, answer).unwrap();
            assert_eq!(
                (draft.answer, draft.choices.join(" ").as_str()),
                (1, "one two three four"),
                "{answer}"
            );
        }
        let listed = written("[\"(A) Ax\", \"B. By\", \"C: Cz\", \"D) Dw\"]", "\"C\"").unwrap();
        assert_eq!((listed.choices.join(" ").as_str(), listed.answer), ("Ax By Cz Dw", 2));
        let bare = written("[\"A\", \"B\", \"AB\", 0]", "\"AB\"").unwrap();
        assert_eq!((bare.choices.join(" ").as_str(), bare.answer), ("A B AB 0", 2));
        for (options, answer, right) in [
            ("[\"A\", \"B\", \"AB\", 0]", "\"B\"", 1),
            ("[\"b\", \"a\", \"c\", \"d\"]", "\"A\"", 0),
            ("[\"b\", \"a\", \"c\", \"d\"]", "\"B) a\"", 1),
            ("[\"b\", \"a\", \"c\", \"d\"]", "\"c\"", 2),
            ("{\"A\": \"L\", \"B\": \"R\", \"C\": \"1/C\", \"D\": \"C\"}", "\"C) 1/C\"", 2),
            ("{\"A\": \"L\", \"B\": \"R\", \"C\": \"1/C\", \"D\": \"C\"}", "\"D\"", 3),
        ] {
            assert_eq!(written(options, answer).map(|d| d.answer), Ok(right), "{options} {answer}");
        }
        for (options, answer) in [
            ("{\"A\": \"L\", \"B\": \"R\", \"C\": \"1/C\", \"D\": \"C\"}", "\"C\""),
            ("[\"B\", \"A\", \"AB\", 0]", "\"A\""),
            ("[\"b\", \"a\", \"c\", \"d\"]", "\"b\""),
            ("[\"L\", \"R\", \"1/C\", \"C\"]", "\"c\""),
        ] {
            let err = written(options, answer).unwrap_err();
            assert!(err.contains("the letter of option"), "{options} {answer}: {err}");
            assert!(err.contains("and the text of option"), "{options} {answer}: {err}");
        }
        for (options, answer, expected) in [
            ("{\"A\": \"1\", \"B\": \"2\", \"C\": \"3\"}", "\"A\"", "has 3 options, expected exactly 4"),
            ("[\"1\", \"2\", \"3\", \"4\", \"5\"]", "\"A\"", "has 5 options"),
            ("{\"A\": \"1\", \"B\": \"2\", \"C\": \"3\", \"E\": \"4\"}", "\"A\"", "has an option \"E\""),
            ("\"1 2 3 4\"", "\"A\"", "has options \"1 2 3 4\", expected A, B, C and D"),
            ("[\"1\", \"2\", \"3\", \"\"]", "\"A\"", "has an empty option D"),
            ("[\"x\", \"2\", \"X\", \"4\"]", "\"A\"", "has options A and C that are the same"),
            ("[\"1\", \"2\", \"3\", [4]]", "\"A\"", "has an array as an option"),
            ("[\"1\", \"2\", \"3\", \"Both A and C\"]", "\"A\"", "which speaks of other options"),
            ("[\"1\", \"2\", \"3\", \"None of the above.\"]", "\"A\"", "which speaks of other options"),
            ("[\"1\", \"2\", \"3\", \"\\frac{1}{2}\"]", "\"A\"", "in option D, as LaTeX leaves it"),
            (four, "\"E\"", "has answer \"E\", expected the letter of one option"),
            (four, "\"A, B\"", "has answer \"A, B\""),
            (four, "\"A) two\"", "has answer \"A) two\""),
            (four, "[\"A\"]", "has answer an array"),
            (four, "1", "has answer 1, expected the letter of one option"),
        ] {
            let err = written(options, answer).unwrap_err();
            assert!(err.contains(expected), "{options} {answer}: {err}");
        }
        assert!(
            read("{\"options\": [], \"answer\": \"A\"}", question).unwrap_err().contains("has no question")
        );
    }

    #[test]
    fn one_domain_answers_or_does_not() {
        let get = |answer: &str| read(&format!("{{\"answer\": {answer}}}"), alone);
        assert_eq!(get("\"B\""), Ok(Some(1)));
        assert_eq!(get("\"(D)\""), Ok(Some(3)));
        assert_eq!(get("\"None\""), Ok(None));
        assert_eq!(get("null"), Ok(None));
        assert!(get("\"A or B\"").unwrap_err().contains("expected A, B, C, D or \"none\""));
        assert!(get("2").is_err());
    }

    #[test]
    fn braces_without_end_take_no_time() {
        let begun = Instant::now();
        for text in ["{\"a\":".repeat(200_000), "{".repeat(1_000_000), "{\"a\":[".repeat(200_000)] {
            assert!(read(&text, alone).is_err());
            assert_eq!(read(&(text + " {\"answer\": \"C\"}"), alone), Ok(Some(2)));
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    proptest! {
        #[test]
        fn anything_is_read_or_refused(text in ".*", parts in "[{}\\[\\]\":,a1<>/think \\\\]{0,60}") {
            for content in [&text, &parts] {
                let _ = read(content, mergeability);
                let _ = read(content, knowledge);
                let _ = read(content, question);
                let _ = read(content, alone);
            }
        }
    }
}
