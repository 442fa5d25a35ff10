//! How several adapters lie to each other: drawings of a [`ConflictReport`].

use serde::Serialize;

use super::Figure;
use super::plot::{self, Cell, Direction};
use crate::checkpoint::module::Target;
use crate::fuse::conflict::{ConflictReport, LEADING, ModuleConflict};

/// Updates that are told apart in one drawing: as many as there are colours.
const COLOURS: usize = 8;
/// Adapters in a matrix: more cells cannot be read.
const MOST_ROWS: usize = 24;

/// A report ready to be laid out.
#[derive(Serialize)]
pub struct ConflictView {
    title: String,
    summary: String,
    adapters: Vec<AdapterRow>,
    figures: Vec<Figure>,
    /// The most contested one last.
    modules: Vec<ModuleView>,
}

#[derive(Serialize)]
struct AdapterRow {
    name: String,
    norm: String,
    kept: String,
}

/// The directions of one module.
#[derive(Serialize)]
struct ModuleView {
    id: String,
    caption: String,
    svg: String,
}

impl ConflictView {
    /// Of adapters with these names; `page` keeps the links of several reports in one page apart.
    pub fn of(report: &ConflictReport, names: &[String], page: &str) -> ConflictView {
        let id = |m: &ModuleConflict| format!("{page}-{}-{}", m.layer, m.target);
        let mut modules: Vec<&ModuleConflict> = report.modules.iter().collect();
        modules.sort_by(|a, b| a.before.conflict_weighted.total_cmp(&b.before.conflict_weighted));
        let percent = |x: f64| format!("{:.1} %", 100.0 * x);
        let mut figures = vec![
            heat_map(report, "c̄ of the updates: means over directions, by layer and module; a click shows the module's directions", id),
            Figure {
                caption: "Cosine of the whole updates: 1 for the same direction, 0 for unrelated ones, below 0 (the other colour) for opposed ones".into(),
                svg: matrix("cosines of adapters", &report.cosines, names, 1.0),
            },
        ];
        if !report.dominance.is_empty() {
            figures.push(Figure {
                caption: "Who dominates whom: the share of the energy in directions where the row's update is longer than the column's".into(),
                svg: matrix("dominance of adapters", &report.dominance, names, 1.0),
            });
        }
        ConflictView {
            title: names.join(" + "),
            summary: format!(
                "Conflict c̄ is {:.4} (weighted by σ {:.4}); LoRA-CR would keep {} of the energy and leave {:.4} ({:.4}). \
                 c̄ is 0 where all updates agree, at most 0.5 for two; unrelated updates count as a conflict too.",
                report.before.conflict_mean,
                report.before.conflict_weighted,
                percent(report.energy_kept),
                report.after.conflict_mean,
                report.after.conflict_weighted,
            ),
            adapters: (0..report.norms.len())
                .map(|e| AdapterRow {
                    name: name(names, e),
                    norm: format!("{:.4}", report.norms[e]),
                    kept: report.kept.get(e).map_or_else(|| "–".into(), |&k| percent(k)),
                })
                .collect(),
            figures,
            modules: modules.iter().map(|m| ModuleView { id: id(m), ..directions(m, names) }).collect(),
        }
    }
}

fn name(names: &[String], e: usize) -> String {
    names.get(e).cloned().unwrap_or_else(|| e.to_string())
}

fn heat_map(report: &ConflictReport, caption: &str, id: impl Fn(&ModuleConflict) -> String) -> Figure {
    let rows: Vec<String> = report.layers.iter().map(|l| format!("layer {}", l.layer)).collect();
    let adapted = |t: &&Target| report.modules.iter().any(|m| m.target == t.short());
    let columns: Vec<String> = Target::ALL.iter().filter(adapted).map(|t| t.short().to_string()).collect();
    let place = |m: &ModuleConflict| {
        let row = report.layers.iter().position(|l| l.layer == m.layer)?;
        let column = columns.iter().position(|c| *c == m.target)?;
        Some(Cell { row, column, value: m.before.conflict_mean, link: Some(id(m)) })
    };
    let cells: Vec<Cell> = report.modules.iter().filter_map(place).collect();
    let most = cells.iter().map(|c| c.value).filter(|v| v.is_finite()).fold(0.0, f64::max);
    Figure {
        caption: caption.to_string(),
        svg: plot::grid("conflict by layer and module", &cells, &rows, &columns, most),
    }
}

fn matrix(title: &str, values: &[Vec<f64>], names: &[String], most: f64) -> String {
    let names: Vec<String> = (0..values.len().min(MOST_ROWS)).map(|e| name(names, e)).collect();
    let cells: Vec<Cell> = (0..names.len())
        .flat_map(|row| (0..names.len()).map(move |column| (row, column)))
        .filter_map(|(row, column)| {
            let value = *values.get(row)?.get(column)?;
            Some(Cell { row, column, value, link: None })
        })
        .collect();
    plot::grid(title, &cells, &names, &names, most)
}

/// The leading directions of a module, for the adapters that have most of its energy.
fn directions(m: &ModuleConflict, names: &[String]) -> ModuleView {
    let mut shown: Vec<usize> = (0..m.norms.len()).collect();
    shown.sort_by(|&a, &b| m.norms[b].total_cmp(&m.norms[a]));
    shown.truncate(COLOURS);
    shown.sort_unstable();
    let pick = |from: &[f64]| shown.iter().filter_map(|&n| from.get(n).copied()).collect::<Vec<f64>>();
    let energy = if m.subspace_energy > 0.0 { m.energy } else { 0.0 };
    let rows: Vec<Direction> = m
        .leading
        .iter()
        .map(|d| Direction {
            energy: if energy > 0.0 { d.sigma * d.sigma / energy } else { 0.0 },
            conflict: d.conflict,
            cos: pick(&d.cos),
            kept: pick(&d.gamma),
        })
        .collect();
    let own: Vec<String> =
        shown.iter().map(|&n| name(names, m.adapters.get(n).copied().unwrap_or(n))).collect();
    let mut caption = format!(
        "Layer {}, {}, {} × {}: c̄ {:.4} (weighted by σ {:.4}), after LoRA-CR {:.4}; {:.1} % of the energy is kept",
        m.layer,
        m.target,
        m.shape[0],
        m.shape[1],
        m.before.conflict_mean,
        m.before.conflict_weighted,
        m.after.conflict_mean,
        100.0 * m.energy_kept
    );
    if m.directions > LEADING {
        caption += &format!("; the {LEADING} strongest of {} directions", m.directions);
    }
    if m.norms.len() > COLOURS {
        caption += &format!("; the {COLOURS} longest of {} updates", m.norms.len());
    }
    ModuleView { id: String::new(), caption, svg: plot::directions(&own, &rows) }
}
