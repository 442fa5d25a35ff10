//! How large each adapter's update is, and whose is far from the others'.
//!
//! Norms are compared by their logarithms, whose median and median absolute deviation (MAD) a minority cannot move. With
//! `x = ln ‖ΔWₑ‖`, an adapter is an outlier if `|x − median| > max(3.5 · MAD / 0.6745, ln 3)`: its modified z-score
//! exceeds 3.5 (Iglewicz and Hoaglin 1993), and it is more than three times larger or smaller than the median. In a
//! single module only larger ones count, and from ten times the median: modules differ more between honest edges, and
//! a small one does no harm. Updates of zero are named apart and left out of the median. Of fewer than three updates
//! nobody can say which is far from the others.

use faer::MatRef;
use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::factor::Pair;
use crate::error::Result;
use crate::fuse::inputs::Inputs;
use crate::fuse::measure::norm_squared;

/// The modified z-score from which on a value is an outlier.
const SCORE: f64 = 3.5;
/// The MAD of a normal distribution with standard deviation 1.
const NORMAL_MAD: f64 = 0.6745;
/// How many times larger or smaller than the median an outlier's whole update is at least.
const FACTOR: f64 = 3.0;
/// How many times larger than the median an outlier's update of one module is at least.
const MODULE_FACTOR: f64 = 10.0;

/// `‖ΔWₑ‖` of each adapter.
#[derive(Clone, Debug)]
pub struct Norms {
    /// Over all modules.
    pub total: Vec<f64>,
    /// Of each of `Inputs::modules`, for those who have it.
    pub modules: Vec<Vec<Option<f64>>>,
}

/// An adapter whose update is far from the others'.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outlier {
    /// Its position among the adapters.
    pub adapter: usize,
    /// Where its update is farthest from the others': a module, or none for the whole update.
    pub module: Option<String>,
    /// `‖ΔW‖` there.
    pub norm: f64,
    /// The median there of all adapters whose update is not zero.
    pub median: f64,
}

impl Norms {
    /// Reads all values; an error where one is NaN or infinite, or an update is too large for f64.
    pub fn of(inputs: &Inputs) -> Result<Norms> {
        let one = |pair: &Pair| -> Result<f64> {
            let norm = norm(pair);
            if norm.is_finite() {
                return Ok(norm);
            }
            pair.check_finite()?;
            Err(pair
                .b
                .error(format!("and its A make an update that is too large, with scale {}", pair.scale)))
        };
        // Gathered before the first error is looked for, so that it is always the same one.
        let modules: Vec<Result<Vec<Option<f64>>>> = inputs
            .modules
            .par_iter()
            .map(|m| inputs.adapters.iter().map(|a| a.modules.get(m).map(one).transpose()).collect())
            .collect();
        let modules = modules.into_iter().collect::<Result<Vec<_>>>()?;
        let total = (0..inputs.adapters.len())
            .map(|e| modules.iter().filter_map(|m| m[e]).fold(0.0, f64::hypot))
            .collect();
        Ok(Norms { total, modules })
    }

    /// The outliers among the adapters at the positions in `among`, each where it is farthest from the others.
    pub fn outliers(&self, inputs: &Inputs, among: &[usize]) -> Vec<Outlier> {
        let Some(whole) = &Spread::of(among.iter().map(|&e| self.total[e])) else { return Vec::new() };
        let of = |norms: &Vec<Option<f64>>| Spread::of(among.iter().filter_map(|&e| norms[e]));
        let spreads: Vec<Option<Spread>> = self.modules.iter().map(of).collect();
        among
            .iter()
            .filter_map(|&e| {
                let found = |module: Option<String>, norm: f64, s: &Spread| Outlier {
                    adapter: e,
                    module,
                    norm,
                    median: s.median.exp(),
                };
                if whole.is_far(self.total[e], FACTOR) {
                    return Some(found(None, self.total[e], whole));
                }
                let here = spreads.iter().zip(&self.modules).zip(&inputs.modules);
                let (module, norm, s) = here
                    .filter_map(|((s, norms), module)| Some((module, norms[e]?, s.as_ref()?)))
                    .filter(|(_, norm, s)| norm.ln() > s.median && s.is_far(*norm, MODULE_FACTOR))
                    .max_by(|a, b| (a.1.ln() - a.2.median).total_cmp(&(b.1.ln() - b.2.median)))?;
                Some(found(Some(module.to_string()), norm, s))
            })
            .collect()
    }
}

/// `‖s B A‖`.
fn norm(pair: &Pair) -> f64 {
    let (o, i) = pair.dims();
    let (a, b) = (pair.a.to_f64(), pair.b.to_f64());
    let a = MatRef::from_row_major_slice(&a, pair.rank, i);
    let b = MatRef::from_row_major_slice(&b, o, pair.rank);
    pair.scale.abs() * norm_squared(b.transpose(), a).sqrt()
}

/// Median and MAD of the logarithms.
struct Spread {
    median: f64,
    mad: f64,
}

impl Spread {
    /// Of the norms that are there and not zero; none of fewer than three.
    fn of(norms: impl Iterator<Item = f64>) -> Option<Spread> {
        let mut x: Vec<f64> = norms.filter(|n| *n > 0.0).map(f64::ln).collect();
        if x.len() < 3 {
            return None;
        }
        let median = median(&mut x);
        x.iter_mut().for_each(|x| *x = (*x - median).abs());
        Some(Spread { median, mad: self::median(&mut x) })
    }

    fn is_far(&self, norm: f64, factor: f64) -> bool {
        let allowed = f64::max(SCORE * self.mad / NORMAL_MAD, factor.ln());
        // The logarithm of an update of zero is infinitely far.
        (norm.ln() - self.median).abs() > allowed
    }
}

/// The middle of at least one number, or the mean of the two in the middle.
fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    let n = x.len();
    (x[(n - 1) / 2] + x[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of the norms are outliers as whole updates.
    fn far(norms: &[f64]) -> Vec<usize> {
        let Some(s) = Spread::of(norms.iter().copied()) else { return Vec::new() };
        (0..norms.len()).filter(|&e| s.is_far(norms[e], FACTOR)).collect()
    }

    #[test]
    fn a_minority_is_found_and_honest_spread_is_not() {
        assert_eq!(far(&[1.0, 1.1, 1e9]), [2]);
        assert_eq!(far(&[1.0, 1.0, 1.0, 1e9]), [3]);
        assert_eq!(far(&[2.0, 1.0, 1e-9, 1.5, 1.2]), [2]);
        assert_eq!(far(&[1.0, 1.1, 0.9, 1.2, 1e6, 1e6]), [4, 5]);
        // Equal ones have no spread, and twice the others is no reason.
        assert!(far(&[1.0, 1.0, 1.0, 2.9]).is_empty());
        assert_eq!(far(&[1.0, 1.0, 1.0, 3.1]), [3]);
        // Where all differ much, more is needed.
        assert!(far(&[1.0, 4.0, 16.0, 64.0, 256.0]).is_empty());
        assert_eq!(far(&[1.0, 0.0, 1.0, 1.0]), [1]);
    }

    #[test]
    fn of_two_nobody_can_say() {
        for few in [&[][..], &[1.0], &[1.0, 1e9], &[1.0, 1e9, 0.0], &[0.0, 0.0, 0.0]] {
            assert!(far(few).is_empty(), "{few:?}");
        }
    }
}
