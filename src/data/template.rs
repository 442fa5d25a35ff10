//! The prompt that an item becomes: lm-evaluation-harness's `mmlu` template, to the letter.

use std::path::Path;

use super::mmlu::rows;
use super::tasks::{self, Form, Item, LETTERS};
use crate::error::{Error, Result};

/// A context and the strings whose log-probability after it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prompt {
    /// Everything before the options.
    pub context: String,
    /// The options, in order.
    pub continuations: Vec<String>,
}

/// The worked examples of `subject`: the first `count` rows of `<dir>/<subject>_dev.csv`. Fewer rows are an error, and so
/// is a subject that is no name, which would lead out of `dir`.
pub fn shots(dir: &Path, subject: &str, count: usize) -> Result<Vec<Item>> {
    rows::named("subject", subject)
        .map_err(|why| Error::file(dir, format!("has no worked examples for an item whose {why}")))?;
    let path = dir.join(format!("{subject}_dev.csv"));
    let mut items = tasks::load(&path)?.items;
    if items.len() < count {
        let why = format!("has {} rows, --shots asks for {count}", items.len());
        return Err(Error::file(path, why));
    }
    items.truncate(count);
    Ok(items)
}

/// The prompt of `item` with `shots` before it.
///
/// A question becomes the description, two line breaks, each shot with its letter and two line breaks, then the
/// question without the white space around it, `A.` to `D.` a line each, and `Answer:`; the options are ` A` to ` D`.
/// A prompt with continuations is taken as it stands.
pub fn prompt(item: &Item, shots: &[Item]) -> Prompt {
    match &item.form {
        Form::Prompt { prompt, continuations } => {
            Prompt { context: prompt.clone(), continuations: continuations.clone() }
        }
        Form::Question { question, choices } => {
            let mut context = description(item.subject.as_deref());
            for shot in shots {
                if let Form::Question { question, choices } = &shot.form {
                    context.push_str(&asked(question, choices));
                    context.push(' ');
                    context.push_str(LETTERS[shot.gold]);
                    context.push_str("\n\n");
                }
            }
            context.push_str(&asked(question, choices));
            Prompt { context, continuations: LETTERS.map(|letter| format!(" {letter}")).to_vec() }
        }
    }
}

/// What stands before the questions of a subject.
pub fn description(subject: Option<&str>) -> String {
    let about = subject.map_or(String::new(), |s| format!(" about {}", s.replace('_', " ")));
    format!("The following are multiple choice questions (with answers){about}.\n\n")
}

fn asked(question: &str, choices: &[String; 4]) -> String {
    let mut text = question.trim().to_string();
    for (letter, choice) in LETTERS.iter().zip(choices) {
        text.push_str(&format!("\n{letter}. {choice}"));
    }
    text.push_str("\nAnswer:");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(question: &str, subject: Option<&str>, gold: usize) -> Item {
        Item {
            id: "0".into(),
            subject: subject.map(String::from),
            domains: Vec::new(),
            form: Form::Question {
                question: question.into(),
                choices: ["w", "x ", "y", "z"].map(String::from),
            },
            gold,
        }
    }

    #[test]
    fn the_template_to_the_letter() {
        let shot = item("one?\n", Some("high_school_x"), 2);
        let p = prompt(&item(" two? ", Some("high_school_x"), 0), &[shot]);
        assert_eq!(
            p.context,
            "The following are multiple choice questions (with answers) about high school x.\n\n\
             one?\nA. w\nB. x \nC. y\nD. z\nAnswer: C\n\n\
             two?\nA. w\nB. x \nC. y\nD. z\nAnswer:"
        );
        assert_eq!(p.continuations, [" A", " B", " C", " D"]);
        let p = prompt(&item("q", None, 0), &[]);
        assert!(
            p.context.starts_with("The following are multiple choice questions (with answers).\n\nq\nA. w")
        );
        let form = Form::Prompt { prompt: "as is ".into(), continuations: vec!["a".into(), "b c".into()] };
        let p = prompt(&Item { form, ..item("", Some("s"), 0) }, &[]);
        assert_eq!((p.context.as_str(), p.continuations.len()), ("as is ", 2));
    }

    #[test]
    fn shots_are_the_first_rows_of_the_subjects_dev_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("s_dev.csv"), "p,1,2,3,4,A\nq,1,2,3,4,D\n").unwrap();
        let two = shots(dir.path(), "s", 2).unwrap();
        assert_eq!(two.iter().map(|i| i.gold).collect::<Vec<_>>(), [0, 3]);
        assert_eq!(shots(dir.path(), "s", 1).unwrap().len(), 1);
        assert!(
            shots(dir.path(), "s", 3).unwrap_err().to_string().contains("has 2 rows, --shots asks for 3")
        );
        assert!(shots(dir.path(), "t", 1).unwrap_err().to_string().contains("t_dev.csv"));
        let below = dir.path().join("below");
        std::fs::create_dir(&below).unwrap();
        let elsewhere = format!("{}/s", dir.path().display());
        for subject in [elsewhere.as_str(), "../s", "..", "a/b", "a\\b", "s\0", ""] {
            let err = shots(&below, subject, 1).unwrap_err().to_string();
            assert!(err.contains("expected letters, digits, _ and -"), "{subject:?}: {err}");
        }
    }
}
