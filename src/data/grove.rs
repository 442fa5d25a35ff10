//! Batches of prefix trees laid end to end; what neighbours begin with in common is fed once.

use std::ops::Range;

use super::prefix_tree::PrefixTree;
use crate::ops::attention::Segment;

/// The fewest tokens worth sharing: for less, keys in two places cost more than the rows that are saved.
const LEAST_SHARED: usize = 32;

/// Neighbouring trees whose contexts begin with the same `shared` tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    trees: Range<usize>,
    /// Fewer than any of their contexts has, so that each tree keeps a row of its own that predicts.
    shared: usize,
}

/// Trees that go through the model together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grove {
    groups: Vec<Group>,
    /// Rows, one column counted.
    pub tokens: usize,
}

/// Rows of one document's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Their positions.
    pub positions: Range<usize>,
    /// Positions that the document needs.
    pub needs: usize,
}

/// A grove's tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planted {
    /// A row each.
    pub ids: Vec<u32>,
    /// Where in their documents the rows stand, in order.
    pub stretches: Vec<Stretch>,
    /// Who sees whom.
    pub segments: Vec<Segment>,
    /// Rows that are asked, ascending, tree after tree.
    pub rows: Vec<u32>,
    /// What each is asked for.
    pub wanted: Vec<u32>,
}

/// `trees` in their order, as many together as stay within `tokens` rows, at least one.
///
/// A tree joins the group before it where that leaves fewer rows than standing alone. One that needs more than
/// `fixed` positions shares nothing: its rope tables are its own.
pub fn groves(trees: &[PrefixTree], tokens: usize, fixed: usize) -> Vec<Grove> {
    let mut out: Vec<Grove> = Vec::new();
    for (at, tree) in trees.iter().enumerate() {
        let alone = Group { trees: at..at + 1, shared: 0 };
        let Some(grove) = out.last_mut() else {
            out.push(Grove { groups: vec![alone], tokens: tree.ids.len() });
            continue;
        };
        let joined = grove.groups.last().and_then(|g| g.with(trees, at, fixed));
        let saved = joined.as_ref().map_or(0, |(_, saved)| *saved);
        // What is saved is at most the tree itself: the group shared less before, or as much with one tree fewer.
        let more = tree.ids.len() - saved;
        if grove.tokens + more > tokens {
            out.push(Grove { groups: vec![alone], tokens: tree.ids.len() });
            continue;
        }
        grove.tokens += more;
        match joined {
            Some((group, _)) => {
                grove.groups.pop();
                grove.groups.push(group);
            }
            None => grove.groups.push(alone),
        }
    }
    out
}

impl Group {
    /// The group with tree `at` behind it and the rows that it then feeds less than with the tree alone; none where
    /// that would be more, or too few.
    fn with(&self, trees: &[PrefixTree], at: usize, fixed: usize) -> Option<(Group, usize)> {
        let (first, tree) = (&trees[self.trees.start], &trees[at]);
        if first.needs.max(tree.needs) > fixed {
            return None;
        }
        let count = self.trees.len();
        let most = match count {
            1 => first.context - 1,
            _ => self.shared,
        };
        let most = most.min(tree.context - 1);
        let same = first.ids[..most].iter().zip(&tree.ids[..most]).take_while(|(a, b)| a == b).count();
        let saved = (same * count).checked_sub(self.shared * (count - 1))?;
        let group = Group { trees: self.trees.start..at + 1, shared: same };
        (same >= LEAST_SHARED && saved > 0).then_some((group, saved))
    }
}

impl Grove {
    /// The trees.
    pub fn trees(&self) -> Range<usize> {
        let ends = |g: &[Group]| Some(g.first()?.trees.start..g.last()?.trees.end);
        ends(&self.groups).unwrap_or(0..0)
    }

    /// Its rows; `trees` are those that it was made of.
    pub fn plant(&self, trees: &[PrefixTree]) -> Planted {
        let mut out = Planted::default();
        for group in &self.groups {
            let shared = out.ids.len()..out.ids.len() + group.shared;
            if group.shared > 0 {
                let first = &trees[group.trees.start];
                out.ids.extend_from_slice(&first.ids[..group.shared]);
                out.stretches.push(Stretch { positions: 0..group.shared, needs: first.needs });
                out.segments.push(Segment { q: shared.clone(), own: shared.start, past: Vec::new() });
            }
            for tree in &trees[group.trees.clone()] {
                out.add(tree, &shared);
            }
        }
        out
    }
}

impl Planted {
    /// Adds `tree`, whose first rows are the rows `shared`.
    fn add(&mut self, tree: &PrefixTree, shared: &Range<usize>) {
        let (base, cut) = (self.ids.len(), shared.len());
        self.ids.extend_from_slice(&tree.ids[cut..]);
        let own = |r: &Range<usize>| r.start.max(cut) - cut + base..r.end - cut + base;
        for s in &tree.segments {
            // Only the context's own run begins within what is shared.
            let before = s.past.iter().map(Range::len).sum::<usize>().max(cut);
            let q = own(&s.q);
            self.stretches.push(Stretch { positions: before..before + q.len(), needs: tree.needs });
            let mut past = Vec::with_capacity(s.past.len() + 1);
            if cut > 0 {
                past.push(shared.clone());
            }
            past.extend(s.past.iter().map(own).filter(|r| !r.is_empty()));
            self.segments.push(Segment { own: q.start, q, past });
        }
        for &(row, token) in &tree.asked {
            self.rows.push((row as usize - cut + base) as u32);
            self.wanted.push(token);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The tokens that row `row` sees, itself last, and its position.
    fn seen(planted: &Planted, row: usize) -> (Vec<u32>, usize) {
        let segment = planted.segments.iter().find(|s| s.q.contains(&row)).unwrap();
        let own = segment.own + row - segment.q.start;
        let rows = segment.past.iter().cloned().flatten().chain(segment.own..=own);
        let position = planted.stretches.iter().flat_map(|s| s.positions.clone()).nth(row).unwrap();
        (rows.map(|r| planted.ids[r]).collect(), position)
    }

    /// Every option of every tree, read back from what its asked rows see.
    fn check(items: &[(Vec<u32>, Vec<Vec<u32>>)], tokens: usize) -> Vec<Grove> {
        let trees: Vec<PrefixTree> = items.iter().map(|(c, o)| PrefixTree::new(c.clone(), o)).collect();
        let groves = groves(&trees, tokens, usize::MAX);
        let mut next = 0;
        for grove in &groves {
            assert_eq!(grove.trees().start, next);
            next = grove.trees().end;
            let planted = grove.plant(&trees);
            assert_eq!(planted.ids.len(), grove.tokens);
            assert!(grove.tokens <= tokens || grove.trees().len() == 1);
            assert!(planted.rows.windows(2).all(|w| w[0] <= w[1]));
            assert_eq!(planted.segments.iter().map(|s| s.q.len()).sum::<usize>(), planted.ids.len());
            assert!(planted.segments.windows(2).all(|w| w[0].q.end == w[1].q.start));
            let mut at = 0;
            for n in grove.trees() {
                let (context, options) = &items[n];
                for (option, path) in options.iter().zip(&trees[n].options) {
                    for (depth, &asked) in path.iter().enumerate() {
                        assert_eq!(planted.wanted[at + asked], option[depth]);
                        let whole = [context, &option[..depth]].concat();
                        let position = whole.len() - 1;
                        assert_eq!(seen(&planted, planted.rows[at + asked] as usize), (whole, position));
                    }
                }
                at += trees[n].asked.len();
            }
            assert_eq!(at, planted.rows.len());
        }
        assert_eq!(next, items.len());
        groves
    }

    #[test]
    fn examples_before_questions_are_fed_once() {
        let examples: Vec<u32> = (0..100).collect();
        let item =
            |n: u32| ([&examples[..], &[200 + n, 300]].concat(), vec![vec![1], vec![2, 3], vec![2, 4]]);
        let items: Vec<_> = (0..4).map(item).collect();
        let groves = check(&items, 1000);
        assert_eq!(groves.len(), 1);
        // 100 once; two of the question and one inner token of the options for each.
        assert_eq!(groves[0].tokens, 100 + 4 * 3);
        // A batch that holds three of them feeds the beginning again in the next.
        assert_eq!(check(&items, 110).iter().map(|g| g.tokens).collect::<Vec<_>>(), [109, 103]);
    }

    #[test]
    fn a_tree_joins_where_that_saves_rows_and_not_across_rope_tables() {
        let of = |lead: u32, len: u32, own: u32| {
            let context: Vec<u32> = (0..len).map(|i| lead + i).chain([own]).collect();
            (context, vec![vec![1], vec![2]])
        };
        // The third shares 40 of the 80 that the first two share: 2 · 40 saves no more than 1 · 80.
        let mut third = of(0, 40, 9).0;
        third.extend(500..560);
        let items = vec![of(0, 80, 1), of(0, 80, 2), (third, vec![vec![1], vec![2]]), of(1000, 80, 3)];
        let groves = check(&items, 10_000);
        assert_eq!(groves[0].groups.iter().map(|g| g.trees.clone()).collect::<Vec<_>>(), [0..2, 2..3, 3..4]);
        let trees: Vec<PrefixTree> = items.iter().map(|(c, o)| PrefixTree::new(c.clone(), o)).collect();
        assert_eq!(super::groves(&trees, 10_000, 80)[0].groups.len(), 4);
        assert!(super::groves(&[], 4, 4).is_empty());
    }

    #[test]
    fn equal_contexts_keep_a_row_each() {
        let same: Vec<u32> = (0..50).collect();
        let groves = check(&[(same.clone(), vec![vec![1], vec![2]]), (same, vec![vec![1], vec![3]])], 99);
        assert_eq!(groves[0].tokens, 49 + 2);
    }

    proptest! {
        #[test]
        fn any_trees_are_read_back(
            shapes in proptest::collection::vec(
                (0usize..3, 30usize..70, proptest::collection::vec(0u32..2, 1..9),
                 proptest::collection::vec(proptest::collection::vec(0u32..3, 1..4), 1..4)),
                1..9,
            ),
            tokens in 1usize..400,
        ) {
            let items: Vec<(Vec<u32>, Vec<Vec<u32>>)> = shapes
                .into_iter()
                .map(|(lead, len, own, options)| {
                    let beginning = (0..len as u32).map(|i| 10 + i * (1 + lead as u32 / 2));
                    (beginning.chain(own).collect(), options)
                })
                .collect();
            check(&items, tokens);
        }
    }
}
