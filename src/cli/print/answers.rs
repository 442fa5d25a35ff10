//! What adapters answer to the items of tasks: evaluations and searches.

use std::cmp::Reverse;

use super::{certified, table};
use crate::stage::evaluate::accuracy::{Accuracy, percent};
use crate::stage::evaluate::letters::{Letters, letter};
use crate::stage::evaluate::paired::Paired;
use crate::stage::evaluate::{EvalReport, PairReport, ShownItem};
use crate::stage::search::{Kind, Row, SEARCH, SearchReport, Table};

/// The most pairs of columns that are printed one by one; of more, those with the first column are.
const PAIRS: usize = 10;
/// The most candidates that are printed.
const CANDIDATES: usize = 20;

/// Accuracies in percent with standard errors, a row a task.
pub fn eval(r: &EvalReport) -> String {
    let name = |c: &Option<String>| c.clone().unwrap_or_else(|| "base".into());
    let mut text = if r.already_finished { "already finished\n".to_string() } else { String::new() };
    if !r.text.is_empty() {
        let mut rows = vec![["", "tokens", "nll per token", "perplexity"].map(String::from).to_vec()];
        for (column, score) in r.columns.iter().zip(&r.text) {
            let cells =
                [score.tokens.to_string(), format!("{:.4}", score.nll), format!("{:.3}", score.perplexity)];
            rows.push([vec![name(column)], cells.to_vec()].concat());
        }
        return text + &table(&rows);
    }
    let accuracy = |a: &Accuracy| percent(a.accuracy, a.standard_error);
    let mut rows = vec![
        [vec!["accuracy, %".to_string(), "items".into()], r.columns.iter().map(name).collect()].concat(),
    ];
    let mut row = |label: String, items: usize, cells: &[Accuracy]| {
        rows.push([vec![label, items.to_string()], cells.iter().map(accuracy).collect()].concat());
    };
    for task in &r.tasks {
        row(task.name.clone(), task.items - task.unfit, &task.columns);
        for subset in &task.subsets {
            let items = subset.columns.first().map_or(0, |a| a.items);
            row(format!("  {}", subset.subject), items, &subset.columns);
        }
    }
    if r.tasks.len() > 1 {
        row("all, by size".into(), r.overall.first().map_or(0, |a| a.items), &r.overall);
    }
    text += &table(&rows);
    let ties: usize = r.overall.iter().map(|a| a.ties).sum();
    if ties > 0 {
        text += &format!("{ties} answers had an equally likely option beside them; the first counts\n");
    }
    text += &unfit(r.unfit.len());
    let names: Vec<String> = r.columns.iter().map(name).collect();
    text += &letters(&r.letters, &names);
    text += &pairs(&r.pairs);
    r.shown.iter().for_each(|item| text += &shown(item, &names));
    text
}

/// How many items were left out.
fn unfit(items: usize) -> String {
    match items {
        0 => String::new(),
        n => format!("{n} items do not fit the model's positions and were left out (--json names them)\n"),
    }
}

/// How often each option is right, and answered by each column.
fn letters(l: &Letters, names: &[String]) -> String {
    let items: usize = l.gold.iter().sum();
    if items == 0 {
        return String::new();
    }
    let shares = |counts: &[usize]| -> Vec<String> {
        counts.iter().map(|n| format!("{:.1}", 100.0 * *n as f64 / items as f64)).collect()
    };
    let mut rows = vec![
        [vec!["answers, %".to_string()], (0..l.gold.len()).map(letter).collect()].concat(),
        [vec!["right".into()], shares(&l.gold)].concat(),
    ];
    rows.extend(names.iter().zip(&l.predicted).map(|(name, n)| [vec![name.clone()], shares(n)].concat()));
    format!("\n{}", table(&rows))
}

/// Columns compared item by item.
fn pairs(all: &[PairReport]) -> String {
    let Some(first) = all.first() else { return String::new() };
    let name = |c: &Option<String>| c.clone().unwrap_or_else(|| "base".into());
    let mut rows = vec![
        ["paired, points", "difference", "95 %", "only 1st", "only 2nd", "p"].map(String::from).to_vec(),
    ];
    for pair in all.iter().filter(|pair| all.len() <= PAIRS || pair.first == first.first) {
        let p = &pair.paired;
        let Some((difference, [low, high])) = p.difference.zip(p.interval) else { continue };
        rows.push(vec![
            format!("{} → {}", name(&pair.first), name(&pair.second)),
            points(difference),
            format!("{} to {}", points(low), points(high)),
            p.only_first.to_string(),
            p.only_second.to_string(),
            p_value(p.p),
        ]);
    }
    let printed = rows.len() - 1;
    let mut text = format!("\n{}", table(&rows));
    if printed < all.len() {
        text += &format!("{} more pairs are in --json and in what --out writes\n", all.len() - printed);
    }
    text + "accuracy of the second less the first's, with the paired bootstrap's interval; p: McNemar's exact test\n"
}

/// A difference of accuracies in percentage points.
fn points(difference: f64) -> String {
    format!("{:+.1}", 100.0 * difference)
}

fn p_value(p: f64) -> String {
    if p < 1e-4 { "<0.0001".into() } else { format!("{p:.4}") }
}

/// A question and what each column makes of it.
fn shown(item: &ShownItem, names: &[String]) -> String {
    let mut rows = vec![[vec!["% among the options".to_string()], names.to_vec()].concat()];
    for (n, option) in item.options.iter().enumerate() {
        let mark = if n == item.gold { "*" } else { " " };
        let shares = item.probabilities.iter().map(|c| format!("{:.1}", 100.0 * c[n])).collect();
        rows.push([vec![format!("{mark} {}", excerpt(option, 40))], shares].concat());
    }
    let chosen = item.predicted.iter().map(|&n| item.options.get(n).map_or("", |o| o.trim()));
    rows.push([vec!["answer".into()], chosen.map(|o| excerpt(o, 24)).collect()].concat());
    rows.push([vec!["greedy text".into()], item.greedy.iter().map(|t| excerpt(t, 24)).collect()].concat());
    format!("\n{} {}\n{}\n{}", item.task, item.id, item.context, table(&rows))
}

/// The first line of a text, at most so many characters of it.
fn excerpt(text: &str, most: usize) -> String {
    let line = text.trim().lines().next().unwrap_or_default();
    match line.chars().count() > most {
        true => line.chars().take(most - 1).chain(['…']).collect(),
        false => line.into(),
    }
}

/// The best candidates, what was written, and what to think of it.
pub fn search(r: &SearchReport) -> String {
    let s = &r.search;
    let mut text = if r.already_finished { "already finished\n".to_string() } else { String::new() };
    let (printed, left_out) = candidates(&s.table);
    text += &printed;
    if left_out > 0 {
        text += &format!("{left_out} more candidates are in --json and {SEARCH}\n");
    }
    text += &unfit(s.table.unfit.len());
    for (name, why) in s.failed().take(CANDIDATES) {
        text += &format!("{name} failed: {why}\n");
    }
    let more = s.failed().skip(CANDIDATES).count();
    if more > 0 {
        text += &format!("{more} more failed, for reasons that are in --json and {SEARCH}\n");
    }
    let best = &s.table.rows[s.best];
    text += &format!("best of {}: {}\n", s.candidates(), best.name);
    if s.equals > 0 {
        text +=
            &format!("{} others answer as many items rightly; the simplest of them was taken\n", s.equals);
    }
    for note in &s.notes {
        text += &format!("note: {note}\n");
    }
    if let Some(test) = &s.test {
        text += &format!("\non held-out items\n{}{}", candidates(test).0, unfit(test.unfit.len()));
    }
    for why in &s.refused {
        text += &format!("not written: {why}\n");
    }
    if !s.refused.is_empty() {
        return text;
    }
    let of_rank = best.rank.map(|rank| format!("an adapter of rank {rank}")).unwrap_or_default();
    text.push('\n');
    text + &certified(&r.out, &of_rank, r.certificate.as_ref())
}

/// A table's rows, the base and the adapters first, then the fusions that were scored by right answers; and how many of
/// them were too many.
fn candidates(t: &Table) -> (String, usize) {
    let head = ["accuracy, %", "to base", "p", "to best", "p"].map(String::from);
    let mut rows = vec![[vec![format!("{} items", t.items)], head.to_vec()].concat()];
    let to = |p: &Option<Paired>| match p {
        Some(p) => [p.difference.map(points).unwrap_or_default(), p_value(p.p)],
        None => ["–".into(), String::new()],
    };
    let (mut fusions, others): (Vec<&Row>, Vec<&Row>) =
        t.rows.iter().filter(|row| row.failed.is_none()).partition(|row| row.kind == Kind::Fusion);
    fusions.sort_by_key(|row| Reverse(row.overall.correct));
    let left_out = fusions.len().saturating_sub(CANDIDATES);
    for row in others.into_iter().chain(fusions.into_iter().take(CANDIDATES)) {
        let accuracy = percent(row.overall.accuracy, row.overall.standard_error);
        rows.push([vec![row.name.clone(), accuracy], [to(&row.to_base), to(&row.to_best)].concat()].concat());
    }
    (table(&rows), left_out)
}
