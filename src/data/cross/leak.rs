//! Sources that an edge was trained on: a question written from one of them does not measure what it should.

use std::path::{Path, PathBuf};

use aho_corasick::AhoCorasick;
use serde_json::Value;

use super::sources::{Pool, Source};
use crate::data::lines;
use crate::data::tasks::{self, LETTERS};
use crate::error::{Error, Result};

/// The sources that stand in the training files at `paths`, as pool and place in it, in order.
///
/// A source stands in a file if the question with its four options does, written as `eval` puts it to a model or as a
/// task holds it, upper or lower case and whatever the white space.
pub fn leaked(pools: &[Pool], paths: &[PathBuf]) -> Result<Vec<(usize, usize)>> {
    let places: Vec<(usize, usize)> =
        pools.iter().enumerate().flat_map(|(p, pool)| (0..pool.sources.len()).map(move |s| (p, s))).collect();
    let asked = |&(p, s): &(usize, usize)| {
        let source: &Source = &pools[p].sources[s];
        squeezed(&block(&source.question, &source.choices))
    };
    let patterns: Vec<String> = places.iter().map(asked).collect();
    let search = AhoCorasick::new(&patterns)
        .map_err(|e| Error::Usage(format!("{} sources cannot be searched for: {e}", patterns.len())))?;
    let mut found = vec![false; places.len()];
    for path in paths {
        for text in texts(path)? {
            for hit in search.find_overlapping_iter(&squeezed(&text)) {
                found[hit.pattern().as_usize()] = true;
            }
        }
    }
    Ok(places.into_iter().zip(found).filter_map(|(place, found)| found.then_some(place)).collect())
}

/// A question as a prompt has it.
fn block(question: &str, choices: &[String; 4]) -> String {
    let options = LETTERS.iter().zip(choices).map(|(letter, c)| format!("{letter}.{c}"));
    std::iter::once(question.to_string()).chain(options).collect()
}

fn squeezed(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace()).flat_map(char::to_lowercase).collect()
}

/// The texts of a training file: questions of a task, all strings of each JSON line, or all of a plain text.
fn texts(path: &Path) -> Result<Vec<String>> {
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
        let items = tasks::load(path)?.items;
        return Ok(items.iter().filter_map(|item| question(&item.form)).collect());
    }
    let text = lines::read_text(path)?;
    if !lines::is_jsonl(path) {
        return Ok(vec![text]);
    }
    lines::numbered(&text)
        .map(|(line, text)| {
            let map = lines::object(text).map_err(|why| Error::file(path, format!("line {line}: {why}")))?;
            if let (Some(Value::String(question)), Some(Value::Array(choices))) =
                (map.get("question"), map.get("choices"))
            {
                let choices: Vec<String> =
                    choices.iter().filter_map(|c| c.as_str().map(String::from)).collect();
                if let Ok(four) = <[String; 4]>::try_from(choices) {
                    return Ok(block(question, &four));
                }
            }
            let mut all = String::new();
            strings(&Value::Object(map), &mut all);
            Ok(all)
        })
        .collect()
}

fn question(form: &tasks::Form) -> Option<String> {
    match form {
        tasks::Form::Question { question, choices } => Some(block(question, choices)),
        tasks::Form::Prompt { .. } => None,
    }
}

/// Adds all strings in `value` to `text`, in order.
fn strings(value: &Value, text: &mut String) {
    match value {
        Value::String(s) => text.push_str(s),
        Value::Array(list) => list.iter().for_each(|v| strings(v, text)),
        Value::Object(map) => map.values().for_each(|v| strings(v, text)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::sources::tests::pool;
    use super::*;
    use crate::data::tasks::{Form, Item};
    use crate::data::template;

    #[test]
    fn sources_are_found_in_every_form_of_training_data() {
        let pools = [pool("a", 5), pool("b", 4)];
        let as_item = |s: &Source| Item {
            id: s.id.clone(),
            subject: s.subject.clone(),
            domains: vec![s.domain.clone()],
            form: Form::Question { question: s.question.clone(), choices: s.choices.clone() },
            gold: s.answer,
        };
        let prompt = |p: usize, s: usize| template::prompt(&as_item(&pools[p].sources[s]), &[]).context;
        let json = |value: Value| value.to_string() + "\n";
        let of = |p: usize, s: usize| &pools[p].sources[s];
        let dir = tempfile::tempdir().unwrap();
        let found = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            leaked(&pools, &[path]).unwrap()
        };
        let training = json(serde_json::json!({"prompt": prompt(0, 1), "completion": " B"}))
            + &json(
                serde_json::json!({"messages": [{"role": "user", "content": prompt(1, 2).to_uppercase()}]}),
            )
            + &json(serde_json::json!({"text": "nothing of it"}));
        assert_eq!(found("t.jsonl", &training), [(0, 1), (1, 2)]);
        let task = json(
            serde_json::json!({"question": of(0, 3).question.replace(' ', "  "), "choices": of(0, 3).choices, "answer": 0}),
        );
        assert_eq!(found("t.jsonl", &task), [(0, 3)]);
        let s = of(1, 0);
        let row = format!("\"{}\",{},A\n", s.question, s.choices.join(","));
        assert_eq!(found("t.csv", &row), [(1, 0)]);
        assert_eq!(found("t.txt", &format!("x\n\n{}", prompt(1, 1))), [(1, 1)]);
        // Other options, or another question, are another item.
        let other = task.replace("a 3 is 3", "a 3 is 4");
        assert!(found("t.jsonl", &other).is_empty());
        assert!(leaked(&pools, &[]).unwrap().is_empty());
        std::fs::write(dir.path().join("t.jsonl"), "{}\n[1]\n").unwrap();
        let err = leaked(&pools, &[dir.path().join("t.jsonl")]).unwrap_err().to_string();
        assert!(err.contains("line 2: is an array"), "{err}");
    }
}
