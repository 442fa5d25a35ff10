//! What a search found: a row for the base, each adapter and each fusion, and which fusion is the best.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::candidates::Candidate;
use super::scorer::{Answers, Outcome, Questions};
use crate::error::Error;
use crate::fuse::Recipe;
use crate::fuse::weights::Weights;
use crate::stage::evaluate::UnfitItem;
use crate::stage::evaluate::accuracy::{Accuracy, percent, weighted};
use crate::stage::evaluate::paired::Paired;

/// `search.json`'s format.
pub(super) const FORMAT: &str = "anabranch-search/1";

/// What the best fusion must be better than: `--require-better-than`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rival {
    /// The model without adapter.
    Base,
    /// The adapter that alone answers the most items rightly.
    BestEdge,
}

impl fmt::Display for Rival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rival::Base => "base",
            Rival::BestEdge => "best-edge",
        })
    }
}

impl FromStr for Rival {
    type Err = Error;

    fn from_str(s: &str) -> Result<Rival, Error> {
        [Rival::Base, Rival::BestEdge]
            .into_iter()
            .find(|r| r.to_string() == s)
            .ok_or_else(|| Error::Usage(format!("--require-better-than {s:?}: expected base or best-edge")))
    }
}

/// What is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The model without adapter.
    Base,
    /// One of the adapters alone.
    Edge,
    /// A fusion of them.
    Fusion,
}

/// What one of them answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What it is.
    pub kind: Kind,
    /// `base`, the adapter's folder, or the fusion in words.
    pub name: String,
    /// How it is fused.
    pub recipe: Option<Recipe>,
    /// With which weights.
    pub weights: Option<Weights>,
    /// The rank of the adapter; the largest where it differs by module.
    pub rank: Option<usize>,
    /// What went wrong in the arithmetic of a fusion that could not be scored, and that is never the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// All tasks together, each counted by its size.
    pub overall: Accuracy,
    /// Each task; none of a fusion that failed.
    pub tasks: Vec<Accuracy>,
    /// The base first, this second; none of the base itself.
    pub to_base: Option<Paired>,
    /// The best fusion first, this second; none of that itself.
    pub to_best: Option<Paired>,
}

/// All rows on some tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Names of the tasks.
    pub tasks: Vec<String>,
    /// Items that were scored.
    pub items: usize,
    /// Those that could not be.
    pub unfit: Vec<UnfitItem>,
    /// The base, the adapters in the order of the command line, the fusions from the simplest.
    pub rows: Vec<Row>,
}

impl Table {
    /// Of the `outcomes` of `questions`, one for each of `rows`; `best` is the best fusion's row.
    pub(super) fn new(questions: &Questions, mut rows: Vec<Row>, outcomes: &[Outcome], best: usize) -> Table {
        let items = &questions.items;
        let right: Vec<Option<Vec<bool>>> =
            outcomes.iter().map(|outcome| outcome.answers().map(Answers::right)).collect();
        let paired = |first: usize, second: usize| match (&right[first], &right[second]) {
            (Some(a), Some(b)) if first != second => Some(Paired::of(a, b)),
            _ => None,
        };
        for (n, row) in rows.iter_mut().enumerate() {
            match &outcomes[n] {
                Outcome::Answers(answers) => row.tasks = answers.accuracies(items),
                Outcome::Failed(why) => row.failed = Some(why.clone()),
            }
            row.overall = weighted(&row.tasks);
            (row.to_base, row.to_best) = (paired(0, n), paired(best, n));
        }
        Table {
            tasks: items.tasks.iter().map(|t| t.name.clone()).collect(),
            items: questions.len(),
            unfit: items.unfit.clone(),
            rows,
        }
    }

    /// The first of the rows of `kind` that answer the most items rightly.
    pub fn best(&self, kind: Kind) -> Option<usize> {
        let counts = |row: &Row| (row.kind == kind && row.failed.is_none()).then_some(row.overall.correct);
        first_best(self.rows.iter().map(counts))
    }
}

impl Row {
    fn new(kind: Kind, name: String) -> Row {
        Row {
            kind,
            name,
            recipe: None,
            weights: None,
            rank: None,
            failed: None,
            overall: Accuracy::default(),
            tasks: Vec::new(),
            to_base: None,
            to_best: None,
        }
    }

    /// The base.
    pub(super) fn base() -> Row {
        Row::new(Kind::Base, "base".into())
    }

    /// One adapter.
    pub(super) fn edge(name: &str, rank: usize) -> Row {
        Row { rank: Some(rank), ..Row::new(Kind::Edge, name.into()) }
    }

    /// One fusion.
    pub(super) fn fusion(candidate: &Candidate, rank: usize) -> Row {
        Row {
            recipe: Some(candidate.recipe),
            weights: Some(candidate.weights.clone()),
            rank: Some(rank),
            ..Row::new(Kind::Fusion, candidate.to_string())
        }
    }
}

/// The first of the largest counts.
pub(super) fn first_best(counts: impl Iterator<Item = Option<usize>>) -> Option<usize> {
    let mut best: Option<(usize, usize)> = None;
    for (n, count) in counts.enumerate() {
        if let Some(count) = count
            && best.is_none_or(|(_, most)| count > most)
        {
            best = Some((n, count));
        }
    }
    best.map(|(n, _)| n)
}

/// A finished search: `search.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Search {
    /// `anabranch-search/1`.
    pub format: String,
    /// On the tasks that chose.
    pub table: Table,
    /// The best fusion's row in `table`.
    pub best: usize,
    /// Fusions behind it that answer as many items rightly.
    pub equals: usize,
    /// What it had to be better than.
    pub required: Vec<Rival>,
    /// Up to which p of the paired test more right answers count as better.
    pub level: f64,
    /// Why it was not written; empty where it was.
    pub refused: Vec<String>,
    /// The base, the adapters and the best fusion on held-out tasks.
    pub test: Option<Table>,
    /// Held-out items that are among those that chose.
    pub test_items_that_chose: usize,
    /// What the reader should know.
    pub notes: Vec<String>,
}

impl Search {
    /// How many fusions were scored.
    pub fn candidates(&self) -> usize {
        self.table.rows.iter().filter(|row| row.kind == Kind::Fusion && row.failed.is_none()).count()
    }

    /// The fusions that could not be, each with the reason.
    pub fn failed(&self) -> impl Iterator<Item = (&str, &str)> {
        self.table.rows.iter().filter_map(|row| Some((row.name.as_str(), row.failed.as_deref()?)))
    }
}

/// What is wrong with believing the accuracy of the best.
pub(super) fn selection_bias(candidates: usize) -> String {
    format!(
        "the best of {candidates} was chosen on these items, so its accuracy and its p on them are optimistic: judge it \
         on items that chose nothing (--test FILE, or eval)"
    )
}

/// Why the best fusion, in row `best`, is not better than the rival in its row; none where it is: it answers more items
/// rightly, and McNemar's exact p is at most `level`. In `paired` the rival is the first.
pub(super) fn not_better(
    table: &Table,
    best: usize,
    (rival, row): (Rival, usize),
    level: f64,
    paired: &Paired,
) -> Option<String> {
    let told = |row: usize| {
        let row = &table.rows[row];
        format!("{}, {} %", row.name, percent(row.overall.accuracy, row.overall.standard_error))
    };
    let both = format!("the best fusion ({}) is not better than {rival} ({})", told(best), told(row));
    match paired.only_second > paired.only_first {
        false => Some(both),
        true if paired.p <= level => None,
        true => Some(format!(
            "{both}: it has more right answers, but McNemar's exact p is {:.4}, above the {level} of --level",
            paired.p
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(correct: &[(Kind, usize)]) -> Table {
        let rows = correct.iter().map(|&(kind, correct)| Row {
            overall: Accuracy::of((0..10).map(|n| (n < correct, false))),
            ..Row::new(kind, format!("{kind:?}"))
        });
        Table { tasks: vec![], items: 10, unfit: vec![], rows: rows.collect() }
    }

    #[test]
    fn the_first_of_equals_is_the_best() {
        let t = table(&[
            (Kind::Base, 9),
            (Kind::Edge, 2),
            (Kind::Fusion, 3),
            (Kind::Fusion, 7),
            (Kind::Fusion, 7),
        ]);
        assert_eq!((t.best(Kind::Fusion), t.best(Kind::Edge)), (Some(3), Some(1)));
        assert_eq!(first_best([None, Some(0), Some(0)].into_iter()), Some(1));
        assert_eq!(first_best(std::iter::empty()), None);
    }

    #[test]
    fn what_failed_is_never_the_best() {
        let mut t = table(&[(Kind::Base, 0), (Kind::Fusion, 0), (Kind::Fusion, 0)]);
        t.rows[1].failed = Some("NaN".into());
        assert_eq!(t.best(Kind::Fusion), Some(2));
        t.rows[2].failed = Some("NaN".into());
        assert_eq!(t.best(Kind::Fusion), None);
    }

    #[test]
    fn better_is_more_right_answers_and_a_small_p() {
        let t = table(&[(Kind::Base, 2), (Kind::Edge, 5), (Kind::Fusion, 8)]);
        let paired = |first: usize, second: usize| {
            let both = |n: usize, yes: bool| vec![yes; n];
            let (a, b) = ([both(first, true), both(second, false)], [both(first, false), both(second, true)]);
            Paired::of(&a.concat(), &b.concat())
        };
        let why = |rival, level, p: Paired| {
            let row = if rival == Rival::Base { 0 } else { 1 };
            not_better(&t, 2, (rival, row), level, &p)
        };
        // p of 0 : 6 is 1/32, of 0 : 5 it is 1/16.
        assert_eq!(why(Rival::Base, 0.05, paired(0, 6)), None);
        let close = why(Rival::Base, 0.05, paired(0, 5)).unwrap();
        assert!(
            close.contains("not better than base (Base, 20.0 ± 13.3 %)") && close.contains("0.0625"),
            "{close}"
        );
        assert_eq!(why(Rival::BestEdge, 1.0, paired(3, 6)), None);
        let worse = why(Rival::BestEdge, 1.0, paired(6, 6)).unwrap();
        assert!(worse.ends_with("not better than best-edge (Edge, 50.0 ± 16.7 %)"), "{worse}");
        assert_eq!("best-edge".parse::<Rival>().unwrap(), Rival::BestEdge);
        assert!("edge".parse::<Rival>().is_err());
    }
}
