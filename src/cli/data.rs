//! The `data` commands: what was typed, and what is printed of their reports.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::print::table;
use crate::stage::data::export::{ExportOptions, ExportReport};
use crate::stage::data::import::{ImportOptions, ImportReport};
use crate::stage::data::split::{DomainCut, SplitOptions, SplitReport};

/// `data`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// MMLU: read from any of its forms, cut into edges' data
    Mmlu {
        /// What to do
        #[command(subcommand)]
        command: MmluCommand,
    },
    /// Tasks for another program
    ///
    /// Example: anabranch data export hum_sc.jsonl --lm-eval --out hum_sc-harness
    Export(DataExportArgs),
}

/// `data mmlu`.
#[derive(Debug, Subcommand)]
pub enum MmluCommand {
    /// One JSONL file of MMLU: from the authors' CSV folders, Hugging Face's parquet folders, or JSONL
    ///
    /// Writes mmlu.jsonl, a line a question with its subject, domain and split, and dev/SUBJECT_dev.csv, the worked
    /// examples for eval --shots-from. Domains: hum (Humanities), sc (Social Sciences), stem (STEM), other.
    ///
    /// Example: anabranch data mmlu import mmlu/data --out mmlu
    Import(MmluImportArgs),
    /// Training data and tasks of an edge for each domain: 80, 10 and 10 % of MMLU's validation and test rows
    ///
    /// Writes for each domain D the files D.train.jsonl and D.val.jsonl (for train --data and --val), and
    /// tasks/D_val.jsonl and tasks/D_test.jsonl (for search and eval --task). Questions that stand twice in a domain are
    /// kept on one side.
    ///
    /// Example: anabranch data mmlu split mmlu --out edges
    Split(MmluSplitArgs),
}

/// `data mmlu import`.
#[derive(Debug, Args)]
pub struct MmluImportArgs {
    /// A folder or file of MMLU
    pub path: PathBuf,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// `data mmlu split`.
#[derive(Debug, Args)]
pub struct MmluSplitArgs {
    /// What `data mmlu import` wrote, or a file like its mmlu.jsonl
    pub dir: PathBuf,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Leave questions that stand twice where chance puts them: some of the test's may then be trained on
    #[arg(long)]
    pub allow_duplicates: bool,
}

/// `data export`.
#[derive(Debug, Args)]
pub struct DataExportArgs {
    /// Multiple-choice tasks: MMLU CSV or JSONL
    #[arg(required = true, num_args = 1.., value_name = "TASK")]
    pub tasks: Vec<PathBuf>,
    /// For lm-evaluation-harness: YAML and JSONL, a task for each subject
    #[arg(long, required = true)]
    pub lm_eval: bool,
    /// Solved examples before each question
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub shots: usize,
    /// Where they come from
    #[arg(long, value_name = "DIR", requires = "shots")]
    pub shots_from: Option<PathBuf>,
    /// Where to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

impl MmluImportArgs {
    /// What it means.
    pub fn options(&self) -> ImportOptions {
        ImportOptions { path: self.path.clone(), out: self.out.clone() }
    }
}

impl MmluSplitArgs {
    /// What it means.
    pub fn options(&self) -> SplitOptions {
        SplitOptions { dir: self.dir.clone(), out: self.out.clone(), allow_duplicates: self.allow_duplicates }
    }
}

impl DataExportArgs {
    /// What it means.
    pub fn options(&self) -> ExportOptions {
        ExportOptions {
            tasks: self.tasks.clone(),
            shots: self.shots,
            shots_from: self.shots_from.clone(),
            out: self.out.clone(),
        }
    }
}

fn finished(already: bool) -> &'static str {
    if already { " (already finished)" } else { "" }
}

/// What was imported.
pub fn imported(r: &ImportReport) -> String {
    let rows = r.domains.iter().map(|d| {
        let counts = [d.subjects, d.dev, d.validation, d.test, d.validation + d.test];
        [vec![d.name.clone(), d.domain.clone()], counts.map(|n| n.to_string()).to_vec()].concat()
    });
    let head = ["domain", "", "subjects", "dev", "validation", "test", "pool"].map(String::from).to_vec();
    let mut text = format!("{}{}\n", r.file.display(), finished(r.already_finished));
    text += &table(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
    if r.repeated > 0 {
        text += &format!("{} questions stand more than once in a domain's pool\n", r.repeated);
    }
    for what in &r.left_out {
        text += &format!("left out: {what}\n");
    }
    text
}

/// The sizes of a cut.
pub fn cuts<'a>(domains: impl Iterator<Item = &'a DomainCut>) -> String {
    let rows = domains.map(|d| {
        let counts = [d.train, d.validation, d.test, d.rows, d.repeated, d.moved];
        [vec![d.name.clone(), d.domain.clone()], counts.map(|n| n.to_string()).to_vec()].concat()
    });
    let head = ["domain", "", "train", "val", "test", "rows", "repeated", "moved"].map(String::from).to_vec();
    table(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
}

/// What was cut.
pub fn split(r: &SplitReport) -> String {
    let mut text = format!("{}{}\n{}", r.out.display(), finished(r.already_finished), cuts(r.domains.iter()));
    let (repeated, moved) = r.domains.iter().fold((0, 0), |(a, b), d| (a + d.repeated, b + d.moved));
    if repeated > 0 {
        text += &format!("{repeated} questions stand more than once; {moved} rows moved for them\n");
    }
    text
}

/// What was exported.
pub fn exported(r: &ExportReport) -> String {
    let mut text = format!("{}{}\n", r.out.display(), finished(r.already_finished));
    for task in &r.tasks {
        let subjects = match task.subtasks.len() {
            1 => String::new(),
            n => format!(" in {n} subjects"),
        };
        text += &format!("{}: {} items{subjects}\n", task.name, task.items);
    }
    let names: Vec<&str> = r.tasks.iter().map(|t| t.name.as_str()).collect();
    text += &format!(
        "cd {} && lm_eval --model hf --model_args pretrained=MODEL --include_path . --tasks {}\n",
        r.out.display(),
        names.join(",")
    );
    text
}
