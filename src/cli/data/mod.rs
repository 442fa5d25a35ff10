//! `data`: data sets made, checked and given to other programs.

use clap::Subcommand;

use self::cross::{CrossArgs, ReviewArgs};
use self::mmlu::{DataExportArgs, MmluCommand};
use super::args::Global;
use super::dry_run::Outline;
use super::print::Output;
use crate::error::{Error, Result};
use crate::stage::common::Common;

pub mod cross;
pub mod mmlu;

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
    /// Questions that need two domains at once, written by a model from pairs of questions
    ///
    /// Any OpenAI-compatible chat endpoint will do, on this machine or elsewhere. Of two questions it is asked whether
    /// they can be merged, what knowledge is behind each, and for a new question that needs both. Every answer goes to a
    /// ledger by the hash of what was asked: a run that ended early, however it did, goes on where it was with the same
    /// command, and nothing is paid for twice but what was under way. The same seed gives the same pairs, and the first
    /// that pass make the set.
    ///
    /// Example: anabranch data cross --source edges/tasks/hum_test.jsonl edges/tasks/sc_test.jsonl --train
    /// edges/hum.train.jsonl edges/sc.train.jsonl --base-url https://api.example.com/v1 --model reasoner --out cross
    Cross(Box<CrossArgs>),
    /// People check what data cross wrote, on a local web page by keyboard or on the terminal
    ///
    /// Each decision is on the disk, in DIR/reviews/NAME.jsonl, before the next item is shown.
    ///
    /// Example: anabranch data review cross --reviewer ann --sample 100 --accepted hum-sc.jsonl
    Review(ReviewArgs),
}

impl DataCommand {
    /// Does what was typed.
    pub(super) fn run(&self, global: &Global, common: &Common, out: Output) -> Result<()> {
        match self {
            DataCommand::Mmlu { command } => command.run(common, out),
            DataCommand::Export(args) => args.run(common, out),
            DataCommand::Cross(args) => args.run(global, common, out),
            DataCommand::Review(args) => args.run(common, out),
        }
    }

    /// What would be read and written.
    pub(super) fn outline(&self, outline: &mut Outline, global: &Global, common: &Common) -> Result<()> {
        match self {
            DataCommand::Mmlu { command } => command.outline(outline, common),
            DataCommand::Export(args) => args.outline(outline, common),
            DataCommand::Cross(args) => args.outline(outline, global, common),
            DataCommand::Review(_) => Err(Error::Usage(
                "--dry-run goes with the other data commands; data review only appends to a file, and --summary tells what is in it".into(),
            )),
        }
    }
}
