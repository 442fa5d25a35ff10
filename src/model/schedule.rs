//! The step size over a run.

use std::f64::consts::PI;
use std::str::FromStr;

use crate::error::{Error, Result};

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// `½(1 + cos π(k−w)/(N−w))`.
    Cosine,
    /// Linear to 0.
    Linear,
    /// No decay.
    Constant,
}

impl FromStr for Decay {
    type Err = Error;

    fn from_str(s: &str) -> Result<Decay> {
        match s {
            "cosine" => Ok(Decay::Cosine),
            "linear" => Ok(Decay::Linear),
            "constant" => Ok(Decay::Constant),
            _ => Err(Error::Usage(format!("--schedule is {s:?}, expected cosine, linear or constant"))),
        }
    }
}

/// The step size of step k of N, as transformers has it: `lr·k/w` below w, then the decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    lr: f64,
    decay: Decay,
    warmup: u64,
    steps: u64,
}

impl LearningRate {
    /// `warmup` below 1 is a fraction of `steps`, rounded up to steps, else a number of steps.
    pub fn new(lr: f64, decay: Decay, warmup: f64, steps: u64) -> Result<LearningRate> {
        if !(lr.is_finite() && lr > 0.0) {
            return Err(Error::Usage(format!("--lr is {lr}, expected a number above 0")));
        }
        if !(warmup.is_finite() && warmup >= 0.0) {
            return Err(Error::Usage(format!("--warmup is {warmup}, expected 0 or more")));
        }
        let warmup = if warmup < 1.0 { (warmup * steps as f64).ceil() } else { warmup.round() } as u64;
        Ok(LearningRate { lr, decay, warmup, steps })
    }

    /// The step size of step `k`, which counts from 0.
    pub fn at(&self, k: u64) -> f64 {
        if k < self.warmup {
            return self.lr * k as f64 / self.warmup as f64;
        }
        let rest = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let part = (k - self.warmup) as f64 / rest;
        self.lr
            * match self.decay {
                Decay::Cosine => 0.5 * (1.0 + (PI * part).cos()),
                Decay::Linear => (1.0 - part).max(0.0),
                Decay::Constant => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_then_decays() {
        let lr = LearningRate::new(2.0, Decay::Cosine, 0.03, 100).unwrap();
        assert_eq!(lr.at(0), 0.0);
        assert!((lr.at(1) - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(lr.at(3), 2.0);
        let half = lr.at(3 + 97 / 2);
        assert!(half > 0.9 && half < 1.1, "{half}");
        let linear = LearningRate::new(1.0, Decay::Linear, 10.0, 20).unwrap();
        assert!((linear.at(15) - 0.5).abs() < 1e-12);
        assert!(linear.at(20).abs() < 1e-12);
        assert_eq!(LearningRate::new(1.0, Decay::Constant, 0.0, 5).unwrap().at(4), 1.0);
        for bad in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
            assert!(LearningRate::new(bad, Decay::Cosine, 0.0, 5).is_err());
        }
        assert!(LearningRate::new(1.0, Decay::Cosine, -0.1, 5).is_err());
    }
}
