//! `data mmlu split`: an edge's training data and tasks for each domain.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::import::by_domain;
use crate::checkpoint::digest;
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::data::lines;
use crate::data::mmlu::cut::{self, Cut};
use crate::data::mmlu::domains;
use crate::data::mmlu::rows::{self, ROWS, Row, Split};
use crate::data::tasks::Item;
use crate::data::template;
use crate::error::{Error, Result};
use crate::stage::common::Common;

/// The folder of tasks.
const TASKS: &str = "tasks";

/// What is cut.
#[derive(Clone, Debug)]
pub struct SplitOptions {
    /// What `data mmlu import` wrote, or a canonical file.
    pub dir: PathBuf,
    /// Where to write.
    pub out: PathBuf,
    /// Leave equal questions where chance puts them.
    pub allow_duplicates: bool,
}

/// What was cut.
#[derive(Clone, Debug, Serialize)]
pub struct SplitReport {
    /// Where it lies.
    pub out: PathBuf,
    /// Each domain's sizes.
    pub domains: Vec<DomainCut>,
    /// What a user should know and what is no error.
    pub warnings: Vec<String>,
    /// Whether `--resume` found it done.
    pub already_finished: bool,
}

/// One domain's sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DomainCut {
    /// As files name it.
    pub domain: String,
    /// As people do.
    pub name: String,
    /// Validation and test rows of MMLU, which are pooled.
    pub rows: usize,
    /// To train on.
    pub train: usize,
    /// To tune on.
    pub validation: usize,
    /// To measure on.
    pub test: usize,
    /// Questions that stand more than once in the pool.
    pub repeated: usize,
    /// Rows that were moved to keep equal questions on one side.
    pub moved: usize,
}

/// The cut of everything in `dir`, before anything is written.
#[derive(Debug)]
pub struct Ready {
    domains: Vec<(DomainCut, Files)>,
    fingerprint: String,
}

/// File names and texts; empty texts are not written.
type Files = Vec<(String, String)>;

impl Ready {
    /// Reads and cuts.
    pub fn new(options: &SplitOptions, common: &Common) -> Result<Ready> {
        let whole = options.dir.join(ROWS);
        let path = if options.dir.is_dir() { &whole } else { &options.dir };
        let rows = rows::load(path)?;
        if let Some(row) = rows.iter().find(|r| r.item.domains.len() != 1) {
            let Item { id, domains, .. } = &row.item;
            let why =
                format!("{id} is of {}, expected one domain: a cut is a domain's", domains.join(" and "));
            return Err(Error::file(path, why));
        }
        if rows.iter().all(|r| r.split == Split::Dev) {
            return Err(Error::file(path, "has no validation and test rows to cut"));
        }
        let of_domain = |(id, rows): (String, Vec<&Row>)| {
            let pool: Vec<&Row> = rows.into_iter().filter(|r| r.split != Split::Dev).collect();
            let cut = cut::cut(&pool, &id, common.seed, !options.allow_duplicates)
                .map_err(|why| Error::file(path, format!("{id}: {why}")))?;
            Ok((sizes(&id, &cut), files(&id, &pool, &cut)))
        };
        let domains = by_domain(&rows).into_iter().map(of_domain).collect::<Result<Vec<_>>>()?;
        let what = format!("{} {} {}", digest::sha256_file(path)?, common.seed, options.allow_duplicates);
        Ok(Ready { domains, fingerprint: digest::sha256(what.as_bytes()) })
    }

    /// The sizes.
    pub fn cuts(&self) -> impl Iterator<Item = &DomainCut> {
        self.domains.iter().map(|(cut, _)| cut)
    }
}

/// Cuts, and writes for each domain D `D.train.jsonl` and `D.val.jsonl` to train with, and `tasks/D_val.jsonl` and
/// `tasks/D_test.jsonl` to evaluate on.
pub fn run(options: &SplitOptions, common: &Common) -> Result<SplitReport> {
    let ready = Ready::new(options, common)?;
    let empty = ready.domains.iter().flat_map(|(_, files)| files).filter(|(_, text)| text.is_empty());
    let report = SplitReport {
        out: options.out.clone(),
        domains: ready.cuts().cloned().collect(),
        warnings: empty.map(|(name, _)| format!("{name} would have no rows and is not written")).collect(),
        already_finished: false,
    };
    let begun = Output::begin_anew(&options.out, "data mmlu split", &ready.fingerprint, common.output())?;
    let Begun::Work(output) = begun else {
        return Ok(SplitReport { already_finished: true, ..report });
    };
    let tasks = output.dir().join(TASKS);
    std::fs::create_dir(&tasks).map_err(Error::io(&tasks))?;
    let mut known = BTreeMap::new();
    for (name, text) in
        ready.domains.into_iter().flat_map(|(_, files)| files).filter(|(_, text)| !text.is_empty())
    {
        let hash = digest::write_file(&output.dir().join(Path::new(&name)), text.as_bytes())?;
        known.insert(name, hash);
    }
    let mut provenance = Provenance::new("data mmlu split");
    provenance.seed = Some(common.seed);
    provenance.options.insert("allow_duplicates".into(), options.allow_duplicates.into());
    provenance.seal(output.dir(), known)?;
    output.finish()?;
    Ok(report)
}

fn sizes(id: &str, cut: &Cut) -> DomainCut {
    DomainCut {
        domain: id.to_string(),
        name: domains::name(id).to_string(),
        rows: cut.train.len() + cut.validation.len() + cut.test.len(),
        train: cut.train.len(),
        validation: cut.validation.len(),
        test: cut.test.len(),
        repeated: cut.repeated,
        moved: cut.moved,
    }
}

fn files(id: &str, pool: &[&Row], cut: &Cut) -> Files {
    let items = |rows: &[usize]| rows.iter().map(|&n| &pool[n].item).collect::<Vec<_>>();
    let (train, validation, test) = (items(&cut.train), items(&cut.validation), items(&cut.test));
    let task = |items: &[&Item]| lines::of_objects(items.iter().map(|i| i.to_json()));
    vec![
        (format!("{id}.train.jsonl"), lines::of_objects(train.into_iter().map(lesson))),
        (format!("{id}.val.jsonl"), lines::of_objects(validation.iter().map(|i| lesson(i)))),
        (format!("{TASKS}/{id}_val.jsonl"), task(&validation)),
        (format!("{TASKS}/{id}_test.jsonl"), task(&test)),
    ]
}

/// A question to learn from: the prompt that evaluation asks with, and the answer's letter as it scores it.
fn lesson(item: &Item) -> Map<String, Value> {
    let prompt = template::prompt(item, &[]);
    let completion = prompt.continuations[item.gold].clone();
    [("id", item.id.clone()), ("prompt", prompt.context), ("completion", completion)]
        .map(|(key, text)| (key.to_string(), text.into()))
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::killed;
    use super::*;
    use crate::data::mmlu::import;

    #[test]
    fn a_killed_split_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let rows =
            import::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mmlu/hub"))).unwrap().rows;
        std::fs::write(dir.path().join(ROWS), rows::text(&rows)).unwrap();
        let options =
            |out: &Path| SplitOptions { dir: dir.path().into(), out: out.into(), allow_duplicates: true };
        let Ready { fingerprint, .. } = Ready::new(&options(Path::new("out")), &Common::default()).unwrap();
        killed::goes_on("data mmlu split", &fingerprint, "tasks/old_test.jsonl", |out, common| {
            let report = run(&options(out), common).unwrap();
            assert!(!report.already_finished && out.join(TASKS).exists());
        });
    }
}
