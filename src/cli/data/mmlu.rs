//! `data mmlu` and `data export`: what was typed, what it means, what is printed.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::dry_run::Outline;
use crate::cli::print::{self, Output, table};
use crate::data::mmlu::import::{self as files, Import};
use crate::error::Result;
use crate::stage::common::Common;
use crate::stage::data::export::{self, ExportOptions, ExportReport};
use crate::stage::data::import::{self, ImportOptions, ImportReport};
use crate::stage::data::split::{self, DomainCut, SplitOptions, SplitReport};

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

impl MmluCommand {
    /// Does what was typed.
    pub(super) fn run(&self, common: &Common, out: Output) -> Result<()> {
        match self {
            MmluCommand::Import(args) => {
                let report = import::run(&args.options(), common)?;
                out.report(&report, || imported(&report))
            }
            MmluCommand::Split(args) => {
                let report = split::run(&args.options(), common)?;
                print::warnings(&report.warnings);
                out.report(&report, || parted(&report))
            }
        }
    }

    /// What would be read and written.
    pub(super) fn outline(&self, outline: &mut Outline, common: &Common) -> Result<()> {
        match self {
            MmluCommand::Import(args) => {
                let options = args.options();
                let Import { rows, files, .. } = files::read(&options.path)?;
                outline.reads(&files);
                outline.folder(&options.out, common)?;
                outline.steps.push(format!("import {} rows", rows.len()));
            }
            MmluCommand::Split(args) => {
                let options = args.options();
                outline.reads([&options.dir]);
                outline.folder(&options.out, common)?;
                for cut in split::Ready::new(&options, common)?.cuts() {
                    let (train, validation, test) = (cut.train, cut.validation, cut.test);
                    outline
                        .steps
                        .push(format!("cut {} into {train}, {validation} and {test} rows", cut.domain));
                }
            }
        }
        Ok(())
    }
}

impl DataExportArgs {
    /// Does what was typed.
    pub(super) fn run(&self, common: &Common, out: Output) -> Result<()> {
        let report = export::run(&self.options(), common)?;
        out.report(&report, || exported(&report))
    }

    /// What would be read and written.
    pub(super) fn outline(&self, outline: &mut Outline, common: &Common) -> Result<()> {
        let options = self.options();
        outline.reads(options.tasks.iter().chain(&options.shots_from));
        outline.folder(&options.out, common)?;
        for task in export::Ready::new(&options)?.tasks {
            outline.steps.push(format!("export {} items as {}", task.items, task.name));
        }
        Ok(())
    }
}

fn finished(already: bool) -> &'static str {
    if already { " (already finished)" } else { "" }
}

/// What was imported.
fn imported(r: &ImportReport) -> String {
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
fn cuts<'a>(domains: impl Iterator<Item = &'a DomainCut>) -> String {
    let rows = domains.map(|d| {
        let counts = [d.train, d.validation, d.test, d.rows, d.repeated, d.moved];
        [vec![d.name.clone(), d.domain.clone()], counts.map(|n| n.to_string()).to_vec()].concat()
    });
    let head = ["domain", "", "train", "val", "test", "rows", "repeated", "moved"].map(String::from).to_vec();
    table(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
}

/// What was cut.
fn parted(r: &SplitReport) -> String {
    let mut text = format!("{}{}\n{}", r.out.display(), finished(r.already_finished), cuts(r.domains.iter()));
    let (repeated, moved) = r.domains.iter().fold((0, 0), |(a, b), d| (a + d.repeated, b + d.moved));
    if repeated > 0 {
        text += &format!("{repeated} questions stand more than once; {moved} rows moved for them\n");
    }
    text
}

/// What was exported.
fn exported(r: &ExportReport) -> String {
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
