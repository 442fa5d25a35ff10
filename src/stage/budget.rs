//! `budget`: parameters and bytes of a training run on an edge at each pruning ratio, from a config alone.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use crate::checkpoint::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::edge;
use crate::model::memory::{Part, human_bytes};
use crate::model::recompute::Choice;
use crate::model::shape::TrainingShape;
use crate::prune::select::Cut;

/// What is planned.
#[derive(Clone, Debug)]
pub struct BudgetOptions {
    /// Pruning ratios, a column each beside the full model's.
    pub ratios: Vec<f64>,
    /// The edge's memory: the smallest ratio that trains in it is looked for.
    pub memory: Option<u64>,
    /// The layers that are pruned, all if none.
    pub layers: Option<Range<usize>>,
    /// Kept MLP channels are rounded down to a multiple of this.
    pub round_mlp: usize,
    /// The training run.
    pub shape: TrainingShape,
}

/// The plan at one ratio.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Column {
    /// 0 for the full model.
    pub ratio: f64,
    /// Parameters of the model.
    pub parameters: u64,
    /// Parameters of the adapter.
    pub adapter_parameters: u64,
    /// Query heads that a pruned layer keeps.
    pub heads: usize,
    /// Key/value heads that it keeps.
    pub kv_heads: usize,
    /// MLP channels that it keeps.
    pub mlp: usize,
    /// Layers that are computed again in the backward pass.
    pub recomputed: usize,
    /// Bytes of each part.
    pub parts: Vec<(Part, u64)>,
    /// Bytes of all parts.
    pub total: u64,
    /// Whether that is within the memory asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<bool>,
}

/// What a training run on an edge takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BudgetReport {
    /// What the plans are of.
    pub plan: &'static str,
    /// The training run.
    pub shape: TrainingShape,
    /// The edge's memory, if there is a limit.
    pub memory: Option<u64>,
    /// The smallest ratio that trains in it; 0 if the full model does, none if no ratio does.
    pub smallest_ratio: Option<f64>,
    /// The full model's, then one a ratio.
    pub columns: Vec<Column>,
}

/// Plans the training of `config` at each ratio.
///
/// Fails where a ratio or the shape has no meaning for the model.
pub fn budget(config: &ModelConfig, options: &BudgetOptions) -> Result<BudgetReport> {
    let cut = |ratio| Cut { ratio, layers: options.layers.clone(), round_mlp: options.round_mlp };
    let mut columns = vec![column(config, 0.0, 0, options)?];
    let first = options.layers.as_ref().map_or(0, |r| r.start);
    for &ratio in &options.ratios {
        columns.push(column(&cut(ratio).apply(config)?, ratio, first, options)?);
    }
    let mut smallest_ratio = None;
    if let Some(memory) = options.memory {
        let found = smallest(config, &cut(0.5), &options.shape, memory)?;
        if let Fit::At { ratio, config, .. } = &found
            && !options.ratios.contains(ratio)
        {
            columns.push(column(config, *ratio, first, options)?);
        }
        smallest_ratio = found.ratio();
    }
    Ok(BudgetReport {
        plan: "training, bf16 on CUDA, weights resident",
        shape: options.shape.clone(),
        memory: options.memory,
        smallest_ratio,
        columns,
    })
}

fn column(config: &ModelConfig, ratio: f64, layer: usize, options: &BudgetOptions) -> Result<Column> {
    let Choice { recomputed, plan, fits } = edge::choose(config, &options.shape, options.memory)?;
    let sizes = config.layer_sizes(layer);
    Ok(Column {
        ratio,
        parameters: config.parameters(),
        adapter_parameters: options.shape.layout(config).end() as u64,
        heads: sizes.heads,
        kv_heads: sizes.kv_heads,
        mlp: sizes.mlp,
        recomputed,
        parts: Part::ALL.into_iter().map(|p| (p, plan.part(p))).filter(|(_, b)| *b > 0).collect(),
        total: plan.total(),
        fits: options.memory.map(|_| fits),
    })
}

/// Which ratio trains within a memory.
#[derive(Clone, Debug)]
pub enum Fit {
    /// No pruning is needed.
    Full,
    /// This is the smallest.
    At {
        /// A multiple of 0.01.
        ratio: f64,
        /// The pruned architecture.
        config: Box<ModelConfig>,
        /// Its plan.
        choice: Choice,
    },
    /// Not even the largest ratio; its plan, if any ratio can be written.
    Never(Option<(f64, Choice)>),
}

impl Fit {
    /// The ratio, 0 without pruning.
    pub fn ratio(&self) -> Option<f64> {
        match self {
            Fit::Full => Some(0.0),
            Fit::At { ratio, .. } => Some(*ratio),
            Fit::Never(_) => None,
        }
    }
}

/// The smallest ratio of 0, 0.01, …, 0.99 whose training plan fits `memory`; `cut` gives layers and rounding.
///
/// Ratios that cannot be written (no head left, biases without a form that transformers loads) are passed over. Fails
/// where the cut or the shape has no meaning for the model.
pub fn smallest(config: &ModelConfig, cut: &Cut, shape: &TrainingShape, memory: u64) -> Result<Fit> {
    cut.check(config)?;
    if edge::choose(config, shape, Some(memory))?.fits {
        return Ok(Fit::Full);
    }
    let mut last = None;
    for step in 1..100 {
        let ratio = f64::from(step) / 100.0;
        let Ok(pruned) = (Cut { ratio, ..cut.clone() }).apply(config) else { continue };
        if shape.check(&pruned).is_err() {
            continue;
        }
        let choice = edge::choose(&pruned, shape, Some(memory))?;
        if choice.fits {
            return Ok(Fit::At { ratio, config: Box::new(pruned), choice });
        }
        last = Some((ratio, choice));
    }
    Ok(Fit::Never(last))
}

/// [`smallest`] for pruning: an error where nothing need be pruned or nothing is enough, with the plan's table.
pub fn required(
    config: &ModelConfig,
    cut: &Cut,
    shape: &TrainingShape,
    memory: u64,
) -> Result<(f64, ModelConfig, Choice)> {
    let size = human_bytes(memory);
    match smallest(config, cut, shape, memory)? {
        Fit::At { ratio, config, choice } => Ok((ratio, *config, choice)),
        Fit::Full => Err(Error::Usage(format!(
            "--memory {size}: the full model trains in it, so nothing need be pruned; --ratio prunes all the same"
        ))),
        Fit::Never(None) => Err(Error::Usage(format!(
            "--memory {size}: the full model does not train in it, and no ratio leaves a model that can be written"
        ))),
        Fit::Never(Some((ratio, choice))) => {
            let table = match choice.plan.fit(memory) {
                Err(Error::Memory(table)) => table,
                Err(other) => return Err(other),
                Ok(()) => String::new(),
            };
            Err(Error::Memory(format!("--memory {size}: not even ratio {ratio} trains in it: {table}")))
        }
    }
}

impl fmt::Display for BudgetReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.shape;
        let targets: Vec<_> = s.targets.iter().map(|t| t.short()).collect();
        writeln!(
            f,
            "{}: batch {} × {} tokens, rank {} on {}",
            self.plan,
            s.batch,
            s.seq,
            s.rank,
            targets.join(", ")
        )?;
        let row = |f: &mut fmt::Formatter<'_>, name: &str, cell: &dyn Fn(&Column) -> String| {
            write!(f, "{name:<20}")?;
            self.columns.iter().try_for_each(|c| write!(f, " {:>15}", cell(c)))?;
            writeln!(f)
        };
        row(f, "ratio", &|c| if c.ratio == 0.0 { "full".into() } else { c.ratio.to_string() })?;
        row(f, "parameters", &|c| grouped(c.parameters))?;
        row(f, "adapter parameters", &|c| grouped(c.adapter_parameters))?;
        row(f, "heads / kv heads", &|c| format!("{} / {}", c.heads, c.kv_heads))?;
        row(f, "MLP channels", &|c| grouped(c.mlp as u64))?;
        for part in Part::ALL {
            let bytes = |c: &Column| c.parts.iter().find(|(p, _)| *p == part).map_or(0, |(_, b)| *b);
            if self.columns.iter().any(|c| bytes(c) > 0) {
                row(f, part.name(), &|c| human_bytes(bytes(c)))?;
            }
        }
        row(f, "total", &|c| human_bytes(c.total))?;
        if self.columns.iter().any(|c| c.recomputed > 0) {
            row(f, "recomputed layers", &|c| c.recomputed.to_string())?;
        }
        let Some(memory) = self.memory else { return Ok(()) };
        let size = human_bytes(memory);
        row(f, &format!("within {size}"), &|c| if c.fits == Some(true) { "yes" } else { "no" }.into())?;
        match self.smallest_ratio {
            Some(0.0) => writeln!(f, "the full model trains within {size}"),
            Some(ratio) => writeln!(f, "the smallest ratio that trains within {size}: {ratio}"),
            None => writeln!(f, "no ratio trains within {size}"),
        }
    }
}

/// `8030261248` as `8,030,261,248`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::select::tests::{config, llama3_8b};

    fn options() -> BudgetOptions {
        BudgetOptions {
            ratios: vec![0.2, 0.4, 0.6, 0.8],
            memory: None,
            layers: None,
            round_mlp: 1,
            shape: TrainingShape::default(),
        }
    }

    #[test]
    fn the_papers_numbers_are_printed() {
        let report = budget(&llama3_8b(), &options()).unwrap();
        let text = report.to_string();
        for number in
            ["8,030,261,248", "6,734,745,600", "5,271,851,008", "3,976,728,576", "2,513,833,984", "5,734"]
        {
            assert!(text.contains(number), "{number} is missing from\n{text}");
        }
        for c in &report.columns {
            assert_eq!(c.parts.iter().map(|(_, b)| b).sum::<u64>(), c.total);
            assert_eq!((c.recomputed, c.fits), (0, None));
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["columns"][3]["parameters"], 3_976_728_576u64);
        assert_eq!(json["columns"][3]["parts"][0][0], "weights");
    }

    #[test]
    fn the_smallest_ratio_is_the_smallest() {
        let memory = 6 << 30;
        let report =
            budget(&llama3_8b(), &BudgetOptions { ratios: vec![], memory: Some(memory), ..options() })
                .unwrap();
        let ratio = report.smallest_ratio.unwrap();
        let at = |ratio: f64| {
            let pruned = Cut::new(ratio).apply(&llama3_8b()).unwrap();
            edge::choose(&pruned, &TrainingShape::default(), Some(memory)).unwrap()
        };
        assert!(at(ratio).fits && at(ratio).plan.total() <= memory);
        assert!(!at(ratio - 0.01).fits);
        assert_eq!(report.columns.len(), 2);
        assert_eq!((report.columns[0].fits, report.columns[1].fits), (Some(false), Some(true)));
        assert!(
            report.to_string().contains(&format!("the smallest ratio that trains within 6.0 GiB: {ratio}"))
        );
        // One layer fewer would not fit.
        let choice = at(ratio);
        if choice.recomputed > 0 {
            let pruned = Cut::new(ratio).apply(&llama3_8b()).unwrap();
            let fewer = edge::plan(&pruned, &TrainingShape::default(), choice.recomputed - 1).unwrap();
            assert!(fewer.total() > memory);
        }
    }

    #[test]
    fn memory_that_is_plenty_or_too_little() {
        let cut = Cut::new(0.5);
        let shape = TrainingShape { seq: 64, ..TrainingShape::default() };
        let c = config(256, 8, 4, 600, 2, 1000);
        let err = required(&c, &cut, &shape, 1 << 40).unwrap_err();
        assert_eq!(err.exit_code(), 2);
        assert!(err.to_string().contains("the full model trains in it"), "{err}");
        let err = required(&c, &cut, &shape, 1 << 20).unwrap_err().to_string();
        assert!(err.contains("not even ratio") && err.contains("context and modules"), "{err}");
        let zero = budget(&c, &BudgetOptions { shape, memory: Some(1 << 40), ratios: vec![], ..options() });
        assert_eq!(zero.unwrap().smallest_ratio, Some(0.0));
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        let c = llama3_8b();
        for ratio in [0.0, 1.0, f64::NAN] {
            assert_eq!(
                budget(&c, &BudgetOptions { ratios: vec![ratio], ..options() }).unwrap_err().exit_code(),
                2
            );
        }
        let bad = BudgetOptions { layers: Some(0..99), memory: Some(1 << 30), ratios: vec![], ..options() };
        assert!(budget(&c, &bad).unwrap_err().to_string().contains("--layers 0..99"));
    }

    #[test]
    fn digits_are_grouped() {
        assert_eq!(
            [0, 999, 1000, 8_030_261_248].map(grouped),
            ["0", "999", "1,000", "8,030,261,248"].map(String::from)
        );
    }
}
