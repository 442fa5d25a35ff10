//! Tasks as lm-evaluation-harness has them: one for each subject, and a group where there are several.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value, json};

use super::tasks::{Form, LETTERS, Task};
use super::template;

/// What the harness calls the version of a task.
pub const VERSION: f64 = 1.0;

/// A task file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suite {
    /// The group's name, or that of the only part.
    pub name: String,
    /// By subject.
    pub parts: Vec<Part>,
}

/// The items of one subject and one form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The harness's task name.
    pub name: String,
    /// The subject.
    pub subject: Option<String>,
    /// Whether the items are questions; prompts else.
    pub questions: bool,
    /// Places in the task file, ascending.
    pub items: Vec<usize>,
}

/// Worked examples of a part, in the harness's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FewShot<'a> {
    /// How many.
    pub count: usize,
    /// The file that has them.
    pub file: &'a str,
}

/// The suites of `tasks`. Names are made of letters, digits, `_` and `-`, and no two are the same.
pub fn suites(tasks: &[Task]) -> Vec<Suite> {
    let mut taken = HashSet::new();
    let mut free = |wanted: String| {
        let numbered = (2..).map(|n| format!("{wanted}_{n}"));
        let name = std::iter::once(wanted.clone()).chain(numbered).find(|name| !taken.contains(name));
        let name = name.unwrap_or(wanted);
        taken.insert(name.clone());
        name
    };
    tasks
        .iter()
        .map(|task| {
            let mut by_subject: BTreeMap<(Option<&str>, bool), Vec<usize>> = BTreeMap::new();
            for (n, item) in task.items.iter().enumerate() {
                let questions = matches!(item.form, Form::Question { .. });
                by_subject.entry((item.subject.as_deref(), questions)).or_default().push(n);
            }
            let name = free(plain(&task.name));
            let several = by_subject.len() > 1;
            let parts = by_subject.into_iter().map(|((subject, questions), items)| Part {
                name: match several {
                    true => free(format!("{name}_{}", plain(subject.unwrap_or("none")))),
                    false => name.clone(),
                },
                subject: subject.map(String::from),
                questions,
                items,
            });
            Suite { parts: parts.collect(), name }
        })
        .collect()
}

fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "_-".contains(c) { c } else { '_' }).collect()
}

impl Suite {
    /// Whether it is a group of tasks.
    pub fn is_group(&self) -> bool {
        self.parts.len() > 1
    }

    /// The group's configuration: accuracies weighted by size.
    pub fn group(&self) -> Map<String, Value> {
        let parts: Vec<&str> = self.parts.iter().map(|p| p.name.as_str()).collect();
        object(json!({
            "group": self.name,
            "task": parts,
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": true}],
            "metadata": {"version": VERSION},
        }))
    }
}

impl Part {
    /// The task's configuration: prompt and scoring are [`template::prompt`]'s.
    pub fn config(&self) -> Map<String, Value> {
        let mut config = Map::new();
        config.insert("task".into(), self.name.clone().into());
        config.insert("output_type".into(), "multiple_choice".into());
        let form = match self.questions {
            true => {
                let options: String =
                    (0..4).map(|n| format!("\n{}. {{{{choices[{n}]}}}}", LETTERS[n])).collect();
                json!({
                    "description": verbatim(&template::description(self.subject.as_deref())),
                    "doc_to_text": format!("{{{{question.strip()}}}}{options}\nAnswer:"),
                    "doc_to_choice": LETTERS,
                })
            }
            // A column's name stands for what is in it, as it is.
            false => {
                json!({"doc_to_text": "prompt", "doc_to_choice": "continuations", "target_delimiter": ""})
            }
        };
        config.extend(object(form));
        config.insert("doc_to_target".into(), "answer".into());
        let metric = json!([{"metric": "acc", "aggregation": "mean", "higher_is_better": true}]);
        config.insert("metric_list".into(), metric);
        config.insert("metadata".into(), json!({"version": VERSION}));
        config
    }

    /// [`Part::config`] of the items in `file`, both in the folder that the harness runs in.
    pub fn exported(&self, file: &str, shots: Option<FewShot<'_>>) -> Map<String, Value> {
        let mut config = self.config();
        let mut files = object(json!({"test": file}));
        if let Some(shots) = shots {
            files.insert("dev".into(), shots.file.into());
            config.insert("fewshot_split".into(), "dev".into());
            config.insert("fewshot_config".into(), json!({"sampler": "first_n"}));
            config.insert("num_fewshot".into(), shots.count.into());
        }
        config.insert("dataset_path".into(), "json".into());
        config.insert("dataset_kwargs".into(), json!({"data_files": files}));
        config.insert("test_split".into(), "test".into());
        config
    }
}

/// A configuration as YAML: a line for each key, its value as JSON, which YAML reads.
pub fn yaml(config: &Map<String, Value>) -> String {
    config.iter().map(|(key, value)| format!("{key}: {value}\n")).collect()
}

/// A Jinja template that gives `text`.
fn verbatim(text: &str) -> String {
    match text.contains('{') {
        true => format!("{{{{ {} }}}}", json!(text)),
        false => text.to_string(),
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::data::tasks::Item;

    fn task(name: &str, subjects: &[Option<&str>]) -> Task {
        let item = |(n, subject): (usize, &Option<&str>)| Item {
            id: n.to_string(),
            subject: subject.map(String::from),
            domains: Vec::new(),
            form: Form::Question { question: "q".into(), choices: ["1", "2", "3", "4"].map(String::from) },
            gold: 0,
        };
        let items = subjects.iter().enumerate().map(item).collect();
        Task { name: name.into(), path: PathBuf::new(), items }
    }

    #[test]
    fn a_part_for_each_subject_and_no_name_twice() {
        let tasks = [
            task("hum test", &[Some("b c"), Some("a"), Some("b c")]),
            task("x", &[None]),
            task("hum_test_a", &[Some("a")]),
            task("y", &[Some("a"), None]),
        ];
        let suites = suites(&tasks);
        let names: Vec<Vec<&str>> =
            suites.iter().map(|s| s.parts.iter().map(|p| p.name.as_str()).collect()).collect();
        assert_eq!(
            names,
            [vec!["hum_test_a", "hum_test_b_c"], vec!["x"], vec!["hum_test_a_2"], vec!["y_none", "y_a"]]
        );
        assert_eq!(suites[0].parts[1].items, [0, 2]);
        assert_eq!((suites[0].is_group(), suites[1].is_group()), (true, false));
        assert_eq!(suites[0].group()["task"], json!(["hum_test_a", "hum_test_b_c"]));
    }

    #[test]
    fn the_harness_s_own_template() {
        let part = &suites(&[task("t", &[Some("high_school_x")])])[0].parts[0];
        let text = yaml(&part.exported("t.jsonl", Some(FewShot { count: 5, file: "t.dev.jsonl" })));
        let expected = r#"task: "t"
output_type: "multiple_choice"
description: "The following are multiple choice questions (with answers) about high school x.\n\n"
doc_to_text: "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
doc_to_choice: ["A","B","C","D"]
doc_to_target: "answer"
metric_list: [{"metric":"acc","aggregation":"mean","higher_is_better":true}]
metadata: {"version":1.0}
fewshot_split: "dev"
fewshot_config: {"sampler":"first_n"}
num_fewshot: 5
dataset_path: "json"
dataset_kwargs: {"data_files":{"test":"t.jsonl","dev":"t.dev.jsonl"}}
test_split: "test"
"#;
        assert_eq!(text, expected);
        assert_eq!(verbatim("a {{b}}\n"), "{{ \"a {{b}}\\n\" }}");
    }
}
