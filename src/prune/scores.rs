//! How single weights are scored, and what is summed over a row or a column of a weight.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::importance::Score;

/// `--importance`: what a row (of q, k, v, gate, up) or a column (of o, down) is worth.
///
/// g is the gradient of the mean loss of the calibration set, F the mean over samples of the squared gradient of each
/// sample's own mean loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Importance {
    /// `Σ |w g|` (LLM-Pruner's param_first).
    #[default]
    Taylor1,
    /// `Σ w² F` (param_second).
    Taylor2,
    /// `Σ |w g − ½ w² F|` (param_mix).
    TaylorMix,
    /// `|Σ w g|`.
    Vector1,
    /// `|Σ w g − ½ Σ w² F|` over all rows or columns of a group's member: the paper's Eq. 11.
    Vector2,
    /// `Σ |w|`.
    L1,
    /// `Σ w²`.
    L2,
    /// Uniform random numbers by the seed, the layer and the group.
    Random,
}

impl Importance {
    /// All, in the order of the help text.
    pub const ALL: [Importance; 8] = [
        Importance::Taylor1,
        Importance::Taylor2,
        Importance::TaylorMix,
        Importance::Vector1,
        Importance::Vector2,
        Importance::L1,
        Importance::L2,
        Importance::Random,
    ];

    /// The word of the command line and of `pruning.json`.
    pub fn name(self) -> &'static str {
        match self {
            Importance::Taylor1 => "taylor1",
            Importance::Taylor2 => "taylor2",
            Importance::TaylorMix => "taylor-mix",
            Importance::Vector1 => "vector1",
            Importance::Vector2 => "vector2",
            Importance::L1 => "l1",
            Importance::L2 => "l2",
            Importance::Random => "random",
        }
    }

    /// The sums of gradient × weight that it is made of; none for scores that need no gradient.
    pub fn sums(self) -> &'static [Score] {
        match self {
            Importance::Taylor1 => &[Score::AbsFirst],
            Importance::Taylor2 => &[Score::Second],
            Importance::TaylorMix => &[Score::AbsMix],
            Importance::Vector1 => &[Score::First],
            Importance::Vector2 => &[Score::First, Score::Second],
            Importance::L1 | Importance::L2 | Importance::Random => &[],
        }
    }

    /// Whether it needs gradients, and so a calibration text.
    pub fn needs_calibration(self) -> bool {
        !self.sums().is_empty()
    }

    /// The power of |w| that a magnitude score sums.
    pub fn power(self) -> Option<u32> {
        match self {
            Importance::L1 => Some(1),
            Importance::L2 => Some(2),
            _ => None,
        }
    }

    /// Whether the numbers of [`Importance::combine`] are signed and their absolute value is taken over a whole group.
    pub fn by_structure(self) -> bool {
        self == Importance::Vector2
    }

    /// One number for each of n rows or columns from `sums[scores, n]`, in the order of [`Importance::sums`].
    pub fn combine(self, sums: &[f64]) -> Vec<f64> {
        match self {
            Importance::Vector1 => sums.iter().map(|s| s.abs()).collect(),
            Importance::Vector2 => {
                let (first, second) = sums.split_at(sums.len() / 2);
                first.iter().zip(second).map(|(f, s)| f - 0.5 * s).collect()
            }
            _ => sums.to_vec(),
        }
    }
}

impl fmt::Display for Importance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Importance {
    type Err = Error;

    fn from_str(s: &str) -> Result<Importance> {
        Importance::ALL.into_iter().find(|i| i.name() == s).ok_or_else(|| {
            let names = Importance::ALL.map(Importance::name).join(", ");
            Error::Usage(format!("unknown importance {s:?}: expected one of {names}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_files() {
        for i in Importance::ALL {
            assert_eq!(i.name().parse::<Importance>().unwrap(), i);
            assert_eq!(serde_json::to_value(i).unwrap(), i.name());
            assert_eq!(i.needs_calibration(), i.name().starts_with(['t', 'v']));
        }
        assert!("taylor3".parse::<Importance>().unwrap_err().to_string().contains("taylor-mix, vector1"));
        assert_eq!(Importance::default(), Importance::Taylor1);
    }

    #[test]
    fn sums_are_combined() {
        assert_eq!(Importance::Vector1.combine(&[-2.0, 1.0]), [2.0, 1.0]);
        assert_eq!(Importance::Vector2.combine(&[-2.0, 1.0, 4.0, 3.0]), [-4.0, -0.5]);
        assert_eq!(Importance::Taylor1.combine(&[2.0, 1.0]), [2.0, 1.0]);
    }
}
