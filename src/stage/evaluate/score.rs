//! The options' log-probabilities under every adapter, in one pass over the items.

use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::data::grove::{Grove, Stretch, groves};
use crate::data::prefix_tree::PrefixTree;
use crate::error::{Error, Result};
use crate::model::adapters::Stack;
use crate::model::room::{Head, Keep, RoomSize};
use crate::model::rope::{Run, Tables};
use crate::model::session::{Adapters, Session};
use crate::model::weights::Model;
use crate::stage::common::Common;
use crate::tensor::Real;

/// Columns that have a whole batch's tokens each.
const WHOLE: usize = 4;

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
    /// Of scoring `trees` in `batches` for `copies` columns; none if there is no tree.
    pub fn of(trees: &[PrefixTree], batches: &[Grove], copies: usize) -> Option<Extent> {
        let asked = |b: &Grove| trees[b.trees()].iter().map(|t| t.asked.len()).sum::<usize>();
        Some(Extent {
            longest: trees.iter().map(|t| t.needs).max()?,
            tokens: batches.iter().map(|b| b.tokens).max()?,
            head: Head::Choice(batches.iter().map(asked).max()? * copies),
        })
    }

    /// The room for it, of `copies` columns with adapters of at most these `ranks`, by target.
    pub fn room(
        self,
        checkpoint: &Checkpoint,
        copies: usize,
        ranks: [usize; 7],
    ) -> Result<(Tables, RoomSize)> {
        let tables = Tables::new(checkpoint.config(), self.longest);
        let size = RoomSize {
            tokens: self.tokens,
            copies,
            keep: Keep::Output,
            table_rows: tables.rows(self.tokens),
            ranks,
            dropout: false,
            dtype: checkpoint.scratch_dtype()?,
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

    /// Buffers for batches of at most `extent`.
    pub fn session<T: Real>(&self, extent: Extent) -> Result<Session<B, T>> {
        let (tables, size) = extent.room(self.checkpoint, self.count(), self.adapters.ranks())?;
        Session::new(self.backend, self.model, tables, size)
    }

    /// Log-probabilities of the options of each of `trees`: by tree, column and option.
    ///
    /// Batches are those of [`batches`]. The sum along a path is in f64. An error if a log-probability is no number.
    pub fn score<T: Real>(
        &self,
        trees: &[PrefixTree],
        batch_tokens: usize,
        common: &Common,
    ) -> Result<Vec<Vec<Vec<f64>>>> {
        let copies = self.count();
        let batches = batches(trees, copies, batch_tokens, self.checkpoint.config());
        let Some(extent) = Extent::of(trees, &batches, copies) else { return Ok(Vec::new()) };
        let mut session = self.session(extent)?;
        self.score_in::<T>(&mut session, trees, &batches, common)
    }

    /// [`Columns::score`] of `trees` in these `batches`, in a session that is large enough for them.
    pub fn score_in<T: Real>(
        &self,
        session: &mut Session<B, T>,
        trees: &[PrefixTree],
        batches: &[Grove],
        common: &Common,
    ) -> Result<Vec<Vec<Vec<f64>>>> {
        let copies = self.count();
        let layouts = self.adapters.layouts();
        let stack = Stack { params: &self.adapters.params, layouts: &layouts };
        let bar = common.progress.bar("evaluate", trees.len() as u64);
        let mut scores = Vec::with_capacity(trees.len());
        for batch in batches {
            common.check_stop("nothing is kept of an evaluation")?;
            let own = &trees[batch.trees()];
            let joined = batch.plant(trees);
            let run = |s: Stretch| Run { positions: s.positions, length: s.needs };
            let runs: Vec<Run> = joined.stretches.into_iter().map(run).collect();
            // A row that is asked for several tokens goes through the last layer once.
            let mut asked = joined.rows.clone();
            asked.dedup();
            let place = |row: &u32| asked.partition_point(|a| a < row);
            let places: Vec<usize> = joined.rows.iter().map(place).collect();
            let t = asked.len();
            let input = session.runs(self.backend, joined.ids, &runs, joined.segments, 0, asked)?;
            session.forward(self.model, self.backend, &input, stack)?;
            let rows: Vec<u32> =
                (0..copies).flat_map(|c| places.iter().map(move |&r| (r + c * t) as u32)).collect();
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
            for tree in own {
                let places = at..at + tree.asked.len();
                at = places.end;
                let column = |c: usize| {
                    let asked = &logprobs[c * joined.wanted.len()..][places.clone()];
                    tree.options.iter().map(|path| path.iter().map(|&n| f64::from(asked[n])).sum()).collect()
                };
                scores.push((0..copies).map(column).collect());
            }
            bar.inc(own.len() as u64);
        }
        bar.finish_and_clear();
        Ok(scores)
    }
}

/// Tokens of a batch for `copies` columns: `batch_tokens` of each, as with fewer trees in a batch fewer share what they
/// begin with; more columns than [`WHOLE`] share the room of so many.
pub fn tokens_of_each(batch_tokens: usize, copies: usize) -> usize {
    (batch_tokens.saturating_mul(copies.min(WHOLE)) / copies.max(1)).max(1)
}

/// `trees` in their order, as many together as stay within [`tokens_of_each`] for `copies` columns, at least one.
pub fn batches(trees: &[PrefixTree], copies: usize, batch_tokens: usize, config: &ModelConfig) -> Vec<Grove> {
    groves(trees, tokens_of_each(batch_tokens, copies), config.longest_of_fixed_rope())
}
