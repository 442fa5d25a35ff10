//! How well a text is predicted: mean negative log-likelihood and perplexity.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::score::{Columns, Extent, tokens_of_each};
use crate::backend::Backend;
use crate::data::batch::Batch;
use crate::data::documents::Document;
use crate::data::lines;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::adapters::Stack;
use crate::model::room::Head;
use crate::model::session::Session;
use crate::stage::common::Common;
use crate::tensor::Real;

/// How well one column predicts the text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextScore {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Windows that they stand in.
    pub windows: usize,
    /// Mean negative log-likelihood of a token, in nats.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
}

/// The windows of the file at `path`: each text (of a JSON line with `text`, or between `<|endoftext|>`, or the whole
/// file) is cut into as many tokens as fit `seq` after what the tokenizer puts first; each window begins with that,
/// and every token after the first is predicted from those before it in the window.
pub fn windows(path: &Path, tokenizer: &Tokenizer, seq: usize) -> Result<Vec<Document>> {
    let prefix = tokenizer.encode("")?;
    let room = seq.checked_sub(prefix.len()).filter(|_| seq >= 2).filter(|&n| n > 0).ok_or_else(|| {
        Error::Usage(format!(
            "--seq {seq} leaves no token to predict, expected at least {}",
            prefix.len() + 1
        ))
    })?;
    let text = lines::read_text(path)?;
    let texts: Vec<String> = if lines::is_jsonl(path) {
        let texts = lines::numbered(&text).map(|(number, line)| {
            let text = lines::object(line).and_then(|map| match map.get("text") {
                Some(Value::String(text)) => Ok(text.clone()),
                _ => Err("has no string under text".into()),
            });
            text.map_err(|why| Error::file(path, format!("line {number}: {why}")))
        });
        texts.collect::<Result<_>>()?
    } else {
        text.split(lines::END_OF_TEXT).map(|t| t.trim().to_string()).filter(|t| !t.is_empty()).collect()
    };
    let mut windows = Vec::new();
    for text in texts {
        for piece in tokenizer.encode_plain(&text)?.chunks(room) {
            let ids = [&prefix[..], piece].concat();
            windows.push(Document::supervised_from(ids, 1));
        }
    }
    windows.retain(|w| w.targets() > 0);
    if windows.is_empty() {
        return Err(Error::file(path, "has no token to predict"));
    }
    Ok(windows)
}

/// Windows in their order, as many together as stay within [`tokens_of_each`] for `copies` columns, at least one.
pub fn batches(windows: &[Document], copies: usize, batch_tokens: usize) -> Vec<Batch> {
    let most = tokens_of_each(batch_tokens, copies);
    let (mut start, mut filled) = (0, 0);
    let mut batches: Vec<Batch> = Vec::new();
    for (i, window) in windows.iter().enumerate() {
        if i > start && filled + window.ids.len() > most {
            batches.push(Batch::of(&windows[start..i]));
            (start, filled) = (i, 0);
        }
        filled += window.ids.len();
    }
    batches.push(Batch::of(&windows[start..]));
    batches
}

/// What the largest of `batches` needs for `copies` columns.
pub fn extent(batches: &[Batch], copies: usize) -> Extent {
    let longest = |b: &Batch| b.bounds.windows(2).map(|w| w[1].saturating_sub(w[0]) as usize).max();
    Extent {
        tokens: batches.iter().map(Batch::tokens).max().unwrap_or(0),
        longest: batches.iter().filter_map(longest).max().unwrap_or(0),
        head: Head::Loss(batches.iter().map(|b| b.rows.len()).max().unwrap_or(0) * copies),
    }
}

impl<B: Backend> Columns<'_, B> {
    /// The mean negative log-likelihood of `windows` under each column, sums in f64.
    pub fn text<T: Real>(
        &self,
        windows: &[Document],
        batch_tokens: usize,
        common: &Common,
    ) -> Result<Vec<TextScore>> {
        let copies = self.count();
        let batches = batches(windows, copies, batch_tokens);
        let extent = extent(&batches, copies);
        self.model.config.check_length(extent.longest)?;
        let mut session: Session<B, T> = self.session(extent)?;
        let layouts = self.adapters.layouts();
        let stack = Stack { params: &self.adapters.params, layouts: &layouts };
        let bar = common.progress.bar("evaluate", batches.len() as u64);
        let mut sums = vec![0.0f64; copies];
        for batch in &batches {
            common.check_stop("nothing is kept of an evaluation")?;
            let t = batch.tokens();
            let input = session.documents(self.backend, batch.ids.clone(), &batch.bounds)?;
            session.forward(self.model, self.backend, &input, stack)?;
            let rows: Vec<u32> =
                (0..copies).flat_map(|c| batch.rows.iter().map(move |&r| r + (c * t) as u32)).collect();
            let targets = batch.targets.repeat(copies);
            let mut nll = vec![0.0f32; rows.len()];
            self.model.loss(&mut nll, &mut session.room, self.backend, &rows, &targets, t * copies, None)?;
            for (sum, own) in sums.iter_mut().zip(nll.chunks(batch.rows.len().max(1))) {
                *sum += own.iter().map(|&x| f64::from(x)).sum::<f64>();
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        let predicted: usize = windows.iter().map(Document::targets).sum();
        let score = |sum: f64| {
            let nll = sum / predicted as f64;
            if !nll.is_finite() {
                return Err(Error::Numeric(format!(
                    "the mean negative log-likelihood is {nll}: look for NaN or infinity in the weights"
                )));
            }
            Ok(TextScore { tokens: predicted, windows: windows.len(), nll, perplexity: nll.exp() })
        };
        sums.into_iter().map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixture;

    #[test]
    fn each_window_begins_as_a_text_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.txt");
        std::fs::write(&path, "a b\n\nc d a<|endoftext|>\nb\n").unwrap();
        let ids = |seq| -> Vec<Vec<u32>> {
            let with = fixture::tokenizer(true, &[]);
            windows(&path, &with, seq).unwrap().into_iter().map(|w| w.ids).collect()
        };
        assert_eq!(ids(4), [vec![1, 3, 4, 5], vec![1, 6, 3], vec![1, 4]]);
        assert_eq!(ids(2).len(), 6);
        let without = fixture::tokenizer(false, &[]);
        let bare: Vec<_> = windows(&path, &without, 3).unwrap().into_iter().map(|w| w.ids).collect();
        assert_eq!(bare, [[3, 4, 5].to_vec(), vec![6, 3]]);
        assert!(windows(&path, &without, 1).is_err());
        std::fs::write(&path, " \n").unwrap();
        assert!(windows(&path, &without, 3).unwrap_err().to_string().contains("no token"));
        let json = dir.path().join("t.jsonl");
        std::fs::write(&json, "{\"text\": \"a b\"}\n{\"prompt\": 1}").unwrap();
        assert!(
            windows(&json, &without, 3).unwrap_err().to_string().contains("line 2: has no string under text")
        );
    }
}
