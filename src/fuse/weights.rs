//! `--weights`: how much each adapter counts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The weights as they are typed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Weights {
    /// The same for all.
    #[default]
    Uniform,
    /// By the number of samples each adapter was trained on.
    Samples,
    /// One number an adapter.
    List(Vec<f64>),
}

impl Weights {
    /// `wₑ` of adapters that were trained on `samples`, adding up to 1.
    ///
    /// Fails for a list of another length, or one with a negative number or of sum 0; and for samples that an adapter
    /// does not name.
    pub fn normalised(&self, samples: &[Option<u64>]) -> Result<Vec<f64>> {
        let usage = |why: String| Err(Error::Usage(why));
        let raw = self.raw(samples)?;
        if let Some(w) = raw.iter().find(|w| **w < 0.0) {
            return usage(format!(
                "--weights {self}: {w} is negative, and only task-arithmetic takes such weights"
            ));
        }
        let sum: f64 = raw.iter().sum();
        if !(sum > 0.0 && sum.is_finite()) {
            return usage(format!("--weights {self}: the sum is {sum}, expected a positive number"));
        }
        Ok(raw.into_iter().map(|w| w / sum).collect())
    }

    /// `wₑ` as they are typed, 1 for `uniform`: the weights of `task-arithmetic`.
    ///
    /// Fails for a list of another length, and for `samples`.
    pub fn as_given(&self, adapters: usize) -> Result<Vec<f64>> {
        match self {
            Weights::Samples => Err(Error::Usage(
                "--weights samples has no meaning under task-arithmetic, whose weights are not normalised: \
                 give a list, or take --method mean"
                    .into(),
            )),
            _ => self.raw(&vec![None; adapters]),
        }
    }

    fn raw(&self, samples: &[Option<u64>]) -> Result<Vec<f64>> {
        match self {
            Weights::Uniform => Ok(vec![1.0; samples.len()]),
            Weights::List(w) if w.len() == samples.len() => Ok(w.clone()),
            Weights::List(w) => Err(Error::Usage(format!(
                "--weights {self}: {} numbers for {} adapters, expected one each",
                w.len(),
                samples.len()
            ))),
            Weights::Samples => samples
                .iter()
                .enumerate()
                .map(|(e, n)| {
                    n.map(|n| n as f64).ok_or_else(|| {
                        Error::Usage(format!(
                            "--weights samples: adapter {e} (counted from 0) does not say how many samples it was \
                             trained on; give a list of weights"
                        ))
                    })
                })
                .collect(),
        }
    }
}

/// The weights of those who have a module, scaled so that their sum is that of all.
///
/// Where theirs is 0 they all count nothing.
pub fn renormalised(weights: &[f64], present: &[usize]) -> Vec<f64> {
    let all: f64 = weights.iter().sum();
    let here: f64 = present.iter().map(|&e| weights[e]).sum();
    let scale = if here > 0.0 { all / here } else { 0.0 };
    present.iter().map(|&e| weights[e] * scale).collect()
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Weights::Uniform => f.write_str("uniform"),
            Weights::Samples => f.write_str("samples"),
            Weights::List(w) => {
                let w: Vec<String> = w.iter().map(f64::to_string).collect();
                f.write_str(&w.join(","))
            }
        }
    }
}

impl FromStr for Weights {
    type Err = Error;

    fn from_str(s: &str) -> Result<Weights> {
        let number = |w: &str| w.trim().parse().ok().filter(|w: &f64| w.is_finite());
        match s {
            "uniform" => Ok(Weights::Uniform),
            "samples" => Ok(Weights::Samples),
            _ => s.split(',').map(number).collect::<Option<_>>().map(Weights::List).ok_or_else(|| {
                Error::Usage(format!(
                    "--weights {s:?}: expected uniform, samples or numbers parted by commas"
                ))
            }),
        }
    }
}

impl From<Weights> for String {
    fn from(w: Weights) -> String {
        w.to_string()
    }
}

impl TryFrom<String> for Weights {
    type Error = Error;

    fn try_from(s: String) -> Result<Weights> {
        s.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(s: &str) -> Weights {
        s.parse().unwrap()
    }

    #[test]
    fn weights_add_up_to_one() {
        let samples = [Some(30), Some(10)];
        assert_eq!(Weights::Uniform.normalised(&samples).unwrap(), [0.5, 0.5]);
        assert_eq!(Weights::Samples.normalised(&samples).unwrap(), [0.75, 0.25]);
        assert_eq!(parse("3, 1").normalised(&samples).unwrap(), [0.75, 0.25]);
        assert_eq!(renormalised(&[0.5, 0.25, 0.25], &[1, 2]), [0.5, 0.5]);
        assert_eq!(renormalised(&[1.0, 0.0], &[1]), [0.0]);
    }

    #[test]
    fn task_arithmetic_takes_them_as_they_are() {
        assert_eq!(Weights::Uniform.as_given(3).unwrap(), [1.0; 3]);
        assert_eq!(parse("2,-0.5").as_given(2).unwrap(), [2.0, -0.5]);
        assert!(Weights::Samples.as_given(2).unwrap_err().to_string().contains("--method mean"));
    }

    #[test]
    fn what_cannot_be_a_weight_is_refused() {
        for s in ["", "x", "1,", "NaN,1", "inf", "1;2"] {
            assert!(s.parse::<Weights>().is_err(), "{s}");
        }
        for s in ["1", "1,2,3", "-1,2", "0,0"] {
            assert!(parse(s).normalised(&[None, None]).is_err(), "{s}");
        }
        let text = Weights::Samples.normalised(&[Some(1), None]).unwrap_err().to_string();
        assert!(text.contains("adapter 1"), "{text}");
        assert_eq!(serde_json::to_string(&parse("0.3,0.7")).unwrap(), "\"0.3,0.7\"");
    }
}
