//! How many layers are computed again in the backward pass: none by default, as few as fit where memory is limited.

use super::memory::Plan;
use crate::error::Result;

/// A plan, the number of its recomputed layers, and whether it takes at most the limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Layers 0, 1, … below this are computed again.
    pub recomputed: usize,
    /// The plan with them.
    pub plan: Plan,
    /// Whether it is within the limit; true where there is none.
    pub fits: bool,
}

/// The plan with the fewest recomputed layers that takes at most `limit` bytes; that with all `layers` but the last
/// recomputed where none does. With `asked` there is no choice, but the last layer is never recomputed.
///
/// `plan_of(n)` may not grow with n: a layer that is recomputed keeps less than one that is not.
pub fn choose(
    layers: usize,
    asked: Option<usize>,
    limit: Option<u64>,
    plan_of: impl Fn(usize) -> Result<Plan>,
) -> Result<Choice> {
    let fits = |plan: &Plan| limit.is_none_or(|l| plan.total() <= l);
    let with = |recomputed: usize| -> Result<Choice> {
        let plan = plan_of(recomputed)?;
        Ok(Choice { recomputed, fits: fits(&plan), plan })
    };
    let most = layers.saturating_sub(1);
    if let Some(asked) = asked {
        return with(asked.min(most));
    }
    let none = with(0)?;
    if none.fits || most == 0 {
        return Ok(none);
    }
    let mut best = with(most)?;
    // The fewest lies in low..=best.recomputed.
    let mut low = 1;
    while best.fits && low < best.recomputed {
        let middle = with(low + (best.recomputed - low) / 2)?;
        if middle.fits {
            best = middle;
        } else {
            low = middle.recomputed + 1;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::super::memory::Part;
    use super::*;

    /// 100 bytes a kept layer, 10 a recomputed one.
    fn plan(n: usize) -> Result<Plan> {
        let mut plan = Plan::default();
        plan.add(Part::Activations, "kept", 100 * (12 - n as u64));
        plan.add(Part::Activations, "recomputed", 10 * n as u64);
        Ok(plan)
    }

    #[test]
    fn as_few_as_fit() {
        for limit in (200..1300).step_by(7) {
            let got = choose(12, None, Some(limit), plan).unwrap();
            let expected = (0..12).find(|&n| plan(n).unwrap().total() <= limit);
            assert_eq!(got.recomputed, expected.unwrap_or(11), "limit {limit}");
            assert_eq!(got.fits, expected.is_some());
            assert_eq!(got.plan, plan(got.recomputed).unwrap());
        }
        assert_eq!(choose(12, None, None, plan).unwrap().recomputed, 0);
        let asked = choose(12, Some(3), Some(1), plan).unwrap();
        assert_eq!((asked.recomputed, asked.fits), (3, false));
        assert!(choose(12, Some(3), None, plan).unwrap().fits);
        assert_eq!(choose(12, Some(12), None, plan).unwrap().recomputed, 11);
        assert_eq!(choose(1, None, Some(1), plan).unwrap().recomputed, 0);
    }
}
