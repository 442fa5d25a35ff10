//! What a forward pass reads: tokens, their places, and who sees whom.

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
        Input { ids, table_rows, segments, offset: 0 }
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The batch `copies` times below one another: rope rows and segments.
    pub(crate) fn stacked(&self, copies: usize) -> (Vec<u32>, Vec<Segment>) {
        let t = self.tokens();
        let rows = self.table_rows.repeat(copies);
        let segments = (0..copies)
            .flat_map(|c| {
                self.segments.iter().map(move |s| Segment {
                    q: s.q.start + c * t..s.q.end + c * t,
                    own: s.own + c * t,
                    past: s.past.iter().map(|p| p.start + c * t..p.end + c * t).collect(),
                })
            })
            .collect();
        (rows, segments)
    }
}
