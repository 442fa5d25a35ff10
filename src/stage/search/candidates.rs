//! Which fusions are tried, in a fixed order: of those that answer as many items rightly the first is taken.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::fuse::options::Method;
use crate::fuse::weights::Weights;
use crate::fuse::{Fusion, LoraCr, Recipe};

/// Steps of the grid: weights are multiples of one over it.
const STEPS: usize = 10;

/// `--weights` of a search.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightChoice {
    /// Every way to share 1 among the adapters in steps of 0.1.
    Grid,
    /// One way.
    One(Weights),
}

impl fmt::Display for WeightChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightChoice::Grid => f.write_str("grid"),
            WeightChoice::One(weights) => weights.fmt(f),
        }
    }
}

impl FromStr for WeightChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<WeightChoice> {
        match s {
            "grid" => Ok(WeightChoice::Grid),
            _ => s.parse().map(WeightChoice::One).map_err(|_| {
                Error::Usage(format!(
                    "--weights {s:?}: expected grid, uniform, samples or numbers parted by commas"
                ))
            }),
        }
    }
}

/// One fusion to try.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The method and the resolution before it.
    pub recipe: Recipe,
    /// How much each adapter counts.
    pub weights: Weights,
}

impl fmt::Display for Candidate {
    /// `fedsa-sum+lora-cr 0.3,0.7`; uniform weights go without saying.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.recipe.fusion.method)?;
        if let Some(choice) = self.recipe.fusion.fedsa {
            write!(f, "-{choice}")?;
        }
        if self.recipe.resolve.is_some() {
            f.write_str("+lora-cr")?;
        }
        match &self.weights {
            Weights::Uniform => Ok(()),
            weights => write!(f, " {weights}"),
        }
    }
}

/// Every method with every resolution and all weights, the simpler first: without a resolution before with one; uniform
/// weights, those by samples, lists, then points of the grid from the most even; methods in the order of
/// [`Method::ALL`].
///
/// An error, before any is made, where there are more than `most`.
pub fn candidates(
    fusions: &[Fusion],
    resolves: &[Option<LoraCr>],
    weights: &[WeightChoice],
    adapters: usize,
    most: usize,
) -> Result<Vec<Candidate>> {
    let points = |choice: &WeightChoice| match choice {
        WeightChoice::Grid => grid_points(adapters),
        WeightChoice::One(_) => 1,
    };
    let weightings = weights.iter().map(points).fold(0, usize::saturating_add);
    let count = weightings.saturating_mul(fusions.len()).saturating_mul(resolves.len());
    if count > most {
        let (m, r) = (fusions.len(), resolves.len());
        return Err(Error::Usage(format!(
            "{m} methods, {r} resolutions and {weightings} weightings of {adapters} adapters are {count} candidates, \
             more than the {most} of --max-candidates"
        )));
    }
    let mut fusions = fusions.to_vec();
    fusions.sort_by_key(|f| Method::ALL.iter().position(|m| *m == f.method));
    let mut resolves = resolves.to_vec();
    resolves.sort_by_key(Option::is_some);
    let mut ordered: Vec<(usize, usize, Weights)> = Vec::with_capacity(weightings);
    for choice in weights {
        match choice {
            WeightChoice::Grid => ordered.extend(grid(adapters)),
            WeightChoice::One(weights) => {
                let rank = match weights {
                    Weights::Uniform => 0,
                    Weights::Samples => 1,
                    Weights::List(_) => 2,
                };
                ordered.push((rank, 0, weights.clone()));
            }
        }
    }
    ordered.sort_by_key(|(rank, unevenness, _)| (*rank, *unevenness));
    let mut out = Vec::with_capacity(count);
    for resolve in &resolves {
        for (_, _, weights) in &ordered {
            for fusion in &fusions {
                let recipe = Recipe { resolve: *resolve, fusion: *fusion };
                out.push(Candidate { recipe, weights: weights.clone() });
            }
        }
    }
    Ok(out)
}

/// C(10 + E − 1, 10), the ways to share ten tenths among E adapters, or the largest number where that is larger.
fn grid_points(adapters: usize) -> usize {
    let mut ways: u128 = 1;
    for j in 1..=STEPS as u128 {
        // A product of j numbers in a row is a multiple of j!.
        ways = match ways.checked_mul(adapters as u128 + j - 1) {
            Some(product) => product / j,
            None => return usize::MAX,
        };
    }
    usize::try_from(ways).unwrap_or(usize::MAX)
}

/// The points of the grid, those that favour the first adapters first; with the place of grids in the order and how far
/// from even each is, `Σ (E kₑ − 10)²` of kₑ tenths.
fn grid(adapters: usize) -> impl Iterator<Item = (usize, usize, Weights)> {
    let mut shares = vec![0; adapters];
    let mut points = Vec::new();
    share(&mut shares, 0, STEPS, &mut points);
    points.into_iter().map(move |point| {
        let unevenness = point.iter().map(|k| (adapters * k).abs_diff(STEPS).pow(2)).sum();
        let weights = point.iter().map(|&k| k as f64 / STEPS as f64).collect();
        (3, unevenness, Weights::List(weights))
    })
}

/// Adds to `points` every way to share `left` among the places from `at` on.
fn share(shares: &mut Vec<usize>, at: usize, left: usize, points: &mut Vec<Vec<usize>>) {
    if at + 1 >= shares.len() {
        if let Some(last) = shares.last_mut() {
            *last = left;
            points.push(shares.clone());
        }
        return;
    }
    for own in (0..=left).rev() {
        shares[at] = own;
        share(shares, at + 1, left - own, points);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fusion(method: Method) -> Fusion {
        Fusion::new(method, None).unwrap()
    }

    fn names(weights: &[&str], adapters: usize) -> Vec<String> {
        let weights: Vec<WeightChoice> = weights.iter().map(|w| w.parse().unwrap()).collect();
        let fusions = [fusion(Method::Mean), fusion(Method::Fedavg)];
        let all = candidates(&fusions, &[Some(LoraCr::default()), None], &weights, adapters, 1000).unwrap();
        all.iter().map(Candidate::to_string).collect()
    }

    #[test]
    fn the_simpler_come_first() {
        let got = names(&["3,1", "uniform"], 2);
        let expected = ["fedavg", "mean", "fedavg 3,1", "mean 3,1"];
        let resolved = ["fedavg+lora-cr", "mean+lora-cr", "fedavg+lora-cr 3,1", "mean+lora-cr 3,1"];
        assert_eq!(got, [expected, resolved].concat());
        let grid = names(&["grid"], 2);
        let some = ["fedavg 0.5,0.5", "mean 0.5,0.5", "fedavg 0.6,0.4", "mean 0.6,0.4", "fedavg 0.4,0.6"];
        assert_eq!(grid[..5], some);
        assert_eq!((grid.len(), grid[43].as_str()), (44, "mean+lora-cr 0,1"));
    }

    #[test]
    fn the_grid_has_every_point_once() {
        for (adapters, count) in [(1, 1), (2, 11), (3, 66), (4, 286), (5, 1001)] {
            let mut points: Vec<String> = grid(adapters).map(|(_, _, w)| w.to_string()).collect();
            for (_, _, weights) in grid(adapters) {
                let Weights::List(w) = weights else { unreachable!() };
                assert!((w.iter().sum::<f64>() - 1.0).abs() <= 1e-15 && w.len() == adapters);
            }
            points.sort_unstable();
            points.dedup();
            assert_eq!((points.len(), grid_points(adapters)), (count, count), "{adapters}");
        }
        assert_eq!((grid_points(50), grid_points(1000)), (62_828_356_305, usize::MAX));
    }

    #[test]
    fn an_absurd_number_is_refused_before_any_is_made() {
        let all = |adapters, most| {
            candidates(&[fusion(Method::Mean)], &[None], &[WeightChoice::Grid], adapters, most)
        };
        assert_eq!(all(3, 66).unwrap().len(), 66);
        let why = all(3, 65).unwrap_err().to_string();
        assert!(
            why.contains(
                "66 weightings of 3 adapters are 66 candidates, more than the 65 of --max-candidates"
            )
        );
        assert!(all(100_000, 1_000_000).is_err() && all(usize::MAX, 1).is_err());
        assert!("0.5;0.5".parse::<WeightChoice>().unwrap_err().to_string().contains("grid, uniform"));
    }
}
