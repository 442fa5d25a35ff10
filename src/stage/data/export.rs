//! `data export --lm-eval`: tasks for lm-evaluation-harness, so that anyone can run them there.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::data::lines;
use crate::data::lm_eval::{self, FewShot, Part, Suite};
use crate::data::tasks::{self, Item, Task};
use crate::error::{Error, Result};
use crate::stage::common::Common;
use crate::stage::evaluate::items::{self, Shots};

/// What is exported.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Task files.
    pub tasks: Vec<PathBuf>,
    /// Worked examples before each question.
    pub shots: usize,
    /// The folder of their `<subject>_dev.csv`.
    pub shots_from: Option<PathBuf>,
    /// Where to write.
    pub out: PathBuf,
}

/// What was exported.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// Where it lies.
    pub out: PathBuf,
    /// One for each task file.
    pub tasks: Vec<Exported>,
    /// Whether `--resume` found it done.
    pub already_finished: bool,
}

/// A task file in the harness's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// What to give to `--tasks`: a group, or a task.
    pub name: String,
    /// The tasks in it, one for each subject.
    pub subtasks: Vec<String>,
    /// Items in all.
    pub items: usize,
}

/// All files of an export, before anything is written.
#[derive(Debug)]
pub struct Ready {
    /// One for each task file.
    pub tasks: Vec<Exported>,
    files: BTreeMap<String, String>,
}

impl Ready {
    /// Reads the tasks and their worked examples.
    pub fn new(options: &ExportOptions) -> Result<Ready> {
        if (options.shots > 0) != options.shots_from.is_some() {
            return Err(Error::Usage("--shots N and --shots-from DIR go together".into()));
        }
        let tasks = options.tasks.iter().map(|path| tasks::load(path)).collect::<Result<Vec<Task>>>()?;
        let shots = options.shots_from.as_deref().map(|dir| Shots { dir, count: options.shots });
        let examples = shots.map(|shots| items::examples(&tasks, shots)).transpose()?.unwrap_or_default();
        let suites = lm_eval::suites(&tasks);
        let mut files = BTreeMap::new();
        for (suite, task) in suites.iter().zip(&tasks) {
            if suite.is_group() {
                files.insert(format!("{}.yaml", suite.name), lm_eval::yaml(&suite.group()));
            }
            for part in &suite.parts {
                let examples = part.subject.as_ref().and_then(|s| examples.get(s));
                files.extend(of_part(part, task, examples.map(Vec::as_slice)));
            }
        }
        files.insert("README.md".into(), readme(&suites));
        let exported = suites.iter().zip(&tasks).map(|(suite, task)| Exported {
            name: suite.name.clone(),
            subtasks: suite.parts.iter().map(|p| p.name.clone()).collect(),
            items: task.items.len(),
        });
        Ok(Ready { tasks: exported.collect(), files })
    }

    /// A hash over all files.
    fn fingerprint(&self) -> String {
        let mut hasher = Hasher::default();
        for (name, text) in &self.files {
            hasher.update(digest::sha256(format!("{name} {text}").as_bytes()).as_bytes());
        }
        hasher.finish()
    }
}

/// Writes the tasks.
pub fn run(options: &ExportOptions, common: &Common) -> Result<ExportReport> {
    let ready = Ready::new(options)?;
    let begun = Output::begin_anew(&options.out, "data export", &ready.fingerprint(), common.output())?;
    let Ready { tasks, files } = ready;
    let report = ExportReport { out: options.out.clone(), tasks, already_finished: false };
    let Begun::Work(output) = begun else { return Ok(ExportReport { already_finished: true, ..report }) };
    let mut known = BTreeMap::new();
    for (name, text) in files {
        let hash = digest::write_file(&output.dir().join(&name), text.as_bytes())?;
        known.insert(name, hash);
    }
    Provenance::new("data export").seal(output.dir(), known)?;
    output.finish()?;
    Ok(report)
}

fn of_part(part: &Part, task: &Task, examples: Option<&[Item]>) -> Vec<(String, String)> {
    let documents = |items: &mut dyn Iterator<Item = &Item>| lines::of_objects(items.map(Item::document));
    let (items, shots) = (format!("{}.jsonl", part.name), format!("{}.shots.jsonl", part.name));
    let few = examples.map(|examples| FewShot { count: examples.len(), file: &shots });
    let mut files = vec![
        (format!("{}.yaml", part.name), lm_eval::yaml(&part.exported(&items, few))),
        (items.clone(), documents(&mut part.items.iter().map(|&n| &task.items[n]))),
    ];
    if let Some(examples) = examples {
        files.push((shots, documents(&mut examples.iter())));
    }
    files
}

fn readme(suites: &[Suite]) -> String {
    let names: Vec<&str> = suites.iter().map(|s| s.name.as_str()).collect();
    format!(
        "Tasks for lm-evaluation-harness. It finds the items where it runs, so run it in this folder:\n\n\
         ```sh\n\
         lm_eval --model hf --model_args pretrained=MODEL --include_path . --tasks {}\n\
         ```\n\n\
         Log-probabilities are those of `anabranch eval`, if the tokenizer may put its own first token before a prompt \
         (recent versions let it; earlier ones want `,add_bos_token=True` after MODEL). A prompt that is longer than \
         the model's positions the harness cuts, where `anabranch eval` names it and leaves it out.\n",
        names.join(",")
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::killed;
    use super::*;

    #[test]
    fn a_killed_export_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let task = dir.path().join("anatomy_test.csv");
        std::fs::write(&task, "q,1,2,3,4,A\n").unwrap();
        let options = |out: &Path| ExportOptions {
            tasks: vec![task.clone()],
            shots: 0,
            shots_from: None,
            out: out.into(),
        };
        let fingerprint = Ready::new(&options(Path::new("out"))).unwrap().fingerprint();
        killed::goes_on("data export", &fingerprint, "old.yaml", |out, common| {
            assert!(!run(&options(out), common).unwrap().already_finished);
        });
    }
}
