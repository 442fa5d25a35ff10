//! `data mmlu import`: MMLU in any of its forms as one canonical file, and its worked examples for `--shots-from`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::digest;
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::data::mmlu::import::{self, Import};
use crate::data::mmlu::rows::{self, ROWS, Row, Split};
use crate::data::mmlu::{cut, domains};
use crate::data::tasks;
use crate::error::{Error, Result};
use crate::stage::common::Common;

/// The folder of worked examples, `SUBJECT_dev.csv` each.
pub const SHOTS: &str = "dev";

/// What is imported.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// A folder or file of MMLU.
    pub path: PathBuf,
    /// Where to write.
    pub out: PathBuf,
}

/// What was imported.
#[derive(Clone, Debug, Serialize)]
pub struct ImportReport {
    /// Where it lies.
    pub out: PathBuf,
    /// The canonical file.
    pub file: PathBuf,
    /// Rows by domain.
    pub domains: Vec<DomainRows>,
    /// Questions of one domain that stand more than once among its validation and test rows.
    pub repeated: usize,
    /// What was not read, and why.
    pub left_out: Vec<String>,
    /// Whether `--resume` found it done.
    pub already_finished: bool,
}

/// One domain's rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DomainRows {
    /// As items name it.
    pub domain: String,
    /// As people do.
    pub name: String,
    /// Subjects in it.
    pub subjects: usize,
    /// Worked examples.
    pub dev: usize,
    /// Validation rows, a part of the pool that `data mmlu split` cuts.
    pub validation: usize,
    /// Test rows, the other part.
    pub test: usize,
}

/// Reads MMLU and writes the canonical file.
pub fn run(options: &ImportOptions, common: &Common) -> Result<ImportReport> {
    let Import { rows, left_out, digest, .. } = import::read(&options.path)?;
    let report = |already_finished| ImportReport {
        out: options.out.clone(),
        file: options.out.join(ROWS),
        domains: domains_of(&rows),
        repeated: repeated(&rows),
        left_out: left_out.clone(),
        already_finished,
    };
    let Begun::Work(output) = Output::begin_anew(&options.out, "data mmlu import", &digest, common.output())?
    else {
        return Ok(report(true));
    };
    let mut known = BTreeMap::new();
    let hash = digest::write_file(&output.dir().join(ROWS), rows::text(&rows).as_bytes())?;
    known.insert(ROWS.to_string(), hash);
    write_shots(&output.dir().join(SHOTS), &rows)?;
    Provenance::new("data mmlu import").seal(output.dir(), known)?;
    output.finish()?;
    Ok(report(false))
}

/// A row counts for each of its domains.
fn domains_of(rows: &[Row]) -> Vec<DomainRows> {
    let ids = by_domain(rows);
    ids.into_iter()
        .map(|(id, rows)| {
            let of = |split| rows.iter().filter(|r| r.split == split).count();
            let mut subjects: Vec<&str> = rows.iter().map(|r| r.subject()).collect();
            subjects.sort_unstable();
            subjects.dedup();
            DomainRows {
                name: domains::name(&id).to_string(),
                subjects: subjects.len(),
                dev: of(Split::Dev),
                validation: of(Split::Validation),
                test: of(Split::Test),
                domain: id,
            }
        })
        .collect()
}

/// Rows by domain: MMLU's in their order, then others by name.
pub(super) fn by_domain(rows: &[Row]) -> Vec<(String, Vec<&Row>)> {
    let mut of: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        for domain in &row.item.domains {
            of.entry(domain).or_default().push(row);
        }
    }
    let place = |id: &str| domains::DOMAINS.iter().position(|d| d.id == id).unwrap_or(usize::MAX);
    let mut all: Vec<(String, Vec<&Row>)> = of.into_iter().map(|(id, rows)| (id.to_string(), rows)).collect();
    all.sort_by_key(|(id, _)| place(id));
    all
}

fn repeated(rows: &[Row]) -> usize {
    let of = |rows: Vec<&Row>| {
        cut::repeated(&rows.into_iter().filter(|r| r.split != Split::Dev).collect::<Vec<_>>())
    };
    by_domain(rows).into_iter().map(|(_, rows)| of(rows)).sum()
}

/// The dev rows in MMLU's own layout, a file for each subject in the folder `dir`, if there are any.
fn write_shots(dir: &Path, rows: &[Row]) -> Result<()> {
    let mut by_subject: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows.iter().filter(|r| r.split == Split::Dev) {
        by_subject.entry(row.subject()).or_default().push(row);
    }
    if !by_subject.is_empty() {
        std::fs::create_dir(dir).map_err(Error::io(dir))?;
    }
    for (subject, rows) in by_subject {
        let path = dir.join(format!("{subject}_dev.csv"));
        let mut writer = csv::Writer::from_writer(Vec::new());
        for record in rows.iter().filter_map(|r| tasks::csv_record(&r.item)) {
            writer.write_record(record).map_err(|e| Error::file(&path, e.to_string()))?;
        }
        let text = writer.into_inner().map_err(|e| Error::file(&path, e.to_string()))?;
        digest::write_file(&path, &text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::killed;
    use super::*;

    #[test]
    fn a_killed_import_goes_on() {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mmlu/hub"));
        let digest = import::read(&path).unwrap().digest;
        killed::goes_on("data mmlu import", &digest, "dev/old_dev.csv", |out, common| {
            let report = run(&ImportOptions { path: path.clone(), out: out.into() }, common).unwrap();
            assert!(!report.already_finished && out.join("dev/sociology_dev.csv").exists());
        });
    }
}
