//! Which options are answered, whatever is asked: a model's leaning towards a letter.

use serde::{Deserialize, Serialize};

/// How often each option is right, and how often each column answers with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letters {
    /// Items whose right option is A, B, …
    pub gold: Vec<usize>,
    /// By column: items answered with A, B, …
    pub predicted: Vec<Vec<usize>>,
}

impl Letters {
    /// Counts items as their right option and the one that each of so many `columns` answers with.
    pub fn count<'a>(columns: usize, items: impl Iterator<Item = (usize, &'a [usize])>) -> Letters {
        let mut out = Letters { gold: Vec::new(), predicted: vec![Vec::new(); columns] };
        for (gold, predicted) in items {
            add(&mut out.gold, gold);
            for (counts, &option) in out.predicted.iter_mut().zip(predicted) {
                add(counts, option);
            }
        }
        let options = out.predicted.iter().chain([&out.gold]).map(Vec::len).max().unwrap_or(0);
        out.gold.resize(options, 0);
        out.predicted.iter_mut().for_each(|counts| counts.resize(options, 0));
        out
    }
}

fn add(counts: &mut Vec<usize>, option: usize) {
    if counts.len() <= option {
        counts.resize(option + 1, 0);
    }
    counts[option] += 1;
}

/// A for the option 0, B for 1, …; a number from 27 on for those after Z.
pub fn letter(option: usize) -> String {
    match u8::try_from(option) {
        Ok(n) if n < 26 => char::from(b'A' + n).to_string(),
        _ => (option + 1).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_counted_by_column() {
        let items = [(0, &[3, 0][..]), (2, &[3, 2]), (2, &[3, 1])];
        let letters = Letters::count(2, items.into_iter());
        assert_eq!(letters.gold, [1, 0, 2, 0]);
        assert_eq!(letters.predicted, [[0, 0, 0, 3], [1, 1, 1, 0]]);
        let none = Letters::count(1, std::iter::empty());
        assert_eq!(none, Letters { gold: vec![], predicted: vec![vec![]] });
        assert_eq!([0, 25, 26].map(letter), ["A", "Z", "27"]);
    }
}
