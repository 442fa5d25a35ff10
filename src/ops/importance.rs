//! Taylor importance: gradient × weight, reduced to rows and columns as it is made.

use std::ops::Range;

use super::{ensure, holds};
use crate::error::Result;
use crate::tensor::{Frozen, Real, Store};

/// What is summed over a row or a column. g is the gradient of the mean loss of the whole calibration set, F the mean
/// over samples of the squared gradient of each sample's own mean loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// `|w g|`.
    AbsFirst,
    /// `w g`.
    First,
    /// `w² F`.
    Second,
    /// `|w g − ½ w² F|`.
    AbsMix,
}

impl Score {
    /// Whether F is needed, which costs one product per sample.
    pub fn needs_second(self) -> bool {
        matches!(self, Score::Second | Score::AbsMix)
    }
}

/// One calibration sample: its rows, and how many of its tokens are supervised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Rows of dy and x.
    pub rows: Range<usize>,
    /// nⱼ.
    pub supervised: usize,
}

/// With `accⱼ = dYⱼᵀ Xⱼ` per sample j (dY of the mean loss over all n supervised tokens):
/// `g = Σⱼ accⱼ`, `F = (1/samples) Σⱼ (n/nⱼ)² accⱼ²`; for each score its sums over rows and over columns of W.
///
/// The whole calibration set is one batch; a gradient of the size of W never exists. Products in f32, sums in f64.
pub struct Importance<'a, S: Store, T: Real> {
    /// `[scores, O]`, written.
    pub row_sums: S::ViewMut<'a, f64>,
    /// `[scores, I]`, written.
    pub col_sums: S::ViewMut<'a, f64>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
    /// `[T, O]`.
    pub dy: S::View<'a, T>,
    /// `[T, I]`.
    pub x: S::View<'a, T>,
    /// `W[O, I]`.
    pub w: &'a S::Matrix,
    /// The samples; samples without a supervised token are left out of F.
    pub samples: &'a [Sample],
    /// Which sums.
    pub scores: &'a [Score],
    /// T.
    pub tokens: usize,
}

impl<S: Store, T: Real> Importance<'_, S, T> {
    /// Compares the sizes; returns `(O, I)`.
    pub fn check(&self) -> Result<(usize, usize)> {
        const OP: &str = "importance";
        let (o, i) = self.w.size();
        let s = ("scores", self.scores.len());
        holds(OP, "row_sums", &self.row_sums, &[s, ("O", o)])?;
        holds(OP, "col_sums", &self.col_sums, &[s, ("I", i)])?;
        holds(OP, "dy", &self.dy, &[("T", self.tokens), ("O", o)])?;
        holds(OP, "x", &self.x, &[("T", self.tokens), ("I", i)])?;
        let inside = self.samples.iter().all(|s| s.rows.start <= s.rows.end && s.rows.end <= self.tokens);
        ensure(OP, inside, || format!("a sample lies beyond T = {}", self.tokens))?;
        Ok((o, i))
    }
}
