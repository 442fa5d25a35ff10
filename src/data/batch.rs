//! Several documents as one run of tokens, without padding.

use super::documents::Document;

/// Documents laid end to end. They do not see each other and each is positioned from 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[T]`.
    pub ids: Vec<u32>,
    /// `[N + 1]`: where each document starts, and T.
    pub bounds: Vec<u32>,
    /// Ascending rows whose next token is supervised.
    pub rows: Vec<u32>,
    /// That token, for each of them.
    pub targets: Vec<u32>,
}

impl Batch {
    /// The documents in order. T must be below 2^32, which the sizes of a step's rows are checked for.
    pub fn of<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Batch {
        let mut batch = Batch { bounds: vec![0], ..Batch::default() };
        for document in documents {
            let start = batch.ids.len();
            for (i, (&id, &supervised)) in document.ids.iter().zip(&document.supervised).enumerate() {
                if supervised && i > 0 {
                    batch.rows.push((start + i - 1) as u32);
                    batch.targets.push(id);
                }
                batch.ids.push(id);
            }
            batch.bounds.push(batch.ids.len() as u32);
        }
        batch
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_predicts_the_token_after_it_in_its_own_document() {
        let a = Document { ids: vec![1, 5, 6], supervised: vec![false, false, true] };
        let b = Document { ids: vec![7], supervised: vec![true] };
        let c = Document::supervised_from(vec![1, 8, 9], 1);
        let batch = Batch::of([&a, &b, &c]);
        assert_eq!(batch.ids, [1, 5, 6, 7, 1, 8, 9]);
        assert_eq!(batch.bounds, [0, 3, 4, 7]);
        assert_eq!((batch.rows, batch.targets), (vec![1, 4, 5], vec![6, 8, 9]));
        assert_eq!(Batch::of([]).bounds, [0]);
    }
}
