//! A search under way: every row scored once, whatever happens to the process.

use std::collections::{HashSet, VecDeque};
use std::path::Path;

use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use super::Rival;
use super::ready::Ready;
use super::scorer::{Answers, Outcome, Questions, Scorer};
use super::table::{self, Kind, Search, Table};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::packing::PackedWeights;
use crate::stage::adapters;
use crate::stage::common::Common;
use crate::stage::evaluate::paired::Paired;
use crate::stage::journal::Journal;
use crate::stage::progress::Progress;
use crate::tensor::Real;

/// The journal of answers; hidden, so that it is no part of the output that is sealed around it.
const SCORES: &str = ".scores.jsonl";
/// What there is when the process is asked to stop.
const KEPT: &str = "the scores so far are kept, --resume goes on from them";

impl Ready<'_> {
    /// Scores every row, chooses, and scores the chosen one on the held-out tasks, with the weights of `packed` packed; with the
    /// journal in the folder `dir`.
    pub fn search<B: Backend, T: Real>(
        &self,
        backend: &B,
        packed: PackedWeights,
        dir: &Path,
        common: &Common,
    ) -> Result<(Search, Journal)> {
        let rows = self.rows();
        let (scored, edges) = (rows.len(), self.edges.len());
        let held_out = self.test.as_ref().map_or(0, |_| edges + 2);
        let counts = |n: usize, line: &Line| {
            let (questions, place) = match n.checked_sub(scored) {
                None => (Some(&self.questions), n),
                Some(place) => (self.test.as_ref(), place),
            };
            let whole = match &line.outcome {
                Outcome::Answers(answers) => questions.is_some_and(|q| q.len() == answers.len()),
                Outcome::Failed(_) => place > edges,
            };
            whole && rows.get(n).is_none_or(|row| row.name == line.name)
        };
        let (journal, done) = Journal::resume(&dir.join(SCORES), counts)?;
        let bar = common.progress.bar("search", (scored + held_out) as u64);
        let mut work: Work<'_, B, T> =
            Work { ready: self, backend, packed, common, scorer: None, journal, done: done.into(), bar };
        let outcomes = (0..scored)
            .map(|n| work.outcome(&rows[n].name, &self.questions, n))
            .collect::<Result<Vec<_>>>()?;
        let counts: Vec<Option<usize>> =
            outcomes.iter().map(|outcome| outcome.answers().map(Answers::correct)).collect();
        let fusions = counts.iter().enumerate().map(|(n, count)| count.filter(|_| n > edges));
        let Some(best) = table::first_best(fusions) else {
            return Err(self.nothing(&outcomes[edges + 1..]));
        };
        let equals = counts[best + 1..].iter().filter(|count| **count == counts[best]).count();
        let table = Table::new(&self.questions, rows.clone(), &outcomes, best);
        let mut refused = self.refusals(&table, best, &outcomes);
        let (mut test, mut repeated) = (None, 0);
        if let Some(questions) = self.test.as_ref().filter(|_| refused.is_empty()) {
            let which: Vec<usize> = (0..=edges).chain([best]).collect();
            let outcomes = which
                .iter()
                .map(|&n| work.outcome(&rows[n].name, questions, n))
                .collect::<Result<Vec<_>>>()?;
            if let Outcome::Failed(why) = &outcomes[edges + 1] {
                refused.push(format!("the best fusion ({}) fails on --test: {why}", rows[best].name));
            }
            let own = which.iter().map(|&n| rows[n].clone()).collect();
            test = Some(Table::new(questions, own, &outcomes, edges + 1));
            repeated = self.repeated(questions);
        }
        work.bar.finish_and_clear();
        let compared = counts[edges + 1..].iter().flatten().count();
        let mut notes = vec![table::selection_bias(compared)];
        if repeated > 0 {
            notes.push(format!("{repeated} items of --test stand in --task too: these are not held out"));
        }
        if let Some(edge) = table.best(Kind::Edge)
            && counts[edge] > counts[best]
        {
            notes.push(format!("{} alone answers more items rightly than any fusion", table.rows[edge].name));
        }
        let search = Search {
            format: table::FORMAT.into(),
            table,
            best,
            equals,
            required: self.options.required.clone(),
            level: self.options.level,
            refused,
            test,
            test_items_that_chose: repeated,
            notes,
        };
        Ok((search, work.journal))
    }

    /// Why the best candidate, in row `best`, is not to be written.
    fn refusals(&self, table: &Table, best: usize, outcomes: &[Outcome]) -> Vec<String> {
        let right = |row: usize| outcomes[row].answers().map(Answers::right);
        let one = |&rival: &Rival| {
            let row = match rival {
                Rival::Base => 0,
                Rival::BestEdge => table.best(Kind::Edge)?,
            };
            let paired = Paired::of(&right(row)?, &right(best)?);
            table::not_better(table, best, (rival, row), self.options.level, &paired)
        };
        self.options.required.iter().filter_map(one).collect()
    }

    /// Why no fusion is the best: what scoring them came to.
    fn nothing(&self, fusions: &[Outcome]) -> Error {
        match (self.candidates.first(), fusions.first()) {
            (Some((first, _)), Some(Outcome::Failed(why))) => {
                Error::Numeric(format!("all {} fusions failed; {first}: {why}", fusions.len()))
            }
            _ => Error::Usage("--methods names no method".into()),
        }
    }

    /// How many of the items of `questions` are asked in the tasks that choose.
    fn repeated(&self, questions: &Questions) -> usize {
        let asked: HashSet<_> = self.questions.items.prompts.iter().collect();
        questions.items.prompts.iter().filter(|prompt| asked.contains(prompt)).count()
    }
}

/// A line of the journal.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    name: String,
    #[serde(flatten)]
    outcome: Outcome,
}

/// A search that is under way.
struct Work<'a, B: Backend, T: Real> {
    ready: &'a Ready<'a>,
    backend: &'a B,
    /// Whose weights are packed.
    packed: PackedWeights,
    common: &'a Common,
    /// The model, once something is to be scored.
    scorer: Option<Scorer<'a, B, T>>,
    journal: Journal,
    /// What an earlier run scored, in order.
    done: VecDeque<Line>,
    bar: ProgressBar,
}

impl<B: Backend, T: Real> Work<'_, B, T> {
    /// What row `n` answers to `questions`, as an earlier run found or as it is found now.
    fn outcome(&mut self, name: &str, questions: &Questions, n: usize) -> Result<Outcome> {
        self.bar.set_message(name.to_string());
        let outcome = match self.done.pop_front() {
            Some(line) => line.outcome,
            None => {
                let outcome = match self.score(questions, n) {
                    Ok(answers) => Outcome::Answers(answers),
                    // The others may be fine.
                    Err(Error::Numeric(why)) if n > self.ready.edges.len() => Outcome::Failed(why),
                    Err(Error::Numeric(why)) => return Err(Error::Numeric(format!("{name}: {why}"))),
                    Err(Error::Interrupted(_)) => return Err(Error::Interrupted(KEPT.into())),
                    Err(other) => return Err(other),
                };
                let line = Line { name: name.into(), outcome };
                self.journal.append(&line)?;
                line.outcome
            }
        };
        self.bar.inc(1);
        Ok(outcome)
    }

    fn score(&mut self, questions: &Questions, n: usize) -> Result<Answers> {
        let ready = self.ready;
        // One bar, that of the search.
        let silent = Common { progress: Progress::default(), ..self.common.clone() };
        silent.check_stop(KEPT)?;
        let scorer = match &mut self.scorer {
            Some(scorer) => scorer,
            none => {
                none.insert(Scorer::new(self.backend, &ready.checkpoint, &ready.needs, self.packed, &silent)?)
            }
        };
        let edges = ready.edges.len();
        if n == 0 {
            return scorer.answers(questions, None, &silent);
        }
        let (layout, values) = if n <= edges {
            let mut values = Vec::new();
            (adapters::append(&mut values, &ready.inputs.adapters[n - 1]), values)
        } else {
            let plan = ready.fusion(&ready.candidates[n - 1 - edges].0, &silent)?;
            (plan.layout(), plan.values(self.backend, (&silent, KEPT))?)
        };
        scorer.answers(questions, Some((layout, &values)), &silent)
    }
}
