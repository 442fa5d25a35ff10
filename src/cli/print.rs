//! Reports as people read them, or as one JSON document.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::fuse::certificate::{Certificate, Spread};
use crate::fuse::conflict::{ConflictReport, Score};
use crate::model::memory::{Part, Plan, human_bytes};
use crate::stage::admit::Admission;
use crate::stage::budget::grouped;
use crate::stage::evaluate::EvalReport;
use crate::stage::evaluate::accuracy::{Accuracy, percent};
use crate::stage::export::ExportReport;
use crate::stage::flow::results::{Column, Results};
use crate::stage::fuse::FuseReport;
use crate::stage::grams::GramsReport;
use crate::stage::join::JoinReport;
use crate::stage::keys::KeysReport;
use crate::stage::measure::Measured;
use crate::stage::prune::PruneReport;
use crate::stage::recover::RecoverReport;
use crate::stage::sign::SignReport;
use crate::stage::train::TrainReport;
use crate::stage::trust::Signatory;
use crate::stage::verify::VerifyReport;

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

/// A plan for this machine and what a step really took.
pub fn measured(m: &Measured) -> String {
    let of_plan = |bytes: u64| {
        let off = 100.0 * (bytes as f64 / m.planned.max(1) as f64 - 1.0);
        format!("{} ({off:+.1} %)", human_bytes(bytes))
    };
    let plan = plan(&m.plan);
    let peak = m.peak.map_or_else(|| "not told by the kernel".into(), of_plan);
    let Some(d) = &m.device else {
        return format!(
            "one step on this machine, mapped weights left out, {:.2} s\n{plan}measured peak  {peak}\n",
            m.seconds
        );
    };
    let row = |what: &str, [before, after, taken]: [String; 3]| vec![what.to_string(), before, after, taken];
    let nvml = match (d.process_before, d.process_peak) {
        (Some(before), Some(peak)) => [human_bytes(before), human_bytes(peak), of_plan(peak)],
        _ => ["not told".into(), "not told".into(), String::new()],
    };
    let rows = [
        row("", ["before", "after", "taken"].map(String::from)),
        row("plan", [String::new(), String::new(), human_bytes(m.planned)]),
        row("free, by the driver", [human_bytes(d.free_before), human_bytes(d.free_after), peak]),
        row("this process's peak, by NVML", nvml),
    ];
    format!("one step on this device, {:.2} s\n{plan}\n{}", m.seconds, table(&rows))
}

/// What pruning did.
pub fn prune(r: &PruneReport) -> String {
    if r.already_finished {
        return format!("{}: already finished", r.out.display());
    }
    let sizes = |s: [usize; 3]| format!("{} / {} / {}", s[0], s[1], s[2]);
    let mut rows = vec![
        ["", "full", "pruned"].map(String::from).to_vec(),
        vec!["parameters".into(), grouped(r.parameters_before), grouped(r.parameters_after)],
        vec!["heads / kv heads / MLP".into(), sizes(r.sizes_before), sizes(r.sizes_after)],
    ];
    if let (Some(before), Some(after)) = (r.perplexity_before, r.perplexity_after) {
        let label = format!("perplexity, {} × {} tokens", r.samples, r.sample_tokens);
        rows.push(vec![label, format!("{before:.3}"), format!("{after:.3}")]);
    }
    let mut text = format!(
        "{}: pruned by {} ({}, {})\n{}",
        r.out.display(),
        r.ratio,
        r.importance,
        r.reduce,
        table(&rows)
    );
    if let Some(t) = &r.training {
        text += &format!(
            "training takes {} of {} on the edge, with {} recomputed layers\n",
            human_bytes(t.total),
            human_bytes(t.memory),
            t.recomputed
        );
    }
    if !r.transformers_loads {
        text += "sizes differ by layer: transformers cannot load this model\n";
    }
    text
}

/// What was recovered.
pub fn recover(r: &RecoverReport) -> String {
    if r.already_finished {
        return format!("{}: already finished", r.out.display());
    }
    let checked =
        if r.base_checked { "checked against the base" } else { "not checked against a base: --model does" };
    let signer = r.from.signer.as_ref();
    let from = signer.map(|s| format!(", from the adapter that {} signed for {}", name(s), r.from.occasion));
    let signed = r.signed.map(|key| format!(", signed by key {}", key.short()));
    format!(
        "{}: {} modules of rank {}, {} → {} numbers, {checked}{}{}",
        r.out.display(),
        r.modules,
        r.rank,
        grouped(r.parameters_pruned),
        grouped(r.parameters_full),
        from.unwrap_or_default(),
        signed.unwrap_or_default()
    )
}

/// Warnings, a line each, on stderr.
pub fn warnings(warnings: &[String]) {
    for warning in warnings {
        tracing::warn!("{warning}");
    }
}

/// Conflict by layer, and how the adapters lie to each other.
pub fn conflict(r: &ConflictReport, adapters: &[PathBuf]) -> String {
    let score = |s: &Score| [format!("{:.4}", s.conflict_mean), format!("{:.4}", s.conflict_weighted)];
    let row = |name: String, before: &Score, after: &Score| {
        [vec![name], score(before).to_vec(), score(after).to_vec()].concat()
    };
    let mut rows =
        vec![["conflict", "mean", "by energy", "after LoRA-CR", "by energy"].map(String::from).to_vec()];
    rows.extend(r.layers.iter().map(|l| row(format!("layer {}", l.layer), &l.before, &l.after)));
    rows.push(row("all".into(), &r.before, &r.after));
    let name = |i: usize| adapters.get(i).map_or_else(|| i.to_string(), |p| p.display().to_string());
    let mut lie = vec![
        ["adapter".to_string(), "norm".into()]
            .into_iter()
            .chain((0..r.cosines.len()).map(|i| format!("cos {i}")))
            .collect::<Vec<_>>(),
    ];
    for (i, cosines) in r.cosines.iter().enumerate() {
        let mut cells =
            vec![format!("{i} {}", name(i)), format!("{:.4}", r.norms.get(i).copied().unwrap_or(f64::NAN))];
        cells.extend(cosines.iter().map(|c| format!("{c:.4}")));
        lie.push(cells);
    }
    format!(
        "{}\n{}\nLoRA-CR would keep {:.1} % of the energy\n",
        table(&rows),
        table(&lie),
        100.0 * r.energy_kept
    )
}

/// `‖ΔW‖` of each adapter, or of the smallest and the largest of many.
fn norms(admission: &Admission) -> String {
    let norm = |x: f64| format!("{x:.3e}");
    let all = admission.adapters.iter().map(|a| a.norm);
    if admission.adapters.len() > 8 {
        let (least, most) = (all.clone().fold(f64::INFINITY, f64::min), all.fold(0.0, f64::max));
        return format!("norm of each adapter's update: {} to {}\n", norm(least), norm(most));
    }
    format!("norm of each adapter's update: {}\n", all.map(norm).collect::<Vec<_>>().join(", "))
}

/// What was fused, and what the certificate says.
pub fn fuse(r: &FuseReport) -> String {
    let of_rank = r.rank.map(|rank| format!(" of rank {rank}")).unwrap_or_default();
    let both = [(&r.out, &r.certificate, of_rank), (&r.merged, &r.merged_certificate, String::new())];
    let one = |(out, c, of_rank): (&Option<PathBuf>, &Option<Certificate>, String)| {
        Some(certified(out.as_ref()?, &format!("{} modules{of_rank}", r.modules), c.as_ref()))
    };
    norms(&r.admission) + &both.into_iter().filter_map(one).collect::<String>()
}

/// What was put together, and what the certificate says.
pub fn join(r: &JoinReport) -> String {
    let what = format!("{} modules of {} parts", r.modules, r.parts);
    certified(&r.out, &what, r.certificate.as_ref())
}

/// An output and its certificate; none where it was there already.
fn certified(out: &Path, what: &str, certificate: Option<&Certificate>) -> String {
    let Some(c) = certificate else { return format!("{}: already finished\n", out.display()) };
    let mut text = format!("{}: {what}", out.display());
    let mut rows = vec![["", "mean", "largest"].map(String::from).to_vec()];
    for (name, s) in [
        ("error to the method's definition", &c.error),
        ("distance to the mean of products", &c.distance_to_mean),
    ] {
        rows.push(vec![name.into(), format!("{:.2e}", s.mean), format!("{:.2e}", s.max)]);
    }
    text += &format!("\n{}", table(&rows));
    if c.energy_kept.min < 1.0 {
        let Spread { min, mean, .. } = c.energy_kept;
        text += &format!("energy kept by truncation: {mean:.4} in the mean, {min:.4} at least\n");
    }
    let number = |s: f64| format!("{s:.3}");
    let scales = &c.effective_scale;
    text += &match scales.len() {
        ..=16 => {
            let scales: Vec<String> = scales.iter().copied().map(number).collect();
            format!("effective scale of each adapter: {}\n", scales.join(", "))
        }
        _ => {
            let s = Spread::of(scales.iter().copied());
            format!("effective scales from {} to {}, mean {}\n", number(s.min), number(s.max), number(s.mean))
        }
    };
    if let Some(kept) = &c.kept {
        let kept: Vec<String> = kept.iter().map(u64::to_string).collect();
        text += &format!("entries kept of each adapter: {}\n", kept.join(", "));
    }
    text += &match &c.after {
        Some(after) => format!(
            "conflict: {:.4} before, {:.4} after LoRA-CR\n",
            c.before.conflict_mean, after.conflict_mean
        ),
        None => format!("conflict: {:.4}\n", c.before.conflict_mean),
    };
    text
}

/// What was collected.
pub fn grams(r: &GramsReport) -> String {
    if r.already_finished {
        return format!("{}: already finished", r.out.display());
    }
    let mut text = format!(
        "{}: Grams of {} inputs over {} tokens of {} documents, {}",
        r.out.display(),
        r.inputs,
        grouped(r.tokens as u64),
        grouped(r.documents as u64),
        human_bytes(r.bytes)
    );
    if r.skipped > 0 {
        text += &format!("\n{} bad lines were left out", r.skipped);
    }
    text
}

/// A new pair of keys.
pub fn keys(r: &KeysReport) -> String {
    format!(
        "{}: the secret key, for you alone\n{}: the public key, {}\n",
        r.secret.display(),
        r.public.display(),
        r.key
    )
}

/// What was signed.
pub fn sign(r: &SignReport) -> String {
    let (dir, key) = (r.dir.display(), r.key.short());
    format!("{dir}: {} files signed by key {key} for {}", r.files, r.occasion)
}

/// Whose a folder is.
pub fn verify(r: &VerifyReport) -> String {
    let (dir, a) = (r.dir.display(), &r.admitted);
    let signer = a.signer.as_ref().map(name).unwrap_or_default();
    let from =
        a.edge.as_ref().map(|e| format!(", recovered from the adapter of {}", name(e))).unwrap_or_default();
    format!("{dir}: {} files as signed by {signer} for {}{from}", a.files, a.occasion)
}

/// What the trusted folder calls a signer, else the start of the key.
fn name(s: &Signatory) -> String {
    s.name.clone().unwrap_or_else(|| format!("key {}", s.key.short()))
}

/// What was exported.
pub fn export(r: &ExportReport) -> String {
    format!("{}: {} modules of rank {} in {}", r.out.display(), r.modules, r.rank, r.dtype)
}

/// The results of a flow: a table for each set of edges.
pub fn results(r: &Results, output: &Path) -> String {
    let mut text = String::new();
    for sweep in &r.sweeps {
        if let Some(ratio) = sweep.ratio {
            text += &format!("pruned by {ratio}\n\n");
        }
        for (set, tasks) in sweep.groups() {
            let names = tasks.iter().map(|t| t.name.clone()).collect();
            let mut rows = vec![[vec![set.join(" + ")], names, vec!["c̄".into()]].concat()];
            for line in sweep.lines(&set, &tasks) {
                let cells = line.columns.iter().map(|c| c.map_or_else(|| "–".into(), Column::to_string));
                rows.push([vec![line.name.to_string()], cells.collect(), vec![line.conflict]].concat());
            }
            text += &table(&rows);
            text.push('\n');
        }
    }
    for note in &r.notes {
        text += &format!("{note}\n");
    }
    text += &format!(
        "accuracy in percent ± standard error; {:.0} s; {}\n",
        r.seconds,
        output.join("report.html").display()
    );
    text
}
