//! How far two reviewers agree, and what all of them together accept.

use serde::Serialize;

use super::decisions::{Verdict, Verdicts, edited};
use crate::data::cross::item::Item;

/// Two reviewers on the items that both decided.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Their names.
    pub reviewers: [String; 2],
    /// Items that both decided.
    pub both: usize,
    /// Items that both keep (as they are or edited), or both reject.
    pub agreed: usize,
    /// Cohen's κ; none without items, and where both say the same of all of them, so that chance explains everything.
    pub kappa: Option<f64>,
}

/// Cohen's κ = (p − e) / (1 − e) of keeping against rejecting, with p the share of items on which both agree, and e what
/// it would be if each decided at random with their own shares.
pub fn agreement(names: [&str; 2], verdicts: [&Verdicts; 2]) -> Agreement {
    let keeps = |v: &Verdict| !matches!(v, Verdict::Reject { .. });
    let mut counts = [[0usize; 2]; 2];
    for (at, first) in verdicts[0] {
        if let Some(second) = verdicts[1].get(at) {
            counts[usize::from(keeps(first))][usize::from(keeps(second))] += 1;
        }
    }
    let both: usize = counts.iter().flatten().sum();
    let agreed = counts[0][0] + counts[1][1];
    let n = both as f64;
    let share = |count: usize| count as f64 / n;
    let first = share(counts[1][0] + counts[1][1]);
    let second = share(counts[0][1] + counts[1][1]);
    let chance = first * second + (1.0 - first) * (1.0 - second);
    let kappa = (both > 0 && chance < 1.0).then(|| (share(agreed) - chance) / (1.0 - chance));
    Agreement { reviewers: names.map(String::from), both, agreed, kappa }
}

/// What all reviewers together say of one item.
#[derive(Clone, Debug, PartialEq)]
pub enum Joint {
    /// Nobody decided it.
    Undecided,
    /// All who decided keep it; the item with their edit, if there is one.
    Accepted(Box<Item>),
    /// All who decided reject it.
    Rejected,
    /// Some keep it and some reject it, or they edited it differently.
    Disputed,
}

/// What `reviews`, one a reviewer, say of item number `at`.
pub fn joint(item: &Item, at: usize, reviews: &[&Verdicts]) -> Joint {
    let verdicts: Vec<&Verdict> = reviews.iter().filter_map(|v| v.get(&at)).collect();
    let rejections = verdicts.iter().filter(|v| matches!(v, Verdict::Reject { .. })).count();
    let mut edits: Vec<_> = verdicts.iter().filter_map(|v| edited(v)).collect();
    edits.dedup();
    match (verdicts.len(), rejections, edits.len()) {
        (0, ..) => Joint::Undecided,
        (all, n, _) if n == all => Joint::Rejected,
        (_, 0, 0) => Joint::Accepted(Box::new(item.clone())),
        (_, 0, 1) => Joint::Accepted(Box::new(Item { written: edits.remove(0), ..item.clone() })),
        _ => Joint::Disputed,
    }
}

#[cfg(test)]
mod tests {
    use super::super::decisions::Reason;
    use super::super::decisions::tests::items;
    use super::*;

    const REJECT: Verdict = Verdict::Reject { reason: Reason::Incoherent };

    fn edit(question: &str) -> Verdict {
        let choices = ["a", "b", "c", "d"].map(String::from);
        Verdict::Edit { question: question.into(), choices, answer: 1 }
    }

    #[test]
    fn cohens_kappa() {
        // 20 keep both, 5 first alone, 10 second alone, 15 neither: p 0.7, e 0.5.
        let verdict = |keep: bool| if keep { Verdict::Accept } else { REJECT };
        let sides = |n: usize| match n {
            0..20 => (true, true),
            20..25 => (true, false),
            25..35 => (false, true),
            _ => (false, false),
        };
        let first: Verdicts = (0..60).map(|n| (n, verdict(sides(n).0))).collect();
        let second: Verdicts = (0..50).map(|n| (n, verdict(sides(n).1))).collect();
        let found = agreement(["ann", "bob"], [&first, &second]);
        assert_eq!((found.both, found.agreed), (50, 35));
        assert!((found.kappa.unwrap() - 0.4).abs() <= 1e-12);
        let all: Verdicts = (0..5).map(|n| (n, if n == 0 { edit("q") } else { Verdict::Accept })).collect();
        let same = agreement(["ann", "bob"], [&all, &all]);
        assert_eq!((same.both, same.agreed, same.kappa), (5, 5, None));
        let none = agreement(["ann", "bob"], [&all, &Verdicts::new()]);
        assert_eq!((none.both, none.agreed, none.kappa), (0, 0, None));
    }

    #[test]
    fn items_are_kept_that_nobody_rejects() {
        let item = &items(1)[0];
        let of = |verdicts: &[Verdict]| {
            let reviews: Vec<Verdicts> = verdicts.iter().map(|v| Verdicts::from([(0, v.clone())])).collect();
            joint(item, 0, &reviews.iter().collect::<Vec<_>>())
        };
        assert_eq!(of(&[]), Joint::Undecided);
        assert_eq!(of(&[Verdict::Accept, Verdict::Accept]), Joint::Accepted(Box::new(item.clone())));
        assert_eq!(of(&[REJECT, REJECT]), Joint::Rejected);
        assert_eq!(of(&[Verdict::Accept, REJECT]), Joint::Disputed);
        assert_eq!(of(&[edit("x"), edit("y")]), Joint::Disputed);
        match of(&[edit("x"), Verdict::Accept, edit("x")]) {
            Joint::Accepted(new) => assert_eq!((new.written.question.as_str(), &new.id), ("x", &item.id)),
            other => panic!("{other:?}"),
        }
    }
}
