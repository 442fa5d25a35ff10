//! `generate`: text from a prompt, token by token, with a cache of keys and values.

use std::path::PathBuf;

use serde::Serialize;

use super::adapters::load_adapters;
use super::common::{Common, blame};
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::adapters::Stack;
use crate::model::memory::Plan;
use crate::model::room::{Head, Keep, RoomSize};
use crate::model::rope::{Run, Tables};
use crate::model::session::{self, Adapters, Session};
use crate::model::weights::Model;
use crate::ops::attention::Segment;
use crate::random::{Philox, Purpose};
use crate::tensor::Real;

/// What to write, and from what.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The model's folder.
    pub model: PathBuf,
    /// An adapter.
    pub adapter: Option<PathBuf>,
    /// What to go on from.
    pub prompt: String,
    /// Tokens to write at most.
    pub max_tokens: usize,
    /// 0 takes the likeliest token.
    pub temperature: f64,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Generated {
    /// The prompt's tokens, BOS as the tokenizer's post-processor says.
    pub prompt_ids: Vec<u32>,
    /// The tokens that follow, the stop token not among them.
    pub ids: Vec<u32>,
    /// Their text, as it goes on from the prompt's.
    pub text: String,
    /// Whether a stop token came before the last allowed one.
    pub stopped: bool,
}

/// Reads the model and writes text.
pub fn run<B: Backend, T: Real>(
    backend: &B,
    options: &GenerateOptions,
    common: &Common,
) -> Result<Generated> {
    let read = Read::new(backend, options, common)?;
    read.plan::<T>(backend, options, common)?;
    let Read { checkpoint, tokenizer, prompt_ids, adapters } = read;
    let model = Model::new(backend, &checkpoint)?;
    let tokens = (prompt_ids.len(), options.max_tokens);
    let mut decoder: Decoder<'_, B, T> = Decoder::new(backend, &model, &adapters, &checkpoint, tokens)?;
    let numbers = Philox::new(common.seed, Purpose::Generate.stream(0));
    let bar = common.progress.bar("generate", options.max_tokens as u64);
    let one = |n: usize, logits: &[f32]| {
        common.check_stop("nothing is kept of a text")?;
        bar.inc(1);
        pick(logits, options.temperature, numbers.uniform_f64(n as u64)).map_err(blame(&checkpoint))
    };
    let (ids, stopped) = decoder.write(&prompt_ids, options.max_tokens, tokenizer.stops(), one)?;
    bar.finish_and_clear();
    let text = continuation(&tokenizer, &prompt_ids, &ids)?;
    Ok(Generated { prompt_ids, ids, text, stopped })
}

/// The text of `ids` as it goes on from that of `prompt`: decoded with it, since a decoder drops the space of a text's
/// first word.
pub(super) fn continuation(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Result<String> {
    let before = tokenizer.decode(prompt, true)?;
    let whole = tokenizer.decode(&[prompt, ids].concat(), true)?;
    match whole.strip_prefix(&before) {
        Some(text) => Ok(text.to_string()),
        None => tokenizer.decode(ids, true),
    }
}

/// What writing the text would hold in memory.
pub fn plan<B: Backend, T: Real>(backend: &B, options: &GenerateOptions, common: &Common) -> Result<Plan> {
    Read::new(backend, options, common)?.plan::<T>(backend, options, common)
}

/// All that is read before the weights.
struct Read<B: Backend> {
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    prompt_ids: Vec<u32>,
    adapters: Adapters<B>,
}

impl<B: Backend> Read<B> {
    fn new(backend: &B, options: &GenerateOptions, common: &Common) -> Result<Read<B>> {
        if !(options.temperature.is_finite() && options.temperature >= 0.0) {
            return Err(Error::Usage(format!(
                "--temperature is {}, expected 0 or more",
                options.temperature
            )));
        }
        let checkpoint = Checkpoint::open(&options.model, common.open_options())?;
        let tokenizer = Tokenizer::load(&options.model, checkpoint.config().vocab)?;
        let prompt_ids = tokenizer.encode(&options.prompt)?;
        if prompt_ids.is_empty() {
            return Err(Error::Usage("--prompt has no token, and the tokenizer puts none before it".into()));
        }
        let adapters = load_adapters(backend, &checkpoint, options.adapter.as_slice(), false, common)?;
        Ok(Read { checkpoint, tokenizer, prompt_ids, adapters })
    }

    /// What writing the text holds in memory, within the limit.
    fn plan<T: Real>(&self, backend: &B, options: &GenerateOptions, common: &Common) -> Result<Plan> {
        let tokens = (self.prompt_ids.len(), options.max_tokens);
        let plan = Decoder::<B, T>::plan(backend, &self.adapters, &self.checkpoint, tokens)?;
        common.fit(&plan)?;
        Ok(plan)
    }
}

/// A sequence being written, with its cache.
pub struct Decoder<'a, B: Backend, T: Real> {
    backend: &'a B,
    model: &'a Model<B>,
    adapters: &'a Adapters<B>,
    column: usize,
    session: Session<B, T>,
    done: usize,
    longest: usize,
    logits: Vec<f32>,
}

impl<'a, B: Backend, T: Real> Decoder<'a, B, T> {
    /// Room for a prompt of so many tokens and so many after it, as far as the model's positions go.
    pub fn new(
        backend: &'a B,
        model: &'a Model<B>,
        adapters: &'a Adapters<B>,
        checkpoint: &Checkpoint,
        tokens: (usize, usize),
    ) -> Result<Decoder<'a, B, T>> {
        let config = checkpoint.config();
        let (tables, size) = room(checkpoint, tokens, adapters.ranks())?;
        let longest = longest(tokens);
        let session = Session::new(backend, model, tables, size)?;
        let logits = vec![0.0; config.vocab];
        Ok(Decoder { backend, model, adapters, column: 0, session, done: 0, longest, logits })
    }

    /// What [`Decoder::new`] would hold in memory, the model and the adapters with it.
    pub(super) fn plan(
        backend: &B,
        adapters: &Adapters<B>,
        checkpoint: &Checkpoint,
        tokens: (usize, usize),
    ) -> Result<Plan> {
        let (tables, size) = room(checkpoint, tokens, adapters.ranks())?;
        session::plan::<B, T>(backend, checkpoint, &adapters.layouts, &tables, size)
    }

    /// With another than the first of the adapters.
    pub fn with_column(self, column: usize) -> Decoder<'a, B, T> {
        Decoder { column, ..self }
    }

    /// Writes at most `most` tokens after `prompt`, each picked from its number and the logits before it, until one of
    /// `stops`, which is not among them: the tokens, and whether a stop came.
    pub fn write(
        &mut self,
        prompt: &[u32],
        most: usize,
        stops: &[u32],
        mut pick: impl FnMut(usize, &[f32]) -> Result<u32>,
    ) -> Result<(Vec<u32>, bool)> {
        let mut ids: Vec<u32> = Vec::new();
        while ids.len() < most {
            let next = if ids.is_empty() { prompt } else { &ids[ids.len() - 1..] };
            let id = pick(ids.len(), self.feed(next)?)?;
            if stops.contains(&id) {
                return Ok((ids, true));
            }
            ids.push(id);
        }
        Ok((ids, false))
    }

    /// Feeds the next tokens; returns the logits `[V]` after the last of them.
    pub fn feed(&mut self, ids: &[u32]) -> Result<&[f32]> {
        let (start, end) = (self.done, self.done + ids.len());
        if ids.is_empty() || end > self.longest {
            return Err(Error::Op {
                op: "generate",
                why: format!("{} tokens after {start}, expected at most {}", ids.len(), self.longest),
            });
        }
        let runs = [Run { positions: start..end, length: end }];
        let past = if start > 0 { vec![0..start] } else { Vec::new() };
        let segments = vec![Segment { q: 0..ids.len(), own: start, past }];
        let last = vec![ids.len() as u32 - 1];
        let layouts = &self.adapters.layouts()[self.column..=self.column];
        let stack = Stack { params: &self.adapters.params, layouts };
        let (model, backend, session, logits) =
            (self.model, self.backend, &mut self.session, &mut self.logits);
        backend.within(|| {
            let input = session.runs(backend, ids.to_vec(), &runs, segments, start, last)?;
            session.forward(model, backend, &input, stack)?;
            model.logits(logits, &mut session.room, backend, 0, 1)
        })?;
        self.done = end;
        Ok(&self.logits)
    }
}

/// Positions that `prompt` tokens and `more` after them take; the last one is never fed.
fn longest((prompt, more): (usize, usize)) -> usize {
    prompt.saturating_add(more.saturating_sub(1)).max(prompt)
}

/// The room of a [`Decoder`].
fn room(checkpoint: &Checkpoint, tokens: (usize, usize), ranks: [usize; 7]) -> Result<(Tables, RoomSize)> {
    let (config, longest) = (checkpoint.config(), longest(tokens));
    config.check_length(longest)?;
    let size = RoomSize {
        tokens: tokens.0,
        copies: 1,
        keep: Keep::Cache { rows: longest },
        table_rows: 0,
        ranks,
        dropout: false,
        dtype: checkpoint.scratch_dtype()?,
        head: Head::Logits(1),
    };
    Ok((Tables::new(config, longest), size))
}

/// The likeliest token (the first of several), or one drawn from `softmax(logits / temperature)` by `u` in [0, 1).
pub(super) fn pick(logits: &[f32], temperature: f64, u: f64) -> Result<u32> {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if !x.is_finite() {
            return Err(Error::Numeric(format!("logit {i} is {x}: look for NaN in the weights")));
        }
        if x > logits[best] {
            best = i;
        }
    }
    if temperature == 0.0 {
        return Ok(best as u32);
    }
    let weight = |x: f32| ((f64::from(x) - f64::from(logits[best])) / temperature).exp();
    let total: f64 = logits.iter().map(|&x| weight(x)).sum();
    let mut left = u * total;
    for (i, &x) in logits.iter().enumerate() {
        left -= weight(x);
        if left < 0.0 {
            return Ok(i as u32);
        }
    }
    Ok(best as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_by_temperature() {
        let logits = [0.0, 2.0, 2.0, -1.0];
        assert_eq!(pick(&logits, 0.0, 0.9).unwrap(), 1);
        assert_eq!(pick(&logits, 1.0, 0.0).unwrap(), 0);
        assert_eq!(pick(&logits, 1.0, 0.999_999).unwrap(), 3);
        let drawn: Vec<u32> = (0..1000).map(|i| pick(&logits, 1.0, f64::from(i) / 1000.0).unwrap()).collect();
        let share = drawn.iter().filter(|&&d| d == 1).count() as f64 / 1000.0;
        let exact = 2f64.exp() / (1.0 + 2.0 * 2f64.exp() + (-1f64).exp());
        assert!((share - exact).abs() < 0.005, "{share} {exact}");
        assert!(pick(&[f32::NAN], 0.0, 0.0).is_err());
    }
}
