//! The results in lm-evaluation-harness's shape: what its readers (tables, leaderboards, viewers of samples) expect.
//!
//! A task file is a task of the harness, or a group of one for each subject, under the names that `data export` gives.
//! The harness evaluates one model at a time and may look at its answers through several filters; here a column is a
//! filter: `none` is the base, or the only column, and an adapter's name is that adapter. What would differ from run to
//! run (date, times) is left out.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::accuracy::{Accuracy, weighted};
use super::items::Items;
use super::{EvalOptions, EvalReport, Prediction};
use crate::checkpoint::digest::{self, HashedFile, Hasher};
use crate::checkpoint::json;
use crate::data::lm_eval::{self, Part, Suite, VERSION};
use crate::error::Result;
use crate::tensor::DType;

/// The file that holds the accuracies.
pub const RESULTS: &str = "results.json";

/// The items of one part that were scored.
struct Scored<'a> {
    part: &'a Part,
    /// Places in the part and trees.
    trees: Vec<(usize, usize)>,
}

/// All parts of a suite.
struct Scores<'a> {
    suite: &'a Suite,
    parts: Vec<Scored<'a>>,
}

/// What a column is called as a filter.
fn filter(report: &EvalReport, column: usize) -> &str {
    match &report.columns[column] {
        Some(name) if report.columns.len() > 1 => name,
        _ => "none",
    }
}

fn scores<'a>(suites: &'a [Suite], items: &Items) -> Vec<Scores<'a>> {
    let mut trees = vec![Vec::new(); suites.len()];
    for (tree, &(task, item)) in items.places.iter().enumerate() {
        trees[task].push((item, tree));
    }
    let of_part = |part: &'a Part, trees: &[(usize, usize)]| {
        let place = |item: usize| part.items.binary_search(&item).ok();
        Scored { part, trees: trees.iter().filter_map(|&(item, tree)| Some((place(item)?, tree))).collect() }
    };
    suites
        .iter()
        .zip(trees)
        .map(|(suite, trees)| Scores {
            suite,
            parts: suite.parts.iter().map(|p| of_part(p, &trees)).collect(),
        })
        .collect()
}

/// Writes `results.json` and the samples of every task into the folder `dir`; gives the SHA-256 of each file by name.
pub fn write(
    dir: &Path,
    report: &EvalReport,
    items: &Items,
    options: &EvalOptions,
    precision: DType,
) -> Result<BTreeMap<String, String>> {
    let suites = lm_eval::suites(&items.tasks);
    let all = scores(&suites, items);
    let (mut files, mut hashes) = (BTreeMap::new(), Map::new());
    for scored in all.iter().flat_map(|s| &s.parts) {
        let name = format!("samples_{}.jsonl", scored.part.name);
        let (file, task) = scored.write(&dir.join(&name), report, items)?;
        files.insert(name, file);
        hashes.insert(scored.part.name.clone(), task.into());
    }
    let mut results = Results::default();
    for scores in &all {
        results.suite(scores, report, options.shots);
    }
    if let Some(text) = report.text.first() {
        results.text(options, report, text.windows);
    }
    let model = options.model.file_name().map(|name| name.to_string_lossy().into_owned());
    let adapters: Map<String, Value> = (0..report.columns.len())
        .map(|c| (filter(report, c).to_string(), report.columns[c].clone().into()))
        .collect();
    let mut file = results.tables;
    if file["groups"] == json!({}) {
        file.shift_remove("groups");
    }
    file.insert(
        "config".into(),
        json!({
            "model": "anabranch",
            "model_args": {"pretrained": model, "peft": adapters},
            "model_dtype": precision.to_string(),
            "limit": null,
        }),
    );
    file.insert("task_hashes".into(), hashes.into());
    file.insert("model_source".into(), "anabranch".into());
    file.insert("model_name".into(), model.into());
    file.insert("anabranch_version".into(), env!("CARGO_PKG_VERSION").into());
    files.insert(RESULTS.into(), digest::write_json(&dir.join(RESULTS), &file)?);
    Ok(files)
}

/// The tables of `results.json`, by task.
struct Results {
    tables: Map<String, Value>,
}

impl Default for Results {
    fn default() -> Results {
        let tables = [
            "results",
            "groups",
            "group_subtasks",
            "configs",
            "versions",
            "n-shot",
            "higher_is_better",
            "n-samples",
        ];
        Results { tables: tables.map(|name| (name.to_string(), json!({}))).into_iter().collect() }
    }
}

impl Results {
    fn put(&mut self, table: &str, task: &str, value: Value) {
        self.tables[table][task] = value;
    }

    fn suite(&mut self, scores: &Scores, report: &EvalReport, shots: usize) {
        let columns = 0..report.columns.len();
        let mut by_part: Vec<Vec<Accuracy>> = Vec::new();
        for scored in &scores.parts {
            let of = |c| Accuracy::of(scored.trees.iter().map(|&(_, tree)| right(answer(report, tree, c))));
            let accuracies: Vec<Accuracy> = columns.clone().map(of).collect();
            let (part, name) = (scored.part, &scored.part.name);
            self.put("results", name, metrics(name, report, &accuracies));
            self.put("configs", name, part.config().into());
            self.put(
                "n-samples",
                name,
                json!({"original": part.items.len(), "effective": scored.trees.len()}),
            );
            self.task(name, shots, "acc", true);
            by_part.push(accuracies);
        }
        if scores.suite.is_group() {
            let (suite, name) = (scores.suite, &scores.suite.name);
            let of = |c: usize| weighted(&by_part.iter().map(|a| a[c]).collect::<Vec<_>>());
            let metrics = metrics(name, report, &columns.map(of).collect::<Vec<_>>());
            self.put("results", name, metrics.clone());
            self.put("groups", name, metrics);
            self.put("group_subtasks", name, suite.group()["task"].clone());
            self.task(name, shots, "acc", true);
        }
    }

    fn text(&mut self, options: &EvalOptions, report: &EvalReport, windows: usize) {
        let path = options.text.as_deref().and_then(|path| path.file_stem()).unwrap_or_default();
        let name = path.to_string_lossy();
        let mut metrics = json!({"name": name, "alias": name, "sample_len": windows});
        for (c, score) in report.text.iter().enumerate() {
            let filter = filter(report, c);
            metrics[format!("perplexity,{filter}")] = score.perplexity.into();
            metrics[format!("perplexity_stderr,{filter}")] = "N/A".into();
        }
        self.put("results", &name, metrics);
        self.put("n-samples", &name, json!({"original": windows, "effective": windows}));
        self.task(&name, 0, "perplexity", false);
    }

    fn task(&mut self, name: &str, shots: usize, metric: &str, higher: bool) {
        self.put("versions", name, VERSION.into());
        self.put("n-shot", name, shots.into());
        self.put("higher_is_better", name, json!({metric: higher}));
    }
}

/// The answer of a column to a tree: predictions are by tree, then by column.
fn answer(report: &EvalReport, tree: usize, column: usize) -> &Prediction {
    &report.predictions[tree * report.columns.len() + column]
}

/// Whether an answer is right, and whether its option has an equal.
fn right(p: &Prediction) -> (bool, bool) {
    (p.predicted == p.gold, super::accuracy::choose(&p.logprobs).1)
}

fn metrics(name: &str, report: &EvalReport, by_column: &[Accuracy]) -> Value {
    let mut metrics =
        json!({"name": name, "alias": name, "sample_len": by_column.first().map_or(0, |a| a.items)});
    for (c, accuracy) in by_column.iter().enumerate() {
        let number = |x: Option<f64>| x.map_or(json!("N/A"), Value::from);
        let filter = filter(report, c);
        metrics[format!("acc,{filter}")] = number(accuracy.accuracy);
        metrics[format!("acc_stderr,{filter}")] = number(accuracy.standard_error);
    }
    metrics
}

/// The harness's hashes of an item: of its document, its prompt and its target, whatever the column.
type ItemHashes = [String; 3];

impl Scored<'_> {
    /// Writes the samples, column by column and one at a time, to the file at `path`; gives its SHA-256 and the harness's
    /// hash of the task, which is of the hashes of every sample.
    fn write(&self, path: &Path, report: &EvalReport, items: &Items) -> Result<(String, String)> {
        let hashes: Vec<ItemHashes> = self.trees.iter().map(|&(_, tree)| item_hashes(items, tree)).collect();
        let (mut file, mut task) = (HashedFile::create(path)?, Hasher::default());
        for column in 0..report.columns.len() {
            for (&at, hashes) in self.trees.iter().zip(&hashes) {
                file.put(&json::line(path, &sample(column, at, hashes, report, items))?)?;
                hashes.iter().for_each(|hash| task.update(hash.as_bytes()));
            }
        }
        Ok((file.finish()?, task.finish()))
    }
}

fn item_hashes(items: &Items, tree: usize) -> ItemHashes {
    let (item, prompt) = (items.item(tree), &items.prompts[tree]);
    let pretty = serde_json::to_string_pretty(&item.document()).unwrap_or_default();
    [&pretty, &prompt.context, &item.gold.to_string()].map(|text| digest::sha256(text.as_bytes()))
}

/// What a column answered to the item at a place in its part. Whether an option is the likeliest of all tokens is not
/// computed: null.
fn sample(
    column: usize,
    (place, tree): (usize, usize),
    [doc_hash, prompt_hash, target_hash]: &ItemHashes,
    report: &EvalReport,
    items: &Items,
) -> Value {
    let (prompt, answer) = (&items.prompts[tree], answer(report, tree, column));
    let argument = |option: &String| json!({"arg_0": prompt.context, "arg_1": option});
    let named = |(n, option): (usize, &String)| (format!("gen_args_{n}"), argument(option));
    let arguments: Map<String, Value> = prompt.continuations.iter().enumerate().map(named).collect();
    let response = |x: &f64| json!([x.to_string(), null]);
    json!({
        "doc_id": place,
        "doc": items.item(tree).document(),
        "target": answer.gold.to_string(),
        "arguments": arguments,
        "resps": answer.logprobs.iter().map(|x| json!([response(x)])).collect::<Vec<_>>(),
        "filtered_resps": answer.logprobs.iter().map(response).collect::<Vec<_>>(),
        "filter": filter(report, column),
        "metrics": ["acc"],
        "doc_hash": doc_hash,
        "prompt_hash": prompt_hash,
        "target_hash": target_hash,
        "acc": if answer.predicted == answer.gold { 1.0 } else { 0.0 },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    /// Two subjects, an item that does not fit, and two columns.
    fn evaluated() -> (EvalReport, Items) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.jsonl");
        let line = |id: &str, subject: &str, question: &str| {
            format!(
                r#"{{"id": "{id}", "subject": "{subject}", "question": "{question}", "choices": ["a", "b", "c", "d"], "answer": 1, "domains": ["x"]}}"#
            )
        };
        let long = "a ".repeat(99);
        let rows = [line("1", "s", "a"), line("2", "r", &long), line("3", "r", "é"), line("4", "s", "b")];
        std::fs::write(&path, rows.join("\n")).unwrap();
        let items = Items::load(&[path], &fixture::tokenizer(true, &[]), None, 99).unwrap();
        assert_eq!((items.trees.len(), items.unfit.len()), (3, 1));
        let (b, c) = (vec![-2.0, -1.5, -2.0, -2.0], vec![-2.0, -2.0, -1.0, -2.5]);
        let columns = [None, Some("fused".to_string())];
        let by_tree = [[&b, &c], [&c, &c], [&b, &b]];
        let answer = |(tree, column): (usize, usize)| Prediction {
            task: "t".into(),
            adapter: columns[column].clone(),
            id: items.tasks[0].items[items.places[tree].1].id.clone(),
            gold: 1,
            predicted: super::super::accuracy::choose(by_tree[tree][column]).0,
            logprobs: by_tree[tree][column].clone(),
        };
        let predictions = (0..6).map(|n| answer((n / 2, n % 2))).collect();
        let report = EvalReport { columns: columns.to_vec(), predictions, ..EvalReport::default() };
        (report, items)
    }

    /// `results.json` and the samples of each task, as they were written.
    fn written(
        report: &EvalReport,
        items: &Items,
        options: &EvalOptions,
        precision: DType,
    ) -> (Value, Vec<(String, Vec<Value>)>) {
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), report, items, options, precision).unwrap();
        let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let names = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name());
        assert_eq!(names.count(), files.len());
        for (name, hash) in &files {
            assert_eq!(*hash, digest::sha256(text(name).as_bytes()), "{name}");
        }
        let lines = |name: &String| -> Vec<Value> {
            text(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        };
        let samples = files.keys().filter(|name| *name != RESULTS).map(|name| (name.clone(), lines(name)));
        (serde_json::from_str(&text(RESULTS)).unwrap(), samples.collect())
    }

    #[test]
    fn a_group_of_subjects_with_a_filter_for_each_column() {
        let (report, items) = evaluated();
        let (file, samples) = written(&report, &items, &EvalOptions::default(), DType::F32);
        let own = &file["results"]["t_s"];
        assert_eq!(
            (&own["acc,none"], &own["acc,fused"], &own["sample_len"]),
            (&json!(1.0), &json!(0.5), &json!(2))
        );
        assert_eq!((&own["acc_stderr,none"], &own["acc_stderr,fused"]), (&json!(0.0), &json!(0.5)));
        let alone = &file["results"]["t_r"];
        assert_eq!((&alone["acc,none"], &alone["acc_stderr,none"]), (&json!(0.0), &json!("N/A")));
        assert_eq!(file["groups"]["t"], file["results"]["t"]);
        assert_eq!(file["groups"]["t"]["acc,none"], json!(2.0 / 3.0));
        assert_eq!(file["group_subtasks"]["t"], json!(["t_r", "t_s"]));
        assert_eq!(file["n-samples"]["t_r"], json!({"original": 2, "effective": 1}));
        assert_eq!(file["higher_is_better"]["t"], json!({"acc": true}));
        assert_eq!((&file["n-shot"]["t_s"], &file["versions"]["t"]), (&json!(0), &json!(1.0)));

        let names: Vec<&str> = samples.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["samples_t_r.jsonl", "samples_t_s.jsonl"]);
        let lines = &samples[1].1;
        let place =
            |v: &Value| (v["filter"].as_str().unwrap().to_string(), v["doc_id"].clone(), v["acc"].clone());
        let places: Vec<_> = lines.iter().map(place).collect();
        let expected = [("none", 0, 1.0), ("none", 1, 1.0), ("fused", 0, 0.0), ("fused", 1, 1.0)];
        assert_eq!(places, expected.map(|(f, n, acc)| (f.to_string(), json!(n), json!(acc))));
        assert_eq!(lines[0]["resps"][1], json!([["-1.5", null]]));
        assert_eq!(lines[0]["filtered_resps"][2], json!(["-2", null]));
        assert_eq!(lines[0]["arguments"]["gen_args_3"]["arg_1"], " D");
        assert_eq!(lines[0]["target_hash"], digest::sha256(b"1"));
        // The harness hashes the hashes of all samples, one behind another.
        let hashes = |line: &Value| ["doc_hash", "prompt_hash", "target_hash"].map(|h| line[h].clone());
        assert_eq!(hashes(&lines[0]), hashes(&lines[2]));
        let all: String =
            lines.iter().flat_map(hashes).map(|hash| hash.as_str().unwrap().to_string()).collect();
        assert_eq!(file["task_hashes"]["t_s"], digest::sha256(all.as_bytes()));
    }

    #[test]
    fn documents_hash_as_python_prints_them() {
        let (report, items) = evaluated();
        let (_, samples) = written(&report, &items, &EvalOptions::default(), DType::F32);
        let line = &samples[0].1[0];
        // json.dumps(doc, indent=2, ensure_ascii=False)
        let doc = "{\n  \"id\": \"3\",\n  \"subject\": \"r\",\n  \"question\": \"é\",\n  \"choices\": [\n    \"a\",\n    \"b\",\n    \"c\",\n    \"d\"\n  ],\n  \"answer\": 1\n}";
        assert_eq!(line["doc_hash"], digest::sha256(doc.as_bytes()));
        let prompt = "The following are multiple choice questions (with answers) about r.\n\né\nA. a\nB. b\nC. c\nD. d\nAnswer:";
        assert_eq!(line["prompt_hash"], digest::sha256(prompt.as_bytes()));
    }

    #[test]
    fn one_column_is_none_whatever_its_name() {
        let (mut report, items) = evaluated();
        report.columns = vec![Some("fused".into())];
        report.predictions.retain(|p| p.adapter.is_some());
        let (file, _) = written(&report, &items, &EvalOptions::default(), DType::F32);
        assert_eq!(file["results"]["t_s"]["acc,none"], json!(0.5));
        assert_eq!(file["config"]["model_args"]["peft"], json!({"none": "fused"}));
    }

    #[test]
    fn a_text_has_a_perplexity() {
        let score = super::super::TextScore { tokens: 9, windows: 2, nll: 1.0, perplexity: 2.5 };
        let report = EvalReport { columns: vec![None], text: vec![score], ..EvalReport::default() };
        let items = Items::load(&[], &fixture::tokenizer(true, &[]), None, 9).unwrap();
        let options = EvalOptions { text: Some("d/story.txt".into()), ..EvalOptions::default() };
        let (file, samples) = written(&report, &items, &options, DType::BF16);
        assert_eq!(file["results"]["story"]["perplexity,none"], json!(2.5));
        assert_eq!(
            (file["higher_is_better"]["story"]["perplexity"].as_bool(), samples),
            (Some(false), Vec::new())
        );
    }
}
