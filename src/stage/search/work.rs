//! A search under way: every row scored once, whatever happens to the process.

use std::collections::{HashSet, VecDeque};
use std::path::Path;

use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use super::Rival;
use super::ready::Ready;
use super::scorer::{Answers, Questions, Scorer};
use super::table::{self, Kind, Search, Table};
use crate::backend::Backend;
use crate::error::{Error, Result};
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
    /// Scores every row, chooses, and scores the chosen one on the held-out tasks; with the journal in the folder `dir`.
    pub fn search<B: Backend, T: Real>(
        &self,
        backend: &B,
        dir: &Path,
        common: &Common,
    ) -> Result<(Search, Journal)> {
        let rows = self.rows();
        let (scored, edges) = (rows.len(), self.edges.len());
        let held_out = self.test.as_ref().map_or(0, |_| edges + 2);
        let counts = |n: usize, line: &Line| {
            let questions = if n < scored { Some(&self.questions) } else { self.test.as_ref() };
            questions.is_some_and(|q| q.len() == line.answers.len())
                && rows.get(n).is_none_or(|row| row.name == line.name)
        };
        let (journal, done) = Journal::resume(&dir.join(SCORES), counts)?;
        let bar = common.progress.bar("search", (scored + held_out) as u64);
        let mut work: Work<'_, B, T> =
            Work { ready: self, backend, common, scorer: None, journal, done: done.into(), bar };
        let answers = (0..scored)
            .map(|n| work.answers(&rows[n].name, &self.questions, n))
            .collect::<Result<Vec<_>>>()?;
        let counts: Vec<usize> =
            answers.iter().map(|a| a.right().into_iter().filter(|right| *right).count()).collect();
        let fusions = counts.iter().enumerate().map(|(n, count)| (n > edges).then_some(*count));
        let Some(best) = table::first_best(fusions) else {
            return Err(Error::Usage("--methods names no method".into()));
        };
        let equals = counts[best + 1..].iter().filter(|count| **count == counts[best]).count();
        let table = Table::new(&self.questions, rows.clone(), &answers, best);
        let refused = self.refusals(&table, best, &answers);
        let (mut test, mut repeated) = (None, 0);
        if let Some(questions) = self.test.as_ref().filter(|_| refused.is_empty()) {
            let which: Vec<usize> = (0..=edges).chain([best]).collect();
            let answers = which
                .iter()
                .map(|&n| work.answers(&rows[n].name, questions, n))
                .collect::<Result<Vec<_>>>()?;
            let own = which.iter().map(|&n| rows[n].clone()).collect();
            test = Some(Table::new(questions, own, &answers, edges + 1));
            repeated = self.repeated(questions);
        }
        work.bar.finish_and_clear();
        let mut notes = vec![table::selection_bias(self.candidates.len())];
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
    fn refusals(&self, table: &Table, best: usize, answers: &[Answers]) -> Vec<String> {
        let one = |&rival: &Rival| {
            let row = match rival {
                Rival::Base => 0,
                Rival::BestEdge => table.best(Kind::Edge)?,
            };
            let paired = Paired::of(&answers[row].right(), &answers[best].right());
            table::not_better(table, best, (rival, row), self.options.level, &paired)
        };
        self.options.required.iter().filter_map(one).collect()
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
    answers: Answers,
}

/// A search that is under way.
struct Work<'a, B: Backend, T: Real> {
    ready: &'a Ready<'a>,
    backend: &'a B,
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
    fn answers(&mut self, name: &str, questions: &Questions, n: usize) -> Result<Answers> {
        self.bar.set_message(name.to_string());
        let answers = match self.done.pop_front() {
            Some(line) => line.answers,
            None => {
                let answers = self.score(questions, n).map_err(|e| match e {
                    Error::Interrupted(_) => Error::Interrupted(KEPT.into()),
                    Error::Numeric(why) => Error::Numeric(format!("{name}: {why}")),
                    other => other,
                })?;
                let line = Line { name: name.into(), answers };
                self.journal.append(&line)?;
                line.answers
            }
        };
        self.bar.inc(1);
        Ok(answers)
    }

    fn score(&mut self, questions: &Questions, n: usize) -> Result<Answers> {
        let ready = self.ready;
        // One bar, that of the search.
        let silent = Common { progress: Progress::default(), ..self.common.clone() };
        silent.check_stop(KEPT)?;
        let scorer = match &mut self.scorer {
            Some(scorer) => scorer,
            none => none.insert(Scorer::new(self.backend, &ready.checkpoint, &ready.needs)?),
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
