//! Evaluation of a real model on MMLU against transformers (`tools/golden/mmlu_sample.py`): which items fit, and the
//! options' log-probabilities of a stored sample.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anabranch::cpu::Cpu;
use anabranch::data::tokenizer::Tokenizer;
use anabranch::stage::common::Common;
use anabranch::stage::evaluate::items::Items;
use anabranch::stage::evaluate::{self, EvalOptions};
use serde::Deserialize;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/mmlu_sample.json");
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");

#[derive(Deserialize)]
struct Golden {
    fit: usize,
    too_long: usize,
    too_long_by_subject: BTreeMap<String, usize>,
    /// Subject, row, gold, tokens of the context, log-probabilities.
    items: Vec<(String, usize, usize, usize, [f64; 4])>,
}

fn golden() -> Golden {
    serde_json::from_slice(&std::fs::read(GOLDEN).expect("stored")).expect("JSON")
}

/// The model and the folder of MMLU test, or none, saying so.
fn data() -> Option<(PathBuf, PathBuf)> {
    let (model, test) = (Path::new(DATA).join("stories260K-hf"), Path::new(DATA).join("mmlu/test"));
    if model.exists() && test.exists() {
        return Some((model, test));
    }
    println!("skipped: {DATA} is not there");
    None
}

#[test]
fn the_items_that_fit_are_those_of_lm_evaluation_harness() {
    let Some((model, test)) = data() else { return };
    let golden = golden();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&test).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    assert_eq!(files.len(), 57);
    let tokenizer = Tokenizer::load(&model, 512).expect("a tokenizer");
    let items = Items::load(&files, &tokenizer, None, 512).expect("items");
    assert_eq!((items.trees.len(), items.unfit.len()), (golden.fit, golden.too_long));
    let mut by_subject = BTreeMap::new();
    for item in &items.unfit {
        let subject = item.task.strip_suffix("_test").expect("a test file").to_string();
        *by_subject.entry(subject).or_insert(0) += 1;
    }
    assert_eq!(by_subject, golden.too_long_by_subject);
}

#[test]
fn log_probabilities_and_answers_are_those_of_transformers() {
    let Some((model, test)) = data() else { return };
    let golden = golden();
    // The sampled rows alone, in files of the same names.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut subjects: Vec<&String> = golden.items.iter().map(|i| &i.0).collect();
    subjects.dedup();
    let mut tasks = Vec::new();
    for subject in subjects {
        let name = format!("{subject}_test.csv");
        let mut reader =
            csv::ReaderBuilder::new().has_headers(false).from_path(test.join(&name)).expect("a file");
        let rows: Vec<csv::StringRecord> = reader.records().map(|r| r.expect("a row")).collect();
        let path = dir.path().join(&name);
        let mut writer = csv::Writer::from_path(&path).expect("a file");
        for (_, row, ..) in golden.items.iter().filter(|i| i.0 == *subject) {
            writer.write_record(&rows[*row]).expect("a row written");
        }
        writer.flush().expect("rows written");
        tasks.push(path);
    }
    let options = EvalOptions { model, tasks, batch_tokens: 2048, ..EvalOptions::default() };
    let backend = Cpu::new(2).expect("threads");
    let report = evaluate::run::<Cpu, f32>(&backend, &options, &Common::default()).expect("a report");
    assert_eq!(report.predictions.len(), golden.items.len());
    let mut worst = 0.0f64;
    for ((subject, row, gold, _, want), got) in golden.items.iter().zip(&report.predictions) {
        let at = format!("{subject} row {row}");
        assert_eq!((got.task.strip_suffix("_test"), got.gold), (Some(subject.as_str()), *gold), "{at}");
        assert_eq!(got.logprobs.len(), 4, "{at}");
        for (got, want) in got.logprobs.iter().zip(want) {
            assert!((got - want).abs() <= 1e-3, "{at}: log-probability {got}, stored {want}");
            worst = worst.max((got - want).abs());
        }
        let best = (0..4).fold(0, |best, i| if want[i] > want[best] { i } else { best });
        assert_eq!(got.predicted, best, "{at}");
    }
    let right = report.predictions.iter().filter(|p| p.predicted == p.gold).count();
    assert_eq!((report.overall[0].items, report.overall[0].correct), (golden.items.len(), right));
    println!("log-probabilities are at most {worst:.1e} off");
}
