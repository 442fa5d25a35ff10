//! Scores of coupled groups: what goes together when a key/value head or an MLP channel goes.
//!
//! The group of key/value head g: its rows of k and v, the rows of q of the query heads that read it, and their
//! columns of o. The group of channel c: row c of gate and of up, column c of down.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::checkpoint::module::Target;
use crate::checkpoint::sizes::LayerSizes;
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// `--reduce`: how the scores of a group's members become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduce {
    /// Their sum.
    #[default]
    Sum,
    /// Their mean.
    Mean,
    /// The largest.
    Max,
    /// Their product: the paper's Eq. 10.
    Prod,
}

impl Reduce {
    /// All, in the order of the help text.
    pub const ALL: [Reduce; 4] = [Reduce::Sum, Reduce::Mean, Reduce::Max, Reduce::Prod];

    /// The word of the command line and of `pruning.json`.
    pub fn name(self) -> &'static str {
        match self {
            Reduce::Sum => "sum",
            Reduce::Mean => "mean",
            Reduce::Max => "max",
            Reduce::Prod => "prod",
        }
    }

    /// One number of the members' numbers. A product of four factors that are 0 or at least 2^-149, as sums of f32
    /// products are, is 0 or at least 2^-596, so it does not underflow in f64.
    fn apply(self, members: impl ExactSizeIterator<Item = f64>) -> f64 {
        let n = members.len() as f64;
        match self {
            Reduce::Sum => members.sum(),
            Reduce::Mean => members.sum::<f64>() / n,
            Reduce::Prod => members.product(),
            // `f64::max` would drop a NaN, which has to reach the check for it.
            Reduce::Max => members.fold(f64::NEG_INFINITY, |a, b| if b > a || b.is_nan() { b } else { a }),
        }
    }
}

impl fmt::Display for Reduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Reduce {
    type Err = Error;

    fn from_str(s: &str) -> Result<Reduce> {
        Reduce::ALL.into_iter().find(|r| r.name() == s).ok_or_else(|| {
            Error::Usage(format!("unknown reduction {s:?}: expected one of sum, mean, max, prod"))
        })
    }
}

/// `--gqa`: which query heads are counted to which key/value head when groups are scored. What is removed is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gqa {
    /// Query head h to key/value head `h div (H/G)`, which it reads.
    #[default]
    Correct,
    /// Query head h to key/value head `h mod G`, as LLM-Pruner's code adds them up.
    LlmPruner,
}

impl Gqa {
    /// All, in the order of the help text.
    pub const ALL: [Gqa; 2] = [Gqa::Correct, Gqa::LlmPruner];

    /// The word of the command line and of `pruning.json`.
    pub fn name(self) -> &'static str {
        match self {
            Gqa::Correct => "correct",
            Gqa::LlmPruner => "llm-pruner",
        }
    }
}

impl fmt::Display for Gqa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Gqa {
    type Err = Error;

    fn from_str(s: &str) -> Result<Gqa> {
        Gqa::ALL.into_iter().find(|g| g.name() == s).ok_or_else(|| {
            Error::Usage(format!("unknown counting of query heads {s:?}: expected correct or llm-pruner"))
        })
    }
}

/// How the numbers of rows and columns become numbers of groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grouping {
    /// Over a group's members.
    pub reduce: Reduce,
    /// Which query heads belong together.
    pub gqa: Gqa,
    /// The numbers are signed: each member's are added up over the whole group, then the absolute value is taken, then
    /// the members are reduced. Otherwise members are reduced row by row first, and rows of a head added up after.
    pub by_structure: bool,
}

/// The scores of one layer's groups.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupScores {
    /// `[G]`.
    pub kv_heads: Vec<f64>,
    /// `[F]`.
    pub mlp: Vec<f64>,
}

impl GroupScores {
    /// From one number for each row (column of o and down) of the seven linears, in the order of [`Target::ALL`]: q and
    /// o `[H·K]`, k and v `[G·K]`, the others `[F]`.
    pub fn new(
        members: &[Vec<f64>; 7],
        sizes: LayerSizes,
        head_dim: usize,
        grouping: Grouping,
    ) -> Result<GroupScores> {
        for target in Target::ALL {
            let (o, i) = sizes.dims(target, 0, head_dim);
            let expected = if target.prunes_rows() { o } else { i };
            let found = members[target as usize].len();
            if found != expected {
                return Err(Error::Op {
                    op: "group scores",
                    why: format!("{target} has {found} scores, expected {expected}"),
                });
            }
        }
        let member = |t: Target| &members[t as usize];
        let folded = |t| fold(member(t), sizes, head_dim, grouping.gqa);
        let (q, o) = (folded(Target::Q), folded(Target::O));
        let attention = [member(Target::K), member(Target::V), &q, &o];
        let mlp = [Target::Gate, Target::Up, Target::Down].map(member);
        Ok(GroupScores { kv_heads: reduce(&attention, head_dim, grouping), mlp: reduce(&mlp, 1, grouping) })
    }

    /// Random scores of layer `layer`, uniform in [0, 1).
    pub fn random(seed: u64, layer: usize, sizes: LayerSizes) -> GroupScores {
        let draw = |block: u64, n: usize| {
            let numbers = Philox::new(seed, Purpose::Importance.stream(2 * layer as u64 + block));
            (0..n as u64).map(|i| numbers.uniform_f64(i)).collect()
        };
        GroupScores { kv_heads: draw(0, sizes.kv_heads), mlp: draw(1, sizes.mlp) }
    }

    /// An error where a score is NaN or infinite; it names the layer and the group.
    pub fn check_finite(&self, layer: usize) -> Result<()> {
        for (what, scores) in [("key/value head", &self.kv_heads), ("MLP channel", &self.mlp)] {
            if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
                return Err(Error::Numeric(format!(
                    "layer {layer}: the importance of {what} {i} is {}, expected a finite number: the weights hold NaN or infinity, or their gradients overflow",
                    scores[i]
                )));
            }
        }
        Ok(())
    }
}

/// The rows of q or columns of o, H·K numbers, added up to the G·K rows of the key/value heads they are counted to.
fn fold(x: &[f64], sizes: LayerSizes, head_dim: usize, gqa: Gqa) -> Vec<f64> {
    let mut out = vec![0.0; sizes.kv_heads * head_dim];
    let group = sizes.heads / sizes.kv_heads.max(1);
    for (h, head) in x.chunks_exact(head_dim).enumerate() {
        let kv = match gqa {
            Gqa::Correct => h / group,
            Gqa::LlmPruner => h % sizes.kv_heads,
        };
        out[kv * head_dim..(kv + 1) * head_dim].iter_mut().zip(head).for_each(|(o, x)| *o += x);
    }
    out
}

/// One number for each `width` rows of the members.
fn reduce(members: &[&Vec<f64>], width: usize, grouping: Grouping) -> Vec<f64> {
    let groups = members[0].len() / width;
    (0..groups)
        .map(|g| {
            let rows = g * width..(g + 1) * width;
            if grouping.by_structure {
                grouping.reduce.apply(members.iter().map(|m| m[rows.clone()].iter().sum::<f64>().abs()))
            } else {
                rows.map(|r| grouping.reduce.apply(members.iter().map(|m| m[r]))).sum()
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: LayerSizes = LayerSizes { heads: 4, kv_heads: 2, mlp: 3 };
    const K: usize = 2;

    /// Members with numbers of both signs, none alike.
    fn members() -> [Vec<f64>; 7] {
        Target::ALL.map(|t| {
            let (o, i) = SIZES.dims(t, 0, K);
            let n = if t.prunes_rows() { o } else { i };
            (0..n).map(|r| ((r * r + 3 * t as usize + 1) as f64).sin() * (1.0 + r as f64)).collect()
        })
    }

    /// The definition, index by index.
    fn dense(m: &[Vec<f64>; 7], grouping: Grouping) -> GroupScores {
        let owner = |h: usize| if grouping.gqa == Gqa::Correct { h / 2 } else { h % 2 };
        let combine = |v: &[f64]| match grouping.reduce {
            Reduce::Sum => v.iter().sum(),
            Reduce::Mean => v.iter().sum::<f64>() / v.len() as f64,
            Reduce::Max => v.iter().copied().reduce(f64::max).unwrap(),
            Reduce::Prod => v.iter().product::<f64>(),
        };
        let mut kv_heads = Vec::new();
        for g in 0..2 {
            let table: Vec<[f64; 4]> = (0..K)
                .map(|j| {
                    let over = |x: &[f64]| (0..4).filter(|&h| owner(h) == g).map(|h| x[h * K + j]).sum();
                    [m[1][g * K + j], m[2][g * K + j], over(&m[0]), over(&m[3])]
                })
                .collect();
            kv_heads.push(if grouping.by_structure {
                let wholes: Vec<f64> =
                    (0..4).map(|c| table.iter().map(|r| r[c]).sum::<f64>().abs()).collect();
                combine(&wholes)
            } else {
                table.iter().map(|r| combine(r)).sum()
            });
        }
        let mlp = (0..3)
            .map(|c| {
                let v = [m[4][c], m[5][c], m[6][c]];
                combine(&if grouping.by_structure { v.map(f64::abs) } else { v })
            })
            .collect();
        GroupScores { kv_heads, mlp }
    }

    #[test]
    fn every_reduction_and_counting_against_the_definition() {
        let mut seen: Vec<GroupScores> = Vec::new();
        for reduce in Reduce::ALL {
            for gqa in Gqa::ALL {
                for by_structure in [false, true] {
                    let grouping = Grouping { reduce, gqa, by_structure };
                    let got = GroupScores::new(&members(), SIZES, K, grouping).unwrap();
                    let expected = dense(&members(), grouping);
                    for (a, b) in
                        got.kv_heads.iter().chain(&got.mlp).zip(expected.kv_heads.iter().chain(&expected.mlp))
                    {
                        assert!((a - b).abs() <= 1e-12 * (1.0 + b.abs()), "{grouping:?}: {a} is not {b}");
                    }
                    assert!(
                        !seen.iter().any(|s| s.kv_heads == got.kv_heads),
                        "{grouping:?} makes no difference"
                    );
                    seen.push(got);
                }
            }
        }
    }

    #[test]
    fn llm_pruner_adds_up_other_heads() {
        // Only query head 1 counts: it reads key/value head 0, and LLM-Pruner adds it to head 1.
        let mut m = Target::ALL.map(|t| {
            let (o, i) = SIZES.dims(t, 0, K);
            vec![0.0; if t.prunes_rows() { o } else { i }]
        });
        m[0][2] = 1.0;
        let score =
            |gqa| GroupScores::new(&m, SIZES, K, Grouping { gqa, ..Grouping::default() }).unwrap().kv_heads;
        assert_eq!(score(Gqa::Correct), [1.0, 0.0]);
        assert_eq!(score(Gqa::LlmPruner), [0.0, 1.0]);
    }

    #[test]
    fn tiny_products_keep_their_order() {
        let m = Target::ALL.map(|t| {
            let (o, i) = SIZES.dims(t, 0, K);
            let n = if t.prunes_rows() { o } else { i };
            (0..n).map(|r| f64::from(f32::from_bits(1 + (r as u32 & 3)))).collect::<Vec<_>>()
        });
        let s =
            GroupScores::new(&m, SIZES, K, Grouping { reduce: Reduce::Prod, ..Grouping::default() }).unwrap();
        assert!(s.kv_heads[1] > s.kv_heads[0] && s.kv_heads[0] > 0.0);
        assert!(s.mlp[2] > s.mlp[1] && s.mlp[1] > s.mlp[0] && s.mlp[0] > 0.0);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        for reduce in Reduce::ALL {
            for (bad, at) in [(f64::NAN, 0), (f64::INFINITY, 1)] {
                let mut m = members();
                m[Target::Up as usize][at] = bad;
                let s = GroupScores::new(&m, SIZES, K, Grouping { reduce, ..Grouping::default() }).unwrap();
                let err = s.check_finite(7).unwrap_err().to_string();
                assert!(err.contains(&format!("layer 7: the importance of MLP channel {at} is")), "{err}");
            }
        }
        let mut m = members();
        m[Target::V as usize][3] = f64::NAN;
        let s = GroupScores::new(&m, SIZES, K, Grouping::default()).unwrap();
        assert!(s.check_finite(0).unwrap_err().to_string().contains("key/value head 1 is NaN"));
        m[0].pop();
        let err = GroupScores::new(&m, SIZES, K, Grouping::default()).unwrap_err().to_string();
        assert!(err.contains("q has 7 scores, expected 8"), "{err}");
    }

    #[test]
    fn random_scores_depend_on_seed_layer_and_block() {
        let sizes = LayerSizes { heads: 6, kv_heads: 6, mlp: 6 };
        let a = GroupScores::random(1, 2, sizes);
        assert_eq!(a, GroupScores::random(1, 2, sizes));
        assert_ne!(a.kv_heads, a.mlp);
        assert_ne!(a, GroupScores::random(2, 2, sizes));
        assert_ne!(a, GroupScores::random(1, 3, sizes));
        assert_eq!(a.kv_heads[..3], GroupScores::random(1, 2, LayerSizes { kv_heads: 3, ..sizes }).kv_heads);
    }

    #[test]
    fn names_are_those_of_files() {
        for r in Reduce::ALL {
            assert_eq!(r.name().parse::<Reduce>().unwrap(), r);
            assert_eq!(serde_json::to_value(r).unwrap(), r.name());
        }
        for g in Gqa::ALL {
            assert_eq!(g.name().parse::<Gqa>().unwrap(), g);
            assert_eq!(serde_json::to_value(g).unwrap(), g.name());
        }
        assert!("min".parse::<Reduce>().is_err() && "wrong".parse::<Gqa>().is_err());
    }
}
