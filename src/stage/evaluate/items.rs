//! The items of all tasks, as prompts and trees.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::accuracy::choose;
use super::{ShownItem, UnfitItem};
use crate::data::prefix_tree::{PrefixTree, Unfit};
use crate::data::tasks::{self, Form, Item, Task};
use crate::data::template::{self, Prompt};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result, most_alike};

/// Where worked examples come from.
#[derive(Clone, Copy, Debug)]
pub struct Shots<'a> {
    /// The folder of `<subject>_dev.csv`.
    pub dir: &'a Path,
    /// The first so many rows.
    pub count: usize,
}

/// All items that can be scored, and those that cannot.
#[derive(Debug)]
pub struct Items {
    /// The files.
    pub tasks: Vec<Task>,
    /// Those that fit, task by task.
    pub trees: Vec<PrefixTree>,
    /// Task and item of each tree.
    pub places: Vec<(usize, usize)>,
    /// The prompt of each tree.
    pub prompts: Vec<Prompt>,
    /// The others.
    pub unfit: Vec<UnfitItem>,
}

impl Items {
    /// Reads and tokenises `files`; an item that needs more than `positions` is left out and named. An error if none
    /// is left of a non-empty list.
    pub fn load(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        shots: Option<Shots<'_>>,
        positions: usize,
    ) -> Result<Items> {
        let tasks = files.iter().map(|f| tasks::load(f)).collect::<Result<Vec<Task>>>()?;
        let mut names = HashSet::new();
        if let Some(task) = tasks.iter().find(|t| !names.insert(t.name.as_str())) {
            let why = format!("two task files are called {}, and results are told apart by name", task.name);
            return Err(Error::Usage(why));
        }
        let examples = match shots {
            Some(shots) => examples(&tasks, shots)?,
            None => HashMap::new(),
        };
        let places: Vec<(usize, usize)> = tasks
            .iter()
            .enumerate()
            .flat_map(|(t, task)| (0..task.items.len()).map(move |i| (t, i)))
            .collect();
        let encode = |&(t, i): &(usize, usize)| {
            let item = &tasks[t].items[i];
            let before = item.subject.as_ref().and_then(|s| examples.get(s.as_str()));
            let prompt = template::prompt(item, before.map_or(&[][..], Vec::as_slice));
            let tree = PrefixTree::encode(tokenizer, &prompt, positions)?;
            Ok((prompt, tree))
        };
        let encoded = places.par_iter().map(encode).collect::<Result<Vec<_>>>()?;

        let mut fit = (Vec::new(), Vec::new(), Vec::new());
        let mut unfit = Vec::new();
        for ((t, i), (prompt, tree)) in places.into_iter().zip(encoded) {
            let why = match tree {
                Ok(tree) => {
                    fit.0.push(tree);
                    fit.1.push((t, i));
                    fit.2.push(prompt);
                    continue;
                }
                Err(Unfit::TooLong { needs }) => {
                    format!("needs {needs} positions, the model has {positions}")
                }
                Err(Unfit::EmptyOption { option }) => format!("option {option} adds no token to the context"),
                Err(Unfit::EmptyContext) => {
                    "the context is empty and the tokenizer has neither BOS nor EOS to begin with".into()
                }
            };
            unfit.push(UnfitItem { task: tasks[t].name.clone(), id: tasks[t].items[i].id.clone(), why });
        }
        let (trees, places, prompts) = fit;
        match unfit.first() {
            Some(first) if trees.is_empty() => Err(Error::Usage(format!(
                "none of {} items can be scored; {} of {}: {}",
                unfit.len(),
                first.id,
                first.task,
                first.why
            ))),
            _ => Ok(Items { tasks, trees, places, prompts, unfit }),
        }
    }

    /// The item of tree `n`.
    pub fn item(&self, n: usize) -> &Item {
        let (task, item) = self.places[n];
        &self.tasks[task].items[item]
    }

    /// The tokens of tree `n`'s context.
    pub fn context(&self, n: usize) -> &[u32] {
        let tree = &self.trees[n];
        &tree.ids[..tree.context]
    }

    /// The trees of items with this id, at most one of each task.
    pub fn named(&self, id: &str) -> Vec<usize> {
        (0..self.trees.len()).filter(|&n| self.item(n).id == id).collect()
    }

    /// An error where no item that can be scored has this id.
    pub fn check_shown(&self, id: &str) -> Result<()> {
        if !self.named(id).is_empty() {
            return Ok(());
        }
        if let Some(unfit) = self.unfit.iter().find(|u| u.id == id) {
            return Err(Error::Usage(format!("--show {id}: the item of {} {}", unfit.task, unfit.why)));
        }
        let ids = self.tasks.iter().flat_map(|t| &t.items).map(|i| i.id.as_str());
        let hint = most_alike(id, ids)
            .map_or_else(String::new, |(_, nearest)| format!(", the nearest is {nearest}"));
        Err(Error::Usage(format!("--show {id}: no item of the tasks has this id{hint}")))
    }

    /// Tree `n` in full; `logprobs` are by column and option, `greedy` by column.
    pub fn shown(&self, n: usize, logprobs: Vec<Vec<f64>>, greedy: Vec<String>) -> ShownItem {
        let (item, tree, prompt) = (self.item(n), &self.trees[n], &self.prompts[n]);
        let tokens = |path: &Vec<usize>| path.iter().map(|&n| tree.asked[n].1).collect();
        ShownItem {
            task: self.tasks[self.places[n].0].name.clone(),
            id: item.id.clone(),
            context: prompt.context.clone(),
            context_ids: self.context(n).to_vec(),
            options: prompt.continuations.clone(),
            option_ids: tree.options.iter().map(tokens).collect(),
            gold: item.gold,
            probabilities: logprobs.iter().map(|l| among(l)).collect(),
            predicted: logprobs.iter().map(|l| choose(l).0).collect(),
            logprobs,
            greedy,
        }
    }
}

/// `exp(lᵢ) / Σ exp(lⱼ)`.
fn among(logprobs: &[f64]) -> Vec<f64> {
    let most = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logprobs.iter().map(|l| (l - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// The worked examples of every subject that occurs. A task of prompts, or an item without a subject, has none to
/// take and is an error.
pub fn examples(tasks: &[Task], shots: Shots<'_>) -> Result<HashMap<String, Vec<Item>>> {
    let mut examples = HashMap::new();
    for task in tasks {
        for item in &task.items {
            let refuse = |why: &str| {
                Err(Error::file(
                    &task.path,
                    format!("item {}: {why}, so --shots has no examples for it", item.id),
                ))
            };
            if matches!(item.form, Form::Prompt { .. }) {
                return refuse("is a prompt that is taken as it stands");
            }
            let Some(subject) = &item.subject else { return refuse("has no subject") };
            if !examples.contains_key(subject) {
                examples.insert(subject.clone(), template::shots(shots.dir, subject, shots.count)?);
            }
        }
    }
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn items_that_do_not_fit_are_named_and_the_others_keep_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let one = write(
            dir.path(),
            "one.jsonl",
            r#"{"prompt": "a b c d a b", "continuations": [" c", " d"], "answer": 0, "id": "long"}
{"prompt": "a", "continuations": [" c", " d"], "answer": 1}"#,
        );
        let two = write(
            dir.path(),
            "two.jsonl",
            r#"{"prompt": "a b", "continuations": [" c", " d a"], "answer": 1, "id": "x"}"#,
        );
        let tokenizer = fixture::tokenizer(true, &[]);
        let items = Items::load(&[one.clone(), two], &tokenizer, None, 4).unwrap();
        assert_eq!(items.places, [(0, 1), (1, 0)]);
        assert_eq!(items.unfit.len(), 1);
        assert_eq!(
            (items.unfit[0].id.as_str(), items.unfit[0].why.as_str()),
            ("long", "needs 7 positions, the model has 4")
        );
        let shown = items.shown(1, vec![vec![0.0, 3f64.ln()]], vec![" c".into()]);
        assert!((shown.probabilities[0][0] - 0.25).abs() <= 1e-15 && shown.predicted == [1]);
        let unknown = |id| items.check_shown(id).unwrap_err().to_string();
        assert!(items.check_shown("x").is_ok());
        assert!(unknown("xx").contains("no item of the tasks has this id, the nearest is x"));
        assert!(unknown("long").contains("the item of one needs 7 positions"));
        assert_eq!((shown.context_ids, shown.option_ids), (vec![1, 3, 4], vec![vec![5], vec![6, 3]]));
        let err = Items::load(std::slice::from_ref(&one), &tokenizer, None, 1).unwrap_err().to_string();
        assert!(err.contains("none of 2 items can be scored; long of one: needs 7"), "{err}");
        assert!(Items::load(&[one.clone(), one.clone()], &tokenizer, None, 9).is_err());
        let err = Items::load(&[one], &tokenizer, Some(Shots { dir: dir.path(), count: 1 }), 9).unwrap_err();
        assert!(err.to_string().contains("item long: is a prompt"), "{err}");
    }

    #[test]
    fn shots_come_before_each_question_of_their_subject() {
        let dir = tempfile::tempdir().unwrap();
        let task = write(dir.path(), "s_test.csv", "a,1,2,3,4,B\n");
        write(dir.path(), "s_dev.csv", "b,1,2,3,4,C\nc,1,2,3,4,D\n");
        let tokenizer = fixture::tokenizer(true, &[]);
        let shots = Shots { dir: dir.path(), count: 2 };
        let items = Items::load(&[task], &tokenizer, Some(shots), 999).unwrap();
        let context = &items.prompts[0].context;
        assert!(context.contains("b\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\nc\n"), "{context}");
        assert!(context.ends_with("\n\na\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"), "{context}");
    }
}
