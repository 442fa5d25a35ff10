//! `report.html` of a finished run: one file, inline SVG, no network.

mod conflict;
mod plot;

use std::iter;
use std::path::{Path, PathBuf};

use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::Serialize;
use serde_json::Value as Json;

use self::conflict::ConflictView;
use self::plot::{Bar, Dot};
use super::flow::results::{Column, EdgeResult, Kind, Line, RESULTS, Results, Sweep, TaskResult};
use crate::checkpoint::json;
use crate::checkpoint::output_file::OutputFile;
use crate::error::{Error, Result};
use crate::fuse::conflict::ConflictReport;
use crate::model::memory::{self, Part, human_bytes};

/// The file's name.
pub const REPORT: &str = "report.html";

/// Reads `results.json` in `dir` and writes `report.html` beside it.
pub fn run(dir: &Path) -> Result<PathBuf> {
    let path = dir.join(RESULTS);
    if !path.exists() {
        return Err(Error::file(
            dir,
            format!("has no {RESULTS}: a report is made of a finished run's folder"),
        ));
    }
    let results: Results = json::typed(&path, json::parse(&path, &json::read_bounded(&path)?)?)?;
    write(dir, &results)
}

/// Writes `report.html` into `dir`.
pub fn write(dir: &Path, results: &Results) -> Result<PathBuf> {
    let path = dir.join(REPORT);
    let html = render(results).map_err(|e| Error::file(&path, format!("cannot be made: {e:#}")))?;
    let fresh = dir.join(format!("{REPORT}.new"));
    std::fs::write(&fresh, html).map_err(Error::io(&fresh))?;
    std::fs::rename(&fresh, &path).map_err(Error::io(&path))?;
    Ok(path)
}

/// The page of a run.
pub fn render(results: &Results) -> Result<String, minijinja::Error> {
    let sweeps: Vec<_> = results.sweeps.iter().enumerate().map(|(n, s)| SweepView::of(n, s)).collect();
    page(
        "run.html",
        context! {
            edges => results.edges.clone(),
            seed => results.seed,
            seconds => format!("{:.0}", results.seconds),
            notes => results.notes.clone(),
            sweeps => Value::from(Serde(sweeps)),
            ratios => Value::from(Serde(sweep_plot(results))),
        },
    )
}

/// Writes the page of a comparison of adapters with these names to `path`; one that is there only under `force`.
pub fn write_conflict(path: &Path, report: &ConflictReport, names: &[String], force: bool) -> Result<()> {
    let view = ConflictView::of(report, names, "module");
    let html = page("conflicts.html", context! { conflict => Value::from(Serde(view)) })
        .map_err(|e| Error::file(path, format!("cannot be made: {e:#}")))?;
    let file = OutputFile::begin(path, force)?;
    std::fs::write(file.path(), html).map_err(Error::io(path))?;
    file.finish()
}

/// A template within the frame that all pages share.
fn page(name: &str, fields: Value) -> Result<String, minijinja::Error> {
    let mut env = Environment::new();
    env.add_template("page.html", include_str!("page.html"))?;
    env.add_template("run.html", include_str!("run.html"))?;
    env.add_template("conflict.html", include_str!("conflict.html"))?;
    env.add_template("conflicts.html", include_str!("conflicts.html"))?;
    env.get_template(name)?.render(context! { version => env!("CARGO_PKG_VERSION"), ..fields })
}

/// One ratio, ready to be laid out.
#[derive(Serialize)]
struct SweepView {
    title: String,
    tables: Vec<Table>,
    dots: Vec<Figure>,
    losses: String,
    conflicts: Vec<ConflictView>,
    memory: String,
    edges: Vec<EdgeRow>,
}

/// A drawing with its caption.
#[derive(Serialize)]
struct Figure {
    caption: String,
    svg: String,
}

/// Accuracies of one set of edges: a row for each column of the tasks.
#[derive(Serialize)]
struct Table {
    set: String,
    tasks: Vec<String>,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    kind: String,
    name: String,
    conflict: String,
    cells: Vec<String>,
    best: Vec<bool>,
}

#[derive(Serialize)]
struct EdgeRow {
    name: String,
    ratio: String,
    parameters: String,
    perplexity: String,
    losses: String,
    memory: String,
}

impl SweepView {
    fn of(number: usize, sweep: &Sweep) -> SweepView {
        let title =
            sweep.ratio.map_or_else(|| "Every edge at its own size".into(), |r| format!("Pruned by {r}"));
        let lines: Vec<plot::Line> = sweep
            .edges
            .iter()
            .chain(&sweep.joints)
            .map(|e| plot::Line {
                name: e.name.clone(),
                points: e.losses.iter().enumerate().map(|(i, &l)| ((i + 1) as f64, l)).collect(),
            })
            .collect();
        SweepView {
            title,
            tables: sweep
                .groups()
                .into_iter()
                .map(|(set, tasks)| table(sweep, &set, &tasks))
                .filter(|t| !t.tasks.is_empty())
                .collect(),
            dots: sweep.tasks.iter().filter(|t| t.edges.len() > 1).map(dot_plot).collect(),
            losses: plot::lines(&lines, "optimizer step", "loss"),
            conflicts: sweep
                .conflicts
                .iter()
                .enumerate()
                .map(|(n, c)| ConflictView::of(&c.report, &c.edges, &format!("module-{number}-{n}")))
                .collect(),
            memory: memory_bars(&sweep.edges),
            edges: sweep.edges.iter().chain(&sweep.joints).map(edge_row).collect(),
        }
    }
}

fn table(sweep: &Sweep, set: &[String], tasks: &[&TaskResult]) -> Table {
    let best: Vec<f64> = tasks
        .iter()
        .map(|t| {
            let fused = t.columns.iter().filter(|c| c.kind == Kind::Fusion && c.edges == set);
            fused.filter_map(|c| c.accuracy).fold(f64::NEG_INFINITY, f64::max)
        })
        .collect();
    let row = |line: Line<'_>| Row {
        kind: format!("{:?}", line.kind).to_lowercase(),
        name: line.name.to_string(),
        cells: line.columns.iter().map(|c| c.map_or_else(|| "–".into(), Column::to_string)).collect(),
        best: iter::zip(&line.columns, &best)
            .map(|(c, b)| line.kind == Kind::Fusion && c.and_then(|c| c.accuracy).is_some_and(|a| a >= *b))
            .collect(),
        conflict: line.conflict,
    };
    Table {
        set: set.join(" + "),
        tasks: tasks.iter().map(|t| t.name.clone()).collect(),
        rows: sweep.lines(set, tasks).into_iter().map(row).collect(),
    }
}

fn dot_plot(task: &TaskResult) -> Figure {
    let dots: Vec<Dot> = task
        .columns
        .iter()
        .filter_map(|c| {
            Some(Dot {
                name: c.name.clone(),
                class: format!("{:?}", c.kind).to_lowercase(),
                value: 100.0 * c.accuracy?,
                half: 196.0 * c.standard_error.unwrap_or(0.0),
            })
        })
        .collect();
    Figure {
        caption: format!("{}: accuracy in percent, with 95 % intervals", task.name),
        svg: plot::dots(&dots, 0.0, 100.0),
    }
}

fn parts(edge: &EdgeResult) -> Vec<(Part, u64)> {
    let rows = edge.train.pointer("/plan/rows").and_then(Json::as_array);
    let of = |part: Part| -> u64 {
        rows.into_iter()
            .flatten()
            .filter(|r| r.get("part").and_then(Json::as_str) == Some(part.name()))
            .filter_map(|r| r.get("bytes").and_then(Json::as_u64))
            .fold(0, u64::saturating_add)
    };
    Part::ALL.into_iter().map(|p| (p, of(p))).filter(|(_, b)| *b > 0).collect()
}

fn memory_bars(edges: &[EdgeResult]) -> String {
    let bars: Vec<Bar> = edges
        .iter()
        .map(|e| Bar {
            name: e.name.clone(),
            parts: parts(e)
                .into_iter()
                .map(|(p, b)| (p.name().to_string(), b as f64, human_bytes(b)))
                .collect(),
        })
        .collect();
    plot::bars(&bars)
}

fn edge_row(edge: &EdgeResult) -> EdgeRow {
    let number = |v: &Json, at: &str| v.pointer(at).and_then(Json::as_f64);
    let show = |x: Option<f64>, digits: usize| x.map_or_else(|| "–".into(), |x| format!("{x:.digits$}"));
    let arrow = |a: Option<f64>, b: Option<f64>, digits: usize| match (a, b) {
        (None, None) => "–".to_string(),
        (a, b) => format!("{} → {}", show(a, digits), show(b, digits)),
    };
    let count = |at: &str| edge.prune.pointer(at).and_then(Json::as_u64);
    EdgeRow {
        name: edge.name.clone(),
        ratio: show(number(&edge.prune, "/ratio"), 2),
        parameters: match (count("/parameters_before"), count("/parameters_after")) {
            (Some(b), Some(a)) => format!("{b} → {a}"),
            _ => "–".into(),
        },
        perplexity: arrow(
            number(&edge.prune, "/perplexity_before"),
            number(&edge.prune, "/perplexity_after"),
            2,
        ),
        losses: arrow(number(&edge.train, "/first_loss"), number(&edge.train, "/last_loss"), 3),
        memory: human_bytes(memory::sum(parts(edge).iter().map(|(_, b)| *b))),
    }
}

/// Accuracy by ratio (the paper's Fig. 5), where the flow swept several.
fn sweep_plot(results: &Results) -> Vec<Figure> {
    let swept: Vec<(f64, &Sweep)> = results.sweeps.iter().filter_map(|s| Some((s.ratio?, s))).collect();
    let Some((_, first)) = swept.first().filter(|_| swept.len() > 1) else { return Vec::new() };
    first
        .tasks
        .iter()
        .map(|task| {
            let lines: Vec<plot::Line> = task
                .columns
                .iter()
                .map(|column| plot::Line {
                    name: match column.kind {
                        Kind::Fusion | Kind::Joint => format!("{} ({})", column.name, column.edges.join("+")),
                        _ => column.name.clone(),
                    },
                    points: swept
                        .iter()
                        .filter_map(|(ratio, sweep)| {
                            let t = sweep.tasks.iter().find(|t| t.name == task.name)?;
                            let same = |c: &&Column| {
                                c.kind == column.kind && c.name == column.name && c.edges == column.edges
                            };
                            Some((*ratio, 100.0 * t.columns.iter().find(same)?.accuracy?))
                        })
                        .collect(),
                })
                .collect();
            Figure {
                caption: format!("{}: accuracy in percent by pruning ratio", task.name),
                svg: plot::lines(&lines, "pruning ratio", "accuracy"),
            }
        })
        .collect()
}
