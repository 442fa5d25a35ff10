//! Which documents each optimizer step sees: shuffling, packing into rows, micro-batches.
//!
//! The schedule is a function of the lengths, the options and the seed, and any step can be asked for without the
//! steps before it, so a resumed run goes on exactly where it was.

use super::batch::Batch;
use super::documents::Document;
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// Epochs are counted before the run, each in a new order: more of them than this, or more documents in all of them
/// together, would take longer than a user waits.
const MOST_EPOCHS: f64 = 1e6;
const MOST_LOOKED_AT: f64 = 2e9;

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    /// This many optimizer steps.
    Steps(u64),
    /// This many times through the data; a fraction takes that part of the last epoch's rows, rounded up.
    Epochs(f64),
}

/// How documents become steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packing {
    /// Rows of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub grad_accum: usize,
    /// The most tokens of a row.
    pub seq: usize,
    /// Several documents in one row.
    pub pack: bool,
    /// A new order in each epoch, else the files' order.
    pub shuffle: bool,
    /// Of the order.
    pub seed: u64,
}

/// Rows of one epoch: document numbers in the epoch's order, and where each row starts among them.
struct Epoch {
    number: u64,
    order: Vec<u32>,
    rows: Vec<usize>,
}

/// The steps of a training run over `documents`.
///
/// An epoch takes each document once. Its rows are filled in order, a row closed when the next document does not fit;
/// epochs follow each other without a gap, so only the very last step may have fewer rows than the others.
pub struct Schedule<'a> {
    documents: &'a [Document],
    packing: Packing,
    steps: u64,
    /// All rows of the run.
    total_rows: u64,
    /// Rows of the epochs before each epoch that was looked at so far, and of all of them.
    rows_before: Vec<u64>,
    current: Epoch,
}

impl<'a> Schedule<'a> {
    /// Plans the whole run. An error for options that make no step, and for a document longer than a row.
    pub fn new(documents: &'a [Document], packing: Packing, extent: Extent) -> Result<Schedule<'a>> {
        let Packing { batch, grad_accum, seq, .. } = packing;
        if batch == 0 || grad_accum == 0 || seq == 0 {
            let why = "--batch, --grad-accum and --seq must be at least 1";
            return Err(Error::Usage(format!("{why}, found {batch}, {grad_accum} and {seq}")));
        }
        let tokens = batch.checked_mul(grad_accum).and_then(|rows| rows.checked_mul(seq));
        if tokens.is_none_or(|tokens| tokens > u32::MAX as usize / 2) {
            return Err(Error::Usage(format!(
                "--batch {batch} × --grad-accum {grad_accum} × --seq {seq} is too many tokens for one step"
            )));
        }
        if documents.is_empty() || documents.len() > u32::MAX as usize {
            return Err(Error::Usage(format!("{} documents cannot be scheduled", documents.len())));
        }
        if let Some(long) = documents.iter().find(|d| d.ids.len() > seq) {
            let why = format!("a document has {} tokens, expected at most --seq {seq}", long.ids.len());
            return Err(Error::Usage(why));
        }
        let per_step = batch as u64 * grad_accum as u64;
        let mut schedule = Schedule {
            documents,
            packing,
            steps: 0,
            total_rows: 0,
            rows_before: vec![0],
            current: Epoch::none(),
        };
        schedule.total_rows = match extent {
            Extent::Steps(steps) => {
                if steps == 0 {
                    return Err(Error::Usage("--steps is 0, expected at least 1".into()));
                }
                steps.checked_mul(per_step).ok_or_else(|| {
                    Error::Usage(format!("--steps {steps} × {per_step} rows is more than can be counted"))
                })?
            }
            Extent::Epochs(epochs) => {
                if !(epochs > 0.0 && epochs <= MOST_EPOCHS) {
                    return Err(Error::Usage(format!(
                        "--epochs is {epochs}, expected more than 0, at most {MOST_EPOCHS}"
                    )));
                }
                if epochs * documents.len() as f64 > MOST_LOOKED_AT {
                    return Err(Error::Usage(format!(
                        "--epochs {epochs} of {} documents is more than can be planned: give --steps",
                        documents.len()
                    )));
                }
                let mut total = 0;
                for number in 0..epochs.ceil() as u64 {
                    let own = schedule.look_at_next();
                    let part = (epochs - number as f64).min(1.0);
                    total += ((part * own as f64).ceil() as u64).min(own);
                }
                total
            }
        };
        schedule.steps = schedule.total_rows.div_ceil(per_step);
        Ok(schedule)
    }

    /// Rows of the run.
    pub fn rows(&self) -> u64 {
        self.total_rows
    }

    /// Optimizer steps of the run.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The micro-batches of step `step`, which counts from 0. An error if none of their tokens is supervised.
    pub fn step(&mut self, step: u64) -> Result<Vec<Batch>> {
        let Packing { batch, grad_accum, .. } = self.packing;
        let per_step = batch as u64 * grad_accum as u64;
        let first = step.saturating_mul(per_step);
        if first >= self.total_rows {
            return Err(Error::Usage(format!("step {step} is asked for, the run has {}", self.steps)));
        }
        let last = (first + per_step).min(self.total_rows);
        let mut rows: Vec<Vec<u32>> = Vec::new();
        for row in first..last {
            rows.push(self.row(row));
        }
        let batches: Vec<Batch> = rows
            .chunks(batch)
            .map(|rows| Batch::of(rows.iter().flatten().map(|&d| &self.documents[d as usize])))
            .collect();
        if batches.iter().all(|b| b.targets.is_empty()) {
            return Err(Error::Numeric(format!(
                "step {step} has no supervised token: the loss would be 0 / 0"
            )));
        }
        Ok(batches)
    }

    /// The documents of row `row` of the run.
    fn row(&mut self, row: u64) -> Vec<u32> {
        let (number, at) = self.place(row);
        if self.current.number != number {
            self.current = self.epoch(number);
        }
        let Epoch { order, rows, .. } = &self.current;
        order[rows[at]..rows[at + 1]].to_vec()
    }

    /// The epoch of row `row` of the run, and which of the epoch's rows it is.
    fn place(&mut self, row: u64) -> (u64, usize) {
        while self.looked_at() <= row {
            let own = self.look_at_next();
            if self.alike() {
                return (row / own, (row % own) as usize);
            }
        }
        let number = self.rows_before.partition_point(|&before| before <= row) - 1;
        (number as u64, (row - self.rows_before[number]) as usize)
    }

    /// Rows of all epochs that were looked at.
    fn looked_at(&self) -> u64 {
        self.rows_before.last().copied().unwrap_or(0)
    }

    /// Counts the rows of the first epoch that was not looked at yet; each has at least one.
    fn look_at_next(&mut self) -> u64 {
        let own = match self.rows_before.get(1) {
            Some(&first) if self.alike() => first,
            _ => {
                self.current = self.epoch(self.rows_before.len() as u64 - 1);
                self.current.rows.len() as u64 - 1
            }
        };
        self.rows_before.push(self.looked_at() + own);
        own
    }

    /// Whether all epochs have as many rows as the first: without packing or shuffling.
    fn alike(&self) -> bool {
        !self.packing.pack || !self.packing.shuffle
    }

    fn epoch(&self, number: u64) -> Epoch {
        let n = self.documents.len();
        let order: Vec<u32> = match self.packing.shuffle {
            true => Philox::new(self.packing.seed, Purpose::Shuffle.stream(number))
                .permutation(n)
                .into_iter()
                .map(|i| i as u32)
                .collect(),
            false => (0..n as u32).collect(),
        };
        let mut rows = vec![0];
        let mut filled = 0;
        for (i, &d) in order.iter().enumerate() {
            let length = self.documents[d as usize].ids.len();
            if i > 0 && (!self.packing.pack || filled + length > self.packing.seq) {
                rows.push(i);
                filled = 0;
            }
            filled += length;
        }
        rows.push(n);
        Epoch { number, order, rows }
    }
}

impl Epoch {
    fn none() -> Epoch {
        Epoch { number: u64::MAX, order: Vec::new(), rows: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Document i is `lengths[i]` tokens that all say i.
    fn documents(lengths: &[usize]) -> Vec<Document> {
        let of = |(i, &n): (usize, &usize)| Document::supervised_from(vec![i as u32; n], 1);
        lengths.iter().enumerate().map(of).collect()
    }

    const IN_ORDER: Packing =
        Packing { batch: 1, grad_accum: 1, seq: 8, pack: true, shuffle: false, seed: 0 };

    /// The documents' numbers of each micro-batch of each step.
    fn all(schedule: &mut Schedule) -> Vec<Vec<Vec<u32>>> {
        let numbers =
            |b: &Batch| b.bounds[..b.bounds.len() - 1].iter().map(|&at| b.ids[at as usize]).collect();
        (0..schedule.steps()).map(|s| schedule.step(s).unwrap().iter().map(numbers).collect()).collect()
    }

    #[test]
    fn rows_fill_in_order() {
        let docs = documents(&[3, 5, 2, 7, 8, 2, 2]);
        let mut s = Schedule::new(&docs, IN_ORDER, Extent::Epochs(1.0)).unwrap();
        assert_eq!(all(&mut s), [[[0, 1].to_vec()], [vec![2]], [vec![3]], [vec![4]], [vec![5, 6]]]);
        let two = Packing { batch: 2, grad_accum: 2, ..IN_ORDER };
        let mut s = Schedule::new(&docs, two, Extent::Epochs(1.0)).unwrap();
        assert_eq!(all(&mut s), [vec![vec![0, 1, 2], vec![3, 4]], vec![vec![5, 6]]]);
        let mut s = Schedule::new(&docs, Packing { pack: false, ..two }, Extent::Epochs(1.0)).unwrap();
        assert_eq!(all(&mut s), [vec![vec![0, 1], vec![2, 3]], vec![vec![4, 5], vec![6]]]);
    }

    #[test]
    fn steps_and_epochs_are_known_up_front() {
        let docs = documents(&[8; 10]);
        let steps = |packing, extent| Schedule::new(&docs, packing, extent).unwrap().steps();
        let four = Packing { batch: 2, grad_accum: 2, ..IN_ORDER };
        assert_eq!(steps(four, Extent::Epochs(1.0)), 3);
        assert_eq!(steps(four, Extent::Epochs(2.0)), 5);
        assert_eq!(steps(four, Extent::Epochs(0.25)), 1);
        assert_eq!(steps(four, Extent::Epochs(1.31)), 4); // 10 + 4 rows
        assert_eq!(steps(four, Extent::Steps(1000)), 1000);
        for bad in [
            Extent::Epochs(0.0),
            Extent::Epochs(f64::NAN),
            Extent::Epochs(-1.0),
            Extent::Steps(0),
            Extent::Steps(u64::MAX),
        ] {
            assert!(Schedule::new(&docs, four, bad).is_err());
        }
        assert!(Schedule::new(&docs, Packing { seq: 7, ..four }, Extent::Steps(1)).is_err());
        assert!(Schedule::new(&docs, Packing { batch: 0, ..four }, Extent::Steps(1)).is_err());
        assert!(Schedule::new(&docs, Packing { batch: usize::MAX, ..four }, Extent::Steps(1)).is_err());
        assert!(Schedule::new(&[], four, Extent::Steps(1)).is_err());
        let mut s = Schedule::new(&docs, four, Extent::Steps(2)).unwrap();
        assert!(s.step(2).is_err());
    }

    #[test]
    fn absurd_lengths_are_refused_or_cost_nothing() {
        let documents = documents(&[3, 4]);
        let packing = Packing { batch: 2, grad_accum: 1, seq: 8, pack: true, shuffle: true, seed: 0 };
        let new = |packing, extent| Schedule::new(&documents, packing, extent).map(|s| s.steps());
        assert_eq!(new(packing, Extent::Steps(1 << 60)).unwrap(), 1 << 60);
        for shuffle in [false, true] {
            let mut long =
                Schedule::new(&documents, Packing { shuffle, ..packing }, Extent::Steps(1 << 60)).unwrap();
            assert_eq!(long.step(2).unwrap()[0].tokens(), 14);
        }
        for grad_accum in [1 << 40, usize::MAX] {
            let err = new(Packing { grad_accum, ..packing }, Extent::Steps(1)).unwrap_err().to_string();
            assert!(err.contains("--grad-accum") && err.contains("too many tokens"), "{err}");
        }
        assert!(new(packing, Extent::Steps(u64::MAX)).is_err());
        for epochs in [1e9, f64::NAN, f64::INFINITY, -1.0, 0.0] {
            assert!(new(packing, Extent::Epochs(epochs)).unwrap_err().to_string().contains("--epochs"));
        }
    }

    #[test]
    fn a_step_without_a_supervised_token_is_an_error() {
        let docs = [Document { ids: vec![1, 2], supervised: vec![false, false] }];
        let mut s = Schedule::new(&docs, IN_ORDER, Extent::Steps(1)).unwrap();
        assert!(s.step(0).unwrap_err().to_string().contains("no supervised token"));
    }

    #[test]
    fn orders_differ_by_epoch_and_seed() {
        let docs = documents(&[8; 50]);
        let order = |seed| {
            let packing = Packing { shuffle: true, seed, ..IN_ORDER };
            let mut s = Schedule::new(&docs, packing, Extent::Epochs(2.0)).unwrap();
            all(&mut s).concat().concat()
        };
        let a = order(0);
        assert_ne!(a[..50], a[50..]);
        assert_ne!(a, order(1));
        assert_eq!(a, order(0));
    }

    proptest! {
        #[test]
        fn every_epoch_takes_every_document_once_whatever_is_asked_first(
            lengths in proptest::collection::vec(1usize..=16, 1..40),
            batch in 1usize..4, grad_accum in 1usize..3, pack: bool, shuffle: bool, seed: u64, epochs in 1u64..4,
        ) {
            let mut docs = documents(&lengths);
            docs[0] = Document::supervised_from(vec![0; 16], 1);
            let packing = Packing { batch, grad_accum, seq: 16, pack, shuffle, seed };
            let mut s = Schedule::new(&docs, packing, Extent::Epochs(epochs as f64)).unwrap();
            let mut seen = Vec::new();
            let mut each = Vec::new();
            for k in 0..s.steps() {
                // A step of one-token documents alone cannot be learned from.
                let Ok(batches) = s.step(k) else { return Ok(()) };
                prop_assert!(batches.len() <= grad_accum);
                for b in &batches {
                    prop_assert!(b.tokens() <= batch * 16);
                    seen.extend(b.bounds.windows(2).map(|w| b.ids[w[0] as usize] as usize));
                }
                each.push(batches);
            }
            let n = docs.len();
            prop_assert_eq!(seen.len() as u64, n as u64 * epochs);
            for epoch in seen.chunks(n) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                prop_assert!(sorted.into_iter().eq(0..n));
            }
            // Backwards, as after a resume.
            let mut again = Schedule::new(&docs, packing, Extent::Epochs(epochs as f64)).unwrap();
            for (k, batches) in each.iter().enumerate().rev() {
                prop_assert_eq!(&again.step(k as u64).unwrap(), batches);
            }
        }
    }
}
