//! What each column answers in its own words, for items that are shown in full.

use super::score::Columns;
use crate::backend::Backend;
use crate::checkpoint::config::ModelConfig;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::stage::common::Common;
use crate::stage::generate::{self, Decoder};
use crate::tensor::Real;

/// The most tokens of an answer: enough to see what it leads to.
const TOKENS: usize = 16;

/// Tokens of `context` and of the answer to it, as far as the model's positions go.
pub(super) fn tokens(context: &[u32], config: &ModelConfig) -> (usize, usize) {
    let room = (config.longest() + 1).saturating_sub(context.len());
    (context.len(), TOKENS.min(room))
}

impl<B: Backend> Columns<'_, B> {
    /// The text that each column writes after each of `contexts`, the likeliest token each time, up to a stop token or
    /// the model's positions: by context and column.
    pub fn greedy<T: Real>(
        &self,
        contexts: &[&[u32]],
        tokenizer: &Tokenizer,
        common: &Common,
    ) -> Result<Vec<Vec<String>>> {
        let one = |context: &[u32], column: usize| {
            let tokens = tokens(context, self.checkpoint.config());
            let decoder: Decoder<'_, B, T> =
                Decoder::new(self.backend, self.model, self.adapters, self.checkpoint, tokens)?;
            let pick = |_, logits: &[f32]| {
                common.check_stop("nothing is kept of an evaluation")?;
                generate::pick(logits, 0.0, 0.0)
            };
            let (ids, _) = decoder.with_column(column).write(context, tokens.1, tokenizer.stops(), pick)?;
            generate::continuation(tokenizer, context, &ids)
        };
        contexts.iter().map(|c| (0..self.count()).map(|column| one(c, column)).collect()).collect()
    }
}
