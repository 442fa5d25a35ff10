//! `data review`: people look at what `data cross` wrote, and keep or reject it.

mod http;
mod server;
mod terminal;

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use self::terminal::Typed;
use super::cross::ITEMS;
use crate::checkpoint::json;
use crate::checkpoint::output_file::OutputFile;
use crate::data::cross::item::{Item, TaskLine};
use crate::data::lines;
use crate::data::review::agreement::{self, Agreement, Joint};
use crate::data::review::decisions::{self, Decision, Decisions, Reason, Verdict, Verdicts};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};
use crate::stage::common::Common;

/// What `data review` is told.
#[derive(Clone, Debug)]
pub struct ReviewOptions {
    /// The folder that `data cross` wrote.
    pub dir: PathBuf,
    /// Who looks.
    pub reviewer: String,
    /// How many items, drawn by the seed; all if none.
    pub sample: Option<usize>,
    /// How they are shown.
    pub how: How,
    /// Where the accepted items go in the end.
    pub accepted: Option<PathBuf>,
    /// Whether items that nobody decided count as accepted.
    pub keep_undecided: bool,
}

/// How items are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// On a page of a server on this machine; port 0 is any that is free.
    Page {
        /// The port.
        port: u16,
    },
    /// Line by line on the terminal.
    Terminal,
    /// Not at all: what was decided is counted.
    Summary,
}

/// What was decided so far.
#[derive(Debug, Serialize)]
pub struct ReviewReport {
    /// The folder.
    pub dir: PathBuf,
    /// Who looked.
    pub reviewer: String,
    /// Items that were to be looked at.
    pub items: usize,
    /// Of them, those that were decided.
    pub decided: usize,
    /// Good as they are.
    pub accepted: usize,
    /// Good after an edit.
    pub edited: usize,
    /// No good, by reason.
    pub rejected: BTreeMap<Reason, usize>,
    /// Decisions about texts that the items no longer have.
    pub stale: usize,
    /// Each two reviewers.
    pub agreement: Vec<Agreement>,
    /// What was written.
    pub accepted_file: Option<AcceptedReport>,
}

/// The file of accepted items.
#[derive(Debug, Serialize)]
pub struct AcceptedReport {
    /// The file.
    pub file: PathBuf,
    /// Items in it.
    pub items: usize,
    /// Items that all who decided reject.
    pub rejected: usize,
    /// Items that some keep and some reject, or edited differently: left out.
    pub disputed: usize,
    /// Items that nobody decided.
    pub undecided: usize,
}

/// The items that one person looks at, and what was decided.
struct Session<'a> {
    items: &'a [Item],
    /// Places of the items that are looked at, ascending.
    asked: &'a [usize],
    reviewer: &'a str,
    decisions: Decisions,
}

impl Session<'_> {
    fn verdict(&self, at: usize) -> Option<&Verdict> {
        self.decisions.verdicts().get(&at)
    }

    fn decide(&mut self, decision: &Decision) -> Result<std::result::Result<(), String>> {
        self.decisions.decide(self.items, decision)
    }

    /// How many of the items that are looked at were decided.
    fn decided(&self) -> usize {
        self.asked.iter().filter(|at| self.verdict(**at).is_some()).count()
    }
}

/// Shows the items until the reviewer or a signal ends it, and counts. `told` is given the page's address.
pub fn run(options: &ReviewOptions, common: &Common, told: impl FnOnce(&str)) -> Result<ReviewReport> {
    if let Some(file) = &options.accepted {
        OutputFile::look_ahead(file, common.force, made_here)?;
    }
    decisions::check_name(&options.reviewer)?;
    let items = items(&options.dir)?;
    let asked = sample(items.len(), options.sample, common.seed)?;
    let open = || Decisions::open(&options.dir, &options.reviewer, &items);
    let reviewer = &options.reviewer;
    match options.how {
        How::Page { port } => {
            let mut session = Session { items: &items, asked: &asked, reviewer, decisions: open()? };
            server::serve(&mut session, port, &common.stop, told)?;
        }
        How::Terminal => {
            let mut session = Session { items: &items, asked: &asked, reviewer, decisions: open()? };
            let input = Typed::of(BufReader::new(std::io::stdin()), &common.stop);
            terminal::run(&mut session, &input, std::io::stderr().lock())?;
        }
        How::Summary => {}
    }
    report(options, &items, &asked, common)
}

/// The items of the folder `dir`.
pub fn items(dir: &Path) -> Result<Vec<Item>> {
    let path = dir.join(ITEMS);
    if !path.exists() {
        return Err(Error::file(dir, format!("has no {ITEMS}: data review looks at what data cross wrote")));
    }
    let text = lines::read_text(&path)?;
    let mut items: Vec<Item> = Vec::new();
    for (line, text) in lines::numbered(&text) {
        let wrong = |why: String| Error::file(&path, format!("line {line}: {why}"));
        let item: Item = json::parse_line(text.as_bytes())
            .and_then(serde_json::from_value)
            .map_err(|e| wrong(format!("is no item: {e}")))?;
        if item.written.answer > 3 || item.sources.iter().any(|s| s.answer > 3) {
            return Err(wrong("answer is above 3".into()));
        }
        items.push(item);
    }
    let mut ids: Vec<&str> = items.iter().map(|i| i.id.as_str()).collect();
    ids.sort_unstable();
    if let Some(twice) = ids.windows(2).find(|w| w[0] == w[1]) {
        return Err(Error::file(&path, format!("has item {:?} twice", twice[0])));
    }
    if items.is_empty() {
        return Err(Error::file(&path, "has no items"));
    }
    Ok(items)
}

/// Which of `count` items are looked at: the same for all reviewers with this seed.
fn sample(count: usize, size: Option<usize>, seed: u64) -> Result<Vec<usize>> {
    let Some(size) = size else { return Ok((0..count).collect()) };
    if size == 0 || size > count {
        return Err(Error::Usage(format!("--sample is {size}, expected 1 to {count}, the number of items")));
    }
    let mut asked = Philox::new(seed, Purpose::Review.stream(0)).permutation(count);
    asked.truncate(size);
    asked.sort_unstable();
    Ok(asked)
}

fn report(options: &ReviewOptions, items: &[Item], asked: &[usize], common: &Common) -> Result<ReviewReport> {
    let (mut reviews, mut own, mut stale) = (Vec::new(), Verdicts::new(), 0);
    for (name, path) in decisions::reviewers(&options.dir)? {
        let (verdicts, others) = decisions::read(&path, items)?;
        if name == options.reviewer {
            (own, stale) = (verdicts.clone(), others);
        }
        reviews.push((name, verdicts));
    }
    let (mut accepted, mut edited, mut rejected) = (0, 0, BTreeMap::new());
    for at in asked {
        match own.get(at) {
            Some(Verdict::Accept) => accepted += 1,
            Some(Verdict::Edit { .. }) => edited += 1,
            Some(Verdict::Reject { reason }) => *rejected.entry(*reason).or_default() += 1,
            Some(Verdict::Undo) | None => {}
        }
    }
    let mut agreements = Vec::new();
    for (n, (first, a)) in reviews.iter().enumerate() {
        for (second, b) in &reviews[n + 1..] {
            agreements.push(agreement::agreement([first, second], [a, b]));
        }
    }
    let accepted_file = match &options.accepted {
        Some(file) => Some(write(file, items, &reviews, options.keep_undecided, common.force)?),
        None => None,
    };
    Ok(ReviewReport {
        dir: options.dir.clone(),
        reviewer: options.reviewer.clone(),
        items: asked.len(),
        decided: accepted + edited + rejected.values().sum::<usize>(),
        accepted,
        edited,
        rejected,
        stale,
        agreement: agreements,
        accepted_file,
    })
}

/// Writes what the reviewers together accept as a task.
fn write(
    file: &Path,
    items: &[Item],
    reviews: &[(String, Verdicts)],
    keep_undecided: bool,
    force: bool,
) -> Result<AcceptedReport> {
    let verdicts: Vec<&Verdicts> = reviews.iter().map(|(_, v)| v).collect();
    let (mut kept, mut rejected, mut disputed, mut undecided) = (Vec::new(), 0, 0, 0);
    for (at, item) in items.iter().enumerate() {
        match agreement::joint(item, at, &verdicts) {
            Joint::Accepted(item) => kept.push(*item),
            Joint::Rejected => rejected += 1,
            Joint::Disputed => disputed += 1,
            Joint::Undecided => {
                undecided += 1;
                if keep_undecided {
                    kept.push(item.clone());
                }
            }
        }
    }
    if kept.is_empty() {
        return Err(Error::Usage(format!(
            "--accepted {}: no item was accepted ({rejected} rejected, {disputed} disputed, {undecided} undecided), and a task has at least one",
            file.display()
        )));
    }
    let output = OutputFile::begin_with(file, force, made_here)?;
    lines::write(output.path(), kept.iter().map(Item::task_line))?;
    output.finish()?;
    Ok(AcceptedReport { file: file.to_path_buf(), items: kept.len(), rejected, disputed, undecided })
}

/// Whether a file begins with a line of a task as [`TaskLine`] has it.
pub fn made_here(start: &[u8]) -> bool {
    let first = start.split(|&b| b == b'\n').next().unwrap_or_default();
    let map: Option<Map<String, Value>> = serde_json::from_slice(first).ok();
    map.is_some_and(|map| map.keys().eq(TaskLine::KEYS))
}
