//! The options' log-probabilities under every adapter, in one pass over the items.

use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::data::prefix_tree::PrefixTree;
use crate::error::{Error, Result};
use crate::model::adapters::{Layout, Stack};
use crate::model::room::{Head, Keep, RoomSize};
use crate::model::rope::{Run, Tables};
use crate::model::session::{Adapters, Session, ranks};
use crate::model::weights::Model;
use crate::ops::attention::Segment;
use crate::stage::common::Common;
use crate::tensor::Real;

/// What the largest batch of an evaluation needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Tokens, one column counted.
    pub tokens: usize,
    /// The longest document.
    pub longest: usize,
    /// Rows that reach the head, all columns counted.
    pub head: Head,
}

impl Extent {
    /// Of scoring `batches` for `copies` columns; none if there is no tree.
    pub fn of(batches: &[&[PrefixTree]], copies: usize) -> Option<Extent> {
        let most = |of: &dyn Fn(&PrefixTree) -> usize| {
            batches.iter().map(|b| b.iter().map(of).sum::<usize>()).max().unwrap_or(0)
        };
        Some(Extent {
            longest: batches.iter().flat_map(|b| b.iter()).map(|t| t.needs).max()?,
            tokens: most(&|t| t.ids.len()),
            head: Head::Choice(most(&|t| t.asked.len()) * copies),
        })
    }

    /// The room for it.
    pub fn room(self, checkpoint: &Checkpoint, layouts: &[Option<Layout>]) -> Result<(Tables, RoomSize)> {
        let tables = Tables::new(checkpoint.config(), self.longest);
        let size = RoomSize {
            tokens: self.tokens,
            copies: layouts.len(),
            keep: Keep::Output,
            table_rows: tables.rows(self.tokens),
            ranks: ranks(layouts),
            dropout: false,
            dtype: checkpoint.dtype()?,
            head: self.head,
        };
        Ok((tables, size))
    }
}

/// A model with adapters stacked below one another: each batch goes through all of them at once.
pub struct Columns<'a, B: Backend> {
    /// Where it is computed.
    pub backend: &'a B,
    /// The files.
    pub checkpoint: &'a Checkpoint,
    /// The weights.
    pub model: &'a Model<B>,
    /// A column each.
    pub adapters: &'a Adapters<B>,
}

impl<'a, B: Backend> Columns<'a, B> {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.adapters.layouts.len()
    }

    /// Buffers for batches of at most `extent`, if they fit the memory limit.
    pub fn session<T: Real>(&self, extent: Extent, common: &Common) -> Result<Session<B, T>> {
        let (tables, size) = extent.room(self.checkpoint, &self.adapters.layouts)?;
        Session::within(self.backend, self.model, self.adapters, tables, size, common.memory_limit)
    }

    /// Log-probabilities of the options of each of `trees`: by tree, column and option.
    ///
    /// At most `batch_tokens` stacked tokens go through the model together, one tree at the least. The sum along a
    /// path is in f64. An error if a log-probability is no number.
    pub fn score<T: Real>(
        &self,
        trees: &[PrefixTree],
        batch_tokens: usize,
        common: &Common,
    ) -> Result<Vec<Vec<Vec<f64>>>> {
        let copies = self.count();
        let batches = batches(trees, copies, batch_tokens);
        let Some(extent) = Extent::of(&batches, copies) else { return Ok(Vec::new()) };
        let mut session: Session<B, T> = self.session(extent, common)?;
        let layouts = self.adapters.layouts();
        let stack = Stack { params: &self.adapters.params, layouts: &layouts };
        let bar = common.progress.bar("evaluate", trees.len() as u64);
        let mut scores = Vec::with_capacity(trees.len());
        for batch in batches {
            common.check_stop("nothing is kept of an evaluation")?;
            let joined = Joined::of(batch);
            let t = joined.ids.len();
            let input = session.runs(self.backend, joined.ids, &joined.runs, joined.segments, 0)?;
            session.forward(self.model, self.backend, &input, stack)?;
            let rows: Vec<u32> =
                (0..copies).flat_map(|c| joined.rows.iter().map(move |&r| r + (c * t) as u32)).collect();
            let wanted = joined.wanted.repeat(copies);
            let mut logprobs = vec![0.0f32; rows.len()];
            let room = &mut session.room;
            self.model.choices(&mut logprobs, room, self.backend, &rows, &wanted, t * copies)?;
            if let Some(bad) = logprobs.iter().find(|x| !x.is_finite()) {
                return Err(Error::Numeric(format!(
                    "a log-probability is {bad}: look for NaN or infinity in the weights"
                )));
            }
            let mut at = 0;
            for tree in batch {
                let own = at..at + tree.asked.len();
                at = own.end;
                let column = |c: usize| {
                    let asked = &logprobs[c * joined.wanted.len()..][own.clone()];
                    tree.options.iter().map(|path| path.iter().map(|&n| f64::from(asked[n])).sum()).collect()
                };
                scores.push((0..copies).map(column).collect());
            }
            bar.inc(batch.len() as u64);
        }
        bar.finish_and_clear();
        Ok(scores)
    }
}

/// Trees in their order, as many together as stay within `batch_tokens` for `copies` columns, at least one.
pub fn batches(trees: &[PrefixTree], copies: usize, batch_tokens: usize) -> Vec<&[PrefixTree]> {
    let tokens = (batch_tokens / copies).max(1);
    let mut out = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (i, tree) in trees.iter().enumerate() {
        if i > start && filled + tree.ids.len() > tokens {
            out.push(&trees[start..i]);
            (start, filled) = (i, 0);
        }
        filled += tree.ids.len();
    }
    if start < trees.len() {
        out.push(&trees[start..]);
    }
    out
}

/// Trees laid end to end.
#[derive(Default)]
struct Joined {
    ids: Vec<u32>,
    runs: Vec<Run>,
    segments: Vec<Segment>,
    rows: Vec<u32>,
    wanted: Vec<u32>,
}

impl Joined {
    fn of(trees: &[PrefixTree]) -> Joined {
        let mut joined = Joined::default();
        for tree in trees {
            let base = joined.ids.len();
            joined.ids.extend_from_slice(&tree.ids);
            for s in &tree.segments {
                let before: usize = s.past.iter().map(|p| p.len()).sum();
                joined.runs.push(Run { positions: before..before + s.q.len(), length: tree.needs });
                joined.segments.push(Segment {
                    q: s.q.start + base..s.q.end + base,
                    own: s.own + base,
                    past: s.past.iter().map(|p| p.start + base..p.end + base).collect(),
                });
            }
            for &(row, token) in &tree.asked {
                joined.rows.push(row + base as u32);
                joined.wanted.push(token);
            }
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_end_to_end_keep_their_own_positions_and_pasts() {
        let one = PrefixTree::new(vec![1, 2, 3], &[vec![4], vec![5]]);
        let two = PrefixTree::new(vec![1, 2], &[vec![4, 5], vec![6, 7]]);
        let joined = Joined::of(&[one, two.clone()]);
        assert_eq!(joined.ids, [1, 2, 3, 1, 2, 4, 6]);
        assert_eq!(joined.rows, [2, 2, 4, 4, 5, 6]);
        assert_eq!(joined.wanted, [4, 5, 4, 6, 5, 7]);
        let positions: Vec<usize> = joined.runs.iter().flat_map(|r| r.positions.clone()).collect();
        assert_eq!(positions, [0, 1, 2, 0, 1, 2, 2]);
        assert_eq!(joined.segments[2], Segment { q: 6..7, own: 6, past: vec![3..5] });

        let trees = vec![two; 5];
        let sizes = |tokens| batches(&trees, 1, tokens).iter().map(|b| b.len()).collect::<Vec<_>>();
        assert_eq!((sizes(8), sizes(1), sizes(99)), (vec![2, 2, 1], vec![1; 5], vec![5]));
        assert!(batches(&[], 1, 4).is_empty());
    }
}
