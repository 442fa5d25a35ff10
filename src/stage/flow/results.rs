//! `results.json`: everything that a report shows.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fuse::conflict::ConflictReport;
use crate::stage::evaluate::accuracy::percent;

/// The file's name.
pub const RESULTS: &str = "results.json";
/// Its format.
pub const FORMAT: &str = "anabranch-results/1";

/// A finished flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// `anabranch-results/1`.
    pub format: String,
    /// Everything random but A₀.
    pub seed: u64,
    /// Names of the edges.
    pub edges: Vec<String>,
    /// One for each ratio of the sweep; a flow whose edges all name their own has one without.
    pub sweeps: Vec<Sweep>,
    /// Seconds from start to end of the run that finished it.
    pub seconds: f64,
    /// What the reader should know: what was left out, and why.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// All stages at one ratio.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// The ratio of the edges that name none.
    pub ratio: Option<f64>,
    /// In the flow's order.
    pub edges: Vec<EdgeResult>,
    /// Adapters trained on pooled data.
    pub joints: Vec<EdgeResult>,
    /// One for each set of several edges that is fused.
    #[serde(default)]
    pub conflicts: Vec<ConflictResult>,
    /// In the flow's order.
    pub fusions: Vec<FusionResult>,
    /// In the flow's order.
    pub tasks: Vec<TaskResult>,
}

impl Sweep {
    /// The distinct sets of edges that are fused, in order, each with the tasks that ask for none but its edges; then
    /// all edges with the tasks that no set covers.
    pub fn groups(&self) -> Vec<(Vec<String>, Vec<&TaskResult>)> {
        let mut sets: Vec<&Vec<String>> = Vec::new();
        for fusion in &self.fusions {
            if !sets.contains(&&fusion.edges) {
                sets.push(&fusion.edges);
            }
        }
        let covers = |set: &[String], task: &TaskResult| task.edges.iter().all(|e| set.contains(e));
        let mut groups: Vec<(Vec<String>, Vec<&TaskResult>)> = sets
            .iter()
            .map(|set| ((*set).clone(), self.tasks.iter().filter(|t| covers(set, t)).collect()))
            .collect();
        let rest: Vec<&TaskResult> =
            self.tasks.iter().filter(|t| !sets.iter().any(|set| covers(set, t))).collect();
        if !rest.is_empty() {
            groups.push((self.edges.iter().map(|e| e.name.clone()).collect(), rest));
        }
        groups
    }

    /// The lines of the table of a fused `set` of edges over `tasks`: base, edges, joint, then fusions in the flow's
    /// order. A joint or fused adapter belongs to the set that it was made of.
    pub fn lines<'a>(&'a self, set: &[String], tasks: &[&'a TaskResult]) -> Vec<Line<'a>> {
        let belongs = |c: &Column| match c.kind {
            Kind::Base | Kind::Pruned => true,
            Kind::Edge => c.edges.iter().all(|e| set.contains(e)),
            Kind::Joint | Kind::Fusion => c.edges == set,
        };
        let mut heads: Vec<(Kind, &str)> = Vec::new();
        for column in tasks.iter().flat_map(|t| &t.columns).filter(|c| belongs(c)) {
            let head = (column.kind, column.name.as_str());
            if !heads.contains(&head) {
                heads.push(head);
            }
        }
        heads.sort_by_key(|(kind, _)| *kind);
        let line = |(kind, name): (Kind, &'a str)| Line {
            kind,
            name,
            columns: tasks
                .iter()
                .map(|t| t.columns.iter().find(|c| c.kind == kind && c.name == name && belongs(c)))
                .collect(),
            conflict: self.conflict(set, kind, name),
        };
        heads.into_iter().map(line).collect()
    }

    /// Which edges were left out of which fusions, and why: a sentence for each edge, set and reason.
    pub fn left_out(&self) -> Vec<String> {
        let mut groups: Vec<(&LeftOut, &[String], Vec<&str>)> = Vec::new();
        for fusion in &self.fusions {
            for left in &fusion.left_out {
                match groups.iter_mut().find(|(same, set, _)| *same == left && *set == fusion.edges) {
                    Some((_, _, names)) => names.push(&fusion.name),
                    None => groups.push((left, &fusion.edges, vec![&fusion.name])),
                }
            }
        }
        let ratio = self.ratio.map(|r| format!(" at ratio {r}")).unwrap_or_default();
        let told = |(left, set, names): (&LeftOut, &[String], Vec<&str>)| {
            let (edge, set, names) = (&left.edge, set.join(" + "), names.join(", "));
            format!("{edge} was left out of {set}{ratio} fused by {names}: {}.", left.why)
        };
        groups.into_iter().map(told).collect()
    }

    /// c̄ before and after a fusion's resolution, as its certificate says; empty for anything else.
    fn conflict(&self, set: &[String], kind: Kind, name: &str) -> String {
        let of = |f: &&FusionResult| kind == Kind::Fusion && f.edges == set && f.name == name;
        let fusion = self.fusions.iter().find(of);
        let mean =
            |which: &str| fusion?.report.pointer(&format!("/certificate/{which}/conflict_mean"))?.as_f64();
        match (mean("before"), mean("after")) {
            (Some(b), Some(a)) => format!("{b:.3} → {a:.3}"),
            (Some(b), None) => format!("{b:.3}"),
            _ => String::new(),
        }
    }
}

/// One adapter in the table of a set of edges.
#[derive(Clone, Debug)]
pub struct Line<'a> {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: &'a str,
    /// Its result on each task, where it was evaluated.
    pub columns: Vec<Option<&'a Column>>,
    /// Its conflict, in words.
    pub conflict: String,
}

impl fmt::Display for Column {
    /// Accuracy ± standard error in percent.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&percent(self.accuracy, self.standard_error))
    }
}

/// One edge: its pruned model and its training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EdgeResult {
    /// The edge, or the edges of a joint adapter joined by `+`.
    pub name: String,
    /// `prune`'s report.
    pub prune: Value,
    /// `train`'s report.
    pub train: Value,
    /// Loss by step.
    pub losses: Vec<f64>,
}

/// How the recovered adapters of a set of edges lie to each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConflictResult {
    /// Names of the edges.
    pub edges: Vec<String>,
    /// `conflict`'s report.
    pub report: ConflictReport,
}

/// One fusion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusionResult {
    /// Names of the edges.
    pub edges: Vec<String>,
    /// Method and resolution.
    pub name: String,
    /// The edges among them whose adapters were not fused.
    #[serde(default)]
    pub left_out: Vec<LeftOut>,
    /// `fuse`'s report.
    pub report: Value,
}

impl FusionResult {
    /// Of `fuse`'s report on the adapters of these edges, in their order.
    pub fn new(edges: Vec<String>, name: String, report: Value) -> FusionResult {
        let why = |n: usize| report.pointer(&format!("/admission/adapters/{n}/rejected"))?.as_str();
        let one = |(n, edge): (usize, &String)| Some(LeftOut { edge: edge.clone(), why: why(n)?.into() });
        let left_out = edges.iter().enumerate().filter_map(one).collect();
        FusionResult { edges, name, left_out, report }
    }
}

/// An edge whose adapter has no part in a fusion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The edge.
    pub edge: String,
    /// Why.
    pub why: String,
}

/// One task, with a column for each adapter that was evaluated on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// The task.
    pub name: String,
    /// Names of the edges whose knowledge it asks for.
    pub edges: Vec<String>,
    /// Base first, then edges, joint, fusions.
    pub columns: Vec<Column>,
}

/// What was evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The model without adapter.
    Base,
    /// A pruned model without adapter.
    Pruned,
    /// One edge's recovered adapter.
    Edge,
    /// An adapter trained on pooled data.
    Joint,
    /// A fused adapter.
    Fusion,
}

/// Accuracy of one adapter on one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// What it is.
    pub kind: Kind,
    /// `base`, the edge, `joint`, or method and resolution.
    pub name: String,
    /// Names of the edges that it knows of.
    pub edges: Vec<String>,
    /// Items that fit.
    pub items: usize,
    /// Items answered rightly.
    pub correct: usize,
    /// `correct / items`; none without items.
    pub accuracy: Option<f64>,
    /// `√(p(1−p)/(n−1))`; none below two items.
    pub standard_error: Option<f64>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::manifest::Occasion;
    use crate::stage::admit::{Admission, Candidate};
    use crate::stage::trust::Admitted;

    /// A fusion of `a` and `b`, with why each was left out.
    fn fusion(name: &str, rejected: [Option<&str>; 2]) -> FusionResult {
        let candidate = |why: Option<&str>| Candidate {
            path: "adapter".into(),
            norm: 1.0,
            from: Admitted { signer: None, edge: None, occasion: Occasion::default(), files: 0 },
            rejected: why.map(String::from),
        };
        let admission = Admission { adapters: rejected.map(candidate).to_vec(), outliers: Vec::new() };
        FusionResult::new(vec!["a".into(), "b".into()], name.into(), json!({"admission": admission}))
    }

    #[test]
    fn edges_that_were_left_out_are_named() {
        let why = "its update has norm 9";
        let all = [
            fusion("mean", [None, Some(why)]),
            fusion("tsv", [None, None]),
            fusion("fedavg", [None, Some(why)]),
            fusion("far", [Some("another reason"), None]),
        ];
        let left = |edge: &str, why: &str| LeftOut { edge: edge.into(), why: why.into() };
        assert_eq!(all[0].left_out, [left("b", why)]);
        assert!(all[1].left_out.is_empty());
        let sweep = Sweep {
            ratio: Some(0.6),
            edges: vec![],
            joints: vec![],
            conflicts: vec![],
            fusions: all.to_vec(),
            tasks: vec![],
        };
        assert_eq!(
            sweep.left_out(),
            [
                "b was left out of a + b at ratio 0.6 fused by mean, fedavg: its update has norm 9.",
                "a was left out of a + b at ratio 0.6 fused by far: another reason.",
            ]
        );
        // A file of an earlier version names nobody.
        let mut old = serde_json::to_value(&all[0]).unwrap();
        old.as_object_mut().unwrap().remove("left_out");
        assert!(serde_json::from_value::<FusionResult>(old).unwrap().left_out.is_empty());
    }
}
