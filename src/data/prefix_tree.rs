//! An item's options as a prefix tree below its context, so that each token is fed once.

use std::collections::HashMap;
use std::ops::Range;

use super::template::Prompt;
use super::tokenizer::Tokenizer;
use crate::error::Result;
use crate::ops::attention::Segment;

/// A context followed by the inner tokens of its options' prefix tree.
///
/// Row r holds token `ids[r]`. The context's last row predicts the options' first tokens; the row of a tree token
/// predicts those below it. A token that ends an option and continues none is not fed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixTree {
    /// `[C + inner tokens]`.
    pub ids: Vec<u32>,
    /// Runs of rows with what they see; a run's rows take the positions after those of its past.
    pub segments: Vec<Segment>,
    /// (row, token) whose log-probability is asked for; rows ascend.
    pub asked: Vec<(u32, u32)>,
    /// For each option, the numbers of those whose sum is its score.
    pub options: Vec<Vec<usize>>,
    /// C.
    pub context: usize,
    /// Positions that the longest option needs: C + its tokens − 1.
    pub needs: usize,
}

/// Why an item cannot be scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It needs more positions than the model has.
    TooLong {
        /// Context + longest option − 1.
        needs: usize,
    },
    /// An option adds no token to the context.
    EmptyOption {
        /// From 0.
        option: usize,
    },
    /// The context is empty and the tokenizer has no special token to stand for it.
    EmptyContext,
}

impl PrefixTree {
    /// Tokenises `prompt` and each continuation together, parted at the context's own token count (as
    /// lm-evaluation-harness does; an empty context is the BOS, else the EOS). The inner error says why the item does
    /// not fit `positions`.
    pub fn encode(
        tokenizer: &Tokenizer,
        prompt: &Prompt,
        positions: usize,
    ) -> Result<Result<PrefixTree, Unfit>> {
        let mut context = tokenizer.encode_prompt(&prompt.context)?;
        let mut options = Vec::with_capacity(prompt.continuations.len());
        for (option, continuation) in prompt.continuations.iter().enumerate() {
            let whole = tokenizer.encode(&format!("{}{continuation}", prompt.context))?;
            match whole.get(context.len()..) {
                None | Some([]) => return Ok(Err(Unfit::EmptyOption { option })),
                Some(rest) => options.push(rest.to_vec()),
            }
        }
        if context.is_empty() {
            match tokenizer.bos().map_or_else(|| tokenizer.eos().ok(), Some) {
                Some(id) => context.push(id),
                None => return Ok(Err(Unfit::EmptyContext)),
            }
        }
        let needs = needed(&context, &options);
        Ok(if needs <= positions {
            Ok(PrefixTree::new(context, &options))
        } else {
            Err(Unfit::TooLong { needs })
        })
    }

    /// The tree of `options`, none of them empty, below `context`, which is not empty either.
    pub fn new(context: Vec<u32>, options: &[Vec<u32>]) -> PrefixTree {
        let (c, needs) = (context.len(), needed(&context, options));
        let whole = Segment { q: 0..c, own: 0, past: Vec::new() };
        let mut tree = PrefixTree {
            ids: context,
            segments: vec![whole],
            asked: Vec::new(),
            options: vec![Vec::new(); options.len()],
            context: c,
            needs,
        };
        let every: Vec<usize> = (0..options.len()).collect();
        tree.grow(options, every, 0, c - 1, &mut vec![0..c]);
        // The walk goes down before it goes on, so rows are not in order yet.
        let mut order: Vec<usize> = (0..tree.asked.len()).collect();
        order.sort_by_key(|&n| tree.asked[n].0);
        let mut place = vec![0; order.len()];
        for (to, &from) in order.iter().enumerate() {
            place[from] = to;
        }
        tree.asked = order.iter().map(|&n| tree.asked[n]).collect();
        for n in tree.options.iter_mut().flatten() {
            *n = place[*n];
        }
        tree
    }

    /// Adds what follows row `row`, the end of the shared first `depth` tokens of the options `alive`; `path` are
    /// the rows from the context down to it.
    ///
    /// It calls itself where options part, and only there: long options are no deep recursion.
    fn grow(
        &mut self,
        options: &[Vec<u32>],
        mut alive: Vec<usize>,
        mut depth: usize,
        mut row: usize,
        path: &mut Vec<Range<usize>>,
    ) {
        'down: loop {
            let next = followers(options, &alive, depth);
            let only = next.len() == 1;
            for (token, same) in next {
                for &o in &same {
                    self.options[o].push(self.asked.len());
                }
                self.asked.push((row as u32, token));
                if same.iter().all(|&o| options[o].len() <= depth + 1) {
                    continue;
                }
                let here = self.ids.len();
                self.ids.push(token);
                let depth_of_path = path.len();
                let continues = here == row + 1;
                match (continues, self.segments.last_mut(), path.last_mut()) {
                    (true, Some(segment), Some(last)) => {
                        segment.q.end += 1;
                        last.end += 1;
                    }
                    _ => {
                        self.segments.push(Segment { q: here..here + 1, own: here, past: path.clone() });
                        path.push(here..here + 1);
                    }
                }
                if only {
                    // The path is set right again where options parted above.
                    (alive, depth, row) = (same, depth + 1, here);
                    continue 'down;
                }
                self.grow(options, same, depth + 1, here, path);
                path.truncate(depth_of_path);
                if continues && let Some(last) = path.last_mut() {
                    last.end = here;
                }
            }
            return;
        }
    }
}

/// Positions that the longest of `options` after `context` needs: the last token is not fed.
fn needed(context: &[u32], options: &[Vec<u32>]) -> usize {
    context.len() + options.iter().map(Vec::len).max().unwrap_or(1) - 1
}

/// The tokens that the options `alive` have at `depth`, in order of first appearance, each with who has it.
fn followers(options: &[Vec<u32>], alive: &[usize], depth: usize) -> Vec<(u32, Vec<usize>)> {
    let mut next: Vec<(u32, Vec<usize>)> = Vec::new();
    let mut places: HashMap<u32, usize> = HashMap::new();
    for &o in alive {
        let Some(&token) = options[o].get(depth) else { continue };
        let place = *places.entry(token).or_insert(next.len());
        if place == next.len() {
            next.push((token, Vec::new()));
        }
        next[place].1.push(o);
    }
    next
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::fixture;

    /// The tokens that row `row` sees, itself last, in the order of their rows.
    fn seen(tree: &PrefixTree, row: usize) -> Vec<u32> {
        let segment = tree.segments.iter().find(|s| s.q.contains(&row)).unwrap();
        let own = segment.own + row - segment.q.start;
        let rows = segment.past.iter().cloned().flatten().chain(segment.own..=own);
        rows.map(|r| tree.ids[r]).collect()
    }

    /// Every option, read back from what its asked rows see.
    fn check(context: &[u32], options: &[Vec<u32>], tree: &PrefixTree) {
        assert!(tree.asked.windows(2).all(|w| w[0].0 <= w[1].0));
        assert_eq!(tree.segments.iter().map(|s| s.q.len()).sum::<usize>(), tree.ids.len());
        assert!(tree.segments.windows(2).all(|w| w[0].q.end == w[1].q.start));
        for segment in &tree.segments {
            assert_eq!(segment.own, segment.q.start);
            assert!(segment.past.windows(2).all(|w| w[0].end <= w[1].start));
        }
        for (option, path) in options.iter().zip(&tree.options) {
            assert_eq!(option.len(), path.len());
            for (depth, &n) in path.iter().enumerate() {
                let (row, token) = tree.asked[n];
                assert_eq!(token, option[depth]);
                assert_eq!(seen(tree, row as usize), [context, &option[..depth]].concat());
            }
        }
        // Nothing is fed or asked twice.
        let mut inner: Vec<&[u32]> =
            options.iter().flat_map(|o| (1..o.len()).map(move |d| &o[..d])).collect();
        inner.sort_unstable();
        inner.dedup();
        assert_eq!(tree.ids.len(), context.len() + inner.len());
        let mut all: Vec<&[u32]> = options.iter().flat_map(|o| (1..=o.len()).map(move |d| &o[..d])).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(tree.asked.len(), all.len());
    }

    #[test]
    fn four_letters_are_four_questions_to_the_last_row() {
        let tree = PrefixTree::new(vec![1, 5, 6], &[vec![7], vec![8], vec![9], vec![7]]);
        assert_eq!(tree.ids, [1, 5, 6]);
        assert_eq!(tree.asked, [(2, 7), (2, 8), (2, 9)]);
        assert_eq!(tree.options, [[0], [1], [2], [0]]);
        assert_eq!(tree.needs, 3);
    }

    #[test]
    fn long_options_are_no_deep_recursion() {
        let long: Vec<u32> = (0..200_000).collect();
        let tree = PrefixTree::new(vec![1], &[long.clone(), long[..150_000].to_vec(), vec![0, 7]]);
        assert_eq!((tree.ids.len(), tree.needs), (200_000, 200_000));
        assert_eq!(tree.options.iter().map(Vec::len).collect::<Vec<_>>(), [200_000, 150_000, 2]);
    }

    #[test]
    fn branches_share_their_beginnings() {
        let options = [vec![3, 4, 5], vec![3, 4], vec![6], vec![3, 7, 8, 9]];
        let tree = PrefixTree::new(vec![1, 2], &options);
        check(&[1, 2], &options, &tree);
        assert_eq!(tree.needs, 5);
        assert_eq!(tree.ids, [1, 2, 3, 4, 7, 8]);
        // 3, 4 go on in the context's run, 7, 8 in one that sees the context and 3.
        assert_eq!(tree.segments.len(), 2);
        assert_eq!((tree.segments[1].q.clone(), &tree.segments[1].past[..]), (4..6, &[0..3][..]));
    }

    #[test]
    fn items_that_do_not_fit_say_what_they_need() {
        let t = fixture::tokenizer(true, &[]);
        let prompt = |context: &str, options: &[&str]| Prompt {
            context: context.into(),
            continuations: options.iter().map(|o| o.to_string()).collect(),
        };
        let p = prompt("a b", &[" c", " c d"]);
        let tree = PrefixTree::encode(&t, &p, 4).unwrap().unwrap();
        assert_eq!((tree.ids, tree.needs), (vec![1, 3, 4, 5], 4));
        assert_eq!(PrefixTree::encode(&t, &p, 3).unwrap(), Err(Unfit::TooLong { needs: 4 }));
        let p = prompt("a b", &[" c", ""]);
        assert_eq!(PrefixTree::encode(&t, &p, 9).unwrap(), Err(Unfit::EmptyOption { option: 1 }));
        let without = fixture::tokenizer(false, &[]);
        let tree = PrefixTree::encode(&without, &prompt("", &["a", "b"]), 9).unwrap().unwrap();
        assert_eq!(tree.ids, [1]);
    }

    proptest! {
        #[test]
        fn any_options_are_read_back(
            context in proptest::collection::vec(0u32..9, 1..5),
            options in proptest::collection::vec(proptest::collection::vec(0u32..3, 1..6), 1..8),
        ) {
            let tree = PrefixTree::new(context.clone(), &options);
            check(&context, &options, &tree);
        }
    }
}
