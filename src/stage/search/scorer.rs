//! The base, loaded once, and one adapter after another in the same buffers.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::data::grove::Grove;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::model::adapters::Layout;
use crate::model::memory::{Part, Plan};
use crate::model::packing::PackedWeights;
use crate::model::room::RoomSize;
use crate::model::rope::Tables;
use crate::model::session::{self, Adapters, Session};
use crate::model::weights::Model;
use crate::stage::common::{Common, blame};
use crate::stage::evaluate::accuracy::{Accuracy, choose};
use crate::stage::evaluate::items::{Items, Shots};
use crate::stage::evaluate::score::{self, Columns, Extent};
use crate::tensor::{Real, Store};

/// Items and how they go through the model.
#[derive(Debug)]
pub(super) struct Questions {
    /// At least one of them can be scored.
    pub items: Items,
    batches: Vec<Grove>,
}

impl Questions {
    /// Reads and tokenises `files`, for batches of at most `batch_tokens`.
    pub fn load(
        files: &[PathBuf],
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        (shots, shots_from): (usize, Option<&Path>),
        batch_tokens: usize,
    ) -> Result<Questions> {
        let config = checkpoint.config();
        let shots = shots_from.map(|dir| Shots { dir, count: shots });
        let items = Items::load(files, tokenizer, shots, config.longest())?;
        let batches = score::batches(&items.trees, 1, batch_tokens, config);
        Ok(Questions { items, batches })
    }

    /// Items that can be scored.
    pub fn len(&self) -> usize {
        self.items.trees.len()
    }

    fn extent(&self) -> Option<Extent> {
        Extent::of(&self.items.trees, &self.batches, 1)
    }
}

/// What one adapter answered to each item: whether rightly, and whether another option was as likely.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(super) struct Answers(Vec<(bool, bool)>);

impl Answers {
    /// Items.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether each item was answered rightly.
    pub fn right(&self) -> Vec<bool> {
        self.0.iter().map(|(right, _)| *right).collect()
    }

    /// Items that were answered rightly.
    pub fn correct(&self) -> usize {
        self.0.iter().filter(|(right, _)| *right).count()
    }

    /// Of the items of each task.
    pub fn accuracies(&self, items: &Items) -> Vec<Accuracy> {
        let own = |task: usize| self.0.iter().zip(&items.places).filter(move |(_, place)| place.0 == task);
        (0..items.tasks.len()).map(|task| Accuracy::of(own(task).map(|(answer, _)| *answer))).collect()
    }
}

/// A digit an item: 1 for a right answer, and 2 more where another option was as likely.
impl From<Answers> for String {
    fn from(answers: Answers) -> String {
        let digit = |(right, tied): &(bool, bool)| char::from(b'0' + u8::from(*right) + 2 * u8::from(*tied));
        answers.0.iter().map(digit).collect()
    }
}

impl TryFrom<String> for Answers {
    type Error = String;

    fn try_from(text: String) -> Result<Answers, String> {
        let answer = |c: char| match c.to_digit(4) {
            Some(digit) => Ok((digit % 2 == 1, digit >= 2)),
            None => Err(format!("{c:?} is no answer, expected 0 to 3")),
        };
        text.chars().map(answer).collect::<Result<_, _>>().map(Answers)
    }
}

/// What scoring a row came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    /// It answered.
    Answers(Answers),
    /// It is a fusion, and its arithmetic gave nothing that can be used: why.
    Failed(String),
}

impl Outcome {
    /// None of a fusion that failed.
    pub fn answers(&self) -> Option<&Answers> {
        match self {
            Outcome::Answers(answers) => Some(answers),
            Outcome::Failed(_) => None,
        }
    }
}

/// The largest of everything that is scored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    extent: Extent,
    /// The largest rank of each target.
    ranks: [usize; 7],
    /// Numbers of the largest adapter.
    values: usize,
}

impl Needs {
    /// Of `questions`; none where there is none.
    pub fn of<'a>(questions: impl IntoIterator<Item = &'a Questions>) -> Option<Needs> {
        let larger = |a: Extent, b: Extent| Extent {
            tokens: a.tokens.max(b.tokens),
            longest: a.longest.max(b.longest),
            head: a.head.max(b.head),
        };
        let extent = questions.into_iter().filter_map(Questions::extent).reduce(larger)?;
        Some(Needs { extent, ranks: [0; 7], values: 0 })
    }

    /// And of an adapter that lies so.
    pub fn hold(&mut self, layout: &Layout) {
        for (most, rank) in self.ranks.iter_mut().zip(layout.ranks()) {
            *most = rank.max(*most);
        }
        self.values = self.values.max(layout.end());
    }

    fn room(&self, checkpoint: &Checkpoint) -> Result<(Tables, RoomSize)> {
        self.extent.room(checkpoint, 1, self.ranks)
    }

    /// Every buffer of a [`Scorer`], and what is handed to it.
    pub fn plan<B: Backend, T: Real>(&self, backend: &B, checkpoint: &Checkpoint) -> Result<Plan> {
        let (tables, size) = self.room(checkpoint)?;
        let largest = [Some(Layout::starting_at(self.values))];
        let mut plan = session::plan::<B, T>(backend, checkpoint, &largest, &tables, size)?;
        if backend.shares_memory() {
            plan.add(Part::Adapter, "an adapter on its way to the model", 4 * self.values as u64);
        }
        Ok(plan)
    }
}

/// The model with room for one adapter at a time.
pub(super) struct Scorer<'a, B: Backend, T: Real> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    model: Model<B>,
    adapters: Adapters<B>,
    session: Session<B, T>,
}

impl<'a, B: Backend, T: Real> Scorer<'a, B, T> {
    /// Loads the model and makes all buffers.
    pub fn new(
        backend: &'a B,
        checkpoint: &'a Checkpoint,
        needs: &Needs,
        packed: PackedWeights,
        common: &Common,
    ) -> Result<Scorer<'a, B, T>> {
        let model = common.model::<B, T>(backend, checkpoint, packed)?;
        let params = backend.alloc("adapter", needs.values)?;
        let (tables, size) = needs.room(checkpoint)?;
        let session = Session::new(backend, &model, tables, size)?;
        Ok(Scorer { backend, checkpoint, model, adapters: Adapters { params, layouts: vec![None] }, session })
    }

    /// What the adapter with these `values`, or the base, answers.
    pub fn answers(
        &mut self,
        questions: &Questions,
        adapter: Option<(Layout, &[f32])>,
        common: &Common,
    ) -> Result<Answers> {
        let layout = match adapter {
            None => None,
            Some((layout, values)) => {
                let place = B::Store::view_mut(&mut self.adapters.params, 0..values.len());
                self.backend.upload(place, values)?;
                Some(layout)
            }
        };
        self.adapters.layouts = vec![layout];
        let (model, adapters) = (&self.model, &self.adapters);
        let columns = Columns { backend: self.backend, checkpoint: self.checkpoint, model, adapters };
        let scores = columns
            .score_in::<T>(&mut self.session, &questions.items.trees, &questions.batches, common)
            .map_err(blame(self.checkpoint))?;
        let answer = |(n, columns): (usize, &Vec<Vec<f64>>)| {
            let (option, tied) = choose(&columns[0]);
            (option == questions.items.item(n).gold, tied)
        };
        Ok(Answers(scores.iter().enumerate().map(answer).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_a_digit_each() {
        let answers = Answers(vec![(false, false), (true, false), (false, true), (true, true)]);
        let text = serde_json::to_string(&answers).unwrap();
        assert_eq!(text, "\"0123\"");
        assert_eq!(serde_json::from_str::<Answers>(&text).unwrap(), answers);
        assert_eq!(answers.right(), [false, true, false, true]);
        assert!(serde_json::from_str::<Answers>("\"014\"").is_err());
    }
}
