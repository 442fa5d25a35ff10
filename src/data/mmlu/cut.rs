//! The cut of a domain's questions into those that an edge trains on, those that it is tuned on, and those that it is
//! measured on: floor(0.8 n), floor(0.1 n), and the rest.
//!
//! MMLU has some questions twice in a domain. A cut by chance would put one of them among the training data and the other
//! among the test's, so equal questions are kept on one side, and other rows make room.

use std::collections::HashMap;

use super::rows::Row;
use crate::checkpoint::digest;
use crate::data::tasks::{Form, Item};
use crate::random::{Philox, Purpose};

/// Places in a list of rows, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// To train on.
    pub train: Vec<usize>,
    /// To tune on.
    pub validation: Vec<usize>,
    /// To measure on.
    pub test: Vec<usize>,
    /// Questions that stand more than once.
    pub repeated: usize,
    /// Rows that are on another side than chance put them.
    pub moved: usize,
}

/// Train, validation and test of n rows.
pub fn sizes(n: usize) -> [usize; 3] {
    // 4 n / 5 is 8 n / 10 without an overflow below 2^62.
    let (train, validation) = (n * 4 / 5, n / 10);
    [train, validation, n - train - validation]
}

/// Cuts `rows` of the domain called `domain`. With `together`, rows of which question and options are the same are on
/// one side; then it is an error if they do not fit.
pub fn cut(rows: &[&Row], domain: &str, seed: u64, together: bool) -> Result<Cut, String> {
    let hash = digest::sha256(domain.as_bytes());
    let stream = Purpose::Cut.stream(u64::from_str_radix(&hash[..14], 16).unwrap_or(0));
    let order = Philox::new(seed, stream).permutation(rows.len());
    let groups = groups(rows, &order);
    let repeated = groups.iter().filter(|g| g.len() > 1).count();
    let groups = if together { groups } else { order.iter().map(|&row| vec![row]).collect() };
    let sides = sides(&order, &groups)?;

    let by_chance = by_chance(&order);
    let moved = (0..rows.len()).filter(|&row| sides[row] != by_chance[row]).count();
    let on = |side| (0..rows.len()).filter(|&row| sides[row] == side).collect();
    Ok(Cut { train: on(0), validation: on(1), test: on(2), repeated, moved })
}

/// How many questions stand more than once among `rows`.
pub fn repeated(rows: &[&Row]) -> usize {
    groups(rows, &(0..rows.len()).collect::<Vec<_>>()).iter().filter(|g| g.len() > 1).count()
}

/// The rows of each question, in `order`.
fn groups(rows: &[&Row], order: &[usize]) -> Vec<Vec<usize>> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for &row in order {
        let place = *places.entry(of(&rows[row].item)).or_insert(groups.len());
        match groups.get_mut(place) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups
}

/// The side of each row if the first of `order` train and the last test.
fn by_chance(order: &[usize]) -> Vec<usize> {
    let [train, validation, _] = sizes(order.len());
    let mut sides = vec![0; order.len()];
    for (rank, &row) in order.iter().enumerate() {
        sides[row] = usize::from(rank >= train) + usize::from(rank >= train + validation);
    }
    sides
}

/// The side of each row: that of its group. Each group goes where chance put its first row, or, where there is no room
/// for it, where there is most; larger ones choose first.
fn sides(order: &[usize], groups: &[Vec<usize>]) -> Result<Vec<usize>, String> {
    let wanted = by_chance(order);
    let whole = sizes(order.len());
    let mut room = whole;
    let mut sides = vec![0; order.len()];
    let mut by_size: Vec<&Vec<usize>> = groups.iter().collect();
    by_size.sort_by_key(|g| std::cmp::Reverse(g.len()));
    for group in by_size {
        let own = wanted[group[0]];
        let side = match room[own] >= group.len() {
            true => own,
            false => (0..3).fold(0, |best, s| if room[s] > room[best] { s } else { best }),
        };
        room[side] = room[side].checked_sub(group.len()).ok_or_else(|| {
            let [train, validation, test] = whole;
            format!(
                "{} of {} rows are one question, which does not fit on one side of a cut into {train}, {validation} \
                 and {test}: --allow-duplicates leaves its rows where chance puts them",
                group.len(),
                order.len()
            )
        })?;
        group.iter().for_each(|&row| sides[row] = side);
    }
    Ok(sides)
}

fn of(item: &Item) -> String {
    match &item.form {
        Form::Question { question, choices } => key(question, choices),
        Form::Prompt { prompt, continuations } => key(prompt, continuations),
    }
}

/// The same for questions that are the same but for white space, capitals and the order of the options.
pub fn key(question: &str, options: &[String]) -> String {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    let mut options: Vec<String> = options.iter().map(|o| plain(o)).collect();
    options.sort_unstable();
    format!("{}\n{}", plain(question), options.join("\n"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::mmlu::rows::Split;

    /// A row for each number; equal numbers are one question.
    fn rows(questions: &[usize]) -> Vec<Row> {
        let row = |(n, question): (usize, &usize)| {
            let choices = ["1", "2", "3", "4"].map(String::from);
            let item = Item {
                id: n.to_string(),
                subject: Some("anatomy".into()),
                domains: Vec::new(),
                form: Form::Question { question: format!("q{question}"), choices },
                gold: 0,
            };
            Row::new(item, Split::Test).unwrap()
        };
        questions.iter().enumerate().map(row).collect()
    }

    fn cut_of(questions: &[usize], seed: u64, together: bool) -> Result<Cut, String> {
        cut(&rows(questions).iter().collect::<Vec<_>>(), "stem", seed, together)
    }

    #[test]
    fn sizes_of_the_paper() {
        assert_eq!(sizes(5223), [4178, 522, 523]);
        assert_eq!(sizes(3414), [2731, 341, 342]);
        assert_eq!(sizes(3488), [2790, 348, 350]);
        assert_eq!([sizes(0), sizes(1), sizes(2), sizes(9)], [[0, 0, 0], [0, 0, 1], [1, 0, 1], [7, 0, 2]]);
    }

    #[test]
    fn few_rows() {
        assert_eq!(cut_of(&[], 0, true).unwrap(), Cut::default());
        assert_eq!(cut_of(&[0], 0, true).unwrap(), Cut { test: vec![0], ..Cut::default() });
        let two = cut_of(&[0, 1], 0, true).unwrap();
        assert_eq!((two.train.len(), two.validation.len(), two.test.len()), (1, 0, 1));
        let err = cut_of(&[0, 0], 0, true).unwrap_err();
        assert!(err.contains("2 of 2 rows are one question") && err.contains("--allow-duplicates"), "{err}");
        let left = cut_of(&[0, 0], 0, false).unwrap();
        assert_eq!((left.train.len(), left.test.len(), left.repeated, left.moved), (1, 1, 1, 0));
    }

    #[test]
    fn a_seed_and_a_domain_are_a_cut() {
        let questions: Vec<usize> = (0..100).collect();
        let a = cut_of(&questions, 1, true).unwrap();
        assert_eq!(a, cut_of(&questions, 1, false).unwrap());
        assert_ne!(a, cut_of(&questions, 2, true).unwrap());
        let all = rows(&questions);
        assert_ne!(a, cut(&all.iter().collect::<Vec<_>>(), "hum", 1, true).unwrap());
        assert_eq!((a.repeated, a.moved), (0, 0));
    }

    #[test]
    fn capitals_white_space_and_order_make_no_other_question() {
        let of = |question: &str, options: [&str; 4]| {
            let mut row = rows(&[0]).remove(0);
            row.item.form = Form::Question { question: question.into(), choices: options.map(String::from) };
            of(&row.item)
        };
        let one = of("What  is\nx?", ["A b", "c", "d", "e"]);
        assert_eq!(one, of(" what is X? ", ["e", "a  B", "C", "d"]));
        assert_ne!(one, of("What is x?", ["a b", "c", "d", "f"]));
        assert_ne!(one, of("What is y?", ["a b", "c", "d", "e"]));
    }

    proptest! {
        #[test]
        fn equal_questions_stay_on_one_side_and_sizes_stay(
            pairs in 0usize..20, triples in 0usize..8, singles in 60usize..90, seed: u64
        ) {
            let mut questions: Vec<usize> = (0..singles).collect();
            questions.extend((0..pairs).flat_map(|n| [1000 + n; 2]));
            questions.extend((0..triples).flat_map(|n| [2000 + n; 3]));
            let n = questions.len();
            let cut = cut_of(&questions, seed, true).unwrap();
            prop_assert_eq!([cut.train.len(), cut.validation.len(), cut.test.len()], sizes(n));
            let mut side = HashMap::new();
            for (s, rows) in [&cut.train, &cut.validation, &cut.test].into_iter().enumerate() {
                for &row in rows {
                    prop_assert_eq!(*side.entry(questions[row]).or_insert(s), s);
                }
            }
            prop_assert_eq!(side.len(), singles + pairs + triples);
            prop_assert_eq!(cut.repeated, pairs + triples);
            prop_assert!(cut.moved <= 2 * (2 * pairs + 3 * triples));
        }
    }
}
