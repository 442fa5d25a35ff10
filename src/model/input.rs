//! What a forward pass reads: tokens, their places, and who sees whom.

use std::ops::Range;

use crate::ops::attention::Segment;

/// One batch of tokens.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// `[T]`.
    pub ids: Vec<u32>,
    /// `[T]`: each token's row of the rope tables.
    pub table_rows: Vec<u32>,
    /// Who sees whom among the T tokens (and, through `past`, among the rows of the cache).
    pub segments: Vec<Segment>,
    /// The cache row at which this call's keys and values are written.
    pub offset: usize,
    /// Tokens, ascending, whose last hidden states are all that is wanted; none for every token's. In the last layer
    /// the others have keys and values only. Not for training.
    pub asked: Option<Vec<u32>>,
}

impl Input {
    /// Documents that do not see each other, from their bounds (ascending, from 0 to T) and rope rows.
    pub fn packed(ids: Vec<u32>, table_rows: Vec<u32>, bounds: &[u32]) -> Input {
        let segments = bounds
            .windows(2)
            .map(|w| (w[0] as usize, w[1] as usize))
            .filter(|(a, b)| a < b)
            .map(|(a, b)| Segment { q: a..b, own: a, past: Vec::new() })
            .collect();
        Input { ids, table_rows, segments, offset: 0, asked: None }
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Rows that a forward pass of one copy ends with.
    pub fn rows(&self) -> usize {
        self.asked.as_ref().map_or(self.tokens(), Vec::len)
    }

    /// The batch `copies` times below one another: rope rows and segments.
    pub(crate) fn stacked(&self, copies: usize) -> (Vec<u32>, Vec<Segment>) {
        (self.table_rows.repeat(copies), stack(&self.segments, copies, self.tokens(), self.tokens()))
    }

    /// [`Input::stacked`] where the queries are the tokens `asked` alone, one after the other.
    pub(crate) fn asked_stacked(&self, asked: &[u32], copies: usize) -> (Vec<u32>, Vec<Segment>) {
        let table_rows: Vec<u32> = asked.iter().map(|&r| self.table_rows[r as usize]).collect();
        let mut segments = Vec::new();
        for s in &self.segments {
            let begin = asked.partition_point(|&r| (r as usize) < s.q.start);
            let end = asked.partition_point(|&r| (r as usize) < s.q.end);
            let mut q = begin..begin;
            while q.end < end {
                let first = asked[q.start] as usize;
                q.end +=
                    asked[q.start..end].iter().zip(first..).take_while(|(r, n)| **r as usize == *n).count();
                let before = s.own..s.own + first - s.q.start;
                let own = before.end;
                let past = s.past.iter().cloned().chain([before]).filter(|r| !r.is_empty()).collect();
                segments.push(Segment { q: q.clone(), own, past });
                q.start = q.end;
            }
        }
        (table_rows.repeat(copies), stack(&segments, copies, asked.len(), self.tokens()))
    }
}

/// `segments` for each of `copies` that lie below one another, of `queries` and `keys` rows each.
fn stack(segments: &[Segment], copies: usize, queries: usize, keys: usize) -> Vec<Segment> {
    let copy = |c: usize| {
        let below = move |r: &Range<usize>, rows: usize| r.start + c * rows..r.end + c * rows;
        segments.iter().map(move |s| Segment {
            q: below(&s.q, queries),
            own: s.own + c * keys,
            past: s.past.iter().map(|p| below(p, keys)).collect(),
        })
    };
    (0..copies).flat_map(copy).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_of_each_segment() {
        let input = Input {
            ids: vec![0; 9],
            table_rows: (10..19).collect(),
            segments: vec![
                Segment { q: 0..4, own: 0, past: vec![] },
                Segment { q: 4..6, own: 4, past: vec![0..2] },
                Segment { q: 6..9, own: 6, past: vec![0..2, 5..6] },
            ],
            ..Input::default()
        };
        let (table_rows, segments) = input.asked_stacked(&[0, 2, 3, 6, 8], 2);
        assert_eq!(table_rows, [10, 12, 13, 16, 18, 10, 12, 13, 16, 18]);
        let one = [
            Segment { q: 0..1, own: 0, past: vec![] },
            Segment { q: 1..3, own: 2, past: vec![0..2] },
            Segment { q: 3..4, own: 6, past: vec![0..2, 5..6] },
            Segment { q: 4..5, own: 8, past: vec![0..2, 5..6, 6..8] },
        ];
        assert_eq!(segments[..4], one);
        assert_eq!(segments[7], Segment { q: 9..10, own: 17, past: vec![9..11, 14..15, 15..17] });
    }
}
