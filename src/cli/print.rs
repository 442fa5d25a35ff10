//! Reports as people read them, or as one JSON document.

use std::io::{ErrorKind, Write};
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::model::memory::{Part, Plan, human_bytes};
use crate::stage::evaluate::EvalReport;
use crate::stage::evaluate::accuracy::Accuracy;
use crate::stage::train::TrainReport;

/// How results are written.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// One JSON document.
    pub json: bool,
}

impl Output {
    /// Writes `report` as JSON, or what `human` makes of it.
    pub fn report(self, report: &impl Serialize, human: impl FnOnce() -> String) -> Result<()> {
        if self.json {
            let json = serde_json::to_string_pretty(report)
                .map_err(|e| Error::file(Path::new("stdout"), e.to_string()))?;
            text(&(json + "\n"))
        } else {
            let mut human = human();
            if !human.ends_with('\n') {
                human.push('\n');
            }
            text(&human)
        }
    }
}

/// Writes to stdout; a reader that went away is no error.
pub fn text(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::io("stdout")),
    }
}

/// Columns of text, the first to the left, the others to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, (cell, w)) in row.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(w - cell.chars().count());
            line += &if c == 0 { format!("{cell}{pad}") } else { format!("  {pad}{cell}") };
        }
        out += line.trim_end();
        out.push('\n');
    }
    out
}

/// A memory plan by part.
pub fn plan(plan: &Plan) -> String {
    let mut rows: Vec<Vec<String>> = Part::ALL
        .into_iter()
        .map(|p| (p, plan.part(p)))
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(p, bytes)| vec![p.name().to_string(), human_bytes(bytes)])
        .collect();
    rows.push(vec!["total".into(), human_bytes(plan.total())]);
    table(&rows)
}

/// What a training run did.
pub fn train(r: &TrainReport) -> String {
    if r.already_finished {
        return format!("{}: already finished", r.out.display());
    }
    let loss = |l: Option<f64>| l.map_or_else(|| "–".to_string(), |l| format!("{l:.4}"));
    let mut text = format!(
        "{}: {} steps on {} documents, loss {} → {}, {:.0} tokens/s, {} trained parameters, memory planned {}",
        r.out.display(),
        r.steps,
        r.documents,
        loss(r.first_loss),
        loss(r.last_loss),
        r.tokens_per_second,
        r.parameters,
        human_bytes(r.plan.total()),
    );
    if let Some(v) = r.validation {
        text += &format!(", validation loss {:.4} at step {}", v.loss, v.step);
    }
    if r.skipped > 0 {
        text += &format!("\n{} bad lines were left out", r.skipped);
    }
    text
}

/// Accuracies in percent with standard errors, a row a task.
pub fn eval(r: &EvalReport) -> String {
    let name = |c: &Option<String>| c.clone().unwrap_or_else(|| "base".into());
    let mut text = String::new();
    if !r.text.is_empty() {
        let mut rows = vec![["", "tokens", "nll per token", "perplexity"].map(String::from).to_vec()];
        for (column, score) in r.columns.iter().zip(&r.text) {
            let cells =
                [score.tokens.to_string(), format!("{:.4}", score.nll), format!("{:.3}", score.perplexity)];
            rows.push([vec![name(column)], cells.to_vec()].concat());
        }
        return table(&rows);
    }
    let accuracy = |a: &Accuracy| match (a.accuracy, a.standard_error) {
        (Some(p), Some(s)) => format!("{:.1} ± {:.1}", 100.0 * p, 100.0 * s),
        (Some(p), None) => format!("{:.1}", 100.0 * p),
        _ => "–".into(),
    };
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
    if !r.unfit.is_empty() {
        text += &format!(
            "{} items do not fit the model's positions and were left out (--json names them)\n",
            r.unfit.len()
        );
    }
    for item in &r.shown {
        text += &format!("\n{} {}\n{}\n", item.task, item.id, item.context);
        for (n, option) in item.options.iter().enumerate() {
            let scores: Vec<String> = item.logprobs.iter().map(|c| format!("{:9.4}", c[n])).collect();
            let mark = if n == item.gold { "*" } else { " " };
            text += &format!("{mark} {option:<12} {}\n", scores.join(" "));
        }
    }
    text
}
