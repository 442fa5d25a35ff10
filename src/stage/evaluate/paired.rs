//! Two columns on the same items: whether one is better, and by how much.

use serde::{Deserialize, Serialize};

/// What lies outside an interval, half of it on each side.
const OUTSIDE: f64 = 0.05;
/// Probabilities below it are left out of a distribution's tails: far less than a rounding error of their sum.
const TINY: f64 = 1e-20;

/// Two columns' answers to the same items.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Items that both answered.
    pub items: usize,
    /// Items that the first alone answered rightly.
    pub only_first: usize,
    /// Items that the second alone answered rightly.
    pub only_second: usize,
    /// The second's accuracy less the first's; none without items.
    pub difference: Option<f64>,
    /// The 95 % percentile interval of the difference under the paired bootstrap; none without items.
    pub interval: Option<[f64; 2]>,
    /// [`mcnemar`]'s p.
    pub p: f64,
}

impl Paired {
    /// Of whether each column answered each item rightly. The slices have one length.
    pub fn of(first: &[bool], second: &[bool]) -> Paired {
        let only = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && !**b).count();
        Paired::counted(first.len(), only(first, second), only(second, first))
    }

    /// Of how many of the `items` one alone answered rightly.
    fn counted(items: usize, only_first: usize, only_second: usize) -> Paired {
        let n = items as f64;
        Paired {
            items,
            only_first,
            only_second,
            difference: (items > 0).then(|| (only_second as f64 - only_first as f64) / n),
            interval: (items > 0)
                .then(|| bootstrap(items, only_first, only_second).map(|sum| sum as f64 / n)),
            p: mcnemar(only_first, only_second),
        }
    }
}

/// McNemar's test, exact and two-sided: `min(1, 2 Σ_{i ≤ k} C(n, i) / 2ⁿ)` with k the smaller of both counts and n their
/// sum. It is how likely counts at least as unequal are where each of n items is as likely to fall to one as to the
/// other.
pub fn mcnemar(only_first: usize, only_second: usize) -> f64 {
    let (k, n) = (only_first.min(only_second), only_first + only_second);
    // C(n, k) / 2ⁿ, a factor and some halvings at a time, so that nothing overflows.
    let (mut term, mut halvings) = (1.0f64, n);
    for j in 1..=k {
        // Multiplied before it is divided: as long as it fits 53 bits it is exact.
        term = term * (n - k + j) as f64 / j as f64;
        while term > 1.0 && halvings > 0 {
            term *= 0.5;
            halvings -= 1;
        }
    }
    term *= (-(halvings as f64)).exp2();
    let mut tail = 0.0;
    for i in (0..=k).rev() {
        tail += term;
        term = term * i as f64 / (n - i + 1) as f64;
    }
    (2.0 * tail).min(1.0)
}

/// The 95 % percentile interval of the paired bootstrap, as sums over the items: `n` items are drawn from the n with
/// replacement, each counts +1 where the second alone is right, −1 where the first alone is, else 0.
///
/// The sum's distribution is that of n independent such numbers, which is computed and not sampled: no seed, no error of
/// sampling, and what infinitely many draws would give.
fn bootstrap(items: usize, only_first: usize, only_second: usize) -> [i64; 2] {
    let p = |count: usize| count as f64 / items as f64;
    let neither = items.saturating_sub(only_first + only_second);
    let one = Distribution { first: -1, mass: vec![p(only_first), p(neither), p(only_second)] };
    let sum = one.times(items);
    let last = sum.first + sum.mass.len() as i64 - 1;
    [sum.first + tail(sum.mass.iter()), last - tail(sum.mass.iter().rev())]
}

/// How many of `masses` lie outside the interval: together they are less than half of what is outside.
fn tail<'a>(masses: impl Iterator<Item = &'a f64>) -> i64 {
    let mut sum = 0.0;
    let outside = masses.take_while(|p| {
        sum += **p;
        sum < OUTSIDE / 2.0
    });
    outside.count() as i64
}

/// How likely each whole number is: `mass[i]` is the probability of `first + i`.
#[derive(Clone, Debug)]
struct Distribution {
    first: i64,
    mass: Vec<f64>,
}

impl Distribution {
    /// Of the sum of two independent numbers.
    fn plus(&self, other: &Distribution) -> Distribution {
        let mut mass = vec![0.0; self.mass.len() + other.mass.len() - 1];
        for (i, p) in self.mass.iter().enumerate() {
            for (sum, q) in mass[i..].iter_mut().zip(&other.mass) {
                *sum += p * q;
            }
        }
        let kept = |p: &f64| *p > TINY;
        let start = mass.iter().position(kept).unwrap_or(0);
        let end = mass.iter().rposition(kept).map_or(mass.len(), |last| last + 1);
        Distribution { first: self.first + other.first + start as i64, mass: mass[start..end].to_vec() }
    }

    /// Of the sum of `n` independent numbers, by squaring.
    fn times(&self, n: usize) -> Distribution {
        let mut sum = Distribution { first: 0, mass: vec![1.0] };
        let (mut power, mut left) = (self.clone(), n);
        while left > 0 {
            if left % 2 == 1 {
                sum = sum.plus(&power);
            }
            left /= 2;
            if left > 0 {
                power = power.plus(&power);
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Philox, Purpose};

    #[test]
    fn mcnemar_is_the_binomial_tail() {
        // By hand: 2 (1 + 10 + 45) / 1024, 2 / 32, 2 (1 + 6 + 15) / 64.
        for (one, other, expected) in [
            (2, 8, 112.0 / 1024.0),
            (0, 5, 1.0 / 16.0),
            (4, 2, 44.0 / 64.0),
            (0, 0, 1.0),
            (3, 3, 1.0),
            (0, 1, 1.0),
            (1, 0, 1.0),
        ] {
            assert_eq!(mcnemar(one, other), expected, "{one} {other}");
        }
        // In exact fractions, rounded once; what scipy.stats.binomtest(k, n, 0.5) gives.
        for (one, other, expected) in [
            (12, 32, 0.003657766827927844),
            (40, 67, 0.011598202043786175),
            (500, 601, 0.002564772797753158),
            (4100, 4300, 0.029904874109640694),
            (3, 900, 3.629598428509171e-264),
        ] {
            let got = mcnemar(one, other);
            assert!((got - expected).abs() <= 1e-11 * expected, "{one} {other}: {got:e} {expected:e}");
            assert_eq!(got, mcnemar(other, one));
        }
        // Smaller than any number, and not NaN.
        assert_eq!(mcnemar(0, 2000), 0.0);
        assert!(mcnemar(3_000_000, 3_000_000) == 1.0 && mcnemar(1 << 20, (1 << 20) + 4096) < 1e-2);
    }

    /// Every draw of a few items, weighed alike.
    fn enumerated(answers: &[i64]) -> [i64; 2] {
        let n = answers.len();
        let mut sums: Vec<i64> = (0..n.pow(n as u32))
            .map(|code| (0..n).map(|place| answers[code / n.pow(place as u32) % n]).sum())
            .collect();
        sums.sort_unstable();
        // The least sum below which, itself counted, lies a share of at least 2.5 %.
        let at = (0.025 * sums.len() as f64).ceil() as usize - 1;
        [sums[at], sums[sums.len() - 1 - at]]
    }

    #[test]
    fn the_interval_is_that_of_every_possible_draw() {
        for answers in [
            &[1i64][..],
            &[0, 0],
            &[1, -1],
            &[1, 0, 0],
            &[-1, 0, 1, 1, 1],
            &[-1, -1, -1, 0, 0, 1],
            &[1, 1, 1, 1, 1, 1],
            &[0, 0, 0, 0, 0, 1, -1],
        ] {
            let count = |which: i64| answers.iter().filter(|a| **a == which).count();
            let got = bootstrap(answers.len(), count(-1), count(1));
            assert_eq!(got, enumerated(answers), "{answers:?}");
        }
    }

    #[test]
    fn the_interval_is_what_many_draws_come_to() {
        let (items, first, second) = (500, 40, 67);
        let numbers = Philox::new(1, Purpose::Test.stream(0));
        let draws = 4000;
        let mut sums: Vec<i64> = (0..draws)
            .map(|r| {
                let place = numbers.at_step(r);
                let answer = |i: u64| match place.below(i, items) {
                    j if j < second => 1,
                    j if j < second + first => -1,
                    _ => 0,
                };
                (0..items as u64).map(answer).sum()
            })
            .collect();
        sums.sort_unstable();
        let [low, high] = bootstrap(items, first, second);
        // A drawn quantile is off by √(0.025 · 0.975 / 4000) of the draws, about a tenth of the deviation of 10.3.
        assert!((low - sums[99]).abs() <= 4 && (high - sums[3900]).abs() <= 4, "{low} {high}");
        // Near the normal one: 27 ± 1.96 · 10.3.
        assert!((low - 7).abs() <= 1 && (high - 47).abs() <= 1, "{low} {high}");
    }

    #[test]
    fn columns_are_counted_item_by_item() {
        let paired = Paired::of(&[true, true, false, false], &[true, false, true, true]);
        assert_eq!((paired.items, paired.only_first, paired.only_second), (4, 1, 2));
        assert_eq!((paired.difference, paired.p), (Some(0.25), 1.0));
        let back = Paired::of(&[true, false, true, true], &[true, true, false, false]);
        let turned = paired.interval.map(|[low, high]| [-high, -low]);
        assert_eq!((back.difference, back.interval), (Some(-0.25), turned));
        let none = Paired::of(&[], &[]);
        assert_eq!((none.difference, none.interval, none.p), (None, None, 1.0));
        let same = Paired::of(&[true; 9], &[true; 9]);
        assert_eq!((same.difference, same.interval, same.p), (Some(0.0), Some([0.0, 0.0]), 1.0));
    }
}
