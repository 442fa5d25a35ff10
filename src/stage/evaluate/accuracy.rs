//! From log-probabilities to accuracies.

use serde::{Deserialize, Serialize};

/// How many items one column answered rightly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Items that fit and were scored.
    pub items: usize,
    /// Items whose first likeliest option is the right one.
    pub correct: usize,
    /// Items whose likeliest option has an equal before or after it.
    pub ties: usize,
    /// `correct / items`; none without items.
    pub accuracy: Option<f64>,
    /// Of the accuracy: `√(p(1−p)/(n−1))`, for several subsets as [`weighted`] says; none below two items.
    pub standard_error: Option<f64>,
}

/// The first likeliest option, and whether another is as likely.
pub fn choose(logprobs: &[f64]) -> (usize, bool) {
    let mut best = 0;
    for (i, x) in logprobs.iter().enumerate() {
        if *x > logprobs[best] {
            best = i;
        }
    }
    (best, logprobs.iter().filter(|&x| *x == logprobs[best]).count() > 1)
}

/// Accuracy ± standard error in percent, as far as there are such.
pub fn percent(accuracy: Option<f64>, standard_error: Option<f64>) -> String {
    match (accuracy, standard_error) {
        (Some(p), Some(s)) => format!("{:.1} ± {:.1}", 100.0 * p, 100.0 * s),
        (Some(p), None) => format!("{:.1}", 100.0 * p),
        _ => "–".into(),
    }
}

impl Accuracy {
    /// Of answers (right or not, tied or not).
    pub fn of(answers: impl IntoIterator<Item = (bool, bool)>) -> Accuracy {
        let mut sum = Accuracy::default();
        for (correct, tied) in answers {
            sum.items += 1;
            sum.correct += usize::from(correct);
            sum.ties += usize::from(tied);
        }
        let n = sum.items as f64;
        let p = sum.correct as f64 / n;
        sum.accuracy = (sum.items > 0).then_some(p);
        sum.standard_error = (sum.items > 1).then(|| (p * (1.0 - p) / (n - 1.0)).sqrt());
        sum
    }
}

/// The mean of subsets, each counted by its size. Its standard error is that of a pooled variance,
/// `√(Σ (nᵢ−1) sᵢ² / (Σ nᵢ − k) / Σ nᵢ)` with `sᵢ²` the sample variance of subset i of k (lm-evaluation-harness's).
pub fn weighted(subsets: &[Accuracy]) -> Accuracy {
    let sum = |of: fn(&Accuracy) -> usize| subsets.iter().map(of).sum::<usize>();
    let (items, correct, ties) = (sum(|a| a.items), sum(|a| a.correct), sum(|a| a.ties));
    let used = subsets.iter().filter(|a| a.items > 0);
    let groups = used.clone().count();
    // Σ (nᵢ−1) sᵢ² = Σ nᵢ pᵢ (1 − pᵢ)
    let within: f64 = used.map(|a| a.correct as f64 * (1.0 - a.correct as f64 / a.items as f64)).sum();
    let standard_error = (items > groups).then(|| (within / (items - groups) as f64 / items as f64).sqrt());
    Accuracy {
        items,
        correct,
        ties,
        accuracy: (items > 0).then(|| correct as f64 / items as f64),
        standard_error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(correct: usize, items: usize) -> Accuracy {
        Accuracy::of((0..items).map(|i| (i < correct, i == 0)))
    }

    #[test]
    fn the_first_of_equals_is_chosen_and_counted() {
        assert_eq!(choose(&[-2.0, -1.0, -1.0, -3.0]), (1, true));
        assert_eq!(choose(&[-2.0, -2.0, -1.0]), (2, false));
        assert_eq!(choose(&[-1.0]), (0, false));
    }

    #[test]
    fn standard_errors_are_the_samples() {
        // Values 1, 1, 1, 0: mean 3/4, sample variance 1/4, standard error √(1/16).
        let a = right(3, 4);
        assert_eq!((a.accuracy, a.standard_error, a.ties), (Some(0.75), Some(0.25), 1));
        assert_eq!(right(1, 1).standard_error, None);
        assert_eq!(right(0, 0).accuracy, None);
    }

    #[test]
    fn subsets_count_by_size() {
        let both = weighted(&[right(3, 4), right(1, 2), right(0, 0)]);
        assert_eq!((both.items, both.correct, both.accuracy), (6, 4, Some(4.0 / 6.0)));
        // ((4−1)·1/4 + (2−1)·1/2) / (6−2) = 0.3125; √(0.3125/6)
        let expected = (0.3125f64 / 6.0).sqrt();
        assert!((both.standard_error.unwrap() - expected).abs() <= 1e-15);
        let one = weighted(&[right(3, 4)]);
        assert!((one.standard_error.unwrap() - 0.25).abs() <= 1e-15);
    }
}
